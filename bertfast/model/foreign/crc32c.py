"""CRC-32C (Castagnoli), TensorFlow's checksum, in numpy: 400 MB take a second.

A register of the checksum is linear over GF(2) in what it has read. So 2^14 of them, lanes, take
turns at the words of 32 bits: `after` a row of words, each moves on by a whole row, which is one
linear map, and adds its next word. At the end halves are folded onto each other.
"""

from functools import cache
from mmap import mmap

import numpy as np

_POLYNOMIAL = 0x82F63B78  # bits reversed
_LANES = 14  # log2; rows of 64 KB, as caches have room for


def crc32c(data: bytes | mmap | np.ndarray) -> int:
    """The checksum of bytes (anything with a contiguous buffer)."""
    data = np.frombuffer(data, np.uint8)
    count = len(data)
    k = min(_LANES, max(0, (count - 1) // 4).bit_length())
    width = 4 << k
    # Zeros before the first byte leave an empty register empty.
    row = np.zeros(width, np.uint8)
    head = count % width or min(count, width)
    row[width - head :] = data[:head]
    lanes = row.view("<u4")
    by_row = _tables(5 + k, 16)
    for row in np.frombuffer(data[head:], "<u4").reshape(-1, 1 << k):
        lanes = _move(by_row, lanes)
        lanes ^= row
    while k:
        k -= 1
        lanes = _move(_tables(5 + k, 8), lanes[: 1 << k]) ^ lanes[1 << k :]
    value = int(_apply(_after(5), lanes)[0])
    # What a register starts with, all ones, moves on by all bytes.
    start = np.array([0xFFFFFFFF], np.uint32)
    for bit in range(count.bit_length()):
        if count >> bit & 1:
            start = _apply(_after(3 + bit), start)
    return value ^ int(start[0]) ^ 0xFFFFFFFF


def masked(data: bytes | mmap | np.ndarray) -> int:
    """The checksum as TensorFlow stores it, so that one of data with checksums in it is sound."""
    value = crc32c(data)
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF


@cache
def _after(k: int) -> np.ndarray:
    """Where each of a register's 32 bits goes when 2^k bits of zeros follow. uint32 [32]"""
    if k == 0:
        bits = [_POLYNOMIAL, *(1 << i for i in range(31))]
        return np.array(bits, np.uint32)
    return _apply(_after(k - 1), _after(k - 1))


def _apply(images, values) -> np.ndarray:
    """A linear map of registers. uint32 [32], [n] -> [n]"""
    found = np.zeros_like(values)
    for i, image in enumerate(images):
        found ^= (values >> np.uint32(i) & np.uint32(1)) * image
    return found


@cache
def _tables(k: int, bits: int):
    """The map of 2^k bits of zeros, of each 8 or 16 bits of a register. uint32 [2^bits] each"""
    images = _after(k)
    return [_table(images[i : i + bits]) for i in range(0, 32, bits)]


def _move(tables, lanes):
    """`_apply` by tables, for many. uint32 [n] -> [n]"""
    parts = lanes.view("<u2" if len(tables) == 2 else np.uint8)
    found = np.take(tables[0], parts[:: len(tables)])
    for i, table in enumerate(tables[1:], 1):
        found ^= np.take(table, parts[i :: len(tables)])
    return found


def _table(images):
    found = np.zeros(1, np.uint32)
    for image in images:
        found = np.concatenate((found, found ^ image))
    return found
