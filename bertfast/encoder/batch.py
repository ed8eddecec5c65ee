"""One call of an encoder, and what its tokens are in a padded batch."""

from typing import Any, NamedTuple

import torch

from .. import ops
from ..ops.declare import FLOATS, LENGTH, Below, Declaration, Number, Offsets, Tensor, UpToLengths
from ..ops.library import call
from ..ops.pack import gather

STATES = Declaration(  # what the encoder's layers take in one call
    "encoder(Tensor hidden, SymInt size, Tensor cu_seqlens, SymInt seqlen, Tensor? seqused_k, "
    "Tensor? rows) -> Tensor",
    hidden=Tensor("tokens, size", FLOATS),
    size=Number(1),
    cu_seqlens=Tensor("batch + 1", torch.int32, Offsets("tokens", "seqlen")),
    seqlen=LENGTH,
    seqused_k=Tensor("batch", torch.int32, UpToLengths("cu_seqlens")),
    rows=Tensor("n", torch.int64, Below("tokens")),
)


class Batch(NamedTuple):
    """Sequences side by side, for the layers."""

    hidden: torch.Tensor  # [tokens, hidden]
    cu_seqlens: torch.Tensor  # int32 [sequences + 1]
    longest: int  # or a bound above it
    seqused_k: torch.Tensor | None = None  # int32 [sequences], see `ops.attention`
    rows: torch.Tensor | None = None  # int64 [n], the last layer's that are wanted; None for all
    bias: torch.Tensor | None = None  # of every layer's attention, see `ops.attention`
    seeds: Any = None  # int64 [DROPOUTS * layers, 2]: each layer's as its `DropoutRates`
    # of rotary positions, a table each: cosines and sines, fp32 [tokens, 2, head_dim / 2]
    angles: tuple[torch.Tensor, ...] = ()
    relative: "Relative | None" = None  # disentangled positions
    captured: bool = False  # into a CUDA graph, whose launches cost nothing
    even: "Even | None" = None  # what padding sees

    @classmethod
    def of(cls, hidden: torch.Tensor, packing: "Packing | PackedSequences", **rest: Any) -> "Batch":
        """packing: a `Packing`, or `PackedSequences`."""
        return cls(
            hidden,
            *(packing.cu_seqlens, packing.seqlen, packing.seqused_k),
            captured=getattr(packing, "captured", False),
            even=packing.even,
            **rest,
        )

    def check(self, size: int, values: bool = True) -> None:
        """Raises TypeError, ValueError or IndexError where it doesn't fit together, or layers of
        this hidden size; `values`: whether those of the offsets may be read."""
        STATES.check(
            (self.hidden, size, self.cu_seqlens, self.longest, self.seqused_k, self.rows), values
        )


class Relative(NamedTuple):
    """Positions of keys as queries see them (He et al., arXiv:2006.03654)."""

    embeddings: torch.Tensor  # [buckets, hidden]
    # int32 [2 * n - 1], n >= longest: the bucket of query - key = -(n - 1) .. n - 1
    index: torch.Tensor


class Even(NamedTuple):
    """Rows of padding, those past `seqused_k`, that see all places of their padded sequence alike:
    attention gives them the mean of the values there. Its last row stands for all places that have
    no row of their own."""

    rows: torch.Tensor  # int64 [n], those rows
    cu_rows: torch.Tensor  # int32 [sequences + 1], the offsets of each sequence's among them
    longest: int  # the most that a sequence has
    # fp64 [n], the share of all places that a sequence's last row stands for besides its own; None
    # where all have one
    share: torch.Tensor | None


class PackedSequences(NamedTuple):
    """All that the layers need of a `Packing`, for sequences that come packed."""

    cu_seqlens: torch.Tensor  # int32 [sequences + 1]
    seqlen: int  # the longest
    seqused_k: torch.Tensor | None = None  # int32 [sequences], see `ops.attention`
    even: Even | None = None


