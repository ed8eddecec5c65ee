import math

import pytest
import torch
from helpers import ACTIVATE, DEVICES, FLOATS, backends, check, close_to_truth, refused, relative
from torch.nn import functional as F

import bertfast
from bertfast import ops

BACKENDS = backends("linear_act")
CASES = [(b, d) for b in BACKENDS for d in FLOATS]
CASES += [("triton", torch.float16)] if "triton" in BACKENDS else []
pytestmark = pytest.mark.usefixtures("guarded")


def without_silu(backend, activation):
    if (backend, activation) == ("cuda", "silu"):
        pytest.skip("CUDA's kernels have no silu: test_cuda_declines_silu")


def inputs(m, n, k, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, w, b = (
        torch.randn(m, k, generator=g),
        torch.randn(n, k, generator=g),
        torch.randn(n, generator=g),
    )
    return [t.bfloat16().float() for t in (x, w / math.sqrt(max(k, 1)), b)]


def on(backend, *tensors):
    return [t.to(DEVICES[backend]) for t in tensors]


@pytest.mark.parametrize("shape", [(77, 53, 100), (2, 9, 5), (33, 384, 1536), (200, 96, 64)])
@pytest.mark.parametrize("activation", ACTIVATE)
@pytest.mark.parametrize("backend, dtype", CASES)
def test_forward_backward(backend, dtype, activation, shape):
    without_silu(backend, activation)
    check(
        backend,
        dtype,
        lambda x, w, b: ops.linear_act(x, w, b, activation),
        lambda x, w, b: ACTIVATE[activation](F.linear(x, w, b)),
        inputs(*shape),
    )


@pytest.mark.parametrize("m", [13, 14, 15, 448, 449, 700])
@pytest.mark.parametrize("n", [31, 32, 33, 1152])
def test_tile_edges(m, n):
    x, w, b = inputs(m, n, 70)
    expected = F.linear(x.double(), w.double(), b.double())
    with ops.backend("cpu"):
        close_to_truth(ops.linear_act(x, w, b), expected, floor=1e-5)


def test_long_k():
    """Sums over many blocks of k, as a weight's gradient over many tokens needs."""
    x, w, _ = inputs(40, 70, 9001)
    with ops.backend("cpu"):
        y = ops.linear_act(x, w)
    close_to_truth(y, x.double() @ w.double().T, floor=1e-5)


def test_fp32_is_as_exact_as_torch():
    """All 24 bits of the operands count, in whatever way the processor multiplies them."""
    g = torch.Generator().manual_seed(3)
    scales = torch.randn(300, 1, generator=g).mul(3).exp()  # sums of many magnitudes
    x, w = torch.randn(300, 384, generator=g) * scales, torch.randn(96, 384, generator=g)
    exact = x.double() @ w.double().T

    def error(y):
        return ((y.double() - exact) / scales).square().mean().sqrt().item()

    with ops.backend("cpu"):
        # BLAS differ in how they sum; a part of the operands less would be 8 times torch's error.
        assert error(ops.linear_act(x, w)) <= 2 * error(x @ w.T)


def test_rows_do_not_depend_on_the_batch():
    x, w = torch.randn(200, 96), torch.randn(40, 96)
    with ops.backend("cpu"):
        assert torch.equal(ops.linear_act(x, w)[150:155], ops.linear_act(x[150:155], w))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_non_finite_rows_stay_apart(value):
    x, w = torch.randn(100, 64), torch.randn(40, 64)
    x[7, 3] = value
    with ops.backend("cpu"):
        y = ops.linear_act(x, w)
    assert not y[7].isfinite().any()
    assert y[:7].isfinite().all() and y[8:].isfinite().all()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
@pytest.mark.parametrize("backend", backends("linear_act"))
def test_extreme_values(backend, activation):
    """Large, infinite and NaN pre-activations; the negative tail."""
    without_silu(backend, activation)
    z = [-math.inf, -1e30, -1e4, -20, -6, -5.4, -3, -1e-30, 0, 1e-3, 5, 1e4, 1e30, math.inf]
    z = torch.tensor([*z, math.nan])
    with ops.backend(backend):
        y = ops.linear_act(*on(backend, z[:, None], torch.ones(1, 1)), None, activation)
    y = y[:, 0].cpu()
    z = z[1:-2].double()
    expected = ACTIVATE[activation](z)
    # z times a probability, which ends within a few ulp of 0 or 1
    assert ((y[1:-2] - expected).abs() <= 1e-5 * expected.abs() + 2e-7 * z.abs()).all()
    assert y[-1].isnan()
    if backend == "cpu" and bertfast.build_info()["cpu_isa"] == "avx512_amx":
        assert not y[-2].isfinite()  # a float is a sum there, of which infinity has none
    else:
        assert y[0] == 0 and y[-2] == math.inf


@pytest.mark.skipif("cuda" not in BACKENDS, reason="built without CUDA")
def test_cuda_declines_silu():
    x, w, _ = on("cuda", *inputs(4, 3, 5))
    with ops.backend("cuda"):
        refused(RuntimeError, "it has no silu", ops.linear_act, x, w, None, "silu")
        x.requires_grad_()
        grad, z = (torch.ones(4, 3, device=x.device) for _ in range(2))
        backward = torch.ops.bertfast.linear_act_backward
        refused(RuntimeError, "it has no silu", backward, grad, x, w, None, z, 4, 1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("hidden", [50, 64, 384])
@pytest.mark.parametrize("backend, dtype", CASES)
def test_qkv(backend, dtype, hidden, bias):
    x = inputs(90, 1, hidden)[0]
    parts = [inputs(1, hidden, hidden, seed)[1:] for seed in (1, 2, 3)]
    flat = [t for part in parts for t in part] if bias else [p[0] for p in parts]

    def split(rest):
        return list(zip(rest[::2], rest[1::2], strict=True)) if bias else [(w, None) for w in rest]

    check(
        backend,
        dtype,
        lambda x, *rest: ops.qkv_linear(x, *(t for pair in split(rest) for t in pair)),
        lambda x, *rest: torch.cat([F.linear(x, w, b) for w, b in split(rest)], 1),
        [x, *flat],
    )


@pytest.mark.parametrize("backend", backends("linear_act"))
def test_feed_forward(backend):
    x, w1, b1 = inputs(60, 256, 64)
    _, w2, b2 = inputs(1, 64, 256, 1)
    check(
        backend,
        torch.float32,
        lambda *t: ops.feed_forward(*t, "gelu"),
        lambda x, w1, b1, w2, b2: F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2),
        [x, w1, b1, w2, b2],
    )


@pytest.mark.parametrize("backend", backends("linear_act"))
def test_mixed_precision(backend):
    """bf16 activations on fp32 parameters: each gradient in its own dtype."""
    x, w, b = on(backend, *inputs(40, 30, 20))
    x, w, b = x.bfloat16().requires_grad_(), w.requires_grad_(), b.requires_grad_()
    with ops.backend(backend):
        y = ops.linear_act(x, w, b, "gelu")
        y.sum().backward()
    assert (y.dtype, x.grad.dtype, w.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    truth, low = (F.gelu(F.linear(*(v.to(t) for v in (x, w, b)))) for t in (torch.double, x.dtype))
    close_to_truth(y, truth, low, floor=2e-3)


@pytest.mark.parametrize("backend", backends("linear_act"))
def test_views(backend):
    """Transposed and misaligned operands, an input of more dimensions, a frozen weight."""
    x, w, b = on(backend, *inputs(24, 30, 20))
    misaligned = torch.zeros(30 * 20 + 1, device=x.device)[1:].view(30, 20).copy_(w)
    truth = F.linear(x.double(), w.double(), b.double())
    with ops.backend(backend):
        for xv, wv in ((x.T.contiguous().T, w), (x, w.T.contiguous().T), (x, misaligned)):
            close_to_truth(ops.linear_act(xv, wv, b), truth, floor=1e-5)
        folded = ops.linear_act(x.view(2, 3, 4, 20), w, b)
        close_to_truth(folded.view(24, 30), truth, floor=1e-5)
        x.requires_grad_()
        ops.linear_act(x, w, b, "relu").sum().backward()
        assert w.grad is None and x.grad is not None


@pytest.mark.parametrize("backend", backends("linear_act"))
def test_empty(backend):
    with ops.backend(backend):
        x, w, b = on(backend, torch.zeros(0, 8), torch.ones(4, 8), torch.ones(4))
        y = ops.linear_act(x.requires_grad_(), w.requires_grad_(), b.requires_grad_(), "gelu")
        y.sum().backward()
    assert y.shape == (0, 4) and (w.grad == 0).all() and (b.grad == 0).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_threads_do_not_change_bits(dtype):
    x, w, b = (t.to(dtype) for t in inputs(300, 200, 1100))
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in (x, w, b)]
            with ops.backend("cpu"):
                y = ops.linear_act(*leaves, "gelu")
                y.sum().backward()
            results.append([y.detach(), *(t.grad for t in leaves)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_rounds_ties_to_even(backend):
    ones = torch.ones(1, 2, dtype=torch.bfloat16)
    low = torch.arange(-256, 256).repeat(4, 1).T.reshape(-1) * 2.0**-8
    x = torch.stack([torch.tensor([1.0, -1, 2, -2]).repeat(512), low], 1)
    keep = (x.bfloat16() == x).all(1)  # pairs whose sum is exact in fp32 and often a tie in bf16
    x = x[keep]
    with ops.backend(backend):
        y = ops.linear_act(*on(backend, x.bfloat16(), ones))
    assert torch.equal(y.cpu()[:, 0], x.sum(1).bfloat16())
    ties = (x.sum(1).view(torch.int32) & 0xFFFF) == 0x8000
    assert ties.sum() > 100


@pytest.mark.parametrize("other", range(3))
@pytest.mark.parametrize("backend", backends("qkv_linear"))
def test_qkv_weights_of_different_strides(backend, other):
    torch.manual_seed(0)
    x, *w = (torch.randn(n, 16, device=DEVICES[backend]) for n in (5, 16, 16, 16))
    w[other] = w[other].T.contiguous().T
    b = [torch.randn(16, device=x.device) for _ in w]
    with ops.backend(backend):
        y = ops.qkv_linear(x, w[0], b[0], w[1], b[1], w[2], b[2])
    truth = torch.cat(
        [x.double() @ a.double().T + c.double() for a, c in zip(w, b, strict=True)], 1
    )
    assert relative(y, truth.cpu()) < 1e-5


def test_refusals():
    x, w, b = inputs(4, 3, 5)
    refused(ValueError, "activation is 'swish'", ops.linear_act, x, w, b, "swish")
    refused(ValueError, r"\[5, 3\], expected \[out, in\], where in is 5", ops.linear_act, x, w.T, b)
    refused(ValueError, r"bias has shape \[2\]", ops.linear_act, x, w, b[:2])
    refused(TypeError, "int64", ops.linear_act, x.long(), w, b)
    refused(TypeError, "float64", ops.linear_act, x, w.double(), b)
    refused(ValueError, r"wk has shape \[2, 5\]", ops.qkv_linear, x, w, b, w[:2], b[:2], w, b)
