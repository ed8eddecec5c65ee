import pytest
import torch
from helpers import DEVICES, FLOATS, backends, check, close_to_truth, keep, refused, relative, run
from torch.nn import functional as F

from bertfast import ops

pytestmark = pytest.mark.usefixtures("guarded")
each_backend = pytest.mark.parametrize("backend", backends("add_layer_norm"))


def inputs(tokens, hidden, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(tokens, hidden), (tokens, hidden), (hidden,), (hidden,), (hidden,)]
    return [torch.randn(s, generator=g).bfloat16().float() for s in shapes]


def there(backend, tensors):
    return [t.to(DEVICES[backend]) for t in tensors]


def plain(x, residual, weight, bias, x_bias, mask=None, eps=1e-5, rms=False):
    s = x if x_bias is None else x + x_bias
    s = s if mask is None else s * mask.to(s.dtype)
    s = s if residual is None else s + residual
    if weight is None:
        return s
    if rms:
        y = F.rms_norm(s, s.shape[1:], weight, eps)
        return y if bias is None else y + bias
    return F.layer_norm(s, s.shape[1:], weight, bias, eps)


def ours(eps=1e-5, **options):
    return lambda x, r, w, b, k: ops.add_layer_norm(x, r, w, b, eps, x_bias=k, **options)


@pytest.mark.parametrize("shape", [(200, 384), (65, 100), (3, 7), (1, 1024), (130, 65)])
@pytest.mark.parametrize("dtype", FLOATS)
@each_backend
def test_forward_backward(backend, dtype, shape):
    check(backend, dtype, ours(), plain, inputs(*shape))


@pytest.mark.parametrize("missing", [(1,), (4,), (1, 4)])
@each_backend
def test_optional_inputs(backend, missing):
    tensors = [None if i in missing else t for i, t in enumerate(inputs(70, 40))]
    check(backend, torch.float32, ours(), plain, tensors)


@each_backend
def test_dropout(backend):
    tensors, p = inputs(90, 70), 0.25
    mask = torch.stack([keep(2**40 + 3, 5, t, 70, p) for t in range(90)]) / (1 - p)
    seed = torch.tensor([2**40 + 3, 5], device=DEVICES[backend])
    check(
        backend,
        torch.float32,
        ours(dropout_p=p, seed=seed),
        lambda *t: plain(*t, mask=mask),
        tensors,
    )


# What stands in layer norm's place: its inputs that are missing, and whether it is RMS norm.
KINDS = {"no bias": ((3,), False), "rms": ((3,), True), "rms, bias": ((), True)}
KINDS |= {"no norm": ((2, 3), False)}
each_kind = pytest.mark.parametrize("missing, rms", KINDS.values(), ids=KINDS)
but_cuda = pytest.mark.parametrize(
    "backend", [b for b in backends("add_layer_norm") if b != "cuda"]
)


@pytest.mark.parametrize("more", [(), (1,), (4,), (1, 4)])
@pytest.mark.parametrize(
    "dtype, shape", [*((d, (130, 65)) for d in FLOATS), (torch.float32, (3, 7))]
)
@each_kind
@but_cuda
def test_other_norms(backend, missing, rms, dtype, shape, more):
    tensors = [None if i in missing + more else t for i, t in enumerate(inputs(*shape))]
    check(backend, dtype, ours(rms=rms), lambda *t: plain(*t, rms=rms), tensors)


@pytest.mark.parametrize("more", [(), (1,), (4,), (1, 4)])
@each_kind
@but_cuda
def test_other_norms_dropout(backend, missing, rms, more):
    p, seed = 0.25, torch.tensor([2**40 + 3, 5], device=DEVICES[backend])
    tensors = [None if i in missing + more else t for i, t in enumerate(inputs(90, 70))]
    mask = torch.stack([keep(2**40 + 3, 5, t, 70, p) for t in range(90)]) / (1 - p)
    check(
        backend,
        torch.float32,
        ours(dropout_p=p, seed=seed, rms=rms),
        lambda *t: plain(*t, mask=mask, rms=rms),
        tensors,
    )


