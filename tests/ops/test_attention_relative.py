"""Attention with disentangled relative positions."""

import math
from itertools import product

import pytest
import torch
from attention_truth import few_tiles, inputs, masks_of, plain, starts, stay_apart
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
)
from transformers import DebertaV2Config
from transformers.models.deberta_v2.modeling_deberta_v2 import (
    DisentangledSelfAttention,
    make_log_bucket_position,
)

from bertfast import ops

pytestmark = pytest.mark.usefixtures("guarded")
BACKENDS = [name for name in backends("attention") if name != "cuda"]
LENGTHS = [40, 0, 1, 131, 77]
BUCKETS = 11


def index_of(n, buckets=BUCKETS, seed=3):
    """No order in it: which bucket a distance has is the caller's."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(buckets, (2 * n - 1,), generator=g, dtype=torch.int32)


def embeddings(dim, heads=2, buckets=BUCKETS):
    g = torch.Generator().manual_seed(9)
    return [torch.randn(buckets, heads, dim, generator=g).bfloat16().float() for _ in range(2)]


def compare(backend, dtype, tensors, lengths, index, fp32=1e-5, used=None, masks=None, **options):
    """Output and gradients by `plain`; tensors: {of the operator's arguments}, None left out."""
    here, there = DEVICES[backend], dict(options, rel_index=index.to(DEVICES[backend]))
    if used is not None:
        there["seqused_k"] = torch.tensor(used, dtype=torch.int32, device=here)
    for name in ("dropout_p", "seed"):
        options.pop(name, None)
    tensors = {n: t for n, t in tensors.items() if t is not None}
    named = lambda given: dict(zip(tensors, given, strict=True))
    cu, longest = starts(lengths, backend), max(lengths)
    check(
        *(backend, dtype),
        lambda *t: ops.attention(**named(t), cu_seqlens=cu, max_seqlen=longest, **there),
        lambda *t: plain(
            **named(t), lengths=lengths, rel_index=index, used=used, masks=masks, **options
        ),
        list(tensors.values()),
        fp32=fp32,
    )


@pytest.mark.seconds("triton")
@pytest.mark.parametrize("backend, dtype, which", cases(BACKENDS, FLOATS, ["key", "both", "query"]))
def test_forward_backward(backend, dtype, which):
    key, query = embeddings(32)
    key, query = None if which == "query" else key, None if which == "key" else query
    lengths = few_tiles(backend, LENGTHS)
    tensors = dict(qkv=inputs(32, 2, lengths), rel_key=key, rel_query=query)
    compare(backend, dtype, tensors, lengths, index_of(131), scale=0.2)


@pytest.mark.seconds("triton")
@pytest.mark.parametrize(
    "backend, dim, lengths",
    cases(BACKENDS, [8, 20, 64, 128], [[300], [33, 31, 14, 15, 16, 17], [2] * 40]),
)
def test_sizes(backend, dim, lengths):
    lengths = few_tiles(backend, lengths)
    if backend == INTERPRETED:
        lengths = lengths[:8]
    key, query = embeddings(dim)
    tensors = dict(qkv=inputs(dim, 2, lengths), rel_key=key, rel_query=query)
    compare(backend, torch.float32, tensors, lengths, index_of(max(lengths) + 3))


# The interpreter takes seconds a case.
ALL = [
    (backend, dtype, causal, window)
    for backend in BACKENDS
    for dtype in (FLOATS if backend != "triton" else [torch.float32])
    for causal, window in product([False, True], [None, 0, 9, 10**9])
    if backend != "triton" or (causal, window) in ((False, 9), (True, None))
]


@pytest.mark.seconds("triton")
@pytest.mark.parametrize("backend, dtype, causal, window", ALL)
def test_all_options_together(backend, dtype, causal, window):
    lengths = few_tiles(backend, LENGTHS)
    bias = torch.randn(1, 2, 131, 131, generator=torch.Generator().manual_seed(5))
    key, query = embeddings(32)
    tensors = dict(qkv=inputs(32, 2, lengths), rel_key=key, rel_query=query)
    tensors["bias"] = bias.bfloat16().float()
    used = [dict(zip(LENGTHS, [31, 0, 1, 90, 70], strict=True))[n] for n in lengths]
    index = index_of(140)
    compare(
        *(backend, dtype, tensors, lengths, index),
        **dict(fp32=2e-5, used=used, window=window, causal=causal),
    )


@pytest.mark.parametrize("kinds", [["c2p", "p2c"], ["c2p"], ["p2c"]])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_deberta(backend, kinds, share):
    """What transformers' module says, its own projections of one table given."""
    config = DebertaV2Config(
        hidden_size=48, num_attention_heads=3, relative_attention=True, pos_att_type=kinds,
        position_buckets=8, max_position_embeddings=64, share_att_key=share,
        attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    stock, lengths = DisentangledSelfAttention(config).double().eval(), [64, 3, 21]
    table = torch.randn(16, 48, dtype=torch.float64)
    x = torch.randn(sum(lengths), 48, dtype=torch.float64)
    projected = lambda name, t: getattr(stock, name)(t).unflatten(-1, (3, 16))
    names = ("key_proj", "query_proj") if share else ("pos_key_proj", "pos_query_proj")
    rel = [
        projected(n, table) if kind in kinds else None
        for n, kind in zip(names, ("c2p", "p2c"), strict=True)
    ]
    distance = torch.arange(-63, 64)
    index = (make_log_bucket_position(distance, 8, 64) + 8).clamp(0, 15).int()
    qkv = torch.stack([projected(f"{n}_proj", x) for n in ("query", "key", "value")], 1)
    to = lambda t: None if t is None else t.float().to(DEVICES[backend])
    with torch.no_grad(), ops.backend(backend):
        found = ops.attention(
            *(to(qkv), starts(lengths, backend), 64),
            scale=1 / math.sqrt(16 * (1 + len(kinds))),
            **dict(rel_key=to(rel[0]), rel_query=to(rel[1]), rel_index=index.to(DEVICES[backend])),
        )
        truth = [
            stock(part[None], torch.ones(1, 1, n, n), rel_embeddings=table)[0][0]
            for part, n in zip(x.split(lengths), lengths, strict=True)
        ]
    close_to_truth(found.flatten(1), torch.cat(truth), floor=1e-5)


@pytest.mark.seconds("triton")
@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout(backend):
    lengths, heads, p = [9, 0, 70], 2, 0.3
    key, query = embeddings(32)
    tensors = dict(qkv=inputs(32, 2, lengths), rel_key=key, rel_query=query)
    masks = masks_of(lengths, heads, p)
    seed = torch.tensor([12345678901, 7], device=DEVICES[backend])
    compare(
        *(backend, torch.float32, tensors, lengths, index_of(70)),
        **dict(masks=masks, dropout_p=p, seed=seed),
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in Triton's interpreter
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_are_apart(backend, value):
    key, query = embeddings(32, 3)
    stay_apart(backend, value, rel_key=key, rel_query=query, rel_index=index_of(50))


@pytest.mark.parametrize("backend", BACKENDS)
def test_views(backend):
    lengths, where = [5, 33], DEVICES[backend]
    qkv, index = inputs(24, 2, lengths).to(where), index_of(33).to(where)
    key, query = (t.to(where) for t in embeddings(24))
    view = lambda t: t.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    wide = torch.cat([index.new_zeros(1), index])[1:].repeat_interleave(2)[::2]
    with ops.backend(backend):
        for rel in ((key, query, index), (view(key), query[:, :, None].squeeze(2), wide)):
            names = dict(zip(("rel_key", "rel_query", "rel_index"), rel, strict=True))
            found = ops.attention(qkv, starts(lengths, backend), 33, **names)
            names = {n: t.cpu().double() for n, t in names.items()}
            names["rel_index"] = index.cpu()
            truth = plain(qkv.cpu().double(), lengths, **names)
            close_to_truth(found, truth, floor=1e-5)


@pytest.mark.seconds("triton")
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_of_two_gradients(backend):
    """Of the embeddings alone, of one of them, of none."""
    lengths, where = [20, 40 if backend == INTERPRETED else 90], DEVICES[backend]
    fixed = [t.to(where) for t in (inputs(32, 2, lengths), *embeddings(32))]

    def grads(needed):
        leaves = [t.clone().requires_grad_(n) for t, n in zip(fixed, needed, strict=True)]
        names = dict(rel_key=leaves[1], rel_query=leaves[2], rel_index=index_of(90).to(where))
        with ops.backend(backend):
            out = ops.attention(leaves[0], starts(lengths, backend), 90, **names)
            out.square().sum().backward()
        return [t.grad for t in leaves]

    full = grads((True, True, True))
    for needed in ((True, False, False), (False, True, False), (False, False, True)):
        for found, expected, n in zip(grads(needed), full, needed, strict=True):
            assert (found is not None) == n
            assert not n or torch.equal(found, expected)


@pytest.mark.seconds("triton")
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_repeat(backend):
    """The same bits every time: no sum depends on which thread comes first."""
    lengths, where = [20, 90, 3, 41, 70, 8], DEVICES[backend]
    if backend == INTERPRETED:  # it has no threads
        lengths = lengths[:1] + lengths[3:4]
    fixed = [t.to(where) for t in (inputs(32, 2, lengths), *embeddings(32))]
    grads = []
    for _ in range(2 if backend == INTERPRETED else 3):
        leaves = [t.clone().requires_grad_() for t in fixed]
        names = dict(rel_key=leaves[1], rel_query=leaves[2], rel_index=index_of(90).to(where))
        with ops.backend(backend):
            out = ops.attention(
                leaves[0], starts(lengths, backend), 90, dropout_p=0.1, seed=3, **names
            )
            grads.append(torch.autograd.grad(out.square().sum(), leaves))
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    where = DEVICES[backend]
    for lengths, longest in (([], 0), ([0, 0], 0), ([0], 4)):
        qkv = torch.zeros(0, 3, 2, 32, device=where, requires_grad=True)
        key, query = (t.to(where).requires_grad_() for t in embeddings(32))
        names = dict(rel_key=key, rel_query=query, rel_index=index_of(max(longest, 1)).to(where))
        with ops.backend(backend):
            ops.attention(qkv, starts(lengths, backend), longest, **names).sum().backward()
        assert qkv.grad.shape == qkv.shape and (key.grad == 0).all() and (query.grad == 0).all()


def test_refused():
    qkv, cu = inputs(8, 2, [5]), offsets([5])
    key, query = embeddings(8)
    index = index_of(5)

    def no(error, match, **rel):
        refused(error, match, ops.attention, qkv, cu, 5, **rel)

    no(ValueError, "rel_index and rel_key or rel_query go together", rel_key=key)
    no(ValueError, "rel_index and rel_key or rel_query go together", rel_index=index)
    for wrong in (index[:8], index[:7], torch.cat([index, index])):
        no(ValueError, r"rel_index has shape .*2n - 1 for n >= max_seqlen.*max_seqlen is 5",
           rel_key=key, rel_index=wrong)  # fmt: skip
    no(TypeError, "rel_index has dtype torch.int64", rel_key=key, rel_index=index.long())
    no(IndexError, "rel_index run from .* expected 0 to 10", rel_query=query, rel_index=index + 9)
    no(IndexError, "rel_index run from -", rel_query=query, rel_index=index - 9)
    no(TypeError, "rel_key has dtype", rel_key=key.bfloat16(), rel_index=index)
    no(ValueError, "rel_query has shape", rel_key=key, rel_query=query[:4], rel_index=index)
    no(ValueError, "rel_key has shape", rel_key=key[..., :4], rel_index=index)
