"""Micro-batches of sources and targets, packed on both sides."""

from itertools import chain
from typing import NamedTuple

import numpy as np
import torch


class Pairs(NamedTuple):
    """The arguments of `BertEncoderDecoder.loss_packed`."""

    input_ids: torch.Tensor  # int64 [source tokens]
    cu_seqlens: torch.Tensor  # int32 [pairs + 1]
    max_seqlen: int
    decoder_input_ids: torch.Tensor  # int64 [target tokens]
    decoder_cu_seqlens: torch.Tensor  # int32 [pairs + 1]
    decoder_max_seqlen: int
    labels: torch.Tensor  # int64 [target tokens]

    @classmethod
    def of_rows(cls, rows: list[dict], start: int) -> "Pairs":
        """Of `input_ids` and `labels`, a target with its end; `start`: what stands before it."""
        sources, targets = ([row[k] for row in rows] for k in ("input_ids", "labels"))
        inputs = [[start, *target[:-1]] for target in targets]
        return cls(*_side(sources), *_side(inputs), _flat(targets))

    def to(self, device: torch.device | str) -> "Pairs":
        moved = (
            v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for v in self
        )
        return Pairs(*moved)


def _flat(sequences):
    return torch.from_numpy(np.fromiter(chain.from_iterable(sequences), np.int64))


def _side(sequences):
    lengths = [len(s) for s in sequences]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return _flat(sequences), torch.from_numpy(starts), max(lengths)
