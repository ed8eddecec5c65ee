"""linear_act and qkv_linear: products with bias and activation in the epilogue, and backward.

A product runs in Triton or in cuBLAS, followed there by one activation kernel;
`linear_act_table.choose` decides. Backward is one pass for dz = grad * activation'(z) and the
bias's gradient, then two cuBLAS products. Products of fp32 follow torch's TF32 switch, and split
sums of cuBLAS its allow_*_reduced_precision_reduction, so that their errors are PyTorch's own.
"""

import functools
from contextlib import nullcontext

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from ..ops.linear_act import _DB, _DW, _DX, _WIDE
from . import linear_act_kernels as kernels
from . import linear_act_table as table
from .jit import cdiv
from .spec import Spec

GROUP = 8  # rows of tiles that share their columns' weights in L2
# Steps of `gradient` (rows, columns; 16 bytes of bf16 a thread and row, two rows a thread), of its
# second stage over few rows of fp32, and of `activation`.
STEP, SECOND, BLOCK = (16, 128), (64, 32), 2048
STAGES = {2: 3, 4: 1}  # of `gradient`, by bytes of a value: fp32 would spill
CHUNK = 128  # rows at least whose sums a program adds


def linear_act(x, weight, bias, activation, save):
    return _forward(x, (weight,), (bias,), activation, save)


def qkv_linear(x, wq, bq, wk, bk, wv, bv):
    return _forward(x, (wq, wk, wv), (bq, bk, bv), 0, False)[0]


def linear_act_backward(grad, x, weight, bias, z, activation, need):
    dz = grad
    if activation:
        if z is None:
            z = _forward(x, (weight,), (bias,), 0, False)[0]
        dz, sums = _gradients(grad, z, activation, need & _DB)
    elif need & _DB:
        _, sums = _gradients(grad, None, 0, True)
    like = weight if bias is None else bias
    db = _total(sums, like) if need & _DB else _none(like.dtype, x)
    dx = _matmul(dz, weight, x.dtype) if need & _DX else _none(x.dtype, x)
    dw = _matmul(dz.T, x, _wide(need, weight)) if need & _DW else _none(weight.dtype, x)
    return dx, dw, db


def qkv_linear_backward(grad, x, wq, wk, wv, bq, need):
    like = wq if bq is None else bq
    dx = _none(x.dtype, x)
    if need & _DX:  # one product, so that its three parts add up in fp32
        dx = _matmul(grad, _together((wq, wk, wv), grad.dtype), x.dtype)
    parts = grad.chunk(3, 1)
    # Three products and not one: gradients that autograd keeps must not share memory.
    dtype = _wide(need, wq)
    dw = [_matmul(g.T, x, dtype) if need & _DW else _none(dtype, x) for g in parts]
    if not need & _DB:
        return dx, *dw, *(_none(like.dtype, x) for _ in range(3))
    _, sums = _gradients(grad, None, 0, True)
    return dx, *dw, *(_total(s, like) for s in sums.chunk(3, 1))


def _wide(need, weight):
    return torch.float32 if need & _WIDE else weight.dtype


def _none(dtype, x):
    return torch.empty((0,), dtype=dtype, device=x.device)


def _unsaved(x, save):
    return None if save is None else _none(x.dtype, x)


def _no_autocast(device):
    """Inside an operator dtypes are settled: autocast must not change them again."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _adjacent(parts) -> bool:
    first = parts[0]
    step = first.numel() * first.element_size()
    return all(
        p.is_contiguous()
        and p.data_ptr() == first.data_ptr() + i * step
        and p.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        for i, p in enumerate(parts)
    )


def _together(parts, dtype=None):
    """The parts as one tensor, in their own dtype or another: where they are if they are adjacent,
    else a copy made now, and so never stale."""
    if parts[0] is not None and dtype not in (None, parts[0].dtype):
        parts = _cast(parts, dtype)
    if len(parts) == 1 or parts[0] is None:
        return parts[0]
    if _adjacent(parts):
        shape = (len(parts) * parts[0].shape[0], *parts[0].shape[1:])
        return parts[0].as_strided(shape, parts[0].stride())
    return torch.cat(parts)


def _cast(parts, dtype):
    """The parts in another dtype, next to each other: one product can read them all."""
    n = parts[0].shape[0]
    whole = parts[0].new_empty((len(parts) * n, *parts[0].shape[1:]), dtype=dtype)
    cast = whole.split(n)
    torch._foreach_copy_(cast, parts)
    return cast


def _matmul(a, b, dtype):
    """a @ b in `dtype` by cuBLAS; a's dtype is the arithmetic's, sums are fp32."""
    b = b.to(a.dtype)
    with _no_autocast(a.device):
        if dtype == a.dtype:
            return a @ b
        if a.is_cuda and a.numel():
            return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


@functools.cache
def _arch(device) -> int:
    if device.type != "cuda":
        return 90  # the interpreter, which runs all of it
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _vectors(x, weights) -> bool:
    """Whether all rows are dense and start at multiples of 16 bytes, the output's too."""
    n = weights[0].shape[0] * x.element_size()
    return n % 16 == 0 and all(
        t.stride(1) == 1
        and t.stride(0) >= t.shape[1] > 0
        and (t.data_ptr() | t.stride(0) * t.element_size()) % 16 == 0
        for t in (x, *weights)
    )


