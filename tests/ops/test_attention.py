import math

import pytest
import torch
from attention_truth import LENGTHS, few_tiles, inputs, masks_of, plain, starts, stay_apart
from helpers import (
    DEVICES,
    FLOATS,
    INTERPRETED,
    backends,
    cases,
    check,
    close_to_truth,
    offsets,
    refused,
    relative,
    run,
)
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bertfast import ops
from bertfast.ops.dropout import keep_mask

pytestmark = pytest.mark.usefixtures("guarded")
# CUDA's kernels have test_attention_cuda.py, with fp16 as well.
BACKENDS = [name for name in backends("attention") if name != "cuda"]


@pytest.mark.parametrize("dim", [32, 64, 128, 24, 40])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_backward(backend, dtype, dim):
    lengths = few_tiles(backend, LENGTHS, dtype)
    check(
        backend,
        dtype,
        lambda qkv: ops.attention(qkv, starts(lengths, backend), max(lengths)),
        lambda qkv: plain(qkv, lengths),
        [inputs(dim, 2, lengths)],
    )


@pytest.mark.seconds("triton")
@pytest.mark.parametrize("lengths", [[300], [1], [97, 15, 14, 28, 29], [2] * 40])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_and_scale(backend, lengths):
    lengths = few_tiles(backend, lengths)
    check(
        backend,
        torch.float32,
        lambda qkv: ops.attention(qkv, starts(lengths, backend), max(lengths), scale=0.3),
        lambda qkv: plain(qkv, lengths, scale=0.3),
        [inputs(32, 2, lengths)],
    )


@pytest.mark.seconds("triton")
@pytest.mark.parametrize(
    "backend, dtype, batch, heads", cases(BACKENDS, FLOATS, [False, True], [False, True])
)
def test_causal_and_bias(backend, dtype, batch, heads):
    """A bias of all sequences or each, of all heads or each."""
    lengths = few_tiles(backend, LENGTHS, dtype)
    shape, longest = (len(lengths) if batch else 1, 3 if heads else 1), max(lengths)
    bias = torch.randn(*shape, longest, longest, generator=torch.Generator().manual_seed(5))
    cu = starts(lengths, backend)
    check(
        backend,
        dtype,
        lambda qkv, b: ops.attention(qkv, cu, longest, causal=True, bias=b),
        lambda qkv, b: plain(qkv, lengths, causal=True, bias=b),
        [inputs(32, 3, lengths), bias.bfloat16().float()],
        fp32=2e-5,  # a shared bias sums thousands of terms of both signs
    )


@pytest.mark.seconds("triton")
@pytest.mark.parametrize("backend, dtype, with_bias", cases(BACKENDS, FLOATS, [False, True]))
def test_unused_keys(backend, dtype, with_bias):
    """seqused_k: tokens past it are queries alone, whatever their keys and values hold."""
    lengths, used = [130, 0, 20, 7, 5, 64], [77, 0, 20, 1, 0, 63]
    bias = torch.randn(1, 2, 130, 130, generator=torch.Generator().manual_seed(5)).bfloat16()
    given = [inputs(32, 2, lengths), bias.float()][: 1 + with_bias]
    count = torch.tensor(used, dtype=torch.int32, device=DEVICES[backend])
    check(
        backend,
        dtype,
        lambda qkv, *b: ops.attention(
            qkv, starts(lengths, backend), 130, bias=b[0] if b else None, seqused_k=count
        ),
        lambda qkv, *b: plain(qkv, lengths, bias=b[0] if b else None, used=used),
        given,
    )
    qkv = given[0].to(DEVICES[backend], dtype)
    for start, n, keys in zip(offsets(lengths), lengths, used, strict=False):
        qkv[start + keys : start + n, 1:] = math.nan
    qkv.requires_grad_()
    with ops.backend(backend):
        out = ops.attention(qkv, starts(lengths, backend), 130, seqused_k=count)
        out.float().square().sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(qkv.grad).all()
    assert (qkv.grad[77:130, 1:] == 0).all() and (qkv.grad[77:130, 0] != 0).any()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_rows_are_zero(backend, dtype):
    """-inf on all of a row's keys gives zeros, forward and backward."""
    lengths = [20, 35]
    bias = torch.zeros(2, 1, 35, 35)
    bias[0, 0, 3] = -math.inf
    bias[1, 0, :, 5:] = -math.inf
    qkv = inputs(32, 3, lengths).to(DEVICES[backend], dtype).requires_grad_()
    with ops.backend(backend):
        out = ops.attention(qkv, starts(lengths, backend), 35, bias=bias.to(qkv.device))
        out.float().square().sum().backward()
    assert (out[3] == 0).all() and (qkv.grad[3, 0] == 0).all()
    assert torch.isfinite(out).all() and torch.isfinite(qkv.grad).all()
    assert (qkv.grad[25:55, 1:] == 0).all() and (qkv.grad[20:25, 2] != 0).any()


