"""Weights for inference on a CPU, laid out in the order of the kernels, in fp32, bf16 or int8."""

import hashlib
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..ops.extension import C
from ..ops.library import ptr
from .executors.whole_cpu import (
    c_spec,
    even_limit,
    forward,
    positions_limit,
    relative_tables,
    texts,
)
from .noise import NOISE_LIMIT, Sample, complaints
from .packed import PRECISIONS, Packed
from .parts import ALIGNMENT, check, damaged, spec_of
from .run import Choice
from .spec import Layer, LayerSpec
from .weights import NORMS, Parameters

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


_TABLES = ("c2p", "p2c")


class PackedLayer(NamedTuple):
    """A layer's weights by what kernels call them: packed matrices, uint8, and in fp32 norms,
    tables of relative positions, the bias of the norm before it, and what int8's first input is
    multiplied by."""

    spec: LayerSpec
    precision: str
    source: int  # the sum of the bits of what it was packed of, by which it is known
    tensors: dict[str, torch.Tensor]

    @classmethod
    def of(
        cls,
        layer: Layer,
        precision: str,
        center: torch.Tensor | None,
        relative: torch.Tensor | None,
        reach: torch.Tensor | None,
    ) -> "PackedLayer":
        """center: the bias of the LayerNorm before it. relative: the embeddings of relative
        positions. reach: see `Sample.reach`. All may be None."""
        spec, w = layer.spec, layer.apart()
        norms = {
            f"{role}.{part}": p.detach().float().clone()
            for role in NORMS
            for part, p in getattr(w, role)._asdict().items()
            if p is not None
        }
        center = norms.get("norm1.bias") if spec.pre_norm else center
        behind = norms.get("norm2.bias" if spec.pre_norm else "norm1.bias")
        tables = relative_tables(layer, relative) if spec.relative else ()
        gate = (w.gate,) if spec.gated else ()
        qkv = PRECISIONS[C.qkv_precision(PRECISIONS.index(precision))]
        first = w.query, w.key, w.value
        smooth = _smooth(first, reach) if qkv == "int8" and reach is not None else None
        found = norms | {
            "qkv": pack(first, qkv, center, smooth),
            "smooth": smooth,
            "out": pack((w.out,), precision),
            "up": pack((w.up, *gate), precision, behind, gated=spec.gated),
            "down": pack((w.down,), precision),
            "center": center,
            **dict(zip(_TABLES, tables, strict=False)),
        }
        return cls(spec, precision, _bits(w), {k: t for k, t in found.items() if t is not None})

    def check(self, i: int, buckets: int) -> None:
        """Raises ValueError where layer `i` lacks a tensor, or one has another size."""
        spec, code = self.spec, PRECISIONS.index(self.precision)
        if code and spec.head_dim % 2:
            raise ValueError(f"packed layer {i}: heads of {spec.head_dim} in {self.precision}")
        width, hidden, floats = spec.width, spec.hidden, torch.float32.itemsize
        linears = {
            "qkv": (C.qkv_precision(code), hidden, width, *[width // spec.groups] * 2),
            "out": (code, width, hidden),
            "up": (code, hidden, *[spec.inner] * (1 + spec.gated)),
            "down": (code, spec.inner, hidden),
        }
        sizes = {
            name: C.packed_bytes(
                *([(0, 0, n) for n in rows], k, spec.gated and name == "up", precision)
            )
            for name, (precision, k, *rows) in linears.items()
        }
        needed = {*sizes, "norm2.weight", *spec.relative}
        needed |= set() if spec.pre_norm else {"norm1.weight"}
        sizes |= dict.fromkeys(_TABLES, buckets * width * floats)
        vectors = (f"{role}.{part}" for role in NORMS for part in ("weight", "bias"))
        sizes |= dict.fromkeys([*vectors, "center", "smooth"], hidden * floats)
        found = {name: t.nbytes for name, t in self.tensors.items()}
        for name in needed | set(found):
            at_least, there = sizes.get(name), found.get(name)
            if at_least is None or there is None or not 0 <= there - at_least < ALIGNMENT:
                raise ValueError(
                    f"packed layer {i}: {name} has {there} bytes, expected {at_least}: the file is "
                    "damaged or of another version"
                )

    def encoder(self, others: "Sequence[PackedLayer]" = ()) -> Any:
        """Of this layer and those behind it; whoever holds it must hold them."""
        layers, tables = [], []
        for w in (self, *others):
            at = {name: t.data_ptr() for name, t in w.tensors.items()}
            norm1, norm2 = (
                (at.get(f"{role}.weight", 0), at.get(f"{role}.bias", 0)) for role in NORMS
            )
            matrices = {name: at[name] for name in ("qkv", "out", "up", "down")}
            smooth = at.get("smooth", 0)
            layers.append(C.PackedLayer(**matrices, norm1=norm1, norm2=norm2, smooth=smooth))
            if w.spec.relative:
                tables.append([at.get(name, 0) for name in _TABLES])
        specs = [c_spec(w.spec) for w in (self, *others)]
        code, center = PRECISIONS.index(self.precision), ptr(self.tensors.get("center"))
        return C.Encoder(specs, layers, code, center, tables)


def _smooth(linears, reach):
    """fp32 [in_features]: factors of the linears' input, which their weights are divided by, that
    share out how far both reach, so that fewer of the tokens' 8 bits go to outliers (SmoothQuant:
    Xiao et al., arXiv:2211.10438, with its alpha of 0.5). None where one is not finite."""
    weights = torch.stack([weight.detach().float().abs().amax(0) for weight, _ in linears]).amax(0)
    least = [t.clamp(min=t.median() / 8) for t in (weights, reach)]  # of a sample alone
    ratio = least[0] / least[1]
    if not (ratio.isfinite().all() and (ratio > 0).all()):
        return None
    # In steps: last bits of the sample, which another way of embedding changes, change nothing.
    return torch.exp2((ratio / ratio.median()).log2().round() / 2)


def pack(
    linears: Sequence[Parameters],
    precision: str,
    center: torch.Tensor | None = None,
    smooth: torch.Tensor | None = None,
    gated: bool = False,
) -> torch.Tensor:
    """Linear layers (weight, bias or None) side by side, or one and its gate, as uint8 [bytes]. In
    int8 they take their input less `center`, times `smooth`: [in_features] or None."""
    parts = []
    for weight, bias in linears:
        weight = weight.detach().float().contiguous()
        bias = None if bias is None else bias.detach().float().contiguous()
        if center is not None and precision == "int8":
            moved = weight @ center
            bias = moved if bias is None else bias + moved
        if smooth is not None:
            weight = weight / smooth
        parts.append((weight, bias))
    given = [(ptr(w), ptr(b), len(w)) for w, b in parts], parts[0][0].shape[1], gated
    given = *given, PRECISIONS.index(precision)
    size = -(-C.packed_bytes(*given) // ALIGNMENT) * ALIGNMENT
    out = aligned(torch.empty(size, dtype=torch.uint8, device="cpu")).zero_()  # the same each time
    C.pack_weights(*given, out.data_ptr())
    return out


def _bits(weights) -> int:
    words = {2: torch.int16, 4: torch.int32}
    given = (p.detach().view(words[p.itemsize]) for p in weights.present())
    return sum((i + 1) * t.sum(dtype=torch.int64).item() for i, t in enumerate(given))


def aligned(t: torch.Tensor) -> torch.Tensor:
    """`t` [n] where it is at a multiple of `ALIGNMENT`, as torch's own memory is, or a copy."""
    if t.data_ptr() % ALIGNMENT == 0:
        return t
    room = torch.empty(t.nbytes + ALIGNMENT, dtype=torch.uint8, device="cpu")
    out = room[-room.data_ptr() % ALIGNMENT :][: t.nbytes].view(t.dtype)
    return out.copy_(t)


@cache
def layout(precisions: frozenset[str]) -> str:
    """What this processor's kernels take packed weights for: a checksum of small ones, packed."""
    g = torch.Generator().manual_seed(0)
    linears = [(torch.randn(n, 83, generator=g), torch.randn(n, generator=g)) for n in (71, 71, 45)]
    digest = hashlib.sha256()
    for precision in sorted(precisions):
        qkv = PRECISIONS[C.qkv_precision(PRECISIONS.index(precision))]
        for packed in (pack(linears, qkv), pack(linears[:2], precision, gated=True)):
            digest.update(packed.numpy().tobytes())
    return digest.hexdigest()


class PackedCpu(Packed):
    """On a CPU, for `whole_cpu`'s kernels.

    fp32: every product in fp32. bf16: weights and activations of products in bf16, sums, softmax,
    layer norm and the residual stream in fp32. int8: weights per output channel, activations in
    uint8 between the least and the largest of a token as they come (no calibration data; fp32
    without AVX2), after a layer norm before its bias is added, and for queries, keys and values
    smoothed by factors from a sample; attention in bf16. Where the processor has no bf16 dot
    product, bf16 weights are widened as they are read and attention is in fp32. Without VNNI int8
    weights are scaled so that no sum in 16 bits overflows. A layer that int8 puts
    too much noise into, for its outliers, stays in bf16: `noise` has each layer's in int8 and
    `least_cosine` the whole's, see noise.py.

    buckets: of relative positions, whose projections are kept; a call's embeddings then aren't
    looked at. noise, least_cosine: of `pack`, in int8.
    """

    def __init__(
        self,
        layers: list[PackedLayer],
        precision: str,
        dtype: torch.dtype,
        config: "PreTrainedConfig",
        buckets: int,
        noise: Sequence[float],
        least_cosine: float | None = None,
    ) -> None:
        super().__init__([layer.spec for layer in layers], precision, dtype, config)
        self.noise: list[float] = noise
        self.least_cosine: float | None = least_cosine
        self.choice = Choice(f"whole_cpu, frozen in {precision}", {})
        self.layers, self._buckets = layers, buckets
        self._specs, self._runs, first = [layer.spec for layer in layers], [], 0
        for _, group in groupby(layers, key=lambda layer: layer.precision):
            head, *others = group
            last = first + 1 + len(others)
            self._runs.append((first, last, head.encoder(others)))
            first = last

    @classmethod
    def pack(
        cls,
        layers: list[Layer],
        precision: str,
        dtype: torch.dtype,
        config: "PreTrainedConfig",
        center: torch.Tensor | None,
        sample: Sample | None,
        relative: torch.Tensor | None,
    ) -> "PackedCpu":
        """layers: are taken out of the list, so that each can be freed. center: [hidden], the bias
        of the LayerNorm before the first, or None. sample: for int8. relative: [buckets, hidden],
        the embeddings of relative positions, or None."""
        chosen, noise, made, before = [], [], {}, None
        relative = None if relative is None else relative.detach().float()
        center = None if center is None else center.detach().float().clone()

        def packed(precision):
            key = precision, before, *map(id, layer.weights.present())
            if key not in made:  # else it runs several times
                reach = None if sample is None else sample.reach(layer, center)
                made[key] = PackedLayer.of(layer, precision, center, relative, reach)
            return made[key]

        while layers:
            layer = layers.pop(0)
            found = packed(precision)
            if sample is not None:
                sample, one = sample.through(layer, found.encoder())
                noise.append(one)
                if not one <= NOISE_LIMIT:  # or NaN
                    found = packed("bf16")
            chosen.append(found)
            center, before = found.tensors.get("norm2.bias"), id(layer.weights.norm2.bias)
        buckets = 0 if relative is None else len(relative)
        self = cls(chosen, precision, dtype, config, buckets, noise)
        if sample is not None:
            self.least_cosine = sample.least_cosine(lambda batch: self._run(0, self.count, batch))
        return self

    def parts(self) -> tuple[dict, dict[str, torch.Tensor]]:
        """What `of_parts` makes it of again: JSON's values, and tensors on the CPU."""
        unique = {id(layer): layer for layer in self.layers}
        number = {key: i for i, key in enumerate(unique)}
        about = {
            "precision": self.precision,
            "dtype": str(self.dtype).removeprefix("torch."),
            "buckets": self._buckets,
            "noise": self.noise,
            "least_cosine": self.least_cosine,
            "why": self.why,
            "layers": [[w.spec._asdict(), w.precision, w.source] for w in unique.values()],
            "order": [number[id(layer)] for layer in self.layers],
        }
        named = ((i, *p) for i, w in enumerate(unique.values()) for p in w.tensors.items())
        return about, {f"{i}.{name}": t for i, name, t in named}

    @classmethod
    def of_parts(
        cls, about: dict, tensors: dict[str, torch.Tensor], config: "PreTrainedConfig"
    ) -> "PackedCpu":
        """Raises ValueError for what `parts` never gives: tensors of another size, say."""
        with damaged("a file of packed layers"):
            unique = [PackedLayer(spec_of(spec), *own, {}) for spec, *own in about["layers"]]
            check(about, [layer.spec for layer in unique])
            named = {f"{i}.": layer for i, layer in enumerate(unique)}
            for path, t in tensors.items():
                i, dot, name = path.partition(".")
                named[i + dot].tensors[name] = aligned(t)
            for i, layer in enumerate(unique):
                layer.check(i, about["buckets"])
            self = cls(
                *([unique[i] for i in about["order"]], about["precision"]),
                *(getattr(torch, about["dtype"]), config),
                *(about[key] for key in ("buckets", "noise", "least_cosine")),
            )
        self.why = about["why"]
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # As arrays: multiprocessing would move tensors to shared memory, from under the kernels.
        about, tensors = self.parts()
        return _of_arrays, (about, {name: t.numpy() for name, t in tensors.items()}, self.config)

    @property
    def kept(self) -> list[int]:
        """The layers that stayed in bf16 where int8 was asked for."""
        return [i for i, noise in enumerate(self.noise) if not noise <= NOISE_LIMIT]

    def complaints(self) -> list[str]:
        return [*complaints(self.noise, self.kept, self.least_cosine)] if self.noise else []

    def __str__(self) -> str:
        return super().__str__() + (f", {len(self.kept)} in bf16" if self.kept else "")

    def _run(self, first, last, batch, graphs=None):
        why = even_limit(batch)
        if why:
            raise RuntimeError(f"a frozen encoder can't serve this call: {why}")
        why = positions_limit(self._specs[first:last], batch)
        if why is None and self._buckets:
            low, high = (int(n) for n in torch.aminmax(batch.relative.index))
            if low < 0 or high >= self._buckets:
                why = f"relative.index has {low} to {high}, of {self._buckets} embeddings"
        if why:
            raise ValueError(f"the frozen encoder can't take this call: {why}")
        for start, end, encoder in self._runs:
            a, b = max(first, start), min(last, end)
            if a < b:
                done = b == last  # between runs the residual stream stays in fp32
                dtype, given = self.dtype, batch
                if not done:
                    dtype, given = torch.float32, batch._replace(rows=None)
                batch = batch._replace(hidden=forward(encoder, a - start, b - start, given, dtype))
        return batch.hidden

    def texts(self, *given: Any) -> torch.Tensor | None:
        """`whole_cpu.texts`; None where it takes several runs."""
        return texts(self._runs[0][2], self.dtype, *given) if len(self._runs) == 1 else None


def _of_arrays(about, arrays, config) -> PackedCpu:
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return PackedCpu.of_parts(about, tensors, config)
