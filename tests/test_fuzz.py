"""Arguments made of what operators and entry points declare, many of them damaged: each call gives
what it should or an error that says something. It never crashes: `make test-sanitize` runs this
under ASan. BERTFAST_FUZZ=100000 makes so many calls."""

import inspect
import os
import random
import re

import pytest
import torch
import transformers

import bertfast
from bertfast import ops
from bertfast.model.bert import _PACKED
from bertfast.model.encoder import PackedSequences
from bertfast.model.layer import STATES
from bertfast.ops import declare
from bertfast.ops.library import CPU_DTYPES, DECLARED
from bertfast.ops.linear_act import ACTIVATIONS
from bertfast.ops.pack import _PACK, _UNPACK

CALLS, PART = int(os.environ.get("BERTFAST_FUZZ", 600)), 200
ERRORS = (ValueError, TypeError, IndexError, RuntimeError, MemoryError)
FLOATS = [torch.float32] * 4 + [torch.bfloat16, torch.float16, torch.float64]
ANY = [*FLOATS, torch.int64, torch.int32, torch.int8, torch.bool, torch.complex64]
HALVES = (torch.bfloat16, torch.float16)
HIDDEN, LAYERS = 8, 2


def model(precision):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=9, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=64,
    )  # fmt: skip
    it = bertfast.BertModel(config).eval()
    return it if precision is None else bertfast.freeze(it, precision)


MODELS = {precision: model(precision) for precision in (None, "fp32", "bf16", "int8")}


# --- what is called ---


def public(name, declared):
    """The public function of an operator, called with the operator's arguments."""
    function = getattr(ops, name)
    known = inspect.signature(function).parameters

    def call(args):
        given = {n: a for n, a in zip(declared.names, args, strict=True) if n in known}
        if name == "linear_act" and isinstance(given["activation"], int):
            given["activation"] = ACTIVATIONS[given["activation"] % len(ACTIVATIONS)]
        torch.manual_seed(0)  # of dropout without a seed
        return function(**given)

    return call


def encoder(precision):
    def call(args):
        hidden, _, cu_seqlens, seqlen, rows = args
        with torch.no_grad():
            packing = PackedSequences(cu_seqlens, seqlen)
            return MODELS[precision].encoder(hidden, packing, [None] * (3 * LAYERS), rows=rows)

    return call


def packed(precision):
    return lambda args: torch.no_grad()(MODELS[precision].encode_packed)(*args)


def raw(name):
    return lambda args: getattr(torch.ops.bertfast, name)(*args)


TARGETS = {f"torch.ops.{name}": (declared, raw(name)) for name, declared in DECLARED.items()}
for declared in (*(DECLARED[n] for n in dir(ops) if n in DECLARED), _PACK, _UNPACK):
    TARGETS[declared.name] = declared, public(declared.name, declared)
for p in MODELS:
    TARGETS[f"encoder {p}"] = STATES, encoder(p)
    TARGETS[f"encode_packed {p}"] = _PACKED, packed(p)


# --- arguments as declared ---


