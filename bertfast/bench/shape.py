"""What the benchmarks of operators run on: a batch, and the sizes of a BERT."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Shape:
    """A batch, and the sizes of a BERT."""

    lengths: tuple[int, ...]
    hidden: int = 384  # the defaults are MiniLM's
    heads: int = 12
    inner: int = 1536
    vocabulary: int = 30522
    seqlen: int = 0  # of the padded batch; 0 for the longest
    device: str = "cpu"

    @classmethod
    def of(
        cls,
        config: "PreTrainedConfig",
        lengths: Sequence[int],
        seqlen: int = 0,
        device: str = "cpu",
    ) -> "Shape":
        sizes = (config.hidden_size, config.num_attention_heads, config.intermediate_size)
        return cls(tuple(lengths), *sizes, config.vocab_size, seqlen, device)

    @cached_property
    def tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def longest(self) -> int:
        return self.seqlen or max(self.lengths)

    @cached_property
    def cu_seqlens(self) -> torch.Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0).int().to(self.device)

    @property
    def positions(self) -> torch.Tensor:
        return torch.cat([torch.arange(n) for n in self.lengths])

    @cached_property
    def mask(self) -> torch.Tensor:
        """int64 [batch, longest]"""
        lengths = torch.tensor(self.lengths)[:, None]
        return (torch.arange(self.longest) < lengths).long().to(self.device)

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, ...] -> [batch, longest, ...]"""
        out = x.new_zeros(*self.mask.shape, *x.shape[1:])
        out[self.mask.bool()] = x
        return out

    def linear_flop(self, into: int, out: int) -> float:
        return 2 * self.tokens * into * out

    def attention_flop(self) -> float:
        return 4 * self.hidden * sum(n * n for n in self.lengths)
