"""Settings of linear_act's kernels, timed on this GPU in bf16: a line for each, the quickest first.

    python benchmarks/gpu_tune_linear.py [--only product gradient activation]

Products by every tile of PRODUCTS, bare, with GELU, and with GELU and its argument stored;
`gradient` with its second stage; `activation`. Each runs as in gpu_ops.py: in a CUDA graph, over
inputs that together exceed the L2. An output that errs more than 1 % from fp32 is refused; a
setting that can't run prints why. `--smoke` runs everything once at tiny sizes, on the CPU in
Triton's interpreter.
"""

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
import torch.nn.functional as F
import triton
from bertfast.kernels import linear_act as kernel
from bertfast.kernels import linear_act_kernels as kernels
from bertfast.kernels.linear_act_table import Tile
from gpu_ops import BF16, Graph

from bertfast.bench.measure import median

PRODUCTS = (
    Tile(128, 256, 64, 8, 3, True, 1),
    Tile(128, 256, 64, 8, 4, True, 1),
    Tile(128, 256, 64, 8, 3, True),
    Tile(256, 128, 64, 8, 3, True, 1),
    Tile(128, 128, 64, 4, 3, True, 2),
    Tile(128, 128, 64, 4, 3, True),
    Tile(128, 128, 64, 8, 3, True, 2),
    Tile(128, 128, 64, 8, 3, True),
    Tile(128, 128, 64, 8, 4, True, 1),
    Tile(128, 128, 128, 8, 3, True, 1),
    Tile(64, 256, 64, 4, 2, True, 2),
    Tile(128, 256, 64, 8, 3),
    Tile(128, 128, 64, 8, 3),
    Tile(128, 128, 64, 4, 3),
)
KINDS = {"bare": (0, False), "GELU": (1, False), "GELU, z": (1, True)}
GRADIENTS = (  # rows, columns, warps, stages, chunk
    (16, 128, 4, 1, 128),
    (16, 128, 4, 1, 64),
    (16, 128, 4, 1, 256),
    (16, 128, 4, 3, 128),
    (32, 128, 4, 1, 128),
    (8, 128, 4, 1, 64),
    (8, 256, 4, 1, 64),
    (8, 256, 8, 1, 128),
    (16, 256, 8, 1, 128),
    (16, 256, 8, 3, 128),
)
ACTIVATIONS = ((1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 8), (8192, 8))  # block, warps
ROUNDS, SETS, ALLOWED = 7, 4, 1e-2


class Once:
    """Graph's stand-in on a CPU."""

    def __init__(self, run, sets):
        self.call = lambda: run(*sets[0])

    def seconds(self):
        start = time.perf_counter()
        self.call()
        return time.perf_counter() - start


def product(tile, kind):
    activation, save = KINDS[kind]

    def run(x, w, b):
        y, z = kernel._fused(x, (w,), (b,), activation, save, tile)
        return [y, z] if save else [y]

    return run


def gradient(rows, columns, warps, stages, chunk):
    def run(grad, z):
        (m, n), device = z.shape, z.device
        chunks = triton.cdiv(m, chunk)
        dz, sums = torch.empty_like(z), torch.empty(chunks, n, device=device)
        kernels.gradient[(triton.cdiv(n, columns), chunks)](
            *(grad, z, dz, sums, m, chunk, n, n, 1, rows, columns, stages), num_warps=warps
        )
        return [dz, kernel._total(sums, z)]

    return run


def activation(block, warps):
    def run(z):
        y = torch.empty_like(z)
        kernels.activation[(triton.cdiv(z.numel(), block),)](
            z, y, z.numel(), 1, block, num_warps=warps
        )
        return [y]

    return run


def by_torch(kind):
    return lambda x, w, b: [F.linear(x, w, b) if kind == "bare" else F.gelu(F.linear(x, w, b))]


