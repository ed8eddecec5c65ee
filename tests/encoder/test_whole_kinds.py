"""Layers that differ from BERT's, all of an encoder's by one call, live and packed, beside a plain
layer in fp64."""

import math
import re
from itertools import pairwise

import pytest
import torch
from helpers import apart, close_to_truth, offsets, refused
from torch.nn import functional as F

from bertfast.encoder import Batch, LayerSpec, LayerWeights
from bertfast.encoder.batch import Relative
from bertfast.encoder.executors import whole_cpu
from bertfast.encoder.packed_cpu import PackedCpu
from bertfast.encoder.spec import Layer
from bertfast.encoder.weights import FLAT, NONE, shapes

BOUND = {"fp32": 1e-5, "bf16": 0.03, "int8": 0.09}
PRE = {"pre_norm": True}
KINDS = {
    "bert": {},
    "pre_norm": PRE,
    "rms": {"rms": True},
    "gated": {"gated": True},
    "silu": {"activation": "silu"},
    "relu": {"gated": True, "activation": "relu"},
    "unbiased": {"biases": ()},
    "rotary": {"rotary": 1},
    "window": {"window": 9},
    "groups": {"groups": 2},
    "c2p": {"relative": ("c2p",)},
    "p2c": {"relative": ("p2c",)},
    "relative_window": {"relative": ("p2c", "c2p"), "window": 21, "groups": 2},
}
FAMILIES = {
    "modernbert": PRE
    | {"gated": True, "biases": (), "first_norm": False, "size": (128, 2, 200)}
    | {"each": [{"rotary": 0}, {"rotary": 1, "window": 8}]},
    "deberta": {"relative": ("c2p", "p2c"), "size": (96, 3, 200)},
    "nomic": {"gated": True, "activation": "silu", "rotary": 0, "biases": ("norms",)},
    "eurobert": PRE
    | {"rms": True, "gated": True, "activation": "silu", "rotary": 0, "groups": 3}
    | {"biases": (), "size": (96, 6, 136)},
}
SIZES = {"even": (128, 4, 256), "odd": (72, 3, 200), "inner": (64, 2, 1100)}  # hidden, heads, inner
LENGTHS = [(40, 1, 17, 0, 33), (3,), (129, 150)]


