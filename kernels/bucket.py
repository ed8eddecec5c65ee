"""A padded batch on a GPU into the static buffer of a CUDA graph (bertfast/model/bucket.py)."""

import triton.language as tl

from .jit import cdiv, jit
from .spec import Spec

_BLOCK, _WARPS = 256, 4
_SIZES = ["tokens", "batch", "seqlen", "room", "sequences", "longest", "steps"]


@jit(do_not_specialize=_SIZES)
def _fill(
    buffer, indices, ids, positions, types, tokens, batch, seqlen, room, sequences, longest, steps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """buffer: see `Static.views`; indices [tokens], None for all; ids, positions, types [batch,
    seqlen], the last two None for the default. All int64. steps: bits of tokens."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = i < tokens
    at = i.to(tl.int64)
    if indices is not None:
        at = tl.load(indices + i, real, other=0)
    tl.store(buffer + i, tl.load(ids + at, real, other=0), i < room)
    if positions is None:
        position = tl.where(real, at % seqlen, 0)
    else:
        position = tl.load(positions + at, real, other=0)
    tl.store(buffer + room + i, position, i < room)
    kind = tl.zeros([BLOCK], tl.int64)
    if types is not None:
        kind = tl.load(types + at, real, other=0)
    tl.store(buffer + 2 * room + i, kind, i < room)
    if tl.program_id(0) * BLOCK <= sequences:
        # Sequence i starts at the first token that lies in its row or behind.
        row = i.to(tl.int64) * seqlen
        start = row
        first = i < batch
        if indices is not None:
            start = tl.zeros([BLOCK], tl.int64)
            stop = start + tokens
            for _ in range(steps):
                middle = (start + stop) // 2
                inside = start < stop
                before = tl.load(indices + middle, inside, other=0) < row
                start = tl.where(inside & before, middle + 1, start)
                stop = tl.where(inside & ~before, middle, stop)
            first &= tl.load(indices + start, first & (start < tokens), other=-1) == row
        padding = tl.minimum(tokens + (i - batch).to(tl.int64) * longest, room)
        offsets = buffer + 3 * room
        tl.store(offsets + i, tl.where(i < batch, start, padding), i <= sequences)
        tl.store(offsets + sequences + 1 + i, first.to(tl.int64), i < sequences)


def fill(buffer, indices, ids, positions, types, tokens, size):
    """ids, positions, types: contiguous int64 [batch, seqlen]; size: the graph's `Bucket`."""
    batch, seqlen = ids.shape
    grid = cdiv(max(size.tokens, size.sequences + 1), _BLOCK)
    _fill[grid,](
        *(buffer, indices, ids, positions, types, tokens, batch, seqlen, *size),
        *(tokens.bit_length(), _BLOCK),
        num_warps=_WARPS,
    )


def shipped():
    sizes = dict.fromkeys(_SIZES, "i32")
    for absent in ((), ("indices",), ("positions",), ("indices", "positions", "types")):
        types = {k: "*i64" for k in ("buffer", "indices", "ids", "positions", "types")} | sizes
        types = {k: v for k, v in types.items() if k not in absent}
        yield Spec(_fill, types, dict.fromkeys(absent) | {"BLOCK": _BLOCK}, _WARPS)
