"""What other frameworks' files are made of, against writers that follow their descriptions."""

import random
import struct
from contextlib import suppress

import numpy as np
import pytest
import torch
from foreign import Table, chunked, crc, masked, pack, raw, snappy, tensorflow, varint
from helpers import refused

from bertfast.model import CheckpointError
from bertfast.model.foreign import flax, msgpack, table
from bertfast.model.foreign import tensorflow as bundle
from bertfast.model.foreign.binary import message, unsnappy
from bertfast.model.foreign.crc32c import crc32c
from bertfast.model.foreign.crc32c import masked as our_masked


def test_checksum_of_the_standard():
    """RFC 3720, B.4, and the usual check value."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E
    assert crc32c(b"") == 0


@pytest.mark.parametrize("size", [*range(1, 10), 63, 64, 65, 4097, 65535, 65536, 65537, 200_003])
def test_checksum_of_any_length(size):
    data = random.Random(size).randbytes(size)
    assert crc32c(data) == crc(data)
    assert our_masked(np.frombuffer(data, np.uint8)) == masked(data)


@pytest.mark.parametrize(
    "data", [b"", b"a", b"abcd" * 100, b"a" * 1000, random.Random(0).randbytes(500), b"ab" * 5000]
)
def test_snappy(data):
    assert unsnappy(snappy(data)) == data


def test_snappy_of_the_standard():
    long = bytes(range(256)) * 2
    head = varint(len(long))
    assert (
        unsnappy(head + bytes([61 << 2]) + struct.pack("<H", 511) + long) == long
    )  # 2 bytes of length
    far = (
        b"\x08\x0cabcd" + bytes([3 << 2 | 3]) + struct.pack("<I", 4)
    )  # a copy with 4 bytes of offset
    assert unsnappy(far) == b"abcdabcd"
    for bad in (b"\x08\x0cabcd", b"\x04\x01\x05", b"\x04\x0cab", b"\x80"):
        refused(ValueError, None, unsnappy, bad)


@pytest.mark.parametrize("compress", [False, True])
def test_table(compress):
    entries = [(f"bert/layer_{i}/kernel".encode(), b"value %d" % i * (i % 5)) for i in range(100)]
    data = Table(compress).whole(entries)
    assert table.read(data) == dict(entries) and list(table.read(data)) == sorted(dict(entries))


def test_every_flipped_bit_of_a_table_is_found():
    entries, made = [(f"name {i}".encode(), b"value") for i in range(5)], Table()
    data = made.whole(entries, size=3)
    assert table.read(data) == dict(entries)
    for at in range(len(data) - 8):
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        if at in made.unread or at >= len(data) - 48:  # nothing is read, or a place and padding
            with suppress(ValueError):
                assert table.read(bytes(flipped)) == dict(entries)
        else:
            refused(ValueError, None, table.read, bytes(flipped))
    for cut in range(len(data)):
        refused(ValueError, "doesn't end as a table", table.read, data[:cut])


def test_message():
    data = b"\x08\x96\x01\x12\x02hi\x1d\1\0\0\0\x21\2\0\0\0\0\0\0\0\x08\x05"
    assert message(data) == {1: [150, 5], 2: [b"hi"], 3: [1], 4: [2]}
    for bad in (b"\x08", b"\x12\x05a", b"\x0b", b"\x08" + b"\xff" * 11):
        refused(ValueError, None, message, bad)


VALUES = [
    (b"\x05", 5),
    (b"\xff", -1),
    (b"\xcc\xff", 255),
    (b"\xcd\x01\x00", 256),
    (b"\xce\x00\x01\x00\x00", 65536),
    (b"\xcf" + b"\0" * 7 + b"\1", 1),
    (b"\xd0\x80", -128),
    (b"\xd1\xff\x00", -256),
    (b"\xd2\xff\xff\xff\xfe", -2),
    (b"\xd3" + b"\xff" * 8, -1),
    (b"\xc0", None),
    (b"\xc2", False),
    (b"\xc3", True),
    (b"\xca\x3f\x80\x00\x00", 1.0),
    (b"\xcb\x3f\xf8" + b"\0" * 6, 1.5),
    (b"\xa2hi", "hi"),
    (b"\xd9\x02hi", "hi"),
    (b"\xda\x00\x02hi", "hi"),
    (b"\xdb\x00\x00\x00\x02hi", "hi"),
    (b"\xc4\x02hi", b"hi"),
    (b"\xc5\x00\x02hi", b"hi"),
    (b"\xc6\x00\x00\x00\x02hi", b"hi"),
    (b"\x92\x01\x02", [1, 2]),
    (b"\xdc\x00\x01\x07", [7]),
    (b"\xdd\x00\x00\x00\x01\x07", [7]),
    (b"\x81\xa1a\x01", {"a": 1}),
    (b"\xde\x00\x01\xa1a\x01", {"a": 1}),
    (b"\xdf\x00\x00\x00\x01\xa1a\x01", {"a": 1}),
    (b"\xd4\x05x", (5, b"x")),
    (b"\xd5\xffxy", (-1, b"xy")),
    (b"\xd8\x01" + b"z" * 16, (1, b"z" * 16)),
    (b"\xc7\x03\x01abc", (1, b"abc")),
    (b"\xc8\x00\x03\x01abc", (1, b"abc")),
    (b"\xc9\x00\x00\x00\x03\x01abc", (1, b"abc")),
]


@pytest.mark.parametrize("data, value", VALUES)
def test_msgpack(data, value):
    found = msgpack.decode(data)
    assert found == value and (type(value) is tuple or isinstance(found, type(value) | memoryview))
    for cut in range(len(data)):
        refused(ValueError, "it ends at byte", msgpack.decode, data[:cut])
    refused(ValueError, "its value ends at byte", msgpack.decode, data + b"\0")


def test_msgpack_refuses():
    refused(ValueError, "byte 0 is 0xc1", msgpack.decode, b"\xc1")
    refused(ValueError, "'a'.*expected new text", msgpack.decode, b"\x82\xa1a\x01\xa1a\x02")
    refused(ValueError, "maps and lists", msgpack.decode, b"\x91" * 100 + b"\x01")
    refused(ValueError, None, msgpack.decode, b"\xa1\xff")


def test_flax_arrays(tmp_path):
    g = torch.Generator().manual_seed(0)
    arrays = {"half": torch.randn(3, 5, generator=g).half(), "whole": torch.randn(7, generator=g)}
    arrays |= {"b": torch.randn(2, 2, generator=g).bfloat16(), "empty": torch.zeros(0, 4)}
    big = torch.randn(6, 7, generator=g)
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(pack({"params": {"a": arrays, "big": chunked(big, 10)}}))
    found = flax.read(path)
    assert set(found) == {"a/half", "a/whole", "a/b", "a/empty", "big"}
    for name, value in [*((f"a/{n}", t) for n, t in arrays.items()), ("big", big)]:
        t = found[name].read()
        assert t.dtype == value.dtype and torch.equal(t, value) and found[name].shape == t.shape


@pytest.mark.parametrize("compress, shards", [(False, 1), (True, 3)])
def test_tensorflow_tensors(tmp_path, compress, shards):
    g = torch.Generator().manual_seed(0)
    made = {"a/kernel": torch.randn(33, 70, generator=g), "b": torch.randn(5, generator=g).half()}
    made |= {"c": torch.randn(4, 3, generator=g).bfloat16(), "scalar": torch.tensor(2.5)}
    made |= {"empty": torch.zeros(0, 3), "step": np.array(3, np.int64)}
    tensorflow(tmp_path / "model.ckpt", made, shards=shards, compress=compress)
    found = bundle.read(tmp_path / "model.ckpt")
    assert set(found) == set(made) and found["step"].dtype == "int64"
    for name in set(made) - {"step"}:
        t = found[name].read()
        assert t.dtype == made[name].dtype and torch.equal(t, made[name])


def test_every_flipped_bit_of_the_data_is_found(tmp_path):
    value = torch.randn(9, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "m.data-00000-of-00001"
    tensorflow(tmp_path / "m", {"x": value}, shards=1)
    for at in range(len(raw(value))):
        flipped = bytearray(raw(value))
        flipped[at] ^= 1 << at % 8
        path.write_bytes(flipped)
        refused(CheckpointError, "checksum of x", bundle.read(tmp_path / "m")["x"].read)
