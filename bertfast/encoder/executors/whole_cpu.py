"""Inference on a CPU: all layers by one call into C++. It packs the weights of a layer when it
comes to it and keeps none for the next call, so that none can be stale; packed.py keeps them."""

import functools
import operator
from array import array
from collections.abc import Sequence
from itertools import compress
from operator import attrgetter
from typing import Any, NamedTuple

import torch

from ...ops import registry
from ...ops.attention import bias_arguments, dense_last
from ...ops.extension import C, error
from ...ops.library import (
    CPU_DTYPES,
    GPU_DTYPES,
    call,
    is_bf16,
    lazy,
    plain,
    ptr,
    real,
    unwatched,
)
from ...ops.linear_act import ACTIVATIONS
from ..batch import Batch, Relative
from ..spec import Layer, Layers, LayerSpec
from ..weights import IS_MATRIX, needed, shapes

_shape, _dtype, _device = attrgetter("shape"), attrgetter("dtype"), attrgetter("device")
_is_neg = torch._C.TensorBase.is_neg
DEVICE = "cpu"
EVEN = "rows of padding see all places alike"
_ANGLES = 3  # tables of a call, see csrc/layer.h


def limit(layers: list[Layer], batch: Batch) -> str | None:
    hidden = batch.hidden
    if not hidden.is_cpu or hidden.dtype not in CPU_DTYPES:
        return f"it takes float32 or bfloat16 on a CPU, not {hidden.dtype} on {hidden.device}"
    if C is None:
        return error
    if registry.forced() not in (None, "cpu"):
        return f"backend {registry.forced()!r} is forced"
    if hidden.dtype != torch.float32 and layers[0].spec.head_dim % 2:
        return f"heads of {layers[0].spec.head_dim} are no pairs"
    why = inference_limit(batch) or layers_limit(layers)
    why = why or positions_limit([layer.spec for layer in layers], batch)
    return why or _weights_limit(layers, hidden)


def even_limit(batch: Batch) -> str | None:
    """What keeps padding that is `Even` from whole encoders."""
    return EVEN if batch.even is not None and batch.even.share is None else None


def inference_limit(batch: Batch) -> str | None:
    """What keeps a call from any executor of whole encoders."""
    if torch.is_grad_enabled():
        return "gradients are enabled"
    if batch.bias is not None and not plain(batch.bias):
        return "the bias on the scores is no plain tensor"
    return even_limit(batch)


def layers_limit(layers: list[Layer]) -> str | None:
    """And which layers."""
    if any(any(layer.dropout) for layer in layers):
        return "it has no dropout"
    return _specs_limit(tuple([layer.spec for layer in layers]))


@functools.lru_cache
def _specs_limit(specs: tuple[LayerSpec, ...]) -> str | None:
    first = specs[0]
    if not all(map(first.alike, specs)):
        return "the layers differ in more than their weights, windows and rotary positions"
    if first.width != first.hidden:
        return "heads were pruned"
    return None


