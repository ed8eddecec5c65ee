"""Which backend serves which operator.

Each operator file registers one function per backend; all have the operator's own signature.
`select` picks by device, in the order of `ORDER`, the first whose `limit` lets it serve.
"""

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar, get_args

import torch

Backend: TypeAlias = Literal["reference", "cpu", "triton", "cuda"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
ORDER = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}

# (device, dtype, all arguments) -> why a backend can't serve them, or None
Limit: TypeAlias = Callable[[str, torch.dtype, tuple[Any, ...]], str | None]
F = TypeVar("F", bound=Callable[..., Any])


class Entry(NamedTuple):
    function: Callable
    limit: Limit


class Forcing:
    """A choice that blocks force in their thread, or else an environment variable in all."""

    def __init__(self, kind: str, names: tuple[str, ...]) -> None:
        self.kind, self.names, self.variable = kind, names, f"BERTFAST_{kind.upper()}"
        self._thread = threading.local()  # .blocks: the choices of those that it is in

    def _check(self, name: str) -> str:
        if name not in self.names:
            raise ValueError(
                f"unknown {self.kind} {name!r}; expected one of {', '.join(self.names)}"
            )
        return name

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        blocks = vars(self._thread).setdefault("blocks", [])
        blocks.append(self._check(name))
        try:
            yield
        finally:
            blocks.pop()

    def name(self) -> str | None:
        blocks = getattr(self._thread, "blocks", None)
        if blocks:
            return blocks[-1]
        name = os.environ.get(self.variable)
        return self._check(name) if name else None


_table: dict[str, dict[str, Entry]] = {}
_forcing = Forcing("backend", BACKENDS)
_remembered = threading.local()  # .name: what the forward was forced to, while its backward runs


def backend(name: Backend) -> AbstractContextManager[None]:
    """Force every operator that the block runs, in its thread, to one backend; their backward, too,
    wherever it runs.

    A backend that can't serve a call raises `RuntimeError` naming the limit: there is no fallback.
    The environment variable `BERTFAST_BACKEND` does the same for a whole process.
    """
    return _forcing(name)


@contextmanager
def remembered(name: str | None) -> Iterator[None]:
    """For a backward: what its forward was forced to (None: nothing) stays forced."""
    before, _remembered.name = getattr(_remembered, "name", None), name
    try:
        yield
    finally:
        _remembered.name = before


def forced() -> str | None:
    return getattr(_remembered, "name", None) or _forcing.name()


def register(operator: str, name: str, limit: Callable | None = None) -> Callable[[F], F]:
    """Decorator: the function serves `operator` as backend `name` where `limit` gives None."""

    def add(function):
        _table.setdefault(operator, {})[name] = Entry(function, limit or (lambda *_: None))
        fast.cache_clear()
        return function

    return add


def select(operator: str, tensor: torch.Tensor, *arguments: Any) -> Callable:
    """The function that serves this call; `tensor` decides device and dtype."""
    return find(operator, tensor.device.type, tensor.dtype, (tensor, *arguments))


def find(operator: str, device: str, dtype: torch.dtype, arguments: tuple) -> Callable:
    """The function that serves calls of these arguments."""
    entries, name = _table[operator], forced()
    if name is not None:
        entry = entries.get(name)
        why = f"it has no {operator}" if entry is None else entry.limit(device, dtype, arguments)
        if why:
            raise RuntimeError(f"backend {name!r} can't serve {operator}: {why}")
        return entry.function
    for name in ORDER.get(device, ("reference",)):
        entry = entries.get(name)
        if entry is not None and entry.limit(device, dtype, arguments) is None:
            return entry.function
    raise RuntimeError(f"no backend serves {operator} on {device} in {dtype}")


@functools.cache
def fast(operator: str, device: str, dtype: torch.dtype) -> bool:
    """Whether a kernel, not the plain PyTorch reference, serves an operator by default."""
    entries = _table[operator]
    return any(
        name != "reference" and name in entries and entries[name].limit(device, dtype, ()) is None
        for name in ORDER.get(device, ())
    )


def served() -> dict[str, list[str]]:
    """{operator: the backends that serve it on this machine in fp32, the default first}."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        operator: [
            name
            for name in ORDER[device]
            if name in entries and entries[name].limit(device, torch.float32, ()) is None
        ]
        for operator, entries in sorted(_table.items())
        if not operator.endswith("_backward")
    }
