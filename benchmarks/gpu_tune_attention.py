"""Times tiles of attention's Triton kernels on a GPU: what kernels/attention_launch.py may ship.

    python benchmarks/gpu_tune_attention.py [--kernels forward queries keys whole] [--batches ...]

bf16, BERT-base's heads, by CUDA graph over rotating inputs. Each tile's results are held against
the shipped one's; dropped values are the same ones. A tile that fails is a line that says so.
--smoke: tiny batches on the CPU, with TRITON_INTERPRET=1, without times.
"""

import argparse
import contextlib
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from bertfast.kernels import attention, attention_backward
from bertfast.kernels.attention_launch import LONG, TILES, Launch, Tile
from gpu_ops import BATCHES, DROPOUT, HEADS, HIDDEN, Graph

from bertfast.bench.measure import median

TINY = {"128 x 128": [5], "natural to 256": [3, 2]}
SETS, ROUNDS = 3, 7
FORWARD = [
    Tile(64, 64, 4, 2), Tile(64, 64, 4, 3), Tile(64, 128, 4, 2), Tile(64, 128, 8, 2),
    Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(128, 64, 4, 3), Tile(128, 128, 8, 2),
    Tile(128, 128, 8, 3), Tile(128, 32, 4, 3),
]  # fmt: skip
CANDIDATES = {
    "forward": FORWARD,
    "queries": [
        Tile(64, 64, 4, 2), Tile(64, 64, 4, 3), Tile(128, 64, 8, 2), Tile(128, 64, 8, 3),
        Tile(128, 32, 4, 2), Tile(128, 128, 8, 2),
    ],
    "keys": [
        Tile(64, 64, 4, 2), Tile(64, 128, 8, 2), Tile(64, 128, 8, 1), Tile(32, 128, 8, 2),
        Tile(32, 128, 4, 2), Tile(32, 64, 4, 2),
    ],
    "whole": [
        Tile(64, 128, 8, 1), Tile(64, 128, 8, 2), Tile(32, 128, 8, 1), Tile(32, 128, 8, 2),
        Tile(32, 128, 4, 1), Tile(128, 128, 8, 1),
    ],
}  # fmt: skip
# One pass at 128 keys.
ONE_PASS = [Tile(64, 128, 4), Tile(64, 128, 8), Tile(128, 128, 8), Tile(128, 128, 4)]
# Products of a kernel in those of forward, as FLOP are counted.
WORK = {"forward": 1, "queries": 1.5, "keys": 2, "whole": 2.5}


def candidates(kernel, longest):
    if kernel == "forward" and longest <= 128:
        return ONE_PASS + FORWARD[:4]
    return CANDIDATES[kernel]


class Only(Launch):
    """Starts one of backward's kernels and leaves out the other."""

    def __init__(self, name):
        self.name = name

    def __call__(self, kernel, *arguments):
        if kernel.function.__name__ == self.name:
            super().__call__(kernel, *arguments)