def _forward(x, weights, biases, activation, save):
    """y, and z where it is saved, else an empty tensor, or None where `save` is None."""
    if len(weights) == 1 and weights[0].dtype is x.dtype and not (activation or save):
        bias = biases[0]
        if (
            x.dtype is not torch.float32
            and not table.MEASURED
            and (bias is None or bias.dtype is x.dtype)
        ):  # nothing to choose or to copy
            with _no_autocast(x.device):
                y = torch.nn.functional.linear(x, weights[0], bias)
            return y, _unsaved(x, save)
    if len(weights) > 1 and _adjacent(weights):
        weights, biases = (_together(weights),), (_together(biases),)
    x = x if x.stride(1) == 1 else x.contiguous()
    (n, k), parts, m = weights[0].shape, len(weights), x.shape[0]
    if weights[0].dtype != x.dtype:
        weights = _cast(weights, x.dtype)
    name = table.CUBLAS
    if activation or parts > 1 or table.MEASURED or x.dtype == torch.float32:
        name = table.choose(
            *(_arch(x.device), x.dtype, m, parts * n, k, activation, save),
            *(_vectors(x, weights), parts),
        )
    if m * n and name != table.CUBLAS:
        return _fused(x, weights, biases, activation, save, table.TILES[name])
    weight, bias = _together(weights, x.dtype), _together(biases, x.dtype)
    with _no_autocast(x.device):
        z = torch.nn.functional.linear(x, weight, bias)
    if not activation:
        return z, z.clone() if save else _unsaved(x, save)
    y = torch.empty(z.shape, dtype=z.dtype, device=z.device) if save else z
    if m * n:
        grid = (cdiv(z.numel(), BLOCK),)
        kernels.activation[grid](z, y, z.numel(), activation, BLOCK)
    return y, z if save else _unsaved(x, save)


