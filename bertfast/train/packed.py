"""Micro-batches: sequences side by side, and what of them fills the buffer that a graph reads."""

from itertools import accumulate, pairwise
from math import prod
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from ..encoder.graph import Bucket, bucket, rounded

IGNORED = -100  # a label that counts for nothing

B = TypeVar("B", torch.Tensor, np.ndarray)


class Rows(NamedTuple):
    """The sequences of a `Packed` side by side in rows, for models that take them so."""

    input_ids: torch.Tensor  # int64 [sequences, longest], padded on the right, as the next two
    attention_mask: torch.Tensor
    token_type_ids: torch.Tensor | None  # None where the tokenizer makes none
    index: torch.Tensor  # int64 [tokens]: where each is in the flattened rows

    @classmethod
    def of(cls, ids: np.ndarray, types: np.ndarray, starts: np.ndarray, pad: int) -> "Rows":
        lengths = np.diff(starts)
        mask = np.arange(lengths.max()) < lengths[:, None]
        tables = np.full(mask.shape, pad, np.int64), np.zeros(mask.shape, np.int64)
        for table, values in zip(tables, (ids, types), strict=True):
            table[mask] = values
        arrays = tables[0], mask.astype(np.int64), tables[1], np.flatnonzero(mask)
        return cls(*map(torch.from_numpy, arrays))


class Packed(NamedTuple):
    """A micro-batch, as a task loads it (on the CPU) and as its loss takes it (on the device)."""

    input_ids: torch.Tensor  # int64 [tokens], as the next two
    position_ids: torch.Tensor
    token_type_ids: torch.Tensor
    cu_seqlens: torch.Tensor  # int32 [sequences + 1]
    max_seqlen: int
    positions: torch.Tensor | None = None  # int64 [masked]: the tokens to predict
    labels: torch.Tensor | None = None  # int64 [masked]: what they were, `IGNORED` of fillers
    targets: torch.Tensor | None = None  # [sequences, ...] of classes (int64) or numbers
    real: torch.Tensor | None = None  # int64 [sequences]: 0 of fillers; None where there are none
    rows: Rows | None = None  # the same sequences padded, for a model of transformers

    @classmethod
    def of_rows(cls, rows: list[dict], pad: int | None = None) -> "Packed":
        """Of encoded rows: input_ids and perhaps token_type_ids, see `data.encode`; `labels`, a
        number or a list of them; `places`, the tokens of the row that count, and their `tags`.
        pad: the padding's id, for `Packed.rows`; None for none."""
        lengths = [len(row["input_ids"]) for row in rows]
        ids = np.concatenate([row["input_ids"] for row in rows]).astype(np.int64)
        types = [r.get("token_type_ids", [0] * n) for r, n in zip(rows, lengths, strict=True)]
        types = np.concatenate(types)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        places = np.arange(len(ids)) - np.repeat(starts[:-1], lengths)
        arrays = (ids, places, types.astype(np.int64), starts.astype(np.int32))
        more = {}
        if "labels" in rows[0]:
            targets = np.asarray([row["labels"] for row in rows])
            whole = np.issubdtype(targets.dtype, np.integer)
            more["targets"] = targets.astype(np.int64 if whole else np.float32)
        if "places" in rows[0]:
            own = [np.asarray(r["places"]) + s for r, s in zip(rows, starts[:-1], strict=True)]
            more["positions"] = np.concatenate(own).astype(np.int64)
            tags = [r.get("tags", np.full(len(r["places"]), IGNORED)) for r in rows]
            more["labels"] = np.concatenate(tags).astype(np.int64)
        more = {name: torch.from_numpy(values) for name, values in more.items()}
        if pad is not None:
            more["rows"] = Rows.of(ids, types, starts, pad)
            if "token_type_ids" not in rows[0]:
                more["rows"] = more["rows"]._replace(token_type_ids=None)
        return cls(*map(torch.from_numpy, arrays), max(lengths), **more)

    @property
    def first(self) -> torch.Tensor:
        """int64 [sequences]: where each starts; any token, of an empty one."""
        return self.cu_seqlens[:-1].long().clamp(max=len(self.input_ids) - 1)

    def to(self, device: torch.device | str) -> "Packed":
        def moved(value):
            return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value

        *own, rows = self
        return Packed(*map(moved, own), rows and Rows(*map(moved, rows)))

    def filled(self, pin: bool) -> "Filled":
        """In the smallest bucket, in pinned memory or not.

        Fillers of `positions` name the last token, which may be a real one: no gradient comes of
        them. The longest is a bound that costs nothing: in powers of two there are half as many
        layouts of texts up to 512 tokens.
        """
        tokens, sequences = len(self.input_ids), len(self.cu_seqlens) - 1
        size = bucket(tokens, sequences, 1 << (self.max_seqlen - 1).bit_length())
        masked = None if self.positions is None else rounded(max(1, len(self.positions)))
        shape = None if self.targets is None else tuple(self.targets.shape[1:])
        numbers = shape is not None and self.targets.is_floating_point()
        layout = Layout(size, masked, shape, numbers)
        here = torch.empty(layout.length, dtype=torch.int64, pin_memory=pin)
        *rows, starts, real, positions, labels, targets = layout.views(here.numpy())
        for view, values in zip(rows, self[:3], strict=True):
            view[:tokens], view[tokens:] = values.numpy(), 0  # valid everywhere
        starts[: sequences + 1] = self.cu_seqlens.numpy()
        fillers = np.arange(1, size.sequences - sequences + 1) * size.longest + tokens
        np.minimum(fillers, size.tokens, out=starts[sequences + 1 :])
        real[:sequences], real[sequences:] = 1, 0
        if masked is not None:
            n = len(self.positions)
            positions[:n], positions[n:] = self.positions.numpy(), size.tokens - 1
            labels[:n], labels[n:] = self.labels.numpy(), IGNORED
        if shape is not None:
            n = self.targets.numel()
            targets = targets.view(np.float64) if numbers else targets
            targets[:n], targets[n:] = self.targets.numpy().reshape(-1), 0 if numbers else IGNORED
        return Filled(layout, here)


class Layout(NamedTuple):
    """What a graph of a micro-batch bakes in: all sizes of its buffer, which is int64."""

    size: Bucket
    masked: int | None  # tokens to predict; None where none are
    targets: tuple[int, ...] | None  # the shape of a sequence's; None where it has none
    numbers: bool  # targets are float64, bit by bit

    @property
    def _lengths(self):
        t, s, _ = self.size
        masked, targets = self.masked or 0, 0 if self.targets is None else prod(self.targets)
        return t, t, t, s + 1, s, masked, masked, s * targets

    @property
    def length(self) -> int:
        return sum(self._lengths)

    def views(self, buffer: B) -> list[B]:
        """ids, positions in sequences, types, starts, real, masked tokens, their labels, targets"""
        return [buffer[a:b] for a, b in pairwise(accumulate(self._lengths, initial=0))]

    def batch(self, buffer: torch.Tensor) -> Packed:
        ids, places, types, starts, real, positions, labels, targets = self.views(buffer)
        if self.targets is not None:
            targets = targets.view(torch.float64) if self.numbers else targets
            targets = targets.view(-1, *self.targets)
        return Packed(
            *(ids, places, types, starts.int(), self.size.longest),
            *((None, None) if self.masked is None else (positions, labels)),
            *(None if self.targets is None else targets, real),
        )


class Filled(NamedTuple):
    """A micro-batch with fillers."""

    layout: Layout
    values: torch.Tensor  # int64 [layout.length], on the CPU
