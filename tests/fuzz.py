"""Arguments made of an operator's declaration, and damage done to them."""

import math
import random
import re

import torch

from bertfast.ops import declare
from bertfast.ops.pack import _UNPACK

FLOATS = [torch.float32] * 4 + [torch.bfloat16, torch.float16, torch.float64]
_TABLES = "vocabulary", "positions", "types", "buckets"
ANY = [*FLOATS, torch.int64, torch.int32, torch.int8, torch.bool, torch.complex64]


class Maker:
    def __init__(self, seed, **sizes):
        self.random, self.sizes = random.Random(seed), {"ignore_index": -100, **sizes}
        torch.manual_seed(seed)

    def size(self, name):
        if name not in self.sizes:
            n = self.random.choice([0, 1, 1, 2, 3, 5, 8, 17, 33])
            # A table without rows has no valid index.
            self.sizes[name] = max(n, 1) if name in _TABLES else n
        return self.sizes[name]

    def starts(self, values):
        """The offsets of a batch, and with them the sizes that they say."""
        lengths = [self.random.choice([0, 1, 2, 5, 19]) for _ in range(self.size("batch"))]
        self.sizes[values.size], self.lengths = sum(lengths), torch.tensor(lengths)
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
        if text.startswith("2n - 1 for n >= "):
            return 2 * max(self.size(text[16:]) + self.random.choice([0, 0, 1, 5]), 1) - 1
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
            shape = shape if rows else [0] * len(shape)
            n = math.prod(shape)
            t = torch.randperm(rows)[:n] if n <= rows else torch.randint(rows, (n,))
            t = t.to(dtype)
            if rule.unless is not None and n:
                t[:: self.random.choice([1, 2, 3])] = self.sizes[rule.unless]
            return t.view(shape)
        if isinstance(rule, declare.UpToLengths):
            return (torch.rand(shape) * (self.lengths + 1)).to(dtype)
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
            beside = (said_of.beside or "").split(" or ")
            if beside[-1] in made:
                absent = all(made[n] is None for n in beside)
            dtype = None if absent else self.dtype(said_of, made)
            made[name] = None if absent else self.values(said_of, self.shape(said_of), dtype)
        if declared is _UNPACK:
            made["indices"] = torch.randperm(self.sizes["rows"])[: self.sizes["tokens"]]
        made = {n: self.view(t) if isinstance(t, torch.Tensor) else t for n, t in made.items()}
        for n, a in said.items():
            if isinstance(a, declare.Number):
                absent = a.needs is not None and made[a.needs] is None
                made[n] = 0 if absent else self.number(n, a)
                if n in declared.optional:
                    made[n] = self.random.choice([None, None, 1, 3, made[n]])
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
        whole = isinstance(t, torch.Tensor) and t.is_cpu and t.layout is torch.strided
        made[name] = self.broken(t) if whole else self.noise()

    def noise(self):
        some = [torch.ones(2), torch.ones(2, 2), torch.arange(3), torch.tensor([0, 1]).int()]
        plain = [None, -1, 0, 1.5, 2**45, float("nan"), float("inf"), "x", [1.0], True]
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
        if kind == 12 and t.dtype != torch.bool:
            return t.to(torch.complex64).conj() if random.random() < 0.5 else torch._neg_view(t)
        return self.noise()
