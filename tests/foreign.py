"""Checkpoints of other frameworks, written from their formats' descriptions without our readers."""

import json
import struct

import numpy as np
import torch
import transformers

TYPES = {"float32": 1, "float64": 2, "int32": 3, "string": 7, "int64": 9, "bfloat16": 14}
TYPES |= {"float16": 19, "complex64": 8}
MAGIC = 0xDB4775248B80FB57
SIZES = {"vocab_size": 200, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 100, "max_position_embeddings": 40, "type_vocab_size": 2}

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "cat", "##s"]


def _byte(value):
    for _ in range(8):
        value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value


_BYTES = [_byte(i) for i in range(256)]


def crc(data) -> int:
    """CRC-32C, byte by byte."""
    value = 0xFFFFFFFF
    for byte in bytes(data):
        value = value >> 8 ^ _BYTES[(value ^ byte) & 255]
    return value ^ 0xFFFFFFFF


def masked(data) -> int:
    value = crc(data)
    return ((value >> 15 | value << 17) + 0xA282EAD8) % 2**32


def varint(n) -> bytes:
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def number(field, n) -> bytes:
    return varint(field << 3) + varint(n)


def text(field, data) -> bytes:
    return varint(field << 3 | 2) + varint(len(data)) + data


def snappy(data) -> bytes:
    """Literals of up to 60 bytes, and copies of what was seen four bytes long."""
    out, seen, at, start = varint(len(data)), {}, 0, 0

    def literal(end):
        nonlocal out
        for i in range(start, end, 60):
            piece = data[i : min(i + 60, end)]
            out += bytes([(len(piece) - 1) << 2]) + piece

    while at < len(data):
        key = data[at : at + 4]
        before = seen.get(key)
        seen[key] = at
        if before is None or len(key) < 4:
            at += 1
            continue
        literal(at)
        length = 4
        while (
            length < 64
            and data[at + length : at + length + 1] == data[before + length :][:1] != b""
        ):
            length += 1
        offset = at - before
        if length < 12 and offset < 2048:
            out += bytes([1 | (length - 4) << 2 | offset >> 8 << 5, offset & 255])
        else:
            out += bytes([2 | (length - 1) << 2]) + struct.pack("<H", offset)
        at += length
        start = at
    literal(len(data))
    return out


class Table:
    """LevelDB's table, of small blocks."""

    def __init__(self, compress=False):
        self.file, self.index, self.compress = b"", [], compress

    def block(self, entries) -> bytes:
        """Writes it; its handle."""
        body, restarts, last = b"", [], b""
        for i, (key, value) in enumerate(entries):
            shared = 0
            if i % 3:
                while key[: shared + 1] == last[: shared + 1] and shared < len(last):
                    shared += 1
            else:
                restarts.append(len(body))
            body += varint(shared) + varint(len(key) - shared) + varint(len(value))
            body, last = body + key[shared:] + value, key
        restarts = restarts or [0]
        body += b"".join(struct.pack("<I", r) for r in restarts) + struct.pack("<I", len(restarts))
        body = snappy(body) + b"\1" if self.compress else body + b"\0"
        handle = varint(len(self.file)) + varint(len(body) - 1)
        self.file += body + struct.pack("<I", masked(body))
        return handle

    def whole(self, entries, size=7) -> bytes:
        entries = sorted(entries)
        for i in range(0, len(entries), size):
            part = entries[i : i + size]
            self.index.append((part[-1][0], self.block(part)))
        at = len(self.file)
        handles = self.block([])  # of other properties
        self.unread = range(at, len(self.file))
        handles += self.block(self.index)
        return self.file + handles.ljust(40, b"\0") + struct.pack("<Q", MAGIC)


def dtype_of(value) -> str:
    return str(value.dtype).removeprefix("torch.")


def raw(value) -> bytes:
    """A torch tensor's or an array's bytes in row-major order."""
    if torch.is_tensor(value):
        return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return value.tobytes()


def tensorflow(prefix, tensors, shards=2, compress=False, header=b"", extra=(), entry=None):
    """PREFIX.index and its data files; `entry(name, fields)` may change an entry's fields."""
    data, entries = [b""] * shards, [(b"", number(1, shards) + header), *extra]
    for i, (name, value) in enumerate(sorted(tensors.items())):
        shard, body = i % shards, raw(value)
        shape = b"".join(text(2, number(1, n)) for n in value.shape)
        fields = {1: TYPES[dtype_of(value)], 2: shape, 3: shard, 4: len(data[shard]), 5: len(body)}
        fields |= {6: masked(body)}
        data[shard] += body
        if entry:
            entry(name, fields)
        out = b""
        for field, value in fields.items():  # a zero is left out, as protobuf does
            if field == 6:
                out += varint(6 << 3 | 5) + struct.pack("<I", value)
            elif isinstance(value, bytes):
                out += text(field, value)
            elif value:
                out += number(field, value)
        entries.append((name.encode(), out))
    prefix.parent.mkdir(parents=True, exist_ok=True)
    prefix.with_name(prefix.name + ".index").write_bytes(Table(compress).whole(entries))
    for i, body in enumerate(data):
        prefix.with_name(f"{prefix.name}.data-{i:05d}-of-{shards:05d}").write_bytes(body)


