"""linear_act's Triton kernels on a GPU: tiles that kernels/linear_act_table.py may ship, the
variants of benchmarks/variants/linear_act.py, and PyTorch's kernels, in the same run.

    python benchmarks/gpu_tune_linear.py [--only product ...] [--seconds 80]

bf16, 16,384 rows, BERT-base's and BERT-large's first feed-forward product: bare, with GELU, and
with GELU and its argument stored; `gradient` with its second stage; `activation`. By CUDA graph
over inputs that together exceed the L2; results are held against fp32's. "torch bare" is cuBLAS
without an activation, what the products with GELU are to come near. --smoke: tiny sizes on the CPU,
with TRITON_INTERPRET=1, without times.
"""

import sys

import gpu_tune
import torch
import torch.nn.functional as F
from bertfast.kernels import linear_act as kernel
from bertfast.kernels import linear_act_kernels as kernels
from bertfast.kernels.jit import cdiv
from bertfast.kernels.linear_act_table import Tile
from variants import linear_act as variants

PRODUCTS = (
    Tile(128, 128, 64, 4, 3, True, 2),
    Tile(128, 256, 64, 8, 4, True, 1),
    Tile(128, 256, 64, 8, 3, True, 1),
    Tile(128, 256, 64, 8, 3, True),
    Tile(256, 128, 64, 8, 3, True, 1),
    Tile(128, 128, 64, 4, 3, True),
    Tile(128, 128, 64, 8, 3, True, 2),
    Tile(128, 128, 64, 8, 4, True, 1),
    Tile(64, 256, 64, 4, 2, True, 2),
    Tile(128, 256, 64, 8, 3),
    Tile(128, 128, 64, 8, 3),
)
KINDS = {"GELU": (1, False), "GELU, z": (1, True), "bare": (0, False)}
GRADIENTS = (  # rows, columns, warps, stages, chunk
    (16, 128, 4, 3, 128),
    (16, 128, 4, 1, 128),
    (16, 128, 4, 1, 64),
    (16, 128, 4, 1, 256),
    (32, 128, 4, 1, 128),
    (8, 256, 4, 1, 64),
    (16, 256, 8, 1, 128),
    (16, 256, 8, 3, 128),
)
ACTIVATIONS = ((2048, 4), (1024, 4), (2048, 8), (4096, 4), (4096, 8), (8192, 8))  # block, warps
SIZES = {"base": (16384, 3072, 768), "large": (16384, 4096, 1024)}
TINY = {"base": (256, 256, 128)}


def product(tile, kind):
    activation, save = KINDS[kind]

    def run(x, w, b):
        y, z = kernel._fused(x, (w,), (b,), activation, save, tile)
        return [y, z] if save else [y]

    return run


def variant(options, kind):
    save = KINDS[kind][1]
    return lambda x, w, b: [t for t in variants.run(x, w, b, save, options) if t is not None]


def gradient(rows, columns, warps, stages, chunk):
    def run(grad, z):
        (m, n), device = z.shape, z.device
        chunks = cdiv(m, chunk)
        dz, sums = torch.empty_like(z), torch.empty(chunks, n, device=device)
        kernels.gradient[(cdiv(n, columns), chunks)](
            *(grad, z, dz, sums, m, chunk, n, n, 1, rows, columns, stages), num_warps=warps
        )
        return [dz, kernel._total(sums, z)]

    return run


def activation(block, warps):
    def run(z):
        y = torch.empty_like(z)
        kernels.activation[(cdiv(z.numel(), block),)](z, y, z.numel(), 1, block, num_warps=warps)
        return [y]

    return run


def bare(x, w, b):
    return [F.linear(x, w, b)]


def plain(kind):
    def run(x, w, b):
        z = F.linear(x, w, b)
        return [z] if kind == "bare" else [F.gelu(z), z][: 1 + KINDS[kind][1]]

    return run


def plain_gradient(grad, z):
    dz = torch.ops.aten.gelu_backward(grad, z)
    return [dz, dz.sum(0)]


def draw(names, sizes, device):
    m, n, k = sizes
    shapes = {"x": (m, k), "w": (n, k), "b": (n,), "z": (m, n)}
    made = [torch.randn(shapes[name], device=device) for name in names.split()]
    return tuple((t * k**-0.5 if t.shape == (n, k) else t).bfloat16() for t in made)


def case_of(what, sizes, device, sets):
    m, n, k = sizes
    few = slice(None) if device != "cpu" else slice(2)
    if what in KINDS:
        names, exact, theirs = "x w b", plain(what), {"torch bare": bare}
        calls = {f"Tile{tuple(t)}": product(t, what) for t in PRODUCTS[few]}
        if what != "bare":
            theirs["torch"] = plain(what)
            for options in variants.CANDIDATES if device != "cpu" else variants.CANDIDATES[::9]:
                calls[f"Variant{tuple(options)}"] = variant(options, what)
        rate = lambda seconds: f"{2 * m * n * k / seconds / 1e12:6.1f} TFLOP/s"
    else:
        wide = what == "gradient"
        names, settings = ("z z", GRADIENTS) if wide else ("z", ACTIVATIONS)
        exact = plain_gradient if wide else lambda z: [F.gelu(z)]
        theirs, make = {"torch": exact}, gradient if wide else activation
        calls = {str(s): make(*s) for s in settings[few]}
        rate = lambda seconds: f"{(6 if wide else 4) * m * n / seconds / 1e9:6.0f} GB/s"
    inputs = [draw(names, sizes, device) for _ in range(sets if device != "meta" else 0)]
    truth = lambda: exact(*(t.float() for t in inputs[0]))
    paste = lambda name: None if name in theirs else name
    loose = ("torch bare",) if what != "bare" else ()
    return gpu_tune.Case(calls | theirs, inputs, truth, rate, paste, loose)


def cases(table):
    """What tells most first."""
    found = {}
    for size, sizes in table.items():
        for what in (*KINDS, "gradient", "activation"):
            title = f"{what if what not in KINDS else f'product, {what}'}, {size}"
            found[title] = lambda device, sets, what=what, sizes=sizes: case_of(
                what, sizes, device, sets
            )
    return found


def main():
    return gpu_tune.main("linear", __doc__, cases(TINY if "--smoke" in sys.argv else SIZES))


if __name__ == "__main__":
    sys.exit(main())
