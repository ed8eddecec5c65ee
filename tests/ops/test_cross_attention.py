import math

import pytest
import torch
from helpers import DEVICES, FLOATS, backends, cases, check, close_to_truth, keep, offsets, refused

from bertfast import ops

pytestmark = pytest.mark.usefixtures("guarded")
BACKENDS = backends("cross_attention")
QUERIES = [0, 1, 13, 40, 5, 17]
KEYS = [3, 77, 20, 0, 1, 33]


def plain(q, kv, bias=None, causal=False, masks=None, lengths=(QUERIES, KEYS)):
    """Attention by autograd on each sequence; `masks` drop probabilities (already scaled)."""
    out, i, j = [], 0, 0
    for b, (m, n) in enumerate(zip(*lengths, strict=True)):
        query = q[i : i + m].transpose(0, 1)  # [heads, m, dim]
        k, v = kv[j : j + n].transpose(0, 2).unbind(1)
        s = query @ k.transpose(1, 2) / math.sqrt(q.shape[2])
        if bias is not None:
            s = s + bias[b % bias.shape[0], :, :m, :n]
        if causal:
            later = torch.ones(m, n, dtype=torch.bool).triu(1)
            s = s.masked_fill(later, -math.inf)
        p = s.softmax(-1).nan_to_num(0)
        if masks is not None:
            p = p * masks[b].to(p)
        out.append((p @ v).transpose(0, 1))
        i, j = i + m, j + n
    return torch.cat(out)


def inputs(backend, dim=24, heads=2, lengths=(QUERIES, KEYS)):
    g = torch.Generator().manual_seed(0)
    shapes = (sum(lengths[0]), heads, dim), (sum(lengths[1]), 2, heads, dim)
    values = [torch.randn(*s, generator=g).bfloat16().float() for s in shapes]
    starts = [offsets(n) for n in lengths]
    return values, (*(s.to(DEVICES[backend]) for s in starts), *map(max, lengths))


@pytest.mark.parametrize("dim", [24, 64])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_backward(backend, dtype, dim):
    tensors, starts = inputs(backend, dim)
    check(
        *(backend, dtype, lambda q, kv: ops.cross_attention(q, kv, *starts)),
        *(plain, tensors),
    )


