"""csrc/cuda/linear.cu: products of few tokens, whole and odd tiles, with k in one share and several.

Without a GPU it runs on the CPU, in an extension built with BERTFAST_CUDA_HOST.
"""

import pytest
import torch
from helpers import ACTIVATE, DEVICES, check, close_to_truth
from test_linear_act import inputs
from torch.nn import functional as F

from bertfast import ops
from bertfast.ops.extension import C

pytestmark = [
    pytest.mark.usefixtures("guarded"),
    pytest.mark.skipif("cuda" not in DEVICES, reason="the extension has no CUDA kernels"),
]
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def kernel_alone(monkeypatch):
    """torch's product of the same operator would hide a fault."""
    from bertfast.ops.cuda import linear_act

    def product(*_):
        raise AssertionError("torch's product served")

    monkeypatch.setattr(linear_act, "_linear", product)


# m, n, k: the edges of both tiles, rows of odd n, a k that ends inside a stage and inside 16.
SHAPES = [(1, 64, 64), (16, 72, 80), (17, 65, 8), (32, 3, 136), (33, 130, 64), (65, 200, 200)]
SPLIT = [(5, 70, 1000), (40, 64, 2048), (33, 384, 512)]


@pytest.mark.parametrize("shape", SHAPES + SPLIT)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.usefixtures("kernel_alone")
def test_forward_backward(dtype, shape):
    assert (C.cuda_linear_splits(*shape, 1) > 1) == (shape in SPLIT)
    check(
        "cuda",
        dtype,
        lambda x, w, b: ops.linear_act(x, w, b, "gelu"),
        lambda x, w, b: F.gelu(F.linear(x, w, b)),
        inputs(*shape),
    )


@pytest.mark.parametrize("shape", [(20, 40, 72), (20, 40, 1024)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [a for a in ACTIVATE if a != "silu"])
@pytest.mark.usefixtures("kernel_alone")
def test_activations(activation, bias, shape):
    x, w, b = inputs(*shape)
    check(
        "cuda",
        torch.bfloat16,
        lambda x, w, *b: ops.linear_act(x, w, *b, activation=activation),
        lambda x, w, *b: ACTIVATE[activation](F.linear(x, w, *b)),
        [x, w, b] if bias else [x, w],
    )


@pytest.mark.parametrize("n, k", [(64, 64), (40, 72), (33, 64), (16, 1024)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.usefixtures("kernel_alone")
def test_qkv(n, k, bias):
    x = inputs(70, 1, k)[0]
    weights, biases = zip(*(inputs(1, n, k, seed)[1:] for seed in (1, 2, 3)), strict=True)

    def ours(x, *rest):
        b = rest[3:] or (None,) * 3
        return ops.qkv_linear(x, rest[0], b[0], rest[1], b[1], rest[2], b[2])

    def plain(x, *rest):
        b = rest[3:] or (None,) * 3
        return torch.cat([F.linear(x, w, b) for w, b in zip(rest[:3], b, strict=True)], 1)

    tensors = [x, *weights, *(biases if bias else ())]
    check("cuda", torch.float16, ours, plain, tensors)


@pytest.mark.usefixtures("kernel_alone")
def test_fp32_parameters():
    x, w, b = (t.to(DEVICES["cuda"]) for t in inputs(40, 30, 64))
    with ops.backend("cuda"):
        y = ops.linear_act(x.bfloat16(), w, b * 1.001, "relu")
    expected = F.relu(F.linear(x.double(), w.double(), (b * 1.001).double()))
    assert y.dtype == torch.bfloat16
    close_to_truth(y, expected, floor=5e-3)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.usefixtures("kernel_alone")
def test_rows_are_apart(value):
    """A NaN stays in its row, of x or of the weight."""
    x, w, b = (t.to(DEVICES["cuda"]).half() for t in inputs(20, 72, 1024))
    with ops.backend("cuda"):
        good = ops.linear_act(x, w, b)
        x[3, 5], w[70, 9] = value, value
        bad = ops.linear_act(x, w, b)
    touched = bad != good
    assert touched[3].all() and touched[:, 70].all() and touched.sum() == 20 + 72 - 1