@pytest.mark.seconds("triton")
@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout(backend):
    """The numbers' own mask, in forward and backward; scaled by 1 / (1 - p)."""
    lengths, heads, p = [9, 0, 70], 2, 0.3
    masks = masks_of(lengths, heads, p)
    seed = torch.tensor([12345678901, 7], device=DEVICES[backend])
    check(
        backend,
        torch.float32,
        lambda qkv: ops.attention(qkv, starts(lengths, backend), 70, dropout_p=p, seed=seed),
        lambda qkv: plain(qkv, lengths, masks=masks),
        [inputs(32, heads, lengths)],
    )


@pytest.mark.seconds("triton")
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits(backend):
    """Scores of +-1e4 and more stay finite and right."""
    lengths = few_tiles(backend, LENGTHS)
    qkv = inputs(32, 3, lengths) * torch.tensor([100.0, 100.0, 1.0])[:, None, None]
    check(
        backend,
        torch.float32,
        lambda qkv: ops.attention(qkv, starts(lengths, backend), max(lengths), scale=1.0),
        lambda qkv: plain(qkv, lengths, scale=1.0),
        [qkv],
        # A score of 1e5 has an ulp of 1e-2; numpy's sums, in Triton's interpreter, are coarser.
        fp32=3e-2 if backend == "triton" else 1e-3,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_probabilities_count(backend):
    """e^-80 of a value of 1e33 is a result like any other in fp32."""
    gaps = torch.tensor([0.0, -30, -60, -70, -80, -86])
    qkv = torch.zeros(len(gaps), 3, 1, 32, device=DEVICES[backend])
    qkv[:, 0, 0, 0], qkv[:, 1, 0, 0] = 1, gaps.to(qkv.device)
    for key in range(1, len(gaps)):
        value = qkv.clone()
        value[key, 2] = 1e33
        with ops.backend(backend):
            found = ops.attention(value, starts([len(gaps)], backend), len(gaps), scale=1.0)
        truth = plain(value.double().cpu(), [len(gaps)], scale=1.0)
        close_to_truth(found, truth, floor=3e-5)  # the scores' own rounding, times 86
    qkv.requires_grad_()
    with ops.backend(backend):
        found = ops.attention(qkv, starts([len(gaps)], backend), len(gaps), scale=1.0)
        grad = torch.autograd.grad(found.sum(), qkv)[0][:, 2, 0].cpu()
    for row, probability in zip(grad, len(gaps) * gaps.double().softmax(0), strict=True):
        close_to_truth(row, probability.expand(32), floor=3e-5)


def flash(qkv, lengths):
    """PyTorch's own kernel."""
    out = []
    for part in qkv.split(lengths):
        q, k, v = (t.transpose(0, 1)[None] for t in part.unbind(1))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out.append(F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1))
    return torch.cat(out)


LARGE = [(name, torch.float32) for name in backends("attention")]
LARGE += [(name, torch.bfloat16) for name in ("reference", "cpu")]  # others need bf16's `out`


