"""What an operator takes, said once: it is checked before a kernel gets a pointer, and
tests/ops/test_fuzz.py makes arguments of it and damages them."""

import re
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch

FLOATS = "floats"


class Tensor(NamedTuple):
    """A tensor argument of any strides; the schema says whether it may be None.

    shape: sizes, of which equal names are equal: "tokens, 3, heads, head_dim". "batch + 1" of
        offsets; in terms of other sizes "3 * out", "head_dim / 2", "batch or 1", ">= max_seqlen",
        "2n - 1 for n >= max_seqlen", which is one for each distance of two positions; "..." for
        any that follow.
    dtype: None for any, FLOATS, one dtype, or in terms of another argument: "as x",
        "as x or float32", "statistics of x" (float64 of float64, else float32).
    values: `check(name, tensor, sizes)`, asked on a CPU alone: on a GPU it would wait for the
        device.
    beside: the argument that it goes together with: both are given or neither; of "a or b",
        either.
    needs: the one without which it must be None.
    """

    shape: str
    dtype: object = None
    values: object = None
    beside: str | None = None
    needs: str | None = None


class Number(NamedTuple):
    """low <= number < high; shapes and values may name it."""

    low: float = -float("inf")
    high: float = float("inf")
    needs: str | None = None  # the tensor without which it must be 0 or False

    def check(self, name: str, value: Any) -> None:
        if isinstance(value, torch.SymInt):
            return
        if not isinstance(value, Real):
            raise TypeError(f"{name} is {value!r}, expected a number")
        if not self.low <= value < self.high:
            below = "" if self.high == float("inf") else f" < {self.high}"
            raise ValueError(f"{name} is {value}, expected {self.low} <= {name}{below}")


class Below(NamedTuple):
    """Indices from 0 up to a size, or the number named `unless`."""

    size: str
    unless: str | None = None

    def check(self, name: str, t: torch.Tensor, sizes: dict[str, Any]) -> None:
        rows, unless = sizes[self.size], sizes.get(self.unless)
        if unless is not None:
            t = t[t != unless]
        if t.numel():
            check_range(name, *(int(v) for v in t.aminmax()), rows, unless)


def check_range(name: str, low: int, high: int, rows: int, unless: int | None = None) -> None:
    if low < 0 or high >= rows:
        other = "" if unless is None else f" or {unless}"
        raise IndexError(f"{name} run from {low} to {high}, expected 0 to {rows - 1}{other}")


class Offsets(NamedTuple):
    """Where packed sequences start: from 0 up to a size, none longer than a number."""

    size: str
    longest: str

    def check(self, name: str, t: torch.Tensor, sizes: dict[str, Any]) -> None:
        total, longest = sizes[self.size], sizes[self.longest]
        sizes[name] = lengths = t.diff()  # for `UpToLengths`
        low, high = (int(v) for v in lengths.aminmax()) if len(t) > 1 else (0, 0)
        if int(t[0]) != 0 or int(t[-1]) != total or low < 0:
            raise ValueError(
                f"{name} is {t.tolist()[:8]}..., expected offsets that rise from 0 to the "
                f"{total} {self.size}"
            )
        if high > longest:
            raise ValueError(f"{self.longest} is {longest}, a sequence of {name} has {high} tokens")


class UpToLengths(NamedTuple):
    """Counts from 0 up to the lengths that the named `Offsets` give."""

    offsets: str

    def check(self, name: str, t: torch.Tensor, sizes: dict[str, Any]) -> None:
        lengths = sizes[self.offsets]
        if bool(((t < 0) | (t > lengths)).any()):
            raise ValueError(
                f"{name} is {t.tolist()[:8]}..., expected 0 to the lengths of {self.offsets}, "
                f"{lengths.tolist()[:8]}..."
            )


PROBABILITY = Number(0, 1)
LENGTH = Number(0, 2**31)  # of a sequence, whose offsets are int32
SEED = Tensor("2", torch.int64)


class Declaration:
    """The arguments of one operator or entry point.

    schema: as of `torch.library`; arguments: {name: Tensor or Number}, every tensor of the schema
    and the numbers that matter to memory.
    """

    def __init__(self, schema: str, **arguments: Tensor | Number) -> None:
        parsed = torch._C.parse_schema(schema)
        self.name, self.arguments = parsed.name, arguments
        self.names = [a.name for a in parsed.arguments]
        types = {a.name: str(a.type) for a in parsed.arguments}
        self.optional = {name for name, kind in types.items() if kind.startswith("Optional")}
        tensors = [name for name in self.names if "Tensor" in types[name]]
        assert tensors == [n for n in self.names if isinstance(arguments.get(n), Tensor)], schema
        self.tensor_positions = [self.names.index(n) for n in tensors]
        self._numbers = [
            (self.names.index(n), n, a) for n, a in arguments.items() if isinstance(a, Number)
        ]
        # What is said in terms of others comes after them.
        tensors = [_Compiled(self.names, n, arguments[n], n in self.optional) for n in tensors]
        self._tensors = sorted(tensors, key=lambda a: (bool(a.late), a.like is not None))
        self._by_name = {a.name: a for a in tensors}
        self._valued = [a for a in tensors if a.values]

    def check(self, args: Sequence[Any], values: bool = True) -> None:
        """Raises TypeError, ValueError or IndexError where `args`, in the schema's order, are not
        as declared; `values`: whether the tensors are real, so that their values may be read."""
        sizes, device = {}, None
        for i, name, number in self._numbers:
            value = args[i] if i < len(args) else None
            if value is None and name in self.optional:
                continue
            number.check(name, value)
            if number.needs and value and args[self.names.index(number.needs)] is None:
                raise ValueError(f"{name} is {value}, yet {number.needs} is None")
            sizes[name] = value
        for a in self._tensors:
            t = args[a.position]
            if a.beside and (t is None) != all(args[i] is None for i in a.beside):
                raise ValueError(
                    f"{a.name} and {a.declared.beside} go together: give both or neither"
                )
            if a.needs is not None and t is not None and args[a.needs] is None:
                raise ValueError(f"{a.name} is given, yet {self.names[a.needs]} is None")
            if t is None and a.optional:
                continue
            a.check(t, args, sizes)
            if device is None:
                device, first = t.device, a.name
            elif t.device != device:
                raise ValueError(f"{a.name} is on {t.device}, expected {device} as {first}")
        if values and device.type == "cpu":
            for a in self._valued:
                if args[a.position] is not None:
                    a.values.check(a.name, args[a.position], sizes)

    def shape_of(self, name: str, t: torch.Tensor) -> torch.Size:
        """The shape of an argument that is declared without others, checked alone."""
        self._by_name[name].check(t, (), {})
        return t.shape


