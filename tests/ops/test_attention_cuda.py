"""Attention's CUDA kernels, in each precision; test_attention.py's cases are fp32 and bf16.

Without a GPU they run on the CPU, in an extension built with BERTFAST_CUDA_HOST.
"""

import math

import pytest
import torch
from attention_truth import LENGTHS, inputs, masks_of, plain
from helpers import DEVICES, check, close_to_truth, refused
from helpers import offsets as cpu_offsets

from bertfast import ops

pytestmark = [
    pytest.mark.usefixtures("guarded"),
    pytest.mark.skipif("cuda" not in DEVICES, reason="the extension has no CUDA kernels"),
]
HALVES = [torch.bfloat16, torch.float16]
ALL = [*HALVES, torch.float32]
DEVICE = DEVICES.get("cuda")


def offsets(lengths):
    return cpu_offsets(lengths).to(DEVICE)


@pytest.mark.parametrize("dim", [32, 64, 128, 24, 40])
@pytest.mark.parametrize("dtype", ALL)
def test_forward_backward(dtype, dim):
    check(
        "cuda",
        dtype,
        lambda qkv: ops.attention(qkv, offsets(LENGTHS), 130),
        lambda qkv: plain(qkv, LENGTHS),
        [inputs(dim, 2)],
    )


@pytest.mark.parametrize("dim", [32, 64])
@pytest.mark.parametrize("dtype", ALL)
def test_unused_keys(dtype, dim):
    lengths, used = [130, 0, 20, 7, 5, 64], [77, 0, 20, 1, 0, 63]
    count = torch.tensor(used, dtype=torch.int32, device=DEVICE)
    check(
        "cuda",
        dtype,
        lambda qkv: ops.attention(qkv, offsets(lengths), 130, seqused_k=count),
        lambda qkv: plain(qkv, lengths, used=used),
        [inputs(dim, 2, lengths)],
    )


