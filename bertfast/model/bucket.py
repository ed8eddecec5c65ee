"""How a padded batch gets into the buffer of a CUDA graph's bucket."""

import importlib
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ..ops.declare import check_range

if TYPE_CHECKING:
    from .graphs import Static


class OnCPU:
    """A batch whose inputs are there: packed by numpy, whose calls cost less than torch's, so that
    one copy takes it to the GPU."""

    def __init__(
        self,
        inner: nn.Module,
        shape: tuple[int, int],
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        types: torch.Tensor | None,
        positions: torch.Tensor | None,
    ) -> None:
        self.sequences, self.seqlen = shape
        kept = np.ones(shape, bool) if mask is None else (mask.detach() != 0).numpy()
        self.lengths, self.first = kept.sum(1), kept[:, :1]
        self.tokens, self.longest = int(self.lengths.sum()), int(self.lengths.max(initial=0))
        self.padded = self.tokens < kept.size
        self.kept = kept.reshape(-1).nonzero()[0] if self.padded else slice(None)
        self.indices, embeddings = None, inner.embeddings

        def packed(name, ids, table):
            values = ids.expand(shape).numpy().reshape(-1)[self.kept]
            if self.tokens:
                check_range(name, values.min(), values.max(), table.weight.shape[0])
            return values

        ids = packed("input_ids", ids, embeddings.word_embeddings)
        if positions is None:
            positions = np.arange(kept.size)[self.kept] % max(self.seqlen, 1)
        else:
            positions = packed("position_ids", positions, embeddings.position_embeddings)
        if types is None:
            types = 0
        else:
            types = packed("token_type_ids", types, embeddings.token_type_embeddings)
        self.rows = ids, positions, types

    def fill(self, static: "Static") -> None:
        size, count, buffer = static.size, self.sequences, static.buffer
        # From pinned memory, which torch gives out again once it is copied, the host goes on.
        pinned = buffer.device.type == "cuda"
        here = torch.empty(buffer.shape, dtype=torch.int64, pin_memory=pinned)
        *rows, offsets, first, indices = static.views(here.numpy())
        for view, values in zip(rows, self.rows, strict=True):
            view[: self.tokens] = values
            view[self.tokens :] = 0  # valid everywhere
        offsets[0] = 0
        np.cumsum(self.lengths, out=offsets[1 : count + 1])
        padding = np.arange(1, size.sequences - count + 1) * size.longest + self.tokens
        np.minimum(padding, size.tokens, out=offsets[count + 1 :])
        first[:count] = self.first[:, 0]
        first[count:] = 0
        if self.padded:
            indices[: self.tokens] = self.kept
            self.indices = static.views(buffer)[-1][: self.tokens]
        buffer.copy_(here, non_blocking=True)


class OnGPU:
    """A batch whose inputs are there: packed by one kernel. Only how many tokens a mask keeps has
    to be waited for."""

    def __init__(
        self,
        inner: nn.Module,
        shape: tuple[int, int],
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        types: torch.Tensor | None,
        positions: torch.Tensor | None,
    ) -> None:
        self.sequences, self.seqlen = shape
        self.tokens, self.longest, self.indices = shape[0] * shape[1], shape[1], None
        if mask is not None:
            indices = mask.reshape(-1).nonzero().view(-1)
            if indices.shape[0] < self.tokens:
                self.tokens, self.indices = indices.shape[0], indices
        self.rows = [
            None if t is None else t.expand(shape).long().contiguous()
            for t in (ids, positions, types)
        ]

    def fill(self, static: "Static") -> None:
        kernel = importlib.import_module("bertfast.kernels.bucket")
        kernel.fill(static.buffer, self.indices, *self.rows, self.tokens, static.size)
