"""LevelDB's sorted table, in which TensorFlow keeps what a checkpoint holds.

Blocks of entries, a block of their places, a footer of 48 bytes. A key says how much it shares with
the one before it; each block has a checksum, and may be compressed by Snappy.
"""

from mmap import mmap

from .binary import part, unsnappy, varint
from .crc32c import masked

FOOTER = 48
MAGIC = 0xDB4775248B80FB57.to_bytes(8, "little")


def read(data: bytes | mmap) -> dict[bytes, bytes]:
    """The entries of a table's bytes in its order. Raises ValueError."""
    footer = part(data, len(data) - FOOTER, FOOTER) if len(data) >= FOOTER else b""
    if footer[-8:] != MAGIC:
        raise ValueError("it doesn't end as a table does")
    _, at = _handle(footer, 0)
    found = {}
    for _, place in _block(data, *_handle(footer, at)[0]):
        for key, value in _block(data, *_handle(place, 0)[0]):
            if key in found:
                raise ValueError(f"the key {key!r} is there twice")
            found[key] = value
    return found


def _handle(data, at):
    """((a block's place, its size), place after it)"""
    place, at = varint(data, at)
    size, at = varint(data, at)
    return (place, size), at


def _block(data, place, size):
    """(key, value) of each entry."""
    whole = bytes(part(data, place, size + 5))
    if masked(whole[: size + 1]) != int.from_bytes(whole[size + 1 :], "little"):
        raise ValueError(f"the block at byte {place} has another checksum")
    if whole[size] > 1:
        raise ValueError(f"the block at byte {place} is compressed by the unknown {whole[size]}")
    block = unsnappy(whole[:size]) if whole[size] else whole[:size]
    restarts = int.from_bytes(block[-4:], "little")
    end, at, key = len(block) - 4 * (restarts + 1), 0, b""
    if end < 0:
        raise ValueError(f"the block at byte {place} is too short")
    block = block[:end]
    while at < end:
        shared, at = varint(block, at)
        own, at = varint(block, at)
        length, at = varint(block, at)
        if shared > len(key):
            raise ValueError(f"a key in the block at byte {place} shares more than there is")
        key = key[:shared] + part(block, at, own)
        yield key, part(block, at + own, length)
        at += own + length
