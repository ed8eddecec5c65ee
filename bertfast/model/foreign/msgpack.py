"""MessagePack, of which the bytes of arrays are left where they are, in a file that is mapped.

A library would hold all of them, twice while it reads; what a checkpoint has of the format is this.
"""

import struct
from mmap import mmap
from typing import Any, NamedTuple

_DEPTH = 64  # of maps in maps
_NUMBERS = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"}
_NUMBERS |= {0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
_SINGLE = {0xC0: None, 0xC2: False, 0xC3: True}
# First byte -> (kind, bytes of its length)
_SIZED = {0xC4: ("bin", 1), 0xC5: ("bin", 2), 0xC6: ("bin", 4)}
_SIZED |= {0xD9: ("str", 1), 0xDA: ("str", 2), 0xDB: ("str", 4), 0xDC: ("list", 2)}
_SIZED |= {0xDD: ("list", 4), 0xDE: ("map", 2), 0xDF: ("map", 4)}
_SIZED |= {0xC7: ("ext", 1), 0xC8: ("ext", 2), 0xC9: ("ext", 4)}
_FIXED = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}  # ext of so many bytes


class Extension(NamedTuple):
    """A value of an application's own type."""

    code: int
    data: memoryview


def decode(data: bytes | mmap) -> Any:
    """The one value in bytes: dict, list, str, number, None, bool; a memoryview for binary data, an
    Extension. Raises ValueError."""
    reader = _Reader(memoryview(data))
    value = reader.value(0)
    if reader.at != len(reader.data):
        raise ValueError(f"its value ends at byte {reader.at:,} of {len(reader.data):,}")
    return value


class _Reader:
    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, size) -> memoryview:
        self.at += size
        if self.at > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data):,}, within a value")
        return self.data[self.at - size : self.at]

    def number(self, size) -> int:
        return int.from_bytes(self.take(size), "big")

    def value(self, depth):
        first = self.take(1)[0]
        if first < 0x80:
            return first
        if first >= 0xE0:
            return first - 0x100
        if first in _SINGLE:
            return _SINGLE[first]
        if first in _NUMBERS:
            form = _NUMBERS[first]
            return struct.unpack(form, self.take(struct.calcsize(form)))[0]
        if first in _FIXED:
            return self.sized("ext", _FIXED[first], depth)
        if first < 0x90:
            return self.sized("map", first & 15, depth)
        if first < 0xA0:
            return self.sized("list", first & 15, depth)
        if first < 0xC0:
            return self.sized("str", first & 31, depth)
        if first not in _SIZED:
            raise ValueError(f"byte {self.at - 1:,} is {first:#x}, which starts no value")
        kind, size = _SIZED[first]
        return self.sized(kind, self.number(size), depth)

    def sized(self, kind, size, depth):
        if kind == "bin":
            return self.take(size)
        if kind == "str":
            return bytes(self.take(size)).decode()
        if kind == "ext":
            code = struct.unpack("b", self.take(1))[0]
            return Extension(code, self.take(size))
        if depth == _DEPTH:
            raise ValueError(f"more than {_DEPTH} maps and lists in one another")
        if kind == "list":
            return [self.value(depth + 1) for _ in range(size)]
        found = {}
        for _ in range(size):
            key = self.value(depth + 1)
            if not isinstance(key, str | int) or key in found:
                raise ValueError(f"the key {key!r:.80} before byte {self.at:,}, expected new text")
            found[key] = self.value(depth + 1)
        return found