# What is resident for dim 128 ends at 128 keys, for dim 64 at 320, less in fp32: beyond,
# keys stream.
@pytest.mark.parametrize(
    "lengths, dim",
    [([1], 32), ([64], 64), ([65, 2], 64), ([190, 7], 128), ([350], 64), ([2] * 40, 32)],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_lengths_and_scale(dtype, lengths, dim):
    check(
        "cuda",
        dtype,
        lambda qkv: ops.attention(qkv, offsets(lengths), max(lengths), scale=0.3),
        lambda qkv: plain(qkv, lengths, scale=0.3),
        [inputs(dim, 1, lengths)],
    )


@pytest.mark.parametrize(
    "dtype, shape, lengths, dim",
    [(d, s, [3, 40, 130], 32) for d in HALVES for s in ((1, 1), (3, 2), (1, 2), (3, 1), None)]
    + [(torch.half, (1, 1), [200], 128), (torch.float32, (1, 1), [70], 128)]
    + [(torch.float32, s, [3, 40, 70], 32) for s in ((3, 2), None)],
)
def test_causal_and_bias(dtype, shape, lengths, dim):
    longest = max(lengths)
    bias = None
    if shape is not None:
        bias = (
            torch.randn(*shape, longest, longest, generator=torch.Generator().manual_seed(5))
            .bfloat16()
            .float()
        )
    check(
        "cuda",
        dtype,
        lambda qkv, b: ops.attention(qkv, offsets(lengths), longest, causal=True, bias=b),
        lambda qkv, b: plain(qkv, lengths, causal=True, bias=b),
        [inputs(dim, 2, lengths), bias],
    )


def test_fp32_bias():
    bias = torch.randn(1, 2, 70, 70, generator=torch.Generator().manual_seed(5))
    qkv = inputs(64, 2, [9, 70]).half()
    with ops.backend("cuda"):
        out = ops.attention(qkv.to(DEVICE), offsets([9, 70]), 70, bias=bias.to(DEVICE))
    expected = plain(qkv.double(), [9, 70], bias=bias.double())
    close_to_truth(out, expected, plain(qkv, [9, 70], bias=bias.half()), floor=2e-3)


@pytest.mark.parametrize("dtype", ALL)
def test_masked_rows_are_zero(dtype):
    """-inf on all of a row's keys gives zeros, forward and backward."""
    lengths = [20, 75]
    bias = torch.zeros(2, 1, 75, 75)
    bias[0, 0, 3] = -math.inf
    bias[1, 0, :, 5:] = -math.inf
    qkv = inputs(32, 3, lengths).to(DEVICE, dtype).requires_grad_()
    with ops.backend("cuda"):
        out = ops.attention(qkv, offsets(lengths), 75, bias=bias.to(DEVICE))
        out.float().square().sum().backward()
    assert (out[3] == 0).all() and (qkv.grad[3, 0] == 0).all()
    assert torch.isfinite(out).all() and torch.isfinite(qkv.grad).all()
    assert (qkv.grad[25:95, 1:] == 0).all() and (qkv.grad[20:25, 2] != 0).any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [32, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dropout(dtype, dim, causal):
    """The numbers' own mask, in forward and backward; scaled by 1 / (1 - p)."""
    lengths, heads, p = [9, 0, 140], 2, 0.3
    masks = masks_of(lengths, heads, p)
    seed = torch.tensor([12345678901, 7], device=DEVICE)
    options = {"dropout_p": p, "seed": seed, "causal": causal}
    check(
        "cuda",
        dtype,
        lambda qkv: ops.attention(qkv, offsets(lengths), 140, **options),
        lambda qkv: plain(qkv, lengths, masks=masks, causal=causal),
        [inputs(dim, heads, lengths)],
    )


def test_large_logits():
    qkv = inputs(32) * torch.tensor([100.0, 100.0, 1.0])[:, None, None]
    check(
        "cuda",
        torch.bfloat16,
        lambda qkv: ops.attention(qkv, offsets(LENGTHS), 130, scale=1.0),
        lambda qkv: plain(qkv, LENGTHS, scale=1.0),
        [qkv],
    )


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sequences_are_apart(dtype, value):
    """A NaN or inf stays in its sequence, and company doesn't change a sequence by one bit."""
    cu = offsets([30, 50, 21])
    qkv = inputs(32, 3, [30, 50, 21]).to(DEVICE, dtype)
    bad = qkv.clone()
    bad[40, 0, 1, 3] = value
    bad[41, 1, 1, 3] = value
    bad.requires_grad_()
    with ops.backend("cuda"):
        good, out = ops.attention(qkv, cu, 50), ops.attention(bad, cu, 50)
        alone = ops.attention(qkv[30:80], offsets([50]), 400)
        out.sum().backward()
    assert out[40, 1].isnan().all()
    for part in (slice(0, 30), slice(80, 101)):
        assert torch.equal(out[part], good[part]) and torch.isfinite(bad.grad[part]).all()
    assert torch.equal(alone, good[30:80])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_views(dtype):
    """Strided and misaligned projections, read in place or copied."""
    lengths = [33, 20]
    qkv = inputs(32, 2, lengths).to(DEVICE, dtype)
    flat = torch.zeros(qkv.numel() + 1, dtype=qkv.dtype, device=DEVICE)
    views = [
        qkv.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
        flat[1:].view(qkv.shape).copy_(qkv),
        qkv.transpose(0, 3).contiguous().transpose(0, 3),
    ]
    with ops.backend("cuda"):
        expected = ops.attention(qkv, offsets(lengths), 33)
        for view in views:
            assert torch.equal(ops.attention(view, offsets(lengths), 33), expected)


def test_empty():
    with ops.backend("cuda"):
        for cu in (offsets([]), offsets([0, 0])):
            qkv = torch.zeros(0, 3, 2, 32, dtype=torch.bfloat16, device=DEVICE)
            out = ops.attention(qkv.requires_grad_(), cu, 0)
            out.sum().backward()
            assert out.shape == (0, 2, 32) and qkv.grad.shape == qkv.shape


def test_refusals():
    with ops.backend("cuda"):
        for qkv, why in (
            (torch.zeros(5, 3, 2, 32).double(), "not torch.float64"),
            (torch.zeros(5, 3, 2, 160, dtype=torch.half), "head_dim is 160"),
        ):
            refused(RuntimeError, why, ops.attention, qkv.to(DEVICE), offsets([5]), 5)
