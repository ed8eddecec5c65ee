import math

import pytest
import torch
from helpers import FLOATS, backends, check, keep, offsets, refused

from bertfast import ops

pytestmark = pytest.mark.usefixtures("guarded")
LENGTHS = [0, 1, 13, 40, 0, 77, 130]


def plain(qkv, lengths, scale=None, causal=False, bias=None, masks=None):
    """Attention by autograd on each sequence; `masks` drop probabilities (already scaled)."""
    out, start = [], 0
    for b, n in enumerate(lengths):
        q, k, v = qkv[start : start + n].transpose(0, 2).unbind(1)  # [heads, n, dim]
        s = q @ k.transpose(1, 2) * (scale or 1 / math.sqrt(qkv.shape[3]))
        if bias is not None:
            s = s + bias[b % bias.shape[0], :, :n, :n]
        if causal:
            s = s.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -math.inf)
        p = s.softmax(-1).nan_to_num(0)  # a row without keys
        if masks is not None:
            p = p * masks[b].to(p.dtype)
        out.append((p @ v).transpose(0, 1))
        start += n
    return torch.cat(out)


def inputs(dim, heads=3, lengths=LENGTHS, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(sum(lengths), 3, heads, dim, generator=g).bfloat16().float()


@pytest.mark.parametrize("dim", [32, 64, 128, 24, 40])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("backend", backends("attention"))
def test_forward_backward(backend, dtype, dim):
    cu = offsets(LENGTHS)
    check(
        backend,
        dtype,
        lambda qkv: ops.attention(qkv, cu, 130),
        lambda qkv: plain(qkv, LENGTHS),
        [inputs(dim)],
    )


@pytest.mark.parametrize("lengths", [[300], [1], [97, 15, 14, 28, 29], [2] * 40])
@pytest.mark.parametrize("backend", backends("attention"))
def test_lengths_and_scale(backend, lengths):
    check(
        backend,
        torch.float32,
        lambda qkv: ops.attention(qkv, offsets(lengths), max(lengths), scale=0.3),
        lambda qkv: plain(qkv, lengths, scale=0.3),
        [inputs(32, 2, lengths)],
    )


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (1, 3), (7, 1)])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("backend", backends("attention"))
def test_causal_and_bias(backend, dtype, shape):
    bias = torch.randn(*shape, 130, 130, generator=torch.Generator().manual_seed(5))
    check(
        backend,
        dtype,
        lambda qkv, b: ops.attention(qkv, offsets(LENGTHS), 130, causal=True, bias=b),
        lambda qkv, b: plain(qkv, LENGTHS, causal=True, bias=b),
        [inputs(32), bias.bfloat16().float()],
        fp32=2e-5,  # a shared bias sums thousands of terms of both signs
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("backend", backends("attention"))
def test_masked_rows_are_zero(backend, dtype):
    """-inf on all of a row's keys gives zeros, forward and backward."""
    lengths = [20, 35]
    bias = torch.zeros(2, 1, 35, 35)
    bias[0, 0, 3] = -math.inf
    bias[1, 0, :, 5:] = -math.inf
    qkv = inputs(32, 3, lengths).to(dtype).requires_grad_()
    with ops.backend(backend):
        out = ops.attention(qkv, offsets(lengths), 35, bias=bias)
        out.float().square().sum().backward()
    assert (out[3] == 0).all() and (qkv.grad[3, 0] == 0).all()
    assert torch.isfinite(out).all() and torch.isfinite(qkv.grad).all()
    assert (qkv.grad[25:55, 1:] == 0).all() and (qkv.grad[20:25, 2] != 0).any()


@pytest.mark.parametrize("backend", backends("attention"))
def test_dropout(backend):
    """The numbers' own mask, in forward and backward; scaled by 1 / (1 - p)."""
    lengths, heads, p = [9, 0, 70], 2, 0.3
    masks, start = [], 0
    for n in lengths:
        rows = [
            [keep(12345678901, 7, (start + q) * heads + h, n, p) for q in range(n)]
            for h in range(heads)
        ]
        mask = [torch.stack(r) if r else torch.zeros(0, 0) for r in rows]
        masks.append(torch.stack(mask) / (1 - p))
        start += n
    seed = torch.tensor([12345678901, 7])
    check(
        backend,
        torch.float32,
        lambda qkv: ops.attention(qkv, offsets(lengths), 70, dropout_p=p, seed=seed),
        lambda qkv: plain(qkv, lengths, masks=masks),
        [inputs(32, heads, lengths)],
    )


@pytest.mark.parametrize("backend", backends("attention"))
def test_large_logits(backend):
    """Scores of +-1e4 and more stay finite and right."""
    qkv = inputs(32) * torch.tensor([100.0, 100.0, 1.0])[:, None, None]
    check(
        backend,
        torch.float32,
        lambda qkv: ops.attention(qkv, offsets(LENGTHS), 130, scale=1.0),
        lambda qkv: plain(qkv, LENGTHS, scale=1.0),
        [qkv],
        fp32=1e-3,  # a score of 1e5 has an ulp of 1e-2
    )


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("backend", backends("attention"))
def test_sequences_are_apart(backend, value):
    """A NaN or inf stays in its sequence, and company doesn't change a sequence by one bit."""
    cu = offsets([30, 50, 21])
    qkv = inputs(32, 3, [30, 50, 21])
    bad = qkv.clone()
    bad[40, 0, 1, 3] = value
    bad[41, 1, 1, 3] = value
    bad.requires_grad_()
    with ops.backend(backend):
        good, out = ops.attention(qkv, cu, 50), ops.attention(bad, cu, 50)
        alone = ops.attention(qkv[30:80], offsets([50]), 50)
        out.sum().backward()
    assert out[40, 1].isnan().all()
    for part in (slice(0, 30), slice(80, 101)):
        assert torch.equal(out[part], good[part]) and torch.isfinite(bad.grad[part]).all()
    torch.testing.assert_close(alone, good[30:80], rtol=0, atol=1e-6)
    if backend == "cpu":
        assert torch.equal(alone, good[30:80])


@pytest.mark.parametrize("backend", backends("attention"))
def test_strides_and_alignment(backend):
    lengths = [5, 33]
    dense = inputs(32, 3, lengths)
    buffer = torch.zeros(38 * 3 * 3 * 32 + 1)
    misaligned = buffer[1:].view(38, 3, 3, 32).copy_(dense)
    strided = torch.zeros(38, 3, 3, 48)[..., 5:37].copy_(dense)
    flipped = dense.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    with ops.backend(backend):
        expected = ops.attention(dense, offsets(lengths), 33)
        for view in (misaligned, strided, flipped):
            assert torch.equal(ops.attention(view, offsets(lengths), 33), expected)


@pytest.mark.parametrize("backend", backends("attention"))
def test_empty(backend):
    with ops.backend(backend):
        for cu in (offsets([]), offsets([0, 0])):
            qkv = torch.zeros(0, 3, 2, 32, requires_grad=True)
            out = ops.attention(qkv, cu, 0)
            out.sum().backward()
            assert out.shape == (0, 2, 32) and qkv.grad.shape == qkv.shape


def test_refusals():
    qkv, cu = torch.zeros(5, 3, 2, 8), offsets([2, 3])
    refused(ValueError, r"\[5, 2, 2, 8\]", ops.attention, qkv[:, :2], cu, 3)
    refused(TypeError, "int64", ops.attention, qkv, cu.long(), 3)
    refused(ValueError, "rise from 0", ops.attention, qkv, offsets([2, 2]), 3)
    refused(ValueError, "rise from 0", ops.attention, qkv, offsets([7, -2]), 9)
    refused(ValueError, "max_seqlen is 2", ops.attention, qkv, cu, 2)
    refused(ValueError, "dropout_p is 1.0", ops.attention, qkv, cu, 3, dropout_p=1.0)
    refused(ValueError, "bias has shape", ops.attention, qkv, cu, 3, bias=torch.zeros(1, 1, 2, 3))
    refused(TypeError, "int64", ops.attention, qkv.long(), cu, 3)