_OFFSET, _TIMES = re.compile(r"(\w+) \+ (\d+)"), re.compile(r"(\d+) \* (\w+)")
_PART = re.compile(r"(\w+) / (\d+)")
_DISTANCES = "2n - 1 for n >= "


def late_size(dim: str) -> Callable[[int, dict[str, Any]], bool] | None:
    """`fits(size, sizes)` of a dimension in terms of others; None for one that isn't."""
    if dim.startswith(_DISTANCES):
        longest = dim[len(_DISTANCES) :]
        return lambda n, sizes: n % 2 == 1 and n >= 2 * sizes[longest] - 1
    if dim.startswith(">= "):
        return lambda n, sizes: n >= sizes[dim[3:]]
    if dim.endswith(" or 1"):
        return lambda n, sizes: n in (1, sizes[dim[:-5]])
    if times := _TIMES.fullmatch(dim):
        return lambda n, sizes: n == int(times[1]) * sizes[times[2]]
    if part := _PART.fullmatch(dim):
        return lambda n, sizes: n * int(part[2]) == sizes[part[1]]
    return None


class _Compiled:
    """A `Tensor` made ready to be checked at every call."""

    def __init__(self, names, name, declared, optional):
        self.name, self.optional, self.declared = name, optional, declared
        self.position, self.values = names.index(name), declared.values
        self.beside = [names.index(n) for n in (declared.beside or "").split(" or ") if n]
        self.needs = None if declared.needs is None else names.index(declared.needs)
        dims = declared.shape.split(", ")
        self.open = dims[-1] == "..."
        self.texts = dims[:-1] if self.open else dims
        self.late = [(i, f) for i, d in enumerate(self.texts) if (f := late_size(d))]
        self.sizes = []  # (index, constant or None, name, what is added to it)
        for i, d in enumerate(self.texts):
            if late_size(d) is None:
                m = _OFFSET.fullmatch(d)
                self.sizes.append(
                    (i, int(d) if d.isdigit() else None, *((m[1], int(m[2])) if m else (d, 0)))
                )
        self.dtype, self.like, self.also = declared.dtype, None, ()
        if isinstance(self.dtype, str) and self.dtype != FLOATS:
            like, _, also = self.dtype.partition(" or ")
            self.like = names.index(like.split()[-1])
            self.also = tuple(getattr(torch, w) for w in also.split())

    def check(self, t, args, sizes):
        """Its own dtype and shape; `sizes` learns those that it names."""
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{self.name} is {t!r:.80}, expected a torch.Tensor")
        if not self._takes(t, args):
            raise TypeError(f"{self.name} has dtype {t.dtype}, expected {self._dtypes(args)}")
        shape = t.shape
        if len(shape) < len(self.texts) if self.open else len(shape) != len(self.texts):
            self._refuse(shape, "", sizes)
        for i, constant, name, more in self.sizes:
            n = shape[i] - more
            if n != (sizes.setdefault(name, n) if constant is None else constant) or n < 0:
                self._refuse(shape, self.texts[i], sizes)
        for i, fits in self.late:
            if not fits(shape[i], sizes):
                self._refuse(shape, self.texts[i], sizes)

    def _takes(self, t, args):
        if self.like is not None:
            return t.dtype is self._reference(args) or t.dtype in self.also
        if self.dtype is FLOATS:
            return t.is_floating_point()
        return self.dtype is None or t.dtype is self.dtype

    def _reference(self, args):
        dtype = args[self.like].dtype
        if self.dtype.startswith("statistics"):
            return torch.float64 if dtype is torch.float64 else torch.float32
        return dtype

    def _dtypes(self, args):
        if self.like is None:
            return "a floating-point dtype" if self.dtype is FLOATS else self.dtype
        return " or ".join(str(d) for d in dict.fromkeys((self._reference(args), *self.also)))

    def _refuse(self, shape, dim, sizes):
        known = [f"{w} is {sizes[w]}" for w in re.findall(r"[a-z_]+", dim) if w in sizes]
        raise ValueError(
            f"{self.name} has shape {list(shape)}, expected [{self.declared.shape}]"
            + (f", where {', '.join(known)}" if known else "")
        )
