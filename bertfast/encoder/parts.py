"""Packed layers in a file, and what it says of them, checked here, for kernels trust it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..ops.library import CPU_DTYPES
from ..ops.linear_act import ACTIVATIONS
from .packed import PRECISIONS
from .spec import LayerSpec

ALIGNMENT = 64  # bytes, of all that kernels read
_MOST = 1 << 24  # of any size: the bytes of a matrix don't overflow
_KINDS = ("c2p", "p2c")
_DTYPES = [str(dtype).removeprefix("torch.") for dtype in CPU_DTYPES]


@contextmanager
def damaged(what: object) -> Iterator[None]:
    """ValueError for whatever values of other types and missing ones raise."""
    try:
        yield
    except (ImportError, MemoryError, OSError, ValueError):
        raise
    except Exception as e:
        text = " ".join(f"{type(e).__name__}: {e}".split())[:300]
        raise ValueError(f"{what} is damaged or of another version: {text}; save it anew") from None


def spec_of(fields: dict) -> LayerSpec:
    spec = LayerSpec(**fields | {"relative": tuple(fields["relative"])})
    sizes = spec.hidden, spec.heads, spec.head_dim, spec.inner, spec.groups
    _expect(all(_whole(n, 1) for n in sizes), "sizes", sizes)
    _expect(spec.width == spec.hidden, "heads, of all hidden,", spec.heads)
    _expect(spec.heads % spec.groups == 0, "groups", spec.groups)
    _expect(spec.activation in ACTIVATIONS, "activation", spec.activation)
    _expect(_number(spec.eps) and 0 <= spec.eps < math.inf, "eps", spec.eps)
    flags = spec.pre_norm, spec.rms, spec.gated
    _expect(all(type(flag) is bool for flag in flags), "flags", flags)
    for name in ("rotary", "window"):
        n = getattr(spec, name)
        _expect(n is None or _whole(n, 0, 1 << 31), name, n)
    kinds = [kind for kind in _KINDS if kind in spec.relative]
    _expect(len(kinds) == len(spec.relative), "relative", spec.relative)
    return spec


def check(about: dict, specs: list[LayerSpec]) -> None:
    """Of `PackedCpu.parts`, all but the layers themselves."""
    order, first = about["order"], specs[0]
    for name in (about["precision"], *(name for _, name, _ in about["layers"])):
        _expect(name in PRECISIONS, "precision", name)
    _expect(about["dtype"] in _DTYPES, "dtype", about["dtype"])
    _expect({*order} == {*range(len(specs))} and all(map(_whole, order)), "order", order)
    _expect(all(map(first.alike, specs)), "layers of one kind", specs)
    noise, buckets = about["noise"], about["buckets"]
    _expect(_whole(buckets) and (buckets > 0) == bool(first.relative), "buckets", buckets)
    _expect(len(noise) in (0, len(order)) and all(map(_number, noise)), "noise", noise)
    for name, kind in (("least_cosine", float), ("why", str)):
        _expect(about[name] is None or isinstance(about[name], kind), name, about[name])


def _whole(n, least=0, most=_MOST) -> bool:
    return type(n) is int and least <= n <= most


def _number(x) -> bool:
    return type(x) in (int, float)


def _expect(fit, name, value):
    if not fit:
        raise ValueError(
            f"packed layers with {name} {value!r}: the file is damaged or of another version"
        )


def padded(t: torch.Tensor) -> torch.Tensor:
    """Its bytes, a multiple of `ALIGNMENT`."""
    if t.dtype == torch.uint8:
        return t
    out = torch.zeros(-(-t.nbytes // ALIGNMENT) * ALIGNMENT, dtype=torch.uint8)
    out[: t.nbytes] = t.detach().contiguous().view(-1).view(torch.uint8)
    return out


def save_aligned(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Each at a multiple of `ALIGNMENT` in the file, behind a header that spaces fill up."""
    save_file(tensors, path, metadata | {"": ""})
    with open(path, "rb") as f:
        header = 8 + int.from_bytes(f.read(8), "little")
    save_file(tensors, path, metadata | {"": " " * (-header % ALIGNMENT)})