@each_kind
@but_cuda
def test_other_norms_edges(backend, missing, rms):
    """No tokens; a NaN stays in its row; a row of zeros is one for RMS norm; tiny rows' eps."""
    x, r, w, b, k = (
        None if i in missing else t for i, t in enumerate(there(backend, inputs(5, 33)))
    )
    with ops.backend(backend):
        empty = x[:0].clone().requires_grad_()
        leaves = [t.requires_grad_() for t in (w, k) if t is not None]
        ops.add_layer_norm(empty, r[:0], w, b, 1e-5, x_bias=k, rms=rms).sum().backward()
        assert all((t.grad == 0).all() for t in leaves)
        bad = x.clone()
        bad[2, 4] = float("nan")
        y = ops.add_layer_norm(bad, r, w, b, 1e-5, rms=rms)
        assert y[2].isnan().all() or (w is None and y[2, 4].isnan())
        assert torch.isfinite(y[[0, 1, 3, 4]]).all()
        if rms:
            zero = ops.add_layer_norm(x * 0, None, w, b, 1e-5, rms=True)
            assert torch.equal(zero, torch.zeros_like(x) if b is None else b.expand_as(x))
    tiny = [None if t is None else t * 1e-3 for t in (x, r)]
    tensors = [None if t is None else t.detach().cpu() for t in (*tiny, w, b, None)]
    floor = ours(1e-3, rms=rms)
    check(backend, torch.float32, floor, lambda *t: plain(*t, eps=1e-3, rms=rms), tensors)


@pytest.mark.skipif("cuda" not in DEVICES, reason="built without CUDA")
@each_kind
def test_cuda_declines_other_norms(missing, rms):
    x, r, w, b, _ = there("cuda", inputs(5, 8))
    w, b = (None if i in missing else t for i, t in ((2, w), (3, b)))
    with ops.backend("cuda"):
        refused(
            RuntimeError,
            "with weight and bias alone",
            ops.add_layer_norm,
            x,
            r,
            w,
            b,
            1e-5,
            rms=rms,
        )


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("missing, rms", [((), False), *KINDS.values()], ids=["layer", *KINDS])
def test_reference_gradients(missing, rms, p):
    """Of fp64, by differences."""
    tensors = [None if i in missing else t.double() for i, t in enumerate(inputs(4, 6))]
    leaves = [None if t is None else t.requires_grad_() for t in tensors]
    with ops.backend("reference"):
        assert torch.autograd.gradcheck(ours(rms=rms, dropout_p=p, seed=3), leaves)


@each_backend
def test_eps_matters(backend):
    """Rows of tiny variance, where eps decides; a constant row gives the bias."""
    x, _r, w, b, _k = inputs(10, 64)
    x = (x * 1e-3).contiguous()
    x[3] = 2.0
    check(backend, torch.float32, ours(1e-3), lambda *t: plain(*t, eps=1e-3), [x, None, w, b, None])
    with ops.backend(backend):
        x, w, b = there(backend, (x, w, b))
        y = ops.add_layer_norm(x, None, w, b, 1e-12)
    close_to_truth(y[3], b, floor=1e-5)


@pytest.mark.parametrize("hidden", [7, 384, 1000])
@pytest.mark.parametrize("mean", [1e3, 1e4, 1e6])
@each_backend
def test_large_mean(backend, mean, hidden):
    """A mean far above the spread costs no digits, forward or backward: its own rounding neither."""
    x, r, w, b, k = inputs(20, hidden)
    tensors = [x + mean, None, w, b, None]
    check(backend, torch.float32, ours(), plain, tensors)
    # Where the sum itself is rounded, no more than torch loses to that.
    grad, tensors = x.flip(0), [x + mean, r, w, b, k]
    truth = run(plain, [t.double() for t in tensors], grad)
    peer = run(plain, tensors, grad)
    with ops.backend(backend):
        got = run(ours(), there(backend, tensors), grad.to(DEVICES[backend]))
    for a, p, t in zip(got, peer, truth, strict=True):
        assert relative(a, t) <= 2 * relative(p, t) + 1e-5


@pytest.mark.parametrize("hidden", [1, 2, 65, 768])
@pytest.mark.parametrize("value", [1.1, 1e4, 1234567.8])
@each_backend
def test_constant_rows(backend, value, hidden):
    """Without a spread rstd is 1e6, and multiplies whatever digits are lost before it."""
    _, _, w, b, _ = inputs(5, hidden)
    x = torch.full((5, hidden), value)

    def flat(x, residual, weight, bias, x_bias):  # torch's own, in fp64 too, is noise here
        return (x - x.mean(1, keepdim=True)) * 1e6 * weight + bias

    check(backend, torch.float32, ours(1e-12), flat, [x, None, w + 0.1, b, None])


@each_backend
def test_views_and_mixed_dtypes(backend):
    x, r, w, b, k = there(backend, inputs(30, 40))
    misaligned = torch.zeros(30 * 40 + 1, device=x.device)[1:].view(30, 40).copy_(x)
    truth = plain(*(t.double() for t in (x, r, w, b, k)))
    with ops.backend(backend):
        for view in (x, misaligned, x.T.contiguous().T):
            y = ops.add_layer_norm(view, r, w, b, 1e-5, x_bias=k)
            close_to_truth(y, truth, floor=1e-5)
        w.requires_grad_()
        low = ops.add_layer_norm(x.bfloat16(), r.bfloat16(), w, b, 1e-5, x_bias=k)
        low.sum().backward()
    assert low.dtype == torch.bfloat16 and w.grad.dtype == torch.float32
    close_to_truth(low, truth, floor=5e-3)


