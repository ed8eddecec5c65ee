"""What tests share: backends, and comparisons with the fp64 truth by bounds that scale."""

import copy
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pybind11
import pytest
import torch
import triton_interpreter  # noqa: F401
from torch.nn import functional as F

from bertfast import ops
from bertfast.ops.extension import C
from bertfast.ops.library import CUDA_DEVICE

torch.set_num_threads(min(2, torch.get_num_threads()))

# Where each backend's tests keep their tensors; Triton's interpreter takes the CPU's.
GPU = "cuda" if torch.cuda.is_available() else "cpu"
DEVICES = {"reference": "cpu", "cpu": "cpu", "triton": GPU}
if hasattr(C, "cuda_gather_rows"):
    DEVICES["cuda"] = CUDA_DEVICE  # the CPU in a build with BERTFAST_CUDA_HOST
INTERPRETED = "triton" if GPU == "cpu" else None  # it takes milliseconds a tile


ROOT = Path(__file__).resolve().parents[1]


def file_of(stem) -> str:
    """tests/<folder>/test_<stem>.py."""
    (found,) = ROOT.glob(f"tests/**/test_{stem}.py")
    return str(found)


def build_extension(folder, *options, source=ROOT) -> Path:
    """The extension of a source tree, built in `folder` with CMake's `options`."""
    configure = ["cmake", "-S", source, "-B", folder, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
    configure += [*options, f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    for command in (configure, ["cmake", "--build", folder]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / "_C.so"


def backends(operator):
    """Those that have the operator, a parameter of its tests."""
    return [name for name in DEVICES if name in ops.registry._table[operator]]


def cases(backends, *axes):
    """(backend, *values), all combinations; for the interpreter every other, as on a chessboard."""
    return [
        (backend, *(value for _, value in case))
        for backend in backends
        for case in itertools.product(*map(enumerate, axes))
        if backend != INTERPRETED or sum(i for i, _ in case) % 2 == 0
    ]


FLOATS = [torch.float32, torch.bfloat16]
ACTIVATE = {  # by plain PyTorch
    None: lambda z: z,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def relative(actual, expected) -> float:
    """||actual - expected|| / ||expected||; inf for a NaN."""
    actual, expected = actual.double().cpu(), expected.double()
    if not torch.isfinite(actual).all():
        return float("inf")
    scale = expected.norm().item() or 1.0
    return (actual - expected).norm().item() / scale


def apart(actual, truth) -> float:
    """The worst row's ||actual - truth|| beside the rows' root mean square norm, so that no token's
    error is lost among many; inf for a NaN. A vector is one row."""
    assert actual.shape == truth.shape, f"{list(actual.shape)}, expected {list(truth.shape)}"
    actual, truth = (t.detach().cpu().double() for t in (actual, truth))
    if not torch.isfinite(actual).all():
        return float("inf")
    if truth.numel() == 0:
        return 0.0
    rows = -1, truth.shape[-1] if truth.dim() else 1
    scale = truth.reshape(rows).norm(dim=1).square().mean().sqrt().item() or 1.0
    return (actual - truth).reshape(rows).norm(dim=1).max().item() / scale


def close_to_truth(actual, truth, like=None, floor=2e-5, what="result"):
    """`actual` is within `floor` of the fp64 `truth`, relative, beyond twice the error of `like`:
    what PyTorch's own kernels make of the same inputs in the same precision.

    Nothing absolute, nothing of ours beside ours: the bound holds on every instruction set, BLAS
    and thread count, for what is ill-conditioned is so for `like`, too.
    """
    error, limit = apart(actual, truth), floor + (0 if like is None else 2 * apart(like, truth))
    assert error <= limit, f"{what}: relative error {error:.2e}, limit {limit:.2e}"


def wide(given):
    """A model's arguments, in fp64 what is floating point."""
    floating = {k: v for k, v in given.items() if torch.is_tensor(v) and v.is_floating_point()}
    return given | {k: v.double() for k, v in floating.items()}


def exact(model, given):
    """What a copy of the model (ours or not) says in fp64."""
    with torch.no_grad(), ops.backend("reference"):
        return copy.deepcopy(model).double()(**wide(given))


def run(function, tensors, grad):
    """function(*tensors) and the gradients of every floating tensor."""
    leaves = [
        t.detach().clone().requires_grad_() if t is not None and t.is_floating_point() else t
        for t in tensors
    ]
    y = function(*leaves)
    y.backward(grad.to(y.dtype))
    return [y.detach()] + [t.grad for t in leaves if t is not None and t.is_floating_point()]


def check(backend, dtype, function, plain, tensors, fp32=1e-5):
    """Forward and backward of `function` against `plain` in fp64.

    fp32 within 1e-5 relative; bf16 and fp16 at most twice the error of `plain` run by PyTorch in
    that precision.
    `tensors` hold values that both dtypes represent.
    """
    tensors = [t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors]
    wide = [t.double() if t is not None and t.is_floating_point() else t for t in tensors]
    shape = plain(*wide).shape
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    truth = run(plain, wide, grad)
    device = DEVICES[backend]
    with ops.backend(backend):
        there = [None if t is None else t.to(device) for t in tensors]
        actual = run(function, there, grad.to(device))
    low = run(plain, tensors, grad) if dtype != torch.float32 else [None] * len(truth)
    for i, (a, t, p) in enumerate(zip(actual, truth, low, strict=True)):
        limit = fp32 if p is None else 2 * relative(p, t) + 2e-3
        assert a.dtype == dtype
        error = relative(a, t)
        what = "output" if i == 0 else f"gradient {i - 1}"
        assert error <= limit, f"{what}: relative error {error:.2e}, limit {limit:.2e}"


def offsets(lengths):
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def philox_numpy(key, counter):
    """Philox4x32-10 on Python integers: key (2), counter (4) -> 4 words. From the paper."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (p1 >> 32) ^ c1 ^ k0,
            p1 & 0xFFFFFFFF,
            (p0 >> 32) ^ c3 ^ k1,
            p0 & 0xFFFFFFFF,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def keep(seed, offset, row, columns, p):
    """The dropout mask of one row, by the numbers: bool [columns]."""
    key = seed & 0xFFFFFFFF, seed >> 32
    words = [
        w
        for block in range((columns + 3) // 4)
        for w in philox_numpy(key, (block, row & 0xFFFFFFFF, row >> 32, offset))
    ]
    return torch.tensor(words[:columns]) >= round(p * 2**32)


def refused(error, match, function, *args, **kwargs):
    with pytest.raises(error, match=match):
        function(*args, **kwargs)