@pytest.mark.seconds("triton")
@pytest.mark.parametrize(
    "backend, causal, precision",
    cases(
        [b for b in BACKENDS if b != "cpu"],
        [False, True],
        [(torch.float16, d) for d in (32, 64, 128)] + [(torch.float32, 128)],
    ),
)
def test_lengths_apart(backend, causal, precision):
    """Either side beyond what stays in shared memory; under the causal mask keys without queries."""
    dtype, dim = precision
    lengths = [150, 20, 3, 340, 9], [340, 9, 150, 150, 20]
    tensors, starts = inputs(backend, dim, 1, lengths)
    check(
        *(backend, dtype, lambda q, kv: ops.cross_attention(q, kv, *starts, causal=causal)),
        *(lambda q, kv: plain(q, kv, causal=causal, lengths=lengths), tensors),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_keys(backend):
    """Keys beyond one tile; few queries, then the reverse."""
    for lengths in ([[5, 20], [150, 9]], [[150, 9], [5, 20]]):
        tensors, starts = inputs(backend, 16, 1, lengths)
        check(
            *(backend, torch.float32, lambda q, kv: ops.cross_attention(q, kv, *starts)),
            *(lambda q, kv: plain(q, kv, lengths=lengths), tensors),
        )


@pytest.mark.parametrize(
    "backend, dtype, causal, shape", cases(BACKENDS, FLOATS, [False, True], [(1, 2), (6, 1)])
)
def test_bias_and_causal(backend, dtype, causal, shape):
    tensors, starts = inputs(backend)
    g = torch.Generator().manual_seed(5)
    bias = torch.randn(*shape, 41, 80, generator=g).bfloat16().float()
    check(
        *(backend, dtype),
        lambda q, kv, b: ops.cross_attention(q, kv, *starts, causal=causal, bias=b),
        lambda q, kv, b: plain(q, kv, b, causal),
        [*tensors, bias],
    )


@pytest.mark.seconds("triton")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout(backend, dtype):
    """Row = query token * heads + head, column = key position."""
    p, heads, masks, start = 0.3, 2, [], 0
    for m, n in zip(QUERIES, KEYS, strict=True):
        rows = [
            torch.stack([keep(2**40 + 5, 9, (start + i) * heads + h, n, p) for h in range(heads)])
            for i in range(m)
        ]
        mask = torch.stack(rows, 1) if rows else torch.zeros(heads, 0, n)
        masks.append(mask / (1 - p))
        start += m
    tensors, starts = inputs(backend, heads=heads)
    seed = torch.tensor([2**40 + 5, 9], device=DEVICES[backend])
    check(
        *(backend, dtype),
        lambda q, kv: ops.cross_attention(q, kv, *starts, dropout_p=p, seed=seed),
        lambda q, kv: plain(q, kv, masks=masks),
        tensors,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_without_keys_or_queries(backend):
    """Zeros forward and backward, not what the memory held."""
    tensors, starts = inputs(backend)
    q, kv = (t.to(DEVICES[backend]).requires_grad_() for t in tensors)
    with ops.backend(backend):
        out = ops.cross_attention(q, kv, *starts)
        out.square().sum().backward()
    assert (out[14:54] == 0).all() and (q.grad[14:54] == 0).all()
    assert (kv.grad[:3] == 0).all() and (kv.grad[3:80] != 0).any()
    assert torch.isfinite(out).all() and torch.isfinite(kv.grad).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_attention_where_both_are_one(backend):
    qkv = torch.randn(39, 3, 3, 32).to(DEVICES[backend])
    cu = offsets([30, 9]).to(qkv.device)
    with ops.backend(backend):
        own = ops.attention(qkv, cu, 30)
        cross = ops.cross_attention(qkv[:, 0], qkv[:, 1:], cu, cu, 30, 30)
    close_to_truth(cross, own, floor=1e-5)
    if backend != "reference":  # whose products are torch's
        assert torch.equal(own, cross)


@pytest.mark.seconds("triton")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_strides_and_alignment(backend, dtype):
    tensors, starts = inputs(backend, 32)
    dense = [t.to(DEVICES[backend], dtype) for t in tensors]
    views = [
        [torch.zeros(t.numel() + 1).to(t)[1:].view(t.shape).copy_(t) for t in dense],
        [torch.zeros(*t.shape[:-1], 48).to(t)[..., 8:40].copy_(t) for t in dense],
        [t.transpose(0, -1).contiguous().transpose(0, -1) for t in dense],
        [t.transpose(0, 1).contiguous().transpose(0, 1) for t in dense],
    ]
    results = []
    with ops.backend(backend):
        for pair in [dense, *views]:
            leaves = [t.detach().requires_grad_() for t in pair]
            out = ops.cross_attention(*leaves, *starts)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    """Without queries, without keys, without sequences."""
    for queries, keys in (([0], [4]), ([2, 3], [0, 0]), ([], [])):
        q, kv = torch.zeros(sum(queries), 2, 8), torch.zeros(sum(keys), 2, 2, 8)
        q, kv = (t.to(DEVICES[backend]).requires_grad_() for t in (q, kv))
        starts = [offsets(n).to(q.device) for n in (queries, keys)]
        longest = (max(n, default=0) for n in (queries, keys))
        with ops.backend(backend):
            out = ops.cross_attention(q, kv, *starts, *longest)
            out.sum().backward()
        assert out.shape == q.shape and (out == 0).all()
        assert (q.grad == 0).all() and (kv.grad == 0).all()


def test_refusals():
    q, kv, a, b = torch.zeros(5, 2, 8), torch.zeros(7, 2, 2, 8), offsets([2, 3]), offsets([3, 4])
    cross = ops.cross_attention
    refused(ValueError, r"\[7, 3, 2, 8\]", cross, q, torch.zeros(7, 3, 2, 8), a, b, 3, 4)
    refused(TypeError, "float64", cross, q, kv.double(), a, b, 3, 4)
    refused(
        ValueError,
        r"\[2\], expected \[batch \+ 1\], where batch is 2",
        cross,
        q,
        kv,
        a,
        offsets([7]),
        3,
        7,
    )
    refused(ValueError, "cu_seqlens_k is .*the 7 tokens_k", cross, q, kv, a, a, 3, 4)
    refused(ValueError, "max_seqlen_k is 3", cross, q, kv, a, b, 3, 3)
    refused(TypeError, "cu_seqlens_q has dtype torch.int64", cross, q, kv, a.long(), b, 3, 4)
    refused(ValueError, "bias has shape", cross, q, kv, a, b, 3, 4, bias=torch.zeros(1, 1, 4, 3))
