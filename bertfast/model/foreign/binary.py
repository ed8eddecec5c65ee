"""What TensorFlow's files are made of: varints, protobuf messages, Snappy. Damage is ValueError."""

from mmap import mmap
from typing import TypeAlias

Buffer: TypeAlias = bytes | mmap


def varint(data: Buffer, at: int) -> tuple[int, int]:
    """(value, place after it)"""
    value = 0
    for i in range(10):
        if at + i >= len(data):
            raise ValueError(f"a number at byte {at} is cut off")
        byte = data[at + i]
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, at + i + 1
    raise ValueError(f"a number at byte {at} has more than 10 bytes")


def part(data: Buffer, at: int, size: int) -> Buffer:
    """`size` bytes from `at`."""
    if size > len(data) - at:
        raise ValueError(f"{size} bytes from byte {at} on, where it has {len(data)}")
    return data[at : at + size]


def message(data: Buffer) -> dict[int, list]:
    """The fields of a protobuf message by number: whole numbers, or bytes."""
    found, at = {}, 0
    while at < len(data):
        key, at = varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value, at = int.from_bytes(part(data, at, size), "little"), at + size
        elif kind == 2:
            size, at = varint(data, at)
            value, at = part(data, at, size), at + size
        else:
            raise ValueError(f"a field of the unknown kind {kind}")
        found.setdefault(key >> 3, []).append(value)
    return found


def unsnappy(data: Buffer) -> bytes:
    """What a Snappy block holds."""
    size, at = varint(data, 0)
    found = bytearray()
    while at < len(data):
        tag, at = data[at], at + 1
        kind, length = tag & 3, (tag >> 2) + 1
        if kind == 0:
            if length > 60:
                more = length - 60
                length = int.from_bytes(part(data, at, more), "little") + 1
                at += more
            found += part(data, at, length)
            at += length
            continue
        more = (1, 2, 4)[kind - 1]
        offset = int.from_bytes(part(data, at, more), "little")
        at += more
        if kind == 1:
            offset |= tag >> 5 << 8
            length = (tag >> 2 & 7) + 4
        if not 0 < offset <= len(found):
            raise ValueError(f"a copy from {offset} bytes before its start")
        while length:  # it may reach into what it makes
            piece = found[-offset:][:length]
            found += piece
            length -= len(piece)
    if len(found) != size:
        raise ValueError(f"{len(found)} bytes in a compressed block of {size}")
    return bytes(found)