class Maker:
    def __init__(self, seed):
        self.random, self.sizes = random.Random(seed), {"size": HIDDEN, "ignore_index": -100}
        torch.manual_seed(seed)

    def size(self, name):
        if name not in self.sizes:
            n = self.random.choice([0, 1, 1, 2, 3, 5, 8, 17, 33])
            # A table without rows has no valid index.
            self.sizes[name] = max(n, 1) if name in ("vocabulary", "positions", "types") else n
        return self.sizes[name]

    def starts(self, values):
        """The offsets of a batch, and with them the sizes that they say."""
        lengths = [self.random.choice([0, 1, 2, 5, 19]) for _ in range(self.size("batch"))]
        self.sizes[values.size] = sum(lengths)
        longest = max(lengths, default=0) + self.random.choice([0, 0, 3])
        self.sizes[values.longest] = max(longest, self.sizes.get(values.longest, 0))
        return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)

    def number(self, name, declared):
        if name in self.sizes:
            return self.sizes[name]
        if declared.high < float("inf"):
            return self.random.choice([0, declared.high - 1 if declared.high > 1 else 0.25])
        return self.size(name)

    def dimension(self, text):
        if text.isdigit():
            return int(text)
        if text.startswith(">= "):
            return self.size(text[3:]) + self.random.choice([0, 0, 1, 5])
        if text.endswith(" or 1"):
            return self.random.choice([1, self.size(text[:-5])])
        if times := re.fullmatch(r"(\d+) \* (\w+)", text):
            return int(times[1]) * self.size(times[2])
        if plus := re.fullmatch(r"(\w+) \+ (\d+)", text):
            return self.size(plus[1]) + int(plus[2])
        return self.size(text)

    def shape(self, declared):
        dims = declared.shape.split(", ")
        more = [self.random.choice([1, 2, 7]) for _ in range(self.random.randrange(3))]
        known = [self.dimension(d) for d in dims if d != "..."]
        return known + (more if dims[-1] == "..." else [])

    def dtype(self, declared, made):
        kind = declared.dtype
        if kind is None or kind is declare.FLOATS:
            return self.random.choice(ANY if kind is None else FLOATS)
        if isinstance(kind, torch.dtype):
            return kind
        words = kind.split()
        like = made[words[2] if words[0] == "statistics" else words[1]].dtype
        if words[0] == "statistics":
            return torch.float64 if like == torch.float64 else torch.float32
        return self.random.choice([like, torch.float32]) if "or" in words else like

    def values(self, declared, shape, dtype):
        rule = declared.values
        if isinstance(rule, declare.Below):
            rows = self.size(rule.size)
            n = shape[0] if rows else 0
            t = torch.randperm(rows)[:n] if n <= rows else torch.randint(rows, (n,))
            if rule.unless is not None and n:
                t[:: self.random.choice([1, 2, 3])] = self.sizes[rule.unless]
            return t
        if dtype.is_floating_point or dtype.is_complex:
            return torch.randn(shape).to(dtype)
        return torch.randint(2, shape).to(dtype)

    def view(self, t):
        """The same values, laid out in another way."""
        kind = self.random.randrange(6)
        if kind == 1 and t.dim() > 1:
            return t.transpose(0, -1).contiguous().transpose(0, -1)
        if kind == 2 and t.dim():  # every other of the last dimension
            return torch.stack([t, t], -1).flatten(-2)[..., ::2]
        if kind == 3:  # an address that is no multiple of 16
            return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)
        if kind == 4 and t.dim():  # rows of a wider tensor
            return torch.cat([t, t], -1)[..., : t.shape[-1]]
        if kind == 5 and t.is_floating_point():
            return torch._neg_view(-t)
        return t

    def arguments(self, declared):
        """Valid ones, by name in the schema's order."""
        said, made = declared.arguments, {}
        offsets = [
            n for n, a in said.items() if isinstance(getattr(a, "values", 0), declare.Offsets)
        ]
        made |= {n: self.starts(said[n].values) for n in offsets}
        if "indices" in said and self.sizes.setdefault("tokens", 0) == 0:
            rows = self.size("batch") * self.size("seqlen") if "seqlen" in said else None
            rows = self.sizes.setdefault("rows", self.size("vocabulary") if rows is None else rows)
            self.sizes["tokens"] = self.random.randint(0, rows)
        compiled = sorted(declared._tensors, key=lambda a: (bool(a.late), a.like is not None))
        for a in compiled:
            name, said_of = a.name, said[a.name]
            if name in made:
                continue
            absent = name in declared.optional and self.random.random() < 0.3
            if said_of.beside is not None and said_of.beside in made:
                absent = made[said_of.beside] is None
            dtype = None if absent else self.dtype(said_of, made)
            made[name] = None if absent else self.values(said_of, self.shape(said_of), dtype)
        if declared is _UNPACK:
            made["indices"] = torch.randperm(self.sizes["rows"])[: self.sizes["tokens"]]
        made = {n: self.view(t) if isinstance(t, torch.Tensor) else t for n, t in made.items()}
        for n, a in said.items():
            if isinstance(a, declare.Number):
                absent = a.needs is not None and made[a.needs] is None
                made[n] = 0 if absent else self.number(n, a)
                if a.needs is not None:
                    made[n] = bool(made[n])
        extra = {"scale": 0.5, "eps": 1e-5, "tokens": None}
        other = {n: extra.get(n, self.random.choice([True, False])) for n in declared.names}
        if "need" in other:
            other["need"] = self.random.randrange(8)
        if "tokens" in other:
            made["tokens"] = None
        return {n: made.get(n, other[n]) for n in declared.names}

    # --- damage ---

    def damage(self, made):
        name = self.random.choice(list(made))
        t = made[name]
        whole = isinstance(t, torch.Tensor) and t.layout is torch.strided
        made[name] = self.broken(t) if whole else self.noise()

    def noise(self):
        some = [torch.ones(2), torch.ones(2, 2), torch.arange(3), torch.tensor([0, 1]).int()]
        plain = [None, -1, 0, 1.5, 2**31, float("nan"), float("inf"), "x", [1.0], True]
        return self.random.choice([*plain, *some])

    def broken(self, t):
        random, shape = self.random, list(t.shape)
        at = random.randrange(len(shape)) if shape else 0
        kind = random.randrange(14)
        if kind == 0:
            return t.to(random.choice(ANY))
        if kind == 1 and shape:
            return t.select(at, 0) if shape[at] else t.flatten()
        if kind == 2:
            return t.unsqueeze(at)
        if kind == 3 and shape:
            return t.narrow(at, 0, random.randint(0, shape[at]))
        if kind == 4 and shape:
            return torch.cat([t, t], at)
        if kind == 5:
            return torch._efficientzerotensor(shape, dtype=t.dtype)
        if kind == 6:
            return t.to("meta")
        if kind == 7:
            return t.to_sparse()
        if kind == 8 and t.numel():
            t = t.clone(memory_format=torch.contiguous_format)
            wild = [float("nan"), float("inf"), 1e30] if t.is_floating_point() else [-1, 120, 7]
            t.view(-1)[random.randrange(t.numel())] = random.choice(wild)
            return t
        if kind == 9 and not t.is_floating_point() and not t.is_complex():
            return t - random.choice([1, 2, 100]) if t.dtype != torch.bool else t
        if kind == 10 and shape:
            return t[tuple(slice(0, 1) for _ in shape)].expand(shape) if t.numel() else t
        if kind == 11 and (t.is_floating_point() or t.is_complex()):
            return t.detach().requires_grad_()
        if kind == 12:
            return t.to(torch.complex64).conj() if random.random() < 0.5 else torch._neg_view(t)
        return self.noise()