def families(only):
    """(title, {name: run}, inputs, what PyTorch computes) of all that is to be timed."""
    if "product" in only:
        for kind in KINDS:
            runs = {str(tuple(t)): (product, t, kind) for t in PRODUCTS}
            exact = by_torch(kind)
            if kind == "GELU, z":
                exact = lambda x, w, b: [F.gelu(F.linear(x, w, b)), F.linear(x, w, b)]
            else:
                runs["torch"] = (by_torch, kind)
            yield f"product, {kind}", runs, "x w b", exact
    if "gradient" in only:

        def exact(grad, z):
            dz = torch.ops.aten.gelu_backward(grad, z)
            return [dz, dz.sum(0)]

        runs = {str(g): (gradient, *g) for g in GRADIENTS}
        yield "gradient and second stage", runs, "z z", exact
    if "activation" in only:
        runs = {str(a): (activation, *a) for a in ACTIVATIONS}
        yield "activation", runs, "z", lambda z: [F.gelu(z)]


def draw(names, m, n, k, device):
    shapes = {"x": (m, k), "w": (n, k), "b": (n,), "z": (m, n)}
    made = [torch.randn(shapes[name], device=device) for name in names.split()]
    return [(t * k**-0.5 if t.shape == (n, k) else t).to(BF16) for t in made]


def make(run):
    return run[0](*run[1:])


def warm(job):
    """Compiles a setting in this process, into Triton's cache: its constants are the shapes'."""
    run, names, n, k, device = job
    try:
        make(run)(*draw(names, 256, n, k, device))
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as e:  # told where it is timed
        return str(e)


def measure(title, runs, names, exact, sizes, device):
    torch.manual_seed(0)
    rounds = ROUNDS if device == "cuda" else 1
    sets = [draw(names, *sizes, device) for _ in range(SETS)]
    truth = exact(*(t.float() for t in sets[0]))
    found = []
    for name, run in runs.items():
        try:
            call = make(run)
            errors = [
                ((f.float() - t).norm() / t.norm()).item()
                for f, t in zip(call(*sets[0]), truth, strict=True)
            ]
            if not all(e < ALLOWED for e in errors):
                raise ValueError(f"wrong, relative errors {errors}")
            graph = (Graph if device == "cuda" else Once)(call, sets)
            found.append((median([graph.seconds() for _ in range(rounds)]), name, max(errors)))
        except Exception as e:
            text = (str(e).strip() or repr(e)).splitlines()[0][:150]
            print(f"{title:26} {name:42} failed: {type(e).__name__}: {text}", flush=True)
    for seconds, name, error in sorted(found):
        print(f"{title:26} {name:42} {1e6 * seconds:9.1f} us  error {error:.1e}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = ("product", "gradient", "activation")
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--sizes", nargs=3, type=int, default=(16384, 3072, 768), metavar="MNK")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile; 0: none")
    parser.add_argument("--smoke", action="store_true", help="once, tiny, on the CPU")
    args = parser.parse_args()
    if not (args.smoke or torch.cuda.is_available()):
        parser.error("torch sees no GPU here")
    sizes, device = ((256, 256, 128), "cpu") if args.smoke else (args.sizes, "cuda")
    tasks, start = list(families(args.only)), time.perf_counter()
    if args.workers:
        jobs = [
            (r, names, *sizes[1:], device) for _, runs, names, _ in tasks for r in runs.values()
        ]
        workers = min(args.workers, 2) if args.smoke else args.workers
        try:
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                refused = [why for why in pool.map(warm, jobs) if why]
            print(f"{len(jobs) - len(refused)} of {len(jobs)} compiled by {workers} workers")
        except Exception as e:  # then they are compiled one by one
            print(f"workers failed: {e}", flush=True)
    print(f"M, N, K = {sizes}, triton {triton.__version__}, torch {torch.__version__}")
    print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    with torch.no_grad():
        for title, runs, names, exact in tasks:
            measure(title, runs, names, exact, sizes, device)
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    sys.exit(main())
