import math

import pytest
import torch
from helpers import ACTIVATE, DEVICES, FLOATS, backends, check, close_to_truth, keep, refused

from bertfast import ops

pytestmark = pytest.mark.usefixtures("guarded")
BACKENDS = backends("gated_act")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_activation = pytest.mark.parametrize("activation", ACTIVATE)
CASES = [(b, d) for b in BACKENDS for d in FLOATS] + [("triton", torch.float16)]


def inputs(tokens, inner, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, inner, generator=g).bfloat16().float() for _ in range(2)]


def there(backend, *tensors):
    return [t.to(DEVICES[backend]) for t in tensors]


def plain(activation, mask=None):
    def run(up, gate):
        y = ACTIVATE[activation](up) * gate
        return y if mask is None else y * mask.to(y.dtype)

    return run


def ours(activation, **options):
    return lambda up, gate: ops.gated_act(up, gate, activation, **options)


@pytest.mark.parametrize("shape", [(77, 53), (3, 7), (1, 1152), (130, 65)])
@each_activation
@pytest.mark.parametrize("backend, dtype", CASES)
def test_forward_backward(backend, dtype, activation, shape):
    check(backend, dtype, ours(activation), plain(activation), inputs(*shape))


@pytest.mark.parametrize("shape", [(90, 70), (2, 1030)])
@pytest.mark.parametrize("backend, dtype", CASES)
def test_dropout(backend, dtype, shape):
    p, seed = 0.25, torch.tensor([2**40 + 3, 5], device=DEVICES[backend])
    mask = torch.stack([keep(2**40 + 3, 5, t, shape[1], p) for t in range(shape[0])]) / (1 - p)
    function = ours("gelu", dropout_p=p, seed=seed)
    check(backend, dtype, function, plain("gelu", mask), inputs(*shape))


@pytest.mark.parametrize("p", [0.1, 0.9])
@each_backend
def test_mask_bits(backend, p):
    """Bit for bit, in the result and in both gradients."""
    up, gate = (t.requires_grad_() for t in there(backend, *torch.ones(2, 257, 150)))
    with ops.backend(backend):
        y = ops.gated_act(up, gate, None, dropout_p=p, seed=2**62 + 12345)
        y.sum().backward()
    mask = torch.stack([keep(2**62 + 12345, 0, t, 150, p) for t in range(257)])
    assert all(torch.equal(t.cpu() != 0, mask) for t in (y, up.grad, gate.grad))


@each_backend
def test_halves_of_one_tensor(backend, monkeypatch):
    """They are read where they are, as is a part of a gradient; one row may stand for all."""
    one, grad = torch.cat(inputs(30, 40), 1), inputs(30, 80, 1)[0]

    def halves(gated):
        def run(one):
            return gated(*one.chunk(2, 1))

        return run

    exact = one.double().requires_grad_()
    truth = halves(plain("silu"))(exact)
    truth.backward(grad[:, :40].double())
    one, grad = there(backend, one, grad)
    with ops.backend(backend), monkeypatch.context() as patched:
        if backend != "reference":
            patched.setattr(torch.Tensor, "contiguous", None)
        y = halves(ours("silu"))(one.requires_grad_())
        y.backward(grad[:, :40])
        same = ops.gated_act(one[:1, :40].expand(30, 40), one[:, 40:], "silu")
    close_to_truth(y, truth, floor=1e-5)
    close_to_truth(one.grad, exact.grad, floor=1e-5)
    close_to_truth(same[7], plain("silu")(exact[0, :40], exact[7, 40:]), floor=1e-5)


@each_backend
def test_other_views(backend):
    up, gate = there(backend, *inputs(30, 40))
    misaligned = torch.zeros(30 * 40 + 1, device=up.device)[1:].view(30, 40).copy_(up)
    every_other = torch.stack([up, up], -1).flatten(1)[:, ::2]
    truth = plain("gelu")(up.double(), gate.double()).cpu()
    with ops.backend(backend):
        for view in (misaligned, every_other, up.T.contiguous().T):
            close_to_truth(ops.gated_act(view, gate), truth, floor=1e-5)
            close_to_truth(ops.gated_act(up, gate.T.contiguous().T), truth, floor=1e-5)


@each_activation
@each_backend
def test_extreme_values(backend, activation):
    """The activation's limits, and a NaN that stays where it is."""
    z = [-math.inf, -1e30, -100, -20, 0, 20, 100, 1e30, math.inf, math.nan, 1]
    up, gate = there(backend, torch.tensor([z, z]), torch.full((2, len(z)), 0.5))
    with ops.backend(backend):
        y = ops.gated_act(up.requires_grad_(), gate.requires_grad_(), activation)
        y[:, 1:8].sum().backward()
    y = y[0].cpu()
    z = up[0, 1:8].detach().cpu().double().requires_grad_()
    truth = 0.5 * ACTIVATE[activation](z)
    (dz,) = torch.autograd.grad(truth.sum(), z)
    assert ((y[1:8] - truth).abs() <= 1e-5 * truth.abs() + 2e-7 * z.abs()).all()
    # torch's own derivative of the tanh form is a NaN where a power of z is infinite
    close_to_truth(up.grad[0, 2:7], dz[1:6], floor=1e-5)
    assert y[8] == math.inf and y[9].isnan() and y[10].isfinite()
    assert y[0] == (-math.inf if activation is None else 0)


@pytest.mark.parametrize("shape", [(0, 8), (5, 0)])
@each_backend
def test_empty(backend, shape):
    up, gate = (t.requires_grad_() for t in there(backend, *torch.zeros(2, *shape)))
    with ops.backend(backend):
        y = ops.gated_act(up, gate, dropout_p=0.1, seed=1)
        y.sum().backward()
    assert y.shape == up.grad.shape == gate.grad.shape == shape


@pytest.mark.parametrize("p", [0.0, 0.3])
@each_activation
def test_reference_gradients(activation, p):
    """Of fp64, by differences."""
    leaves = [(t.double() + 0.01).requires_grad_() for t in inputs(5, 6)]
    with ops.backend("reference"):
        assert torch.autograd.gradcheck(ours(activation, dropout_p=p, seed=3), leaves)


def test_refusals():
    up, gate = inputs(4, 6)
    refused(ValueError, "activation is 'swish', expected one of", ops.gated_act, up, gate, "swish")
    refused(ValueError, r"gate has shape \[3, 6\]", ops.gated_act, up, gate[:3])
    refused(TypeError, "gate has dtype torch.bfloat16", ops.gated_act, up, gate.bfloat16())
    refused(ValueError, r"expected \[tokens, inner\]", ops.gated_act, up[0], gate[0])
    refused(ValueError, "dropout_p is 1.0", ops.gated_act, up, gate, dropout_p=1.0)