# --- what must come of it ---


def outcome(call, args):
    try:
        return call(args), None
    except ERRORS as error:
        assert str(error), f"{type(error).__name__} without a message"
        return None, error
    except NotImplementedError as error:
        return None, error


def tensors(result):
    return [result] if isinstance(result, torch.Tensor) else [
        t for t in result if isinstance(t, torch.Tensor)
    ]  # fmt: skip


def shapes(result):
    return [(t.shape, t.dtype) for t in tensors(result)]


def close(actual, expected, low):
    """Within the rounding of fp32, or of half precision where `low`; inf and NaN in their places."""
    for a, e in zip(tensors(actual), tensors(expected), strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype
        if not a.is_floating_point():
            assert torch.equal(a, e)
            continue
        finite = e.isfinite()
        assert torch.equal(a.isfinite(), finite)
        a, e = a[finite].double(), e[finite].double()
        error, norm = (a - e).norm(), e.norm()
        assert error <= (2e-2 if low else 1e-4) * norm + 1e-6, f"error {error:.2e} of {norm:.2e}"


def one(seed):
    maker = Maker(seed)
    name = maker.random.choice(list(TARGETS))
    declared, call = TARGETS[name]
    made = maker.arguments(declared)
    if maker.random.random() < 0.7:
        for _ in range(maker.random.choice([1, 1, 2])):
            maker.damage(made)
        result, error = outcome(call, list(made.values()))
        if error is None and any(t.requires_grad for t in tensors(result)):
            outcome(
                lambda _: sum(t.sum() for t in tensors(result) if t.requires_grad).backward(), ()
            )
        return
    args = list(made.values())
    if declared is STATES and made["hidden"].dtype not in CPU_DTYPES:
        outcome(call, args)  # which dtypes depends on where the model is
        return
    result = call(args)
    if name.startswith("torch.ops") and declared.name != "pack_indices":
        there = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
        assert shapes(result) == shapes(call(there))
    if not declared.name.endswith("_backward") and not name.startswith("enc"):
        with ops.backend("reference"):
            close(result, call(args), any(t.dtype in HALVES for t in tensors(args)))


@pytest.mark.parametrize("part", range(-(-CALLS // PART)))
def test_fuzz(part):
    for seed in range(part * PART, min((part + 1) * PART, CALLS)):
        try:
            one(seed)
        except Exception as error:
            raise AssertionError(f"call {seed}: {type(error).__name__}: {error}") from error