def _fused(x, weights, biases, activation, save, tile):
    n, k = weights[0].shape
    parts, m = len(weights), x.shape[0]
    if any(w.stride() != weights[0].stride() for w in weights):
        weights = tuple(w.contiguous() for w in weights)
    biases = tuple(None if b is None else b.contiguous() for b in biases)
    y = torch.empty((m, parts * n), dtype=x.dtype, device=x.device)
    z = torch.empty(y.shape, dtype=x.dtype, device=x.device) if save else _unsaved(x, save)
    strides = (x.stride(0), *weights[0].stride())
    grid = cdiv(m, tile.m) * cdiv(n, tile.n) * parts
    if tile.programs:
        grid = min(grid, tile.programs * _processors(x.device))
    out = y, z if save else None
    if tile.tma:
        x = TensorDescriptor.from_tensor(x, [tile.m, tile.k])
        weights = (TensorDescriptor.from_tensor(weights[0], [tile.n, tile.k]),)
        box = [tile.m, min(tile.n, kernels.PIECE.value)]
        out = [None if t is None else TensorDescriptor.from_tensor(t, box) for t in out]
    kernels.product[(grid,)](
        *(x, *weights, *(None,) * (3 - parts), *biases, *(None,) * (3 - parts)),
        *(*out, m, n, k, *strides, parts, activation, _precision(y.dtype)),
        *(tile.m, tile.n, tile.k, GROUP, tile.tma, tile.programs > 0, y.dtype == torch.float32),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return y, z


@functools.cache
def _processors(device) -> int:
    if device.type != "cuda":
        return 2  # the interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count


def _precision(dtype) -> str:
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def _gradients(grad, z, activation, sums):
    """(dz, or grad itself without an activation, sums [chunks, N] fp32 or None)."""
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    (m, n), device = grad.shape, grad.device
    rows, columns = STEP
    # At most 256 chunks, so that the second stage stays short.
    chunk = max(CHUNK, cdiv(cdiv(m, 256), rows) * rows)
    chunks = max(1, cdiv(m, chunk))
    dz = grad
    if z is not None:
        z, dz = z.contiguous(), torch.empty(grad.shape, dtype=grad.dtype, device=device)
    sums = torch.empty((chunks, n), dtype=torch.float32, device=device) if sums else None
    if n:
        kernels.gradient[(cdiv(n, columns), chunks)](
            *(grad, z, None if z is None else dz, sums, m, chunk, n),
            *(grad.stride(0), activation, rows, columns, STAGES[grad.element_size()]),
        )
    return dz, sums


def _total(sums, like):
    """The second stage: [chunks, N], rows any stride apart -> [N] in like's dtype."""
    (chunks, n), device = sums.shape, sums.device
    out = torch.empty((n,), dtype=like.dtype, device=device)
    if n:
        kernels.gradient[(cdiv(n, SECOND[1]), 1)](
            *(sums, None, None, out, chunks, chunks, n, sums.stride(0), 0, *SECOND, 1),
        )
    return out


# --- ahead-of-time compilation ---


def shipped():
    """BERT-base's shapes, and one that no tile divides."""
    feed_forward = (3072, 768)
    for name, tile in table.TILES.items():
        if name == "narrow":
            for precision in ("ieee", "tf32"):
                yield _product_spec("fp32", tile, *feed_forward, 1, 1, True, precision)
            for dtype in ("fp32", "bf16"):
                yield _product_spec(dtype, tile, 1001, 101, 1, 1, True)
            yield _product_spec("bf16", tile, 1001, 101, 3, 0, False)
            continue
        saved = [(activation, True) for activation in (1, 2, 3, 4)]
        for activation, save in ((0, False), (1, False), *saved):
            yield _product_spec("bf16", tile, *feed_forward, 1, activation, save)
        yield _product_spec("fp16", tile, *feed_forward, 1, 1, True)
        if not tile.tma:
            yield _product_spec("bf16", tile, 768, 768, 3, 0, False)
            yield _product_spec("bf16", tile, 1000, 104, 1, 1, True)
    for dtype in ("bf16", "fp16", "fp32"):
        p, n = f"*{dtype}", feed_forward[0]
        first, second = (
            {"ROWS": rows, "COLUMNS": columns, "N": n, "STRIDE": n, "STAGES": stages}
            for (rows, columns), stages in (
                (STEP, STAGES[4 if dtype == "fp32" else 2]),
                (SECOND, 1),
            )
        )
        lengths = dict.fromkeys(("M", "chunk"), "i32")
        for activation in (1, 2, 3, 4):
            yield Spec(
                *(kernels.activation, {"z": p, "y": p, "size": "i32"}),
                *({"ACT": activation, "BLOCK": BLOCK}, 4),
            )
            yield Spec(
                *(kernels.gradient, {"grad": p, "z": p, "dz": p, "sums": "*fp32", **lengths}),
                *({"ACT": activation, **first}, 4),
            )
        alone = {"z": None, "dz": None, "ACT": 0}
        yield Spec(kernels.gradient, {"grad": p, "sums": "*fp32", **lengths}, alone | first, 4)
        yield Spec(kernels.gradient, {"grad": "*fp32", "sums": p, **lengths}, alone | second, 4)


def _product_spec(dtype, tile, n, k, parts, activation, save, precision="ieee"):
    p = f"*{dtype}"
    out = ["y", "z"] if save else ["y"]
    if tile.tma:
        boxes = {"x": (tile.m, tile.k), "w0": (tile.n, tile.k)}
        boxes |= dict.fromkeys(out, (tile.m, min(tile.n, kernels.PIECE.value)))
        types = {name: f"tensordesc<{dtype}{list(box)}>" for name, box in boxes.items()}
    else:
        types = dict.fromkeys(["x", *(f"w{i}" for i in range(parts)), *out], p)
    types |= {f"b{i}": p for i in range(parts)} | {"M": "i32"}
    absent = [f"{c}{i}" for c in "wb" for i in range(parts, 3)] + ([] if save else ["z"])
    constants = {**dict.fromkeys(absent), "N": n, "K": k, "X_M": k, "W_N": k, "W_K": 1}
    constants |= {"PARTS": parts, "ACT": activation, "PRECISION": precision, "GROUP": GROUP}
    constants |= {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k}
    constants |= {"TMA": tile.tma, "PERSISTENT": tile.programs > 0, "EXACT": dtype == "fp32"}
    arch = 90 if tile.tma else 80
    return Spec(kernels.product, types, constants, tile.warps, tile.stages, arch)