def pack(value) -> bytes:
    """MessagePack of a tree with tensors, as Flax writes it."""
    if isinstance(value, dict):
        n = len(value)
        head = bytes([0x80 | n]) if n < 16 else b"\xde" + struct.pack(">H", n)
        return head + b"".join(pack(k) + pack(v) for k, v in value.items())
    if isinstance(value, str):
        body = value.encode()
        n = len(body)
        return (bytes([0xA0 | n]) if n < 32 else b"\xd9" + bytes([n])) + body
    if isinstance(value, bool):
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, int):
        return bytes([value]) if value < 128 else b"\xcd" + struct.pack(">H", value)
    if isinstance(value, tuple):
        return bytes([0x90 | len(value)]) + b"".join(map(pack, value))
    if isinstance(value, bytes):
        return b"\xc6" + struct.pack(">I", len(value)) + value
    body = pack((tuple(value.shape), dtype_of(value), raw(value)))
    return b"\xc9" + struct.pack(">Ib", len(body), 1) + body


def tree(tensors) -> dict:
    found = {}
    for name, value in tensors.items():
        *path, leaf = name.split("/")
        at = found
        for part in path:
            at = at.setdefault(part, {})
        at[leaf] = value
    return found


def chunked(value, size) -> dict:
    """As Flax keeps arrays of more than 1 GB."""
    flat = value.reshape(-1)
    pieces = {str(i // size): flat[i : i + size] for i in range(0, len(flat), size)}
    shape = {str(i): n for i, n in enumerate(value.shape)}
    return {"__msgpack_chunked_array__": True, "shape": shape, "chunks": pieces}


def places(model, flax: bool):
    """(parameter, the framework's name, whether it is transposed there) of a model's, by hand."""
    kernel, bias = "kernel", "bias"
    gamma, beta, table = ("scale", "bias", "/embedding") if flax else ("gamma", "beta", "")

    def linear(m, path):
        yield m.weight, f"{path}/{kernel}", True
        yield m.bias, f"{path}/{bias}", False

    def norm(m, path):
        yield m.weight, f"{path}/{gamma}", False
        yield m.bias, f"{path}/{beta}", False

    bert = getattr(model, "bert", model)
    top = "" if flax and bert is model else "bert/"
    for kind in ("word", "position", "token_type"):
        weight = getattr(bert.embeddings, f"{kind}_embeddings").weight
        yield weight, f"{top}embeddings/{kind}_embeddings{table}", False
    yield from norm(bert.embeddings.LayerNorm, f"{top}embeddings/LayerNorm")
    for i, layer in enumerate(bert.encoder.layer):
        path = f"{top}encoder/layer{'/' if flax else '_'}{i}"
        for part in ("query", "key", "value"):
            yield from linear(getattr(layer.attention.self, part), f"{path}/attention/self/{part}")
        yield from linear(layer.attention.output.dense, f"{path}/attention/output/dense")
        yield from norm(layer.attention.output.LayerNorm, f"{path}/attention/output/LayerNorm")
        yield from linear(layer.intermediate.dense, f"{path}/intermediate/dense")
        yield from linear(layer.output.dense, f"{path}/output/dense")
        yield from norm(layer.output.LayerNorm, f"{path}/output/LayerNorm")
    if bert.pooler is not None:
        yield from linear(bert.pooler.dense, f"{top}pooler/dense")
    head = getattr(model, "cls", None)
    if hasattr(head, "predictions"):
        predictions = head.predictions
        yield from linear(predictions.transform.dense, "cls/predictions/transform/dense")
        yield from norm(predictions.transform.LayerNorm, "cls/predictions/transform/LayerNorm")
        yield predictions.bias, f"cls/predictions/{'bias' if flax else 'output_bias'}", False
    heads = {"cls/seq_relationship": getattr(head, "seq_relationship", None)}
    heads |= {"qa_outputs" if flax else "cls/squad": getattr(model, "qa_outputs", None)}
    heads |= {"classifier" if flax else "": getattr(model, "classifier", None)}
    for path, m in heads.items():
        if m is not None and flax:
            yield from linear(m, path)
        elif m is not None:
            yield m.weight, f"{path}/output_weights".strip("/"), False
            yield m.bias, f"{path}/output_bias".strip("/"), False


def tensors(model, flax: bool, dtype=torch.float32) -> dict:
    """Random weights in a model and, by the other framework's names, as it keeps them."""
    g, found = torch.Generator().manual_seed(0), {}
    for parameter, name, transposed in places(model, flax):
        value = (torch.randn(parameter.shape, generator=g) * 0.3).to(dtype)
        parameter.data = value.float()
        found[name] = value.T.contiguous() if transposed else value
    model.tie_weights()
    return found


def training(weights) -> dict:
    """What a run of google-research's code keeps besides."""
    found = {
        f"{n}/{slot}": torch.ones_like(t)
        for n, t in weights.items()
        for slot in ("adam_m", "adam_v")
    }
    return weights | found | {"global_step": np.array(7, np.int64)}


def google_folder(folder, weights, **options):
    """A checkpoint as google-research publishes them, with its configuration."""
    tensorflow(folder / "bert_model.ckpt", weights, **options)
    (folder / "bert_config.json").write_text(json.dumps(SIZES | {"hidden_act": "gelu"}))
    return folder


def flax_folder(folder, weights, **settings):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "flax_model.msgpack").write_bytes(pack(tree(weights)))
    (folder / "config.json").write_text(json.dumps(SIZES | {"model_type": "bert"} | settings))
    return folder


def built(head, num_labels=3, **options):
    """transformers' model, without our files or its own."""
    if head == "ForQuestionAnswering":
        num_labels = 2
    config = transformers.BertConfig(**SIZES, num_labels=num_labels, **options)
    return getattr(transformers, f"Bert{head}")(config).eval()
