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
    padding: "Padding | None" = None  # rows behind those of the sequences

    @classmethod
    def of(cls, hidden, packing, **rest):
        """packing: a `Packing`, or `PackedSequences`."""
        return cls(
            hidden,
            *(packing.cu_seqlens, packing.seqlen, packing.seqused_k),
            captured=getattr(packing, "captured", False),
            padding=packing.padding,
            **rest,
        )

    def check(self, size: int, values: bool = True) -> None:
        """Raises TypeError, ValueError or IndexError where it doesn't fit together, or layers of
        this hidden size; `values`: whether those of the offsets may be read."""
        hidden = self.hidden if self.padding is None else self.hidden[: self.padding.first]
        STATES.check(
            (hidden, size, self.cu_seqlens, self.longest, self.seqused_k, self.rows), values
        )


class Relative(NamedTuple):
    """Positions of keys as queries see them (He et al., arXiv:2006.03654)."""

    embeddings: torch.Tensor  # [buckets, hidden]
    # int32 [2 * n - 1], n >= longest: the bucket of query - key = -(n - 1) .. n - 1
    index: torch.Tensor


class Padding(NamedTuple):
    """Rows of padding that see every place of their padded sequence alike: what attention gives
    them is a mean of values."""

    first: int  # of these rows
    cu_seqlens: torch.Tensor  # int32 [sequences + 1], the offsets of each sequence's among them
    longest: int  # or a bound above it
    places: torch.Tensor  # int64 [sequences, seqlen], the row that is at each place
    cu_places: torch.Tensor  # int32 [sequences + 1], the offsets of each sequence's places


class PackedSequences(NamedTuple):
    """All that the layers need of a `Packing`, for sequences that come packed."""

    cu_seqlens: torch.Tensor  # int32 [sequences + 1]
    seqlen: int  # the longest
    seqused_k: torch.Tensor | None = None  # int32 [sequences], see `ops.attention`
    padding: Padding | None = None


def lowered(hidden):
    """In autocast's dtype where that is on: our operators take the dtype they are given."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return hidden.to(torch.get_autocast_dtype(device))
    return hidden


def check_mask(attention_mask, batch: int, seqlen: int):
    if attention_mask is not None and attention_mask.shape != (batch, seqlen):
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}, expected "
            f"[{batch}, {seqlen}] as the input: one 0 or 1 for each token"
        )


class Packing:
    """Where the real tokens of a padded batch are; made once for a forward.

    attention_mask [batch, seqlen], 0 at padding, None for none.
    """

    seqused_k = padding = None
    captured = False

    def __init__(self, batch: int, seqlen: int, attention_mask, device):
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

    def pack(self, x):
        """[batch, seqlen, ...] -> [tokens, ...]"""
        if self.indices is None:
            return x.reshape(self.batch * self.seqlen, *x.shape[2:])
        return gather(x, self.indices)

    def unpack(self, x):
        """[tokens, ...] -> [batch, seqlen, ...], zeros at the padding."""
        if self.indices is None:
            return x.view(self.batch, self.seqlen, *x.shape[1:])
        return ops.unpack(x, self.indices, self.batch, self.seqlen)

    def columns(self):
        """int64 [tokens]: which of its row each token is."""
        if self.indices is None:
            return torch.arange(self.seqlen, device=self.cu_seqlens.device).repeat(self.batch)
        return self.indices % max(self.seqlen, 1)

    def first_rows(self, tokens: int):
        """int64 [batch]: where column 0 is among the tokens; any row where it is padding."""
        return self.cu_seqlens[:-1].long().clamp(max=tokens - 1)

    def zero_padded(self, first):
        """[batch, hidden], rows of `first_rows` -> the same, zeros where column 0 is padding."""
        if self.mask is None:
            return first
        return torch.where((self.mask[:, 0] != 0).unsqueeze(1), first, 0)

    def first(self, x):
        """[tokens, hidden] -> [batch, hidden]: column 0 of `unpack`, without making the rest."""
        if not torch.compiler.is_compiling() and x.shape[0] == 0:
            return x.new_zeros((self.batch, x.shape[1]))
        return self.zero_padded(x[self.first_rows(x.shape[0])])


class PaddedPacking(Packing):
    """All rows of a padded batch: a sequence's real tokens, then its padding, whose rows are
    queries alone. For who reads what the layers make of them.

    packing: that of the real tokens.
    """

    def __init__(self, packing: Packing):
        self.batch, self.seqlen, self.mask = packing.batch, packing.seqlen, packing.mask
        self.seqused_k = packing.cu_seqlens.diff()
        padding = (self.mask == 0).to(torch.uint8)
        rows = padding.argsort(dim=1, stable=True)
        starts = torch.arange(self.batch + 1, device=rows.device) * self.seqlen
        self.indices, self.cu_seqlens = (rows + starts[:-1, None]).flatten(), starts.int()


class EvenPacking(Packing):
    """All rows of a padded batch where those of padding see all alike (`Padding`), behind the real
    tokens.

    packing: that of the real tokens. zeros: whether all rows of padding are zeros and stay alike:
        then one stands for all of a sequence's.
    """

    def __init__(self, packing: Packing, zeros: bool):
        self.batch, self.seqlen, self.mask = packing.batch, packing.seqlen, packing.mask
        self.cu_seqlens, self.zeros, real = packing.cu_seqlens, zeros, packing.indices
        first, device = len(real), real.device
        ends = torch.arange(self.batch + 1, dtype=torch.int32, device=device)
        if zeros:
            starts, longest = ends, 1
            places = (first + ends[:-1].long()).repeat_interleave(self.seqlen)
            self.indices = real
        else:
            tokens = self.batch * self.seqlen - first
            padding, starts = call("pack_indices", self.mask == 0, tokens)
            longest, self.indices = self.seqlen, torch.cat([real, padding])
            places = torch.empty_like(self.indices)
            places[padding] = torch.arange(first, len(places), device=device)
        places[real] = torch.arange(first, device=device)
        places = places.view(self.batch, self.seqlen)
        self.padding = Padding(first, starts, longest, places, ends * self.seqlen)

    def pack(self, x):
        x = super().pack(x)
        return torch.cat([x, x.new_zeros(self.batch, *x.shape[1:])]) if self.zeros else x

    def unpack(self, x):
        places = self.padding.places
        return x.index_select(0, places.flatten()).unflatten(0, places.shape)