def layers_of(kind, size="even", count=3):
    """Some, with weights that matter."""
    options = dict((KINDS | FAMILIES)[kind])
    biases = options.pop("biases", ("matrices", "norms"))
    first, each = options.pop("first_norm", True), options.pop("each", [{}])
    hidden, heads, inner = options.pop("size", SIZES[size or "even"])
    heads = options.get("groups", 1) * -(-heads // options.get("groups", 1))
    g, layers = torch.Generator().manual_seed(0), []
    for i in range(count):
        given = {"activation": "gelu"} | options | each[i % len(each)]
        spec = LayerSpec(hidden, heads, hidden // heads, inner, eps=1e-6, **given)
        parts = []
        for (role, part), shape in zip(FLAT, shapes(spec), strict=True):
            norm = role.startswith("norm")
            there = {"gate": spec.gated, "pos_key": "c2p" in spec.relative,
                     "pos_query": "p2c" in spec.relative}.get(role, True)  # fmt: skip
            if part == "bias":
                there = there and ("norms" if norm else "matrices") in biases
                there = there and not (norm and spec.rms)
            if role == "norm1" and i == 0:
                there = there and first
            noise = torch.randn(shape, generator=g)
            value = noise * (0.1 if len(shape) == 1 else 0.8 / math.sqrt(shape[-1]))
            parts.append((value + (norm and part == "weight")) if there else None)
        layers.append(Layer(spec, LayerWeights.of(parts)))
    return layers


def norm_of(spec, x, norm):
    weight, bias = norm
    if weight is None:
        return x
    if spec.rms:
        return x * (x.square().mean(-1, keepdim=True) + spec.eps).rsqrt() * weight
    return F.layer_norm(x, x.shape[-1:], weight, bias, spec.eps)


def turned(x, angles):
    """x [n, heads, dim]"""
    cos, sin = (t.repeat(1, 2).unsqueeze(1) for t in angles.double().unbind(1))
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def attend(spec, w, x, used, angles, relative):
    n, heads = len(x), spec.heads
    q, k, v = (F.linear(x, *p).unflatten(1, (-1, spec.head_dim)) for p in w[:3])
    if spec.rotary is not None:
        q, k = (turned(t, angles[spec.rotary]) for t in (q, k))
    k, v = (t.repeat_interleave(spec.groups, 1) for t in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k)
    if spec.relative:
        middle = len(relative.index) // 2
        away = torch.arange(n)[:, None] - torch.arange(n)
        buckets = relative.index[middle + away].long()
        table = lambda p: F.linear(relative.embeddings.double(), *p).view(-1, heads, spec.head_dim)
        if "c2p" in spec.relative:
            scores = scores + torch.einsum("ihd,ijhd->hij", q, table(w.pos_key)[buckets])
        if "p2c" in spec.relative:
            scores = scores + torch.einsum("jhd,ijhd->hij", k, table(w.pos_query)[buckets])
    scores = scores * spec.scale
    positions = torch.arange(n)
    hidden = (positions >= used).expand(n, n)
    if spec.window is not None:
        hidden = hidden | ((positions[:, None] - positions).abs() > spec.window)
    p = scores.masked_fill(hidden, -math.inf).softmax(-1).nan_to_num()
    return torch.einsum("hij,jhd->ihd", p, v).flatten(1)


def one_layer(layer, x, *rest):
    spec, w = layer.spec, LayerWeights.of([None if p is None else p.double() for p in layer.weights.flat()])  # fmt: skip
    act = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}[spec.activation]

    def feed_forward(x):
        inner = act(F.linear(x, *w.up))
        return F.linear(inner * F.linear(x, *w.gate) if spec.gated else inner, *w.down)

    def attention(x):
        return F.linear(attend(spec, w, x, *rest), *w.out)

    if spec.pre_norm:
        x = x + attention(norm_of(spec, x, w.norm1))
        return x + feed_forward(norm_of(spec, x, w.norm2))
    x = norm_of(spec, x + attention(x), w.norm1)
    return norm_of(spec, x + feed_forward(x), w.norm2)


def truth(layers, batch):
    """In fp64, sequence by sequence."""
    starts, found = batch.cu_seqlens.tolist(), []
    for i, (a, b) in enumerate(pairwise(starts)):
        x, used = (
            batch.hidden[a:b].double(),
            b - a if batch.seqused_k is None else batch.seqused_k[i],
        )
        for layer in layers:
            x = one_layer(layer, x, used, [t[a:b] for t in batch.angles], batch.relative)
        found.append(x)
    x = torch.cat(found)
    return x if batch.rows is None else x[batch.rows]


def batch_of(layers, lengths, seed=1, **rest):
    spec, g = layers[0].spec, torch.Generator().manual_seed(seed)
    hidden = torch.randn(sum(lengths), spec.hidden, generator=g)
    return Batch(hidden, offsets(lengths), max(lengths), **rest, **positions(layers, lengths))


BUCKETS = 16  # near distances have one each, far ones share them: arXiv:2006.03654's successor
EMBEDDINGS = torch.randn(2 * BUCKETS, 128, generator=torch.Generator().manual_seed(2))


def relative(size, n):
    away = torch.arange(1 - n, n)
    near, far = BUCKETS // 2, away.abs().clamp(min=1).float()
    more = near + (far / near).log() / math.log(16) * (near - 1)
    bucket = torch.where(far <= near, far, more.ceil().clamp(max=BUCKETS - 1)) * away.sign()
    return Relative(EMBEDDINGS[:, :size], (bucket + BUCKETS).int())


def positions(layers, lengths):
    """Angles, of two bases, and relative positions of a few more tokens than there are."""
    at, half = torch.cat([torch.arange(n) for n in lengths]), layers[0].spec.head_dim // 2
    turns = (at[:, None] * base ** -(torch.arange(half) / half) for base in (100.0, 10000.0))
    given = relative(layers[0].spec.hidden, max(lengths) + 3)
    return {"relative": given, "angles": tuple(torch.stack([t.cos(), t.sin()], 1) for t in turns)}


def packed(layers, precision):
    center = None if layers[0].spec.pre_norm else torch.linspace(-0.1, 0.1, layers[0].spec.hidden)
    relative = EMBEDDINGS[:, : layers[0].spec.hidden]
    return PackedCpu.pack(list(layers), precision, torch.float32, None, center, None, relative)


HOW = ["live fp32", "live bf16", "fp32", "bf16", "int8"]


def states(how, layers, batch):
    """By one call: of weights that are packed in `how`, or live ones."""
    *live, precision = how.split()
    with torch.inference_mode():
        if not live:
            return packed(layers, precision).run(batch, False)
        if precision == "bf16":
            batch = batch._replace(hidden=batch.hidden.bfloat16())
        assert whole_cpu.limit(layers, batch) is None
        return whole_cpu.run(layers, batch)


def rounded(layers):
    """Their weights as bf16 has them."""
    return [
        layer._replace(
            weights=layer.weights.filled(
                iter([p.bfloat16().float() for p in layer.weights.present()])
            )
        )
        for layer in layers
    ]


def agrees(how, layers, batch):
    found, precision = states(how, layers, batch), how.split()[-1]
    close_to_truth(found, truth(layers, batch), floor=BOUND[precision])
    return found


CASES = [(kind, size) for kind in KINDS for size in ("even", "odd")]
CASES += [("gated", "inner"), *((kind, None) for kind in FAMILIES)]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kind, size", CASES)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.usefixtures("guarded")
def test_kinds(how, kind, size, lengths):
    layers = layers_of(kind, size)
    agrees(how, layers, batch_of(layers, lengths))


@pytest.mark.parametrize("kind", ["pre_norm", "window", *FAMILIES])
@pytest.mark.parametrize("how", HOW)
def test_rows_and_padding(how, kind):
    """Rows that are wanted alone, and sequences whose last rows are queries, not keys."""
    layers, lengths = layers_of(kind), (60, 20, 9, 75)
    used = torch.tensor([60, 7, 0, 30], dtype=torch.int32)
    batch = batch_of(layers, lengths, seqused_k=used)
    whole, rows = agrees(how, layers, batch), torch.tensor([163, 0, 60, 66, 80, 0])
    few = agrees(how, layers, batch._replace(rows=rows))
    assert apart(few, whole[rows]) < 2e-6


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("how", HOW)
def test_company_changes_nothing(how, kind):
    layers, lengths = layers_of(kind), (40, 1, 17, 133) * 6
    batch = batch_of(layers, lengths)
    together, start = states(how, layers, batch), 191 + 41
    alone = batch_of(layers, (17,))._replace(hidden=batch.hidden[start : start + 17])
    # Other sums of products: of bf16 results some are rounded the other way.
    floor = 1e-4 if "bf16" in how else 2e-6
    close_to_truth(states(how, layers, alone), together[start : start + 17], floor=floor)


def test_what_it_does_not_serve():
    """Said by the limit for live weights, raised for packed ones."""
    given = {kind: layers_of(kind, "even") for kind in ("rotary", "c2p", "modernbert", "bert")}
    batches = {kind: batch_of(layers, (5, 3)) for kind, layers in given.items()}

    def check(kind, why, layers=None, frozen=True, **changed):
        layers, batch = layers or given[kind], batches[kind]._replace(**changed)
        with torch.inference_mode():
            assert why in whole_cpu.limit(layers, batch)
            if frozen:
                refused(ValueError, re.escape(why), packed(layers, "fp32").run, batch, False)

    angles = batches["rotary"].angles
    check("rotary", "has 1 tables of angles", angles=angles[:1])
    check("rotary", "has 4 tables of angles, and 3 at most", angles=angles * 2)
    check("rotary", "expected float32 [8, 2, 16]", angles=(angles[0], angles[1][:7]))
    check("rotary", "angles are torch.float64", angles=(angles[0], angles[1].double()))
    embeddings, index = batches["c2p"].relative
    check("c2p", "no relative positions", relative=None)
    check("c2p", "7 relative positions for 5 tokens", relative=Relative(embeddings, index[4:-4]))
    check("c2p", "expected plain int32", relative=Relative(embeddings, index.long()))
    far = Relative(embeddings, index + BUCKETS)
    with torch.inference_mode():
        refused(IndexError, "of 32 embeddings", states, "live fp32", given["c2p"],
                batches["c2p"]._replace(relative=far))  # fmt: skip
        refused(ValueError, "of 32 embeddings", states, "fp32", given["c2p"],
                batches["c2p"]._replace(relative=far))  # fmt: skip
    first, *rest = given["modernbert"]
    other = first._replace(spec=first.spec._replace(rms=True))
    check("modernbert", "differ in more than", [other, *rest], frozen=False)
    lost = first._replace(weights=first.weights._replace(gate=NONE))
    check("modernbert", "a weight is missing", [lost, *rest], frozen=False)
    bare = given["bert"][0]
    lost = bare._replace(weights=bare.weights._replace(norm1=NONE))
    check("bert", "a weight is missing", [lost], frozen=False)