@contextlib.contextmanager
def shipping(kernel, tile, device):
    """The table with `tile` for all lengths; None leaves it."""
    arch = 90 if Launch.arch(device) in (90, 100, 103) else 80
    table = TILES[kernel, arch]
    kept = table[2, HIDDEN // HEADS]
    if tile is not None:
        table[2, HIDDEN // HEADS] = {LONG: tile}
    try:
        yield
    finally:
        table[2, HIDDEN // HEADS] = kept


class Case:
    """A batch's inputs, and the shipped kernels' results of the first of them."""

    def __init__(self, lengths, p, device, sets=SETS):
        torch.manual_seed(0)
        self.device, self.p, self.longest = torch.device(device), p, max(lengths)
        self.starts = torch.tensor([0, *lengths], device=device).cumsum(0).int()
        self.seed = torch.tensor([7, 9], device=device) if p else None
        self.flop = 4 * HIDDEN * sum(n * n for n in lengths)
        self.sets = []
        for _ in range(sets):
            dim = HIDDEN // HEADS
            qkv = torch.randn(sum(lengths), 3, HEADS, dim, device=device).bfloat16()
            out, lse = self.forward(qkv)
            self.sets.append((torch.randn_like(out), qkv, out, lse))

    def options(self):
        return (HIDDEN // HEADS) ** -0.5, self.p, self.seed, False, None

    def forward(self, qkv):
        return attention.forward(qkv, self.starts, self.longest, *self.options())

    def backward(self, grad, qkv, out, lse, launch):
        args = grad, qkv, out, lse, self.starts, self.longest, *self.options(), False
        return attention_backward.backward(*args, launch=launch)[0]

    def calls(self, kernel):
        """What is timed, and what is checked, of a set of inputs."""
        if kernel == "forward":
            return (lambda *s: self.forward(s[1])), (lambda *s: self.forward(s[1])[0])
        only = Only("_queries" if kernel == "queries" else "_keys")
        whole = Launch()
        return (lambda *s: self.backward(*s, only)), (lambda *s: self.backward(*s, whole))


def warm(job):
    """Compiles, into Triton's cache on disk, in a process of its own."""
    kernel, tile, lengths, p = job
    case = Case(lengths, p, "cuda", 1)
    with contextlib.suppress(Exception), shipping(kernel, tile, case.device):
        case.calls(kernel)[1](*case.sets[0])
        torch.cuda.synchronize()


def measure(case, kernel, tile, smoke):
    """seconds, or why there are none"""
    run, check = case.calls(kernel)
    truth = check(*case.sets[0]).float()
    try:
        with shipping(kernel, tile, case.device):
            error = ((check(*case.sets[0]).float() - truth).norm() / truth.norm()).item()
            if not error < 1e-2:
                return f"wrong: relative error {error:.1e}"
            if smoke:
                return "agrees"
            graph = Graph(run, case.sets)
            return median([graph.seconds() for _ in range(ROUNDS)])
    except Exception as e:
        return f"{type(e).__name__}: {' '.join(str(e).split())[:120]}"


def groups(args):
    """(batch, lengths, dropout, kernel, its tiles)"""
    for batch, lengths in (TINY if args.smoke else BATCHES).items():
        if args.batches and batch not in args.batches:
            continue
        for p in (0.0, DROPOUT):
            for kernel in args.kernels:
                if kernel == "forward" or (kernel == "whole") == (batch == "128 x 128"):
                    longest = 128 if batch == "128 x 128" else 512
                    tiles = candidates(kernel, longest)
                    yield batch, lengths, p, kernel, tiles[:2] if args.smoke else tiles


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", nargs="+", choices=WORK, default=list(WORK))
    parser.add_argument("--batches", nargs="+", choices=BATCHES)
    parser.add_argument("--workers", type=int, default=14, help="processes that compile")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    device = "cpu" if args.smoke else "cuda"
    if not args.smoke and not torch.cuda.is_available():
        parser.error("torch sees no GPU here")
    began = time.time()
    if not args.smoke and args.workers:
        jobs = {}  # once for batches that make the same kernel
        for batch, lengths, p, kernel, tiles in groups(args):
            for tile in [None, *tiles]:
                kind = "natural" if tile and "natural" in batch else batch
                jobs.setdefault((kind, p, kernel, tile), (kernel, tile, lengths, p))
        spawn = get_context("spawn")
        with contextlib.suppress(Exception), ProcessPoolExecutor(args.workers, spawn) as pool:
            list(pool.map(warm, jobs.values(), timeout=150))  # what fails here compiles below
        print(f"{len(jobs)} compiled in {time.time() - began:.0f} s", flush=True)
    key, case = None, None
    for batch, lengths, p, kernel, tiles in groups(args):
        if key != (batch, p):
            key, case = (batch, p), Case(lengths, p, device)
        found = [(measure(case, kernel, tile, args.smoke), tile) for tile in [None, *tiles]]
        for seconds, tile in sorted(found, key=lambda f: (isinstance(f[0], str), f[0])):
            name = (
                "shipped" if tile is None else f"{tile.m} x {tile.n} w{tile.warps} s{tile.stages}"
            )
            line = f"{kernel:8} {batch:15} p={p:.1f} {name:16}"
            if isinstance(seconds, str):
                print(line, seconds, flush=True)
                continue
            rate = WORK[kernel] * case.flop / seconds / 1e12
            print(f"{line} {1e6 * seconds:8.1f} us {rate:6.1f} TFLOP/s", flush=True)
    print(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
