"""Attention's Triton kernels on a GPU: tiles that kernels/attention_launch.py may ship, the
variants of benchmarks/variants/attention.py, and cuDNN's and torch's kernels, in the same run.

    python benchmarks/gpu_tune_attention.py [--only "forward, 32 x 512" ...] [--seconds 100]

bf16, 768 values a token in heads of 64, 128 or 32, by CUDA graph over rotating inputs. Outputs are
held against fp32's; with dropout against the shipped kernel's, rivals' then not at all: their masks
are others. BEST is what to write into the table, or the variant to move into the kernel. --smoke:
tiny batches on the CPU, with TRITON_INTERPRET=1, without times.
"""

import contextlib
import sys

import gpu_tune
import torch
import torch.nn.functional as F
from bertfast.kernels import attention, attention_backward
from bertfast.kernels.attention_launch import LONG, TILES, Launch, Tile
from gpu_ops import BATCHES, DROPOUT, HIDDEN
from torch.nn.attention import SDPBackend, sdpa_kernel
from variants import attention as variants

TINY = {"128 x 128": [5, 5], "32 x 512": [140, 140], "natural to 512": [3, 2]}
SHIPPED = "shipped"
FORWARD = [
    Tile(64, 64, 4, 2), Tile(64, 64, 4, 3), Tile(64, 128, 4, 2), Tile(128, 64, 8, 2),
    Tile(128, 64, 8, 3), Tile(128, 128, 8, 2), Tile(128, 32, 4, 3),
]  # fmt: skip
CANDIDATES = {
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


class Only(Launch):
    """Starts one of backward's kernels and leaves out the other."""

    def __init__(self, name):
        self.name = name

    def __call__(self, kernel, *arguments):
        if kernel.function.__name__ == self.name:
            super().__call__(kernel, *arguments)


@contextlib.contextmanager
def shipping(kernel, tile, device, dim):
    """The table with `tile` for all lengths."""
    arch = 90 if Launch.arch(torch.device(device)) in (90, 100, 103) else 80
    table = TILES[kernel, arch]
    kept = table[2, dim]
    table[2, dim] = {LONG: tile}
    try:
        yield
    finally:
        table[2, dim] = kept


class Inputs:
    """A batch's, and the calls that take them."""

    def __init__(self, lengths, dim, p, device):
        self.device, self.dim, self.p = device, dim, p
        self.lengths, self.longest = lengths, max(lengths)
        where = "cpu" if device == "meta" else device
        self.starts = torch.tensor([0, *lengths]).cumsum(0).int().to(where)
        self.seed = torch.tensor([7, 9], device=where) if p else None
        self.options = dim**-0.5, p, self.seed, False, *(None,) * 6

    def qkv(self):
        shape = sum(self.lengths), 3, HIDDEN // self.dim, self.dim
        return torch.randn(*shape, device=self.device).bfloat16()

    def forward(self, qkv):
        return attention.forward(qkv, self.starts, self.longest, *self.options)

    def variant(self, options):
        args = self.starts, self.longest, *self.options[:3], options
        return lambda qkv: [variants.run(qkv, *args)[0]]

    def tiled(self, kernel, tile, run):
        def call(*inputs):
            with shipping(kernel, tile, self.device, self.dim):
                return run(*inputs)

        return call

    def padded(self, kernel, p=None):
        """torch's attention of a batch without padding, [batch, heads, tokens, dim]."""
        p = self.p if p is None else p

        def call(qkv):
            q, k, v = qkv.unflatten(0, (len(self.lengths), -1)).permute(2, 0, 3, 1, 4).unbind(0)
            with sdpa_kernel(kernel):
                out = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
            return [out.transpose(1, 2).flatten(0, 1)]

        return call

    def varlen(self, qkv):
        from torch.nn.attention.varlen import varlen_attn

        args = self.starts, self.starts, self.longest, self.longest
        return [varlen_attn(*qkv.unbind(1), *args)]

    def backward(self, launch):
        def call(grad, qkv, out, lse):
            args = grad, qkv, out, lse, self.starts, self.longest, *self.options, False, False
            return [attention_backward.backward(*args, launch=launch)[0]]

        return call


def rate(kernel, lengths):
    flop = WORK[kernel] * 4 * HIDDEN * sum(n * n for n in lengths)
    return lambda seconds: f"{flop / seconds / 1e12:6.1f} TFLOP/s"


def forward_case(lengths, dim, p, device, sets):
    given, full = Inputs(lengths, dim, p, device), min(lengths) == max(lengths)
    ours = lambda qkv: [given.forward(qkv)[0]]
    longest = given.longest if device != "cpu" else 512
    calls = {SHIPPED: ours}
    for tile in ONE_PASS if longest <= 128 else FORWARD:
        calls[str(tuple(tile))] = given.tiled("forward", tile, ours)
    tried = variants.candidates(longest, dim, p)
    for options in tried if device != "cpu" else tried[::5]:
        calls[f"variant {tuple(options)}"] = given.variant(options)
    rivals = {}
    if device != "cpu" and full:
        rivals["cuDNN"] = given.padded(SDPBackend.CUDNN_ATTENTION)
        rivals["torch flash"] = given.padded(SDPBackend.FLASH_ATTENTION)
    if device != "cpu" and not p:
        rivals["torch varlen"] = given.varlen
    inputs = [(given.qkv(),) for _ in range(sets)] if device != "meta" else []
    truth = None
    if not p and full:
        truth = lambda: given.padded(SDPBackend.MATH)(inputs[0][0].float())

    def paste(name):
        if name in rivals:
            return None
        if name == SHIPPED:
            return "the shipped tile"
        limit = longest if longest <= 128 else "LONG"
        if name.startswith("variant"):
            return f"({dim} {limit}) Variant{name.removeprefix('variant ')}"
        return f"TILES['forward', 90][2, {dim}]: {{{limit}: Tile{name}}}"

    loose = tuple(rivals) if p else ()
    return gpu_tune.Case(calls | rivals, inputs, truth, rate("forward", lengths), paste, loose)


def backward_case(kernel, lengths, dim, p, device, sets):
    """One of the kernels is timed, and the results of all are checked."""
    given = Inputs(lengths, dim, p, device)
    tiles = CANDIDATES[kernel] if device != "cpu" else CANDIDATES[kernel][:2]

    def calls(launch):
        run = given.backward(launch)
        return {SHIPPED: run} | {str(tuple(t)): given.tiled(kernel, t, run) for t in tiles}

    inputs = []
    for _ in range(sets if device != "meta" else 0):
        qkv = given.qkv()
        out, lse = given.forward(qkv)
        inputs.append((torch.randn_like(out), qkv, out, lse))

    def paste(name):
        if name == SHIPPED:
            return "the shipped tile"
        return f"TILES[{kernel!r}, 90][2, {dim}]: {{LONG: Tile{name}}}"

    return gpu_tune.Case(
        calls(Only("_queries" if kernel == "queries" else "_keys")),
        *(inputs, None, rate(kernel, lengths), paste),
        checks=calls(Launch()),
    )


def cases(batches):
    """What tells most first."""
    found = {}

    def add(kernel, batch, dim, p):
        def make(device, sets):
            if kernel == "forward":
                return forward_case(batches[batch], dim, p, device, sets)
            return backward_case(kernel, batches[batch], dim, p, device, sets)

        found[f"{kernel}, {batch}, heads of {dim}, p={p}"] = make

    for dim in (64, 128, 32):
        for batch in ("32 x 512", "128 x 128"):
            for p in (0.0, DROPOUT):
                add("forward", batch, dim, p)
        if dim == 64:
            for p in (0.0, DROPOUT):
                add("forward", "natural to 512", dim, p)
    for p in (DROPOUT, 0.0):
        for kernel, batch in (
            ("keys", "32 x 512"),
            ("queries", "32 x 512"),
            ("whole", "128 x 128"),
        ):
            add(kernel, batch, 64, p)
    return found


def main():
    batches = TINY if "--smoke" in sys.argv else BATCHES
    return gpu_tune.main("attention", __doc__, cases(batches))


if __name__ == "__main__":
    sys.exit(main())
