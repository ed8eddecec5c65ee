import pytest
import torch
from helpers import DEVICES, FLOATS, backends, check, keep, refused, run
from torch.nn import functional as F

from bertfast import ops

pytestmark = pytest.mark.usefixtures("guarded")
each_backend = pytest.mark.parametrize("backend", backends("embedding_layer_norm"))


def inputs(tokens, hidden, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (tokens,), generator=g)
    ids[: tokens // 2] = ids[0] if tokens else 0  # one row gathers many gradients
    positions = torch.arange(tokens) % 20
    types = torch.randint(0, 2, (tokens,), generator=g)
    tables = [torch.randn(s, generator=g) for s in ((50, hidden), (20, hidden), (2, hidden))]
    vectors = [torch.randn(hidden, generator=g) for _ in range(2)]
    return [ids, positions, types, *(t.bfloat16().float() for t in tables + vectors)]


def plain(ids, positions, types, word, position, token_type, weight, bias, mask=None):
    s = word[ids] + position[positions]
    s = s if types is None else s + token_type[types]
    y = F.layer_norm(s, s.shape[1:], weight, bias, 1e-5)
    return y if mask is None else y * mask.to(y.dtype)


@pytest.mark.parametrize("shape", [(200, 384), (65, 100), (3, 7), (1, 64)])
@pytest.mark.parametrize("dtype", FLOATS)
@each_backend
def test_forward_backward(backend, dtype, shape):
    check(backend, dtype, lambda *t: ops.embedding_layer_norm(*t, 1e-5), plain, inputs(*shape))


@each_backend
def test_without_types(backend):
    tensors = inputs(30, 40)
    tensors[2] = tensors[5] = None
    check(backend, torch.float32, lambda *t: ops.embedding_layer_norm(*t, 1e-5), plain, tensors)


@pytest.mark.parametrize("mean", [1e4, 1e6])
@each_backend
def test_large_mean(backend, mean):
    """A mean far above the spread costs no digits, forward or backward: its own rounding neither."""
    tensors = inputs(30, 384)
    tensors[3] += mean
    tensors[4].zero_(), tensors[5].zero_()  # their sum isn't rounded
    check(backend, torch.float32, lambda *t: ops.embedding_layer_norm(*t, 1e-5), plain, tensors)


@pytest.mark.parametrize("hidden", [1, 65])
@each_backend
def test_constant_rows(backend, hidden):
    """Without a spread rstd multiplies whatever digits are lost before it by 300."""
    tensors = inputs(30, hidden)
    tensors[3:6] = (torch.full_like(t, 1e4) for t in tensors[3:6])

    def flat(ids, positions, types, word, position, token_type, weight, bias):
        s = word[ids] + position[positions] + token_type[types]
        return (s - s.mean(1, keepdim=True)) * 1e-5**-0.5 * weight + bias

    check(backend, torch.float32, lambda *t: ops.embedding_layer_norm(*t, 1e-5), flat, tensors)


@each_backend
def test_dropout(backend):
    p = 0.4
    mask = torch.stack([keep(77, 2, t, 70, p) for t in range(90)]) / (1 - p)
    seed = torch.tensor([77, 2], device=DEVICES[backend])
    check(
        backend,
        torch.float32,
        lambda *t: ops.embedding_layer_norm(*t, 1e-5, dropout_p=p, seed=seed),
        lambda *t: plain(*t, mask=mask),
        inputs(90, 70),
    )


@each_backend
def test_empty(backend):
    tensors = [t.to(DEVICES[backend]) for t in inputs(0, 16)]
    tensors[3].requires_grad_()
    with ops.backend(backend):
        y = ops.embedding_layer_norm(*tensors, 1e-5)
        y.sum().backward()
    assert y.shape == (0, 16) and (tensors[3].grad == 0).all()


@each_backend
def test_repeats_are_bitwise_equal(backend):
    tensors = [t.to(DEVICES[backend]) for t in inputs(300, 40)]
    grad = torch.randn(300, 40, generator=torch.Generator().manual_seed(1)).to(DEVICES[backend])
    with ops.backend(backend):
        first, *others = (
            run(lambda *t: ops.embedding_layer_norm(*t, 1e-5), tensors, grad)
            for _ in range(250 if DEVICES[backend] == "cuda" else 3)
        )
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("bad", [-1, 50])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_id_out_of_range(backend, bad):
    tensors = inputs(8, 16)
    tensors[0][3] = bad
    with ops.backend(backend):
        refused(
            IndexError, rf"input_ids run .*{bad}.*0 to 49", ops.embedding_layer_norm, *tensors, 1e-5
        )


def test_refusals():
    t = inputs(8, 16)
    refused(
        ValueError, "position_ids has shape", ops.embedding_layer_norm, t[0], t[1][:3], *t[2:], 1e-5
    )
    refused(TypeError, "int32", ops.embedding_layer_norm, t[0].int(), *t[1:], 1e-5)
    refused(ValueError, "both or neither", ops.embedding_layer_norm, *t[:2], None, *t[3:], 1e-5)
    refused(
        ValueError,
        r"weight has shape \[3\]",
        ops.embedding_layer_norm,
        *t[:6],
        t[6][:3],
        t[7],
        1e-5,
    )