def lowered(hidden: torch.Tensor) -> torch.Tensor:
    """In autocast's dtype where that is on: our operators take the dtype they are given."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return hidden.to(torch.get_autocast_dtype(device))
    return hidden


def check_mask(attention_mask: torch.Tensor | None, batch: int, seqlen: int) -> None:
    if attention_mask is not None and attention_mask.shape != (batch, seqlen):
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}, expected "
            f"[{batch}, {seqlen}] as the input: one 0 or 1 for each token"
        )


class Packing:
    """Where the real tokens of a padded batch are; made once for a forward.

    attention_mask [batch, seqlen], 0 at padding, None for none.
    """

    seqused_k = even = None
    captured = False

    def __init__(
        self,
        batch: int,
        seqlen: int,
        attention_mask: torch.Tensor | None,
        device: torch.device | str,
    ) -> None:
        self.batch, self.seqlen, self.mask = batch, seqlen, attention_mask
        if attention_mask is None:  # nothing to move, and no number of tokens to wait for
            self.indices = None
            self.cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * seqlen
            return
        check_mask(attention_mask, batch, seqlen)
        if attention_mask.device.type != torch.device(device).type:
            raise ValueError(
                f"attention_mask is on {attention_mask.device}, expected {device} as the input"
            )
        self.indices, self.cu_seqlens = call("pack_indices", attention_mask, None)

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, seqlen, ...] -> [tokens, ...]"""
        if self.indices is None:
            return x.reshape(self.batch * self.seqlen, *x.shape[2:])
        return gather(x, self.indices)

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, ...] -> [batch, seqlen, ...], zeros at the padding."""
        if self.indices is None:
            return x.view(self.batch, self.seqlen, *x.shape[1:])
        return ops.unpack(x, self.indices, self.batch, self.seqlen)

    def columns(self) -> torch.Tensor:
        """int64 [tokens]: which of its row each token is."""
        if self.indices is None:
            return torch.arange(self.seqlen, device=self.cu_seqlens.device).repeat(self.batch)
        return self.indices % max(self.seqlen, 1)

    def first_rows(self, tokens: int) -> torch.Tensor:
        """int64 [batch]: where column 0 is among the tokens; any row where it is padding."""
        return self.cu_seqlens[:-1].long().clamp(max=tokens - 1)

    def zero_padded(self, first: torch.Tensor) -> torch.Tensor:
        """[batch, hidden], rows of `first_rows` -> the same, zeros where column 0 is padding."""
        if self.mask is None:
            return first
        return torch.where((self.mask[:, 0] != 0).unsqueeze(1), first, 0)

    def first(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] -> [batch, hidden]: column 0 of `unpack`, without making the rest."""
        if not torch.compiler.is_compiling() and x.shape[0] == 0:
            return x.new_zeros((self.batch, x.shape[1]))
        return self.zero_padded(x[self.first_rows(x.shape[0])])


class PaddedPacking(Packing):
    """All rows of a padded batch: a sequence's real tokens, then its padding, whose rows are
    queries alone. For who reads what the layers make of them.

    packing: that of the real tokens. even: whether they are `Even`.
    """

    def __init__(self, packing: Packing, even: bool = False) -> None:
        self.batch, self.seqlen, self.mask = packing.batch, packing.seqlen, packing.mask
        self.seqused_k = packing.cu_seqlens.diff()
        padding = (self.mask == 0).to(torch.uint8)
        rows = padding.argsort(dim=1, stable=True)
        starts = torch.arange(self.batch + 1, device=rows.device) * self.seqlen
        self.indices, self.cu_seqlens = (rows + starts[:-1, None]).flatten(), starts.int()
        if even:
            behind = torch.arange(self.seqlen, device=rows.device) >= self.seqused_k[:, None]
            count = len(self.indices) - len(packing.indices)
            rows, starts = call("pack_indices", behind, count)
            self.even = Even(rows, starts, self.seqlen, None)


class ZerosPacking(Packing):
    """The real tokens of a padded batch, and behind each sequence's a row of zeros, for all of its
    padding where that is zeros and stays alike, as `Even` has it.

    packing: that of the real tokens.
    """

    def __init__(self, packing: Packing) -> None:
        self.batch, seqlen, self.mask = packing.batch, packing.seqlen, packing.mask
        self.seqlen, self.seqused_k = seqlen + 1, packing.cu_seqlens.diff()
        self.indices, device = packing.indices, packing.indices.device
        one = torch.arange(self.batch + 1, dtype=torch.int32, device=device)
        self.cu_seqlens = packing.cu_seqlens + one
        rows = self.cu_seqlens[1:].long() - 1
        tokens = torch.arange(len(self.indices), device=device)
        self.tokens = tokens + self.indices // seqlen  # where they are among all rows
        self.places = rows.repeat_interleave(seqlen).index_copy(0, self.indices, self.tokens)
        share = 1 - (self.seqused_k.double() + 1) / seqlen
        self.even = Even(rows, one, 1, share)

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        x = super().pack(x)
        rows = x.new_zeros(len(x) + self.batch, *x.shape[1:])
        return rows.index_copy(0, self.tokens, x)

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        return x.index_select(0, self.places).unflatten(0, (self.batch, self.seqlen - 1))
