import pytest
import torch
from helpers import DEVICES, FLOATS, backends, check, close_to_truth, refused

from bertfast import ops

pytestmark = pytest.mark.usefixtures("guarded")
BACKENDS = backends("rotary")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
CASES = [(b, d) for b in BACKENDS for d in FLOATS] + [("triton", torch.float16)]
turn = torch.ops.bertfast.rotary


def inputs(tokens, heads, dim, base=10000.0):
    g = torch.Generator().manual_seed(dim)
    qkv = torch.randn(tokens, 3, heads, dim, generator=g).bfloat16().float()
    positions = torch.randint(8192, (tokens,), generator=g).double()
    angles = torch.outer(positions, base ** (-torch.arange(0, dim, 2) / dim).double())
    return qkv, torch.stack([angles.cos(), angles.sin()], 1).float()


def there(backend, *tensors):
    return [t.to(DEVICES[backend]) for t in tensors]


def rotate_half(x):
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def plain(angles):
    """As transformers' `apply_rotary_pos_emb` has it."""

    def run(qkv):
        cos, sin = (torch.cat([t, t], -1)[:, None].to(qkv.dtype) for t in angles.unbind(1))
        q, k, v = qkv.unbind(1)
        return torch.stack([q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin, v], 1)

    return run


@pytest.mark.parametrize("shape", [(50, 4, 64), (7, 3, 10), (1, 1, 2), (33, 2, 22), (3, 5, 128)])
@pytest.mark.parametrize("backend, dtype", CASES)
def test_forward_backward(backend, dtype, shape):
    qkv, angles = inputs(*shape)
    (ours,) = there(backend, angles)
    check(backend, dtype, lambda x: ops.rotary(x, ours), plain(angles), [qkv])


@each_backend
def test_inverse(backend):
    """It turns back, and its gradient turns forth."""
    qkv, angles = there(backend, *inputs(20, 3, 14))
    with ops.backend(backend):
        close_to_truth(turn(turn(qkv, angles, False), angles, True), qkv.double(), floor=1e-5)
        x = qkv.clone().requires_grad_()
        turn(x, angles, True).backward(qkv)
        assert torch.equal(x.grad, turn(qkv, angles, False))


@pytest.mark.parametrize("dtype", FLOATS)
@each_backend
def test_values_are_copied(backend, dtype):
    """Bit for bit, whatever they are; what isn't finite stays in its pair."""
    qkv, angles = there(backend, *inputs(9, 2, 10))
    qkv = qkv.to(dtype)
    qkv[3, 2, 1, 4], qkv[3, 2, 1, 5], qkv[5, 0, 1, 2] = float("inf"), float("nan"), float("nan")
    with ops.backend(backend):
        y = ops.rotary(qkv, angles).cpu()
    assert torch.equal(y[:, 2].nan_to_num(7), qkv[:, 2].cpu().nan_to_num(7))
    wrong = (~y[:, :2].isfinite()).nonzero().tolist()
    assert wrong == [[5, 0, 1, 2], [5, 0, 1, 7]]


@each_backend
def test_views(backend):
    qkv, angles = there(backend, *inputs(12, 2, 10))
    misaligned = torch.zeros(qkv.numel() + 1, device=qkv.device)[1:].view(qkv.shape).copy_(qkv)
    turned = angles.transpose(1, 2).contiguous().transpose(1, 2)
    truth = plain(angles.double().cpu())(qkv.double().cpu())
    with ops.backend(backend):
        for x in (misaligned, qkv.transpose(0, 3).contiguous().transpose(0, 3)):
            close_to_truth(ops.rotary(x, turned), truth, floor=1e-5)
        one = ops.rotary(qkv, angles[:1].expand(12, 2, 5))
        close_to_truth(
            one, plain(angles[:1].expand(12, 2, 5).double().cpu())(qkv.double().cpu()), floor=1e-5
        )


@pytest.mark.parametrize("shape", [(0, 2, 8), (5, 0, 8), (5, 2, 0)])
@each_backend
def test_empty(backend, shape):
    qkv, angles = there(backend, *inputs(*shape))
    with ops.backend(backend):
        y = ops.rotary(qkv.requires_grad_(), angles)
        y.sum().backward()
    assert y.shape == qkv.grad.shape == qkv.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reference_in_fp64(dtype):
    """With angles in fp32 too; gradients by differences."""
    qkv, angles = inputs(4, 2, 6)
    qkv, angles = qkv.double().requires_grad_(), angles.to(dtype)
    truth = plain(angles)(qkv)
    y = ops.rotary(qkv, angles)
    assert y.dtype == torch.float64 and torch.allclose(y, truth, rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x: ops.rotary(x, angles), [qkv])


def test_refusals():
    qkv, angles = inputs(4, 2, 6)
    refused(ValueError, "head_dim is 5, expected an even number", ops.rotary, qkv[..., :5], angles)
    refused(
        ValueError, r"angles has shape \[4, 2, 3\].*head_dim is 4", ops.rotary, qkv[..., :4], angles
    )
    refused(ValueError, r"angles has shape \[3, 2, 3\].*tokens is 4", ops.rotary, qkv, angles[:3])
    refused(ValueError, r"expected \[tokens, 3, heads", ops.rotary, qkv[:, :2], angles)
    refused(TypeError, "angles has dtype torch.bfloat16", ops.rotary, qkv, angles.bfloat16())
    refused(TypeError, "angles has dtype torch.float64", ops.rotary, qkv, angles.double())