@each_backend
def test_empty_and_nan(backend):
    x, r, w, b, _k = there(backend, inputs(5, 33))
    with ops.backend(backend):
        empty = x[:0].requires_grad_()
        w.requires_grad_()
        ops.add_layer_norm(empty, r[:0], w, b, 1e-5).sum().backward()
        assert (w.grad == 0).all()
        bad = x.clone()
        bad[2, 4] = float("nan")
        y = ops.add_layer_norm(bad, r, w, b, 1e-5)
    assert y[2].isnan().all() and torch.isfinite(y[[0, 1, 3, 4]]).all()


@pytest.mark.seconds("triton")
@pytest.mark.parametrize("hidden", [128, 768, 1000, 2048, 4096])
@each_backend
def test_hidden_sizes(backend, hidden):
    """With dropout and mixed dtypes: bf16 beside fp32 parameters."""
    g = torch.Generator().manual_seed(hidden)
    x, r, w, b, k = inputs(11, hidden)
    grad = torch.randn(11, hidden, generator=g).bfloat16()
    seed = torch.tensor([hidden, 1], device=DEVICES[backend])
    mask = torch.stack([keep(hidden, 1, t, hidden, 0.1) for t in range(11)]) / 0.9
    truth = run(lambda *t: plain(*t, mask=mask), [t.double() for t in (x, r, w, b, k)], grad)
    leaves = there(backend, (x.bfloat16(), r.bfloat16(), w, b, k))
    with ops.backend(backend):
        got = run(ours(dropout_p=0.1, seed=seed), leaves, grad.to(DEVICES[backend]))
    dtypes = [torch.bfloat16] * 3 + [torch.float32] * 3
    for i, (a, t, dtype) in enumerate(zip(got, truth, dtypes, strict=True)):
        assert a.dtype == dtype
        assert relative(a, t) < (1e-5 if i > 3 else 3e-5 if i == 3 else 4e-3), i


@pytest.mark.seconds("triton")
@each_backend
def test_repeats_are_bitwise_equal(backend):
    tensors = there(backend, inputs(300, 96))
    grad = tensors[1].flip(0)
    with ops.backend(backend):
        first, *others = (
            run(ours(dropout_p=0.1, seed=3), tensors, grad)
            for _ in range(250 if DEVICES[backend] == "cuda" else 3)
        )
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("shape", [(40, 64), (3, 7)])
def test_fp16(shape, rms):
    """On a GPU's kernels; PyTorch's own fp16 makes errors of 1e-3."""
    tensors = [t.half() for t in inputs(*shape)]
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).half()
    truth = run(lambda *t: plain(*t, rms=rms), [t.double() for t in tensors], grad)
    with ops.backend("triton"):
        got = run(ours(rms=rms), there("triton", tensors), grad.to(DEVICES["triton"]))
    assert all(
        a.dtype == torch.float16 and relative(a, t) < 2e-3 for a, t in zip(got, truth, strict=True)
    )


def test_longest_row():
    x, w = torch.ones(1, 8193), torch.ones(8193)
    with ops.backend("triton"):
        refused(RuntimeError, "up to 8192, not 8193", ops.add_layer_norm, x, None, w, w, 1e-5)


def test_refusals():
    x, r, w, b, _k = inputs(4, 6)
    refused(ValueError, r"residual has shape \[3, 6\]", ops.add_layer_norm, x, r[:3], w, b, 1e-5)
    refused(ValueError, r"weight has shape \[5\]", ops.add_layer_norm, x, r, w[:5], b, 1e-5)
    refused(TypeError, "bfloat16", ops.add_layer_norm, x, r.bfloat16(), w, b, 1e-5)
    refused(ValueError, r"expected \[tokens, hidden\]", ops.add_layer_norm, x[0], None, w, b, 1e-5)
    refused(
        ValueError, "bias is given, yet weight is None", ops.add_layer_norm, x, r, None, b, 1e-5
    )
    refused(
        *(
            ValueError,
            "rms is True, yet weight is None",
            ops.add_layer_norm,
            x,
            r,
            None,
            None,
            1e-5,
        ),
        rms=True,
    )
    refused(ValueError, "dropout_p is -0.1", ops.add_layer_norm, x, r, w, b, 1e-5, dropout_p=-0.1)
    refused(
        ValueError, "seed is", ops.add_layer_norm, x, r, w, b, 1e-5, dropout_p=0.1,
        seed=torch.zeros(3, dtype=torch.int64),
    )  # fmt: skip