def positions_limit(specs: Sequence[LayerSpec], batch: Batch) -> str | None:
    """What of a call's positions doesn't fit its layers."""
    dim, tokens, relative = specs[0].head_dim, len(batch.hidden), batch.relative
    if specs[0].relative:
        if relative is None:
            return "the batch has no relative positions"
        index = relative.index
        if index.dtype != torch.int32 or index.dim() != 1 or not plain(index):
            return f"the relative positions are {index.dtype}, expected plain int32"
        if len(index) < 2 * batch.longest - 1 or len(index) % 2 == 0:
            return f"there are {len(index)} relative positions for {batch.longest} tokens"
    for i in {spec.rotary for spec in specs} - {None}:
        if dim % 2:
            return f"heads of {dim} have no halves to turn"
        if not i < len(batch.angles) <= _ANGLES:
            return f"the batch has {len(batch.angles)} tables of angles, and {_ANGLES} at most"
        table, shape = batch.angles[i], (tokens, 2, dim // 2)
        if table.shape != shape or table.dtype != torch.float32 or not plain(table):
            return f"angles are {table.dtype} {list(table.shape)}, expected float32 {list(shape)}"
    return None


def flat_weights(layers: list[Layer]) -> list[torch.Tensor]:
    return [p for layer in layers for p in layer.weights.present()]


class _Plan(NamedTuple):
    """Of `flat_weights`, all layers' in one list."""

    missing: bool  # whether a layer lacks a weight that it can't do without
    matrices: list[bool]
    shapes: list[tuple[int, ...]]


@functools.lru_cache
def _plan(spec: LayerSpec, there: tuple[bool, ...]) -> _Plan:
    """there: of `LayerWeights.flat` of each layer, which parameters it has."""
    count = len(there) // len(IS_MATRIX)
    return _Plan(
        not all([there[i + j] for i in range(0, len(there), len(IS_MATRIX)) for j in needed(spec)]),
        [*compress(IS_MATRIX * count, there)],
        [*compress(shapes(spec) * count, there)],
    )


def _planned(layers: list[Layer]) -> tuple[list[torch.Tensor], _Plan]:
    slots = [p for layer in layers for p in layer.weights.flat()]
    plan = _plan(layers[0].spec, tuple([p is not None for p in slots]))
    return [p for p in slots if p is not None], plan


class _Kept:
    """A `C.Encoder` on weights where and as they lie, for as long as they do."""

    def __init__(self, layers: list[Layer], dtype: torch.dtype, encoder: Any) -> None:
        self.flat, self.dtype, self.encoder = flat_weights(layers), dtype, encoder
        self.form = self._form()

    def _form(self):
        layouts = C.layouts(torch.Tensor.__dlpack_c_exchange_api__, self.flat)
        return layouts and (layouts, [*map(_is_neg, self.flat)])  # a flag that DLPack doesn't know

    def holds(self, hidden: torch.Tensor) -> bool:
        return hidden.dtype is self.dtype and self.form is not None and self.form == self._form()


def _weights_limit(layers, hidden):
    kept = getattr(layers, "kept", None)
    if kept is not None:
        if kept.holds(hidden):
            return None
        layers.kept = None
    flat, plan = _planned(_apart(layers))
    if plan.missing:
        return "a weight is missing"
    dtypes = list(map(_dtype, flat))
    matrices = {*compress(dtypes, plan.matrices)}
    if len(matrices) > 1 or not matrices <= {torch.float32, hidden.dtype}:
        return f"the matrices are in {sorted(map(str, matrices))} beside {hidden.dtype}"
    if not {*dtypes} <= {*CPU_DTYPES} or {*map(_device, flat)} != {hidden.device} or lazy(*flat):
        return "a parameter is no float32 or bfloat16 in this CPU's memory"
    if list(map(_shape, flat)) != plan.shapes:
        return "the weights' shapes don't fit together"
    return None


@functools.lru_cache
def c_spec(spec: LayerSpec) -> Any:
    """Of C++."""
    return C.LayerSpec(
        hidden=spec.hidden,
        heads=spec.heads,
        inner=spec.inner,
        activation=ACTIVATIONS.index(spec.activation),
        eps=spec.eps,
        scale=spec.scale,
        pre_norm=spec.pre_norm,
        rms=spec.rms,
        gated=spec.gated,
        groups=spec.groups,
        window=-1 if spec.window is None else spec.window,
        rotary=-1 if spec.rotary is None else spec.rotary,
    )


def _apart(layers: list[Layer]) -> list[Layer]:
    """With each role's weights its own."""
    return [
        layer._replace(weights=layer.apart(), stacked=()) if layer.stacked else layer
        for layer in layers
    ]


def run(layers: list[Layer], batch: Batch) -> torch.Tensor:
    """In bf16 the residual stream stays in fp32 between layers."""
    hidden, relative = batch.hidden, batch.relative
    tables = []
    if layers[0].spec.relative:
        index, first, last = _reached(batch)
        rows = relative.embeddings[first : last + 1].to(hidden.dtype)
        batch = batch._replace(relative=Relative(rows, index - first))
        tables = [relative_tables(layer, rows) for layer in _apart(layers)]
    encoder, _memory = _live(layers, hidden.dtype, tables)
    return forward(encoder, 0, len(layers), batch, hidden.dtype)


def _live(layers: list[Layer], dtype, tables=()):
    """A `C.Encoder` on the weights as they are, and what it must not outlive. Of weights that a
    `limit` just found in their places, the one that is kept."""
    kept = getattr(layers, "kept", None)
    if kept is not None and kept.dtype is dtype:
        return kept.encoder, kept
    flat = [p for layer in _apart(layers) for p in layer.weights.flat()]
    memory = [p if p is None or p.is_contiguous() else p.contiguous() for p in flat]
    slots = array("q", map(ptr, memory))
    narrow = [
        0 if p is None or matrix or p.dtype is torch.float32 else p.numel()
        for p, matrix in zip(memory, IS_MATRIX * len(layers), strict=True)
    ]
    encoder = C.Encoder(
        *([c_spec(layer.spec) for layer in layers], slots.buffer_info()[0]),
        *(narrow if any(narrow) else [], is_bf16(memory[0]), int(dtype == torch.bfloat16)),
        [list(map(ptr, two)) for two in tables],
    )
    own = all(map(operator.is_, memory, flat)) and not tables
    if own and isinstance(layers, Layers):
        layers.kept = _Kept(layers, dtype, encoder)
    return encoder, memory


def _reached(batch: Batch):
    """The part of the relative positions' index that the call reaches, and its least and largest
    bucket. Raises IndexError for buckets that aren't there."""
    embeddings, index = batch.relative
    middle, reach = len(index) // 2, max(batch.longest - 1, 0)
    index = index[middle - reach : middle + reach + 1]
    first, last = (int(n) for n in torch.aminmax(index))
    if first < 0 or last >= len(embeddings):
        raise IndexError(f"relative.index has {first} to {last} of {len(embeddings)} embeddings")
    return index, first, last


@torch.no_grad()
def relative_tables(layer: Layer, embeddings: torch.Tensor) -> list[torch.Tensor | None]:
    """[buckets, hidden] -> what a layer's queries meet, and its keys: fp32, [buckets, width]."""
    found = dict.fromkeys(("c2p", "p2c"))
    for kind in layer.spec.relative:
        weight, bias = (
            p.float() if p is not None and embeddings.dtype == torch.float32 else p
            for p in getattr(layer.weights, layer.role_of(kind))
        )
        found[kind] = call("linear_act", embeddings, weight, bias, 0, False)[0].float()
    return [*found.values()]


def forward(encoder: Any, first: int, last: int, batch: Batch, dtype: torch.dtype) -> torch.Tensor:
    """Layers [first, last) of a `C.Encoder`, whose size the batch was checked for: [tokens or rows,
    hidden] in `dtype`."""
    for given in (batch.hidden.dtype, dtype):
        if given not in CPU_DTYPES:
            raise TypeError(f"states of {given}, expected torch.float32 or torch.bfloat16")
    parts = batch.hidden, batch.cu_seqlens, batch.seqused_k, batch.rows
    hidden, starts, used, rows = map(real, parts)
    count = len(hidden) if rows is None else len(rows)
    out = torch.empty((count, hidden.shape[1]), dtype=dtype, device="cpu")
    if count:
        bias = None if batch.bias is None else dense_last(batch.bias)
        angles = [real(table) for table in batch.angles]
        index = None if batch.relative is None else real(batch.relative.index)
        even = None if batch.even is None else batch.even.share.float()
        given = c_batch(batch, hidden, out, starts, used, rows, bias, angles, index, even)
        encoder.forward(first, last, given)
    return out


def c_batch(
    batch: Batch,
    hidden: torch.Tensor,
    out: torch.Tensor,
    starts: torch.Tensor,
    used: torch.Tensor | None,
    rows: torch.Tensor | None,
    bias: torch.Tensor | None,
    angles: Sequence[torch.Tensor] = (),
    index: torch.Tensor | None = None,
    even: torch.Tensor | None = None,
) -> Any:
    """Of C++, with whatever stands for the batch's tensors in memory."""
    return C.Batch(
        hidden=hidden.data_ptr(),
        dtype=GPU_DTYPES.index(hidden.dtype),  # DType in csrc/layer.h has the same order
        out=out.data_ptr(),
        out_dtype=GPU_DTYPES.index(out.dtype),
        cu_seqlens=starts.data_ptr(),
        seqused_k=ptr(used),
        batch=len(starts) - 1,
        tokens=len(hidden),
        longest=int(batch.longest),
        rows=ptr(rows),
        count=len(out),
        bias=bias_arguments(bias),
        angles=[ptr(table) for table in angles],
        rel_index=0 if index is None else index[len(index) // 2 :].data_ptr(),
        even=ptr(even),
    )


def live_texts(layers: list[Layer], tables: Sequence[torch.Tensor], *given: Any) -> torch.Tensor:
    """`texts` by layers whose weights may change."""
    encoder, _memory = _live(layers, tables[0].dtype)
    return texts(encoder, tables[0].dtype, tables, *given)


def texts_fit(
    tables: Sequence[torch.Tensor],
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    types: torch.Tensor | None,
) -> bool:
    """Whether `texts` may take a call's place: nobody watches, and memory is as C++ reads it."""
    words, positions, *_ = tables
    given = [t for t in (ids, mask, types) if t is not None]
    return (
        C is not None
        and unwatched()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and registry.forced() in (None, "cpu")
        and words.dtype in CPU_DTYPES
        and all(
            [
                type(t) is torch.Tensor
                and plain(t)
                and t.dtype == torch.int64
                and t.device.type == "cpu"
                and t.dim() == 2
                and t.shape == ids.shape
                and t.is_contiguous()
                for t in given
            ]
        )
        and ids.numel() > 0
        and ids.shape[1] <= len(positions)
        and all(
            [
                t.is_cpu
                and t.dtype == words.dtype
                and plain(t)
                and t.dim() == rank
                and t.shape[-1] == words.shape[-1]
                and t.is_contiguous()
                for t, rank in zip(tables, (2, 2, 2, 1, 1), strict=True)
            ]
        )
    )


def texts(
    encoder: Any,
    dtype: torch.dtype,
    tables: Sequence[torch.Tensor],
    eps: float,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    types: torch.Tensor | None,
) -> torch.Tensor:
    """A padded batch from its ids to its states by one call, for which Python's own time for
    packing, embedding and unpacking is a third of a short text's.

    Args:
        encoder: a `C.Encoder` without relative or rotary positions.
        dtype: of the states.
        tables: the words', positions' and types' embeddings, their LayerNorm's weight and bias.
        eps: of that LayerNorm.
        ids, mask, types: int64 [batch, seqlen]; the last two may be None. See `texts_fit`.

    Returns: [batch, seqlen, hidden], zeros at the padding.

    Raises: IndexError for ids out of range.
    """
    words, _, kinds, *_ = tables
    shape = (*ids.shape, words.shape[1])
    x = torch.empty(shape, dtype=words.dtype, device="cpu")
    packed, states = (torch.empty(shape, dtype=dtype, device="cpu") for _ in range(2))
    encoder.texts(
        *([t.data_ptr() for t in tables], is_bf16(words), eps, len(words), len(kinds)),
        *(ids.data_ptr(), *(0 if t is None else t.data_ptr() for t in (mask, types))),
        *(*ids.shape, x.data_ptr(), packed.data_ptr(), states.data_ptr(), is_bf16(states)),
    )
    return states