@pytest.mark.parametrize("mean", [3, 10, 30])  # scores of 72, 800, 7200
@pytest.mark.parametrize(("backend", "dtype"), LARGE)
def test_gradients_at_large_scores(backend, dtype, mean):
    """The log-sum-exp's rounding stays out: the gradients of a row's scores sum to 0."""
    lengths = [60, 47]
    qkv = (inputs(64, 2, lengths) + mean).bfloat16()
    grad = torch.randn(107, 2, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    truth = run(lambda t: plain(t, lengths), [qkv.double()], grad)
    there = [qkv.to(DEVICES[backend], dtype)], grad.to(DEVICES[backend], dtype)
    with ops.backend(backend):
        got = run(lambda t: ops.attention(t, starts(lengths, backend), 60), *there)
    peer = run(lambda t: flash(t, lengths), [qkv.to(dtype)], grad.to(dtype))
    # A GPU's kernels see keys in parts, so that the log-sum-exp's rounding remains in their exp2.
    factor = 2 if backend in ("reference", "cpu") else 6
    for name, i, part in (("out", 0, slice(None)), ("dq and dk", 1, slice(0, 2)), ("dv", 1, 2)):
        error, its = (relative(r[i][:, part], truth[i][:, part]) for r in (got, peer))
        limit = 2**-8 if dtype == torch.bfloat16 else factor * its + 1e-5
        assert error <= limit, f"{name}: {error:.2e}, PyTorch's {its:.2e}"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_are_apart(backend, value):
    stay_apart(backend, value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_alignment(backend):
    lengths = [5, 33]
    cu = starts(lengths, backend)
    dense = inputs(32, 3, lengths).to(cu.device)
    buffer = torch.zeros(38 * 3 * 3 * 32 + 1, device=cu.device)
    misaligned = buffer[1:].view(38, 3, 3, 32).copy_(dense)
    strided = torch.zeros(38, 3, 3, 48, device=cu.device)[..., 5:37].copy_(dense)
    flipped = dense.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    with ops.backend(backend):
        expected = ops.attention(dense, cu, 33)
        for view in (misaligned, strided, flipped):
            result = ops.attention(view, cu, 33)
            close_to_truth(result, plain(dense.double(), lengths), floor=1e-5)
            if backend != "reference":  # whose products are torch's, which may sum by alignment
                assert torch.equal(result, expected)


@pytest.mark.parametrize("longest", [32, 64, 128])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float16])
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "cpu"])
def test_tiles_that_hold_a_sequence(backend, dtype, longest):
    """Lengths around the sizes at which the kernels change."""
    lengths = [longest, 0, longest - 1, longest // 2 + 1, 1]
    check(
        *(backend, dtype),
        lambda qkv: ops.attention(qkv, starts(lengths, backend), longest),
        lambda qkv: plain(qkv, lengths),
        [inputs(64, 1, lengths)],
        fp32=1e-5 if dtype == torch.float32 else 2e-3,  # fp16 has 11 bits
    )


@pytest.mark.seconds("triton")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_bit_for_bit(backend, dtype):
    """Equal probabilities and one-hot values: the output shows forward's mask, dV backward's."""
    lengths, heads, p = [70] if backend == INTERPRETED else [100, 128], 2, 0.3
    longest = max(lengths)
    one_hot = torch.cat([torch.eye(longest)[:n] for n in lengths])[:, None].expand(-1, heads, -1)
    seed = torch.tensor([2**60 + 3, 5])
    qkv = torch.stack([torch.zeros_like(one_hot)] * 2 + [one_hot], 1)
    qkv = qkv.to(DEVICES[backend], dtype).requires_grad_()
    with ops.backend(backend):
        out = ops.attention(
            *(qkv, starts(lengths, backend), longest), dropout_p=p, seed=seed.to(qkv.device)
        )
        out.backward(one_hot.to(qkv))
    start = 0
    for n in lengths:
        rows = torch.arange(start, start + n)[:, None] * heads + torch.arange(heads)
        mask = keep_mask(seed, rows, n, p)  # [n, heads, n]
        part = slice(start, start + n)
        assert torch.equal(out[part, :, :n].cpu() > 0, mask)
        assert torch.equal(qkv.grad[part, 2, :, :n].cpu() > 0, mask.transpose(0, 2))
        start += n


@pytest.mark.seconds("triton")
@pytest.mark.parametrize("backend", BACKENDS)
def test_more_sequences_than_the_search_holds(backend):
    lengths = [1] * 290 + [70, 3]
    qkv = inputs(16, 1, lengths).to(DEVICES[backend])
    with ops.backend(backend):
        out = ops.attention(qkv, starts(lengths, backend), 70)
    assert torch.equal(out[:290], qkv[:290, 2])
    close_to_truth(out, plain(qkv.double(), lengths), floor=1e-5)


@pytest.mark.seconds("triton")
@pytest.mark.parametrize("lengths", [[20, 90, 3], [140, 5]])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_repeat(backend, lengths):
    """The same bits every time: no sum depends on which thread comes first."""
    if backend == INTERPRETED:  # it has no threads
        lengths = [20, 40] if len(lengths) == 3 else [5]
    bias = torch.randn(1, 2, max(lengths), max(lengths)).to(DEVICES[backend])
    qkv, cu = inputs(32, 2, lengths).to(bias.device, torch.bfloat16), starts(lengths, backend)
    grads = []
    for _ in range(2):
        leaves = [t.clone().requires_grad_() for t in (qkv, bias)]
        with ops.backend(backend):
            out = ops.attention(
                *(leaves[0], cu, max(lengths)), bias=leaves[1], dropout_p=0.1, seed=3
            )
            grads.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for first, second in zip(*grads, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    with ops.backend(backend):
        for cu in (starts([], backend), starts([0, 0], backend)):
            qkv = torch.zeros(0, 3, 2, 32, device=cu.device, requires_grad=True)
            out = ops.attention(qkv, cu, 0)
            out.sum().backward()
            assert out.shape == (0, 2, 32) and qkv.grad.shape == qkv.shape


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_beyond_32_bits(backend):
    """A second token 2**31 elements behind the first; the 4 GB between are never touched."""
    memory = torch.empty(
        2**31 + 96, dtype=torch.bfloat16, device=DEVICES[backend], pin_memory=False
    )
    qkv = memory.as_strided((2, 3, 1, 32), (2**31, 32, 32, 1))
    qkv.copy_(torch.randn(qkv.shape))
    results = []
    for x in (qkv, qkv.contiguous()):
        x.requires_grad_()
        with ops.backend(backend):
            out = ops.attention(x, starts([2], backend), 2)
            results.append([out, *torch.autograd.grad(out.square().sum(), x)])
    for far, near in zip(*results, strict=True):
        assert torch.equal(far, near)


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
    if "triton" in BACKENDS:
        with ops.backend("triton"):
            wide = torch.zeros(5, 3, 1, 160)
            refused(RuntimeError, "head_dim is 160", ops.attention, wide, cu, 3)
