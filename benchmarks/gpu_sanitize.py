"""Every Triton kernel at small, odd sizes, for a memory checker to watch.

    compute-sanitizer [--tool racecheck] python benchmarks/gpu_sanitize.py [--seconds 60]

Forward and backward of each operator in bf16, with dropout, over lengths that no tile divides, and
the products with tensor descriptors; held against the reference in fp64. Tensors are allocated one
by one, so that a read past a tensor's end is one past an allocation's.
"""

import argparse
import os
import sys
import time

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # before torch is imported

import torch
from bertfast.kernels import linear_act as kernel
from bertfast.kernels import linear_act_table as table

from bertfast import ops
from bertfast.bench import ops as bench

LENGTHS = ((37, 1, 70, 15), (300, 129))
SIZES = dict(hidden=128, heads=2, inner=384, vocabulary=101)


def errors(found, exact):
    """Of each tensor, relative in its norm."""
    return [((f.double() - e).norm() / e.norm()).item() for f, e in zip(found, exact, strict=True)]


def operator(name, lengths, device):
    shape = bench.Shape(lengths, **SIZES, device=device)
    case = bench.make(name, shape)
    with ops.backend("reference"):
        exact = bench.build(case, shape, "training", torch.float64)()
        plain = errors(bench.build(case, shape, "training", torch.bfloat16)(), exact)
    with ops.backend("triton"):
        found = errors(bench.build(case, shape, "training", torch.bfloat16)(), exact)
        bench.build(case, shape, "training", torch.bfloat16, bench.DROPOUT)()
    return all(e <= 2 * limit + 1e-3 for e, limit in zip(found, plain, strict=True)), max(found)


def product(name, lengths, device):
    m, n, k = sum(lengths), SIZES["inner"], SIZES["hidden"]
    x, w, b = (torch.randn(*s, device=device).bfloat16() for s in ((m, k), (n, k), (n,)))
    y, z = kernel._fused(x, (w,), (b,), 1, True, table.TILES[name])
    exact = torch.nn.functional.linear(x.double(), w.double(), b.double())
    error = max(errors((z, y), (exact, torch.nn.functional.gelu(exact))))
    return error < 5e-3, error  # 2^-9 and some


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=60, help="no kernel begins past these")
    args = parser.parse_args()
    end, good = time.monotonic() + args.seconds, True
    jobs = [(operator, name) for name in bench.OPERATORS]
    jobs += [(product, name) for name, tile in table.TILES.items() if tile.tma]
    for lengths in LENGTHS:
        for run, name in jobs:
            if time.monotonic() > end:
                print(f"{name} {lengths}: left out, no time")
                continue
            fine, error = run(name, lengths, args.device)
            good &= fine
            print(f"{name:22} {lengths!s:20} error {error:.1e}" + " WRONG" * (not fine), flush=True)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
