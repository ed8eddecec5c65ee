"""What `bertfast convert` refuses, and that nothing is written then."""

import json
import os
import random
import shutil

import pytest
import torch
from foreign import (
    WORDS,
    built,
    flax_folder,
    google_folder,
    pack,
    tensors,
    text,
)
from helpers import refused
from safetensors.torch import load_file, save_file

from bertfast.cli import main
from bertfast.convert import convert
from bertfast.data.errors import ConfigError
from bertfast.model import CheckpointError
from bertfast.model.foreign import flax as foreign_flax
from bertfast.model.foreign import tensorflow as bundle
from bertfast.model.foreign.stored import FLOATS


def _edit(name, change):
    def fault(folder):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return fault


def _config(**changes):
    return _edit(
        "bert_config.json",
        lambda data: json.dumps(
            {k: v for k, v in (json.loads(data) | changes).items() if v is not None}
        ).encode(),
    )


def _written(change=lambda weights: weights, **options):
    return lambda folder: google_folder(
        folder, change(tensors(built("Model"), flax=False)), **options
    )


def _field(number, value):
    def change(name, fields):
        if name == "bert/embeddings/word_embeddings":
            fields[number] = value

    return _written(entry=change)


def _without(name):
    return lambda folder: os.remove(folder / name)


def _only(name, data):
    """A folder with that file alone."""

    def fault(folder):
        for path in folder.iterdir():
            path.unlink()
        (folder / name).write_bytes(data)

    return fault


def _layer(weights, i):
    return {
        name.replace("layer_1", f"layer_{i}"): t for name, t in weights.items() if "layer_1" in name
    }


INDEX, DATA = "bert_model.ckpt.index", "bert_model.ckpt.data-00000-of-00002"
MORE = text(7, b"")
FAULTS = {  # what is done to a sound folder, the words of the error
    "missing shard": (_without(DATA), f"lacks {DATA}: bert_model.ckpt.index has its tensors in 2 files"),
    "missing index": (_without(INDEX), "holds .*: expected bert_model.ckpt.index of TensorFlow, flax_model"),
    "truncated data": (_edit(DATA, lambda d: d[:-9]), f"{DATA} is truncated: .* is in its bytes .*take it anew"),
    "empty data": (_edit(DATA, lambda d: b""), "is truncated: .* and it has 0"),
    "flipped bit": (_edit(DATA, lambda d: d[:999] + bytes([d[999] ^ 16]) + d[1000:]), f"{DATA} is damaged: the checksum of .* is another"),
    "flipped bit of the index": (_edit(INDEX, lambda d: d[:30] + bytes([d[30] ^ 1]) + d[31:]), f"{INDEX} is damaged .*has another checksum"),
    "truncated index": (_edit(INDEX, lambda d: d[:-1]), f"{INDEX} is no index of a TensorFlow checkpoint, or is truncated: it ends in .*expected 57fb808b247547db"),
    "empty index": (_edit(INDEX, lambda d: b""), "it ends in nothing"),
    "missing configuration": (_without("bert_config.json"), "bert_config.json is not there: put .* by --config"),
    "configuration that is none": (_edit("bert_config.json", lambda d: b"{"), "bert_config.json is no JSON"),
    "configuration of a list": (_edit("bert_config.json", lambda d: b"[1]"), r"holds \[1\], expected names"),
    "another hidden_size": (_config(hidden_size=64), r"LayerNorm/beta is \[48\], expected \[64\] as hidden_size is 64; correct it, or"),
    "another intermediate_size": (_config(intermediate_size=90), r"dense/bias is \[100\], expected \[90\] as intermediate_size is 90"),
    "more layers": (_config(num_hidden_layers=3), r"lacks bert.encoder.layer.2.* and 13 more, which its configuration makes of a BertModel"),
    "fewer layers": (_config(num_hidden_layers=1), "has bert/encoder/layer_1.*, which are layers beyond num_hidden_layers, 1"),
    "no heads": (_config(num_attention_heads=None), "has no num_attention_heads, which no tensor tells"),
    "heads that do not fit": (_config(num_attention_heads=5), "hidden_size 48 is no multiple of num_attention_heads 5"),
    "another family": (_config(model_type="gpt2"), "model_type is 'gpt2', expected one of bert, roberta"),
    "unknown tensor": (_written(lambda w: w | {"bert/x": torch.ones(2)}), "has bert/x, which no bert of transformers has a place for: --ignore"),
    "lacks one": (_written(lambda w: {n: t for n, t in w.items() if "layer_1/output/dense/k" not in n}), "lacks bert.encoder.layer.1.output.dense.weight, which"),
    "layers of a gap": (_written(lambda w: w | _layer(w, 5)), "has bert/encoder/layer_5"),
    "two names": (_written(lambda w: w | {"bert/encoder/layer/0/output/dense/bias": torch.ones(48)}), "two of one weight"),
    "dtype": (_written(lambda w: w | {"bert/embeddings/position_embeddings": torch.ones(40, 48).double()}), "position_embeddings is float64, expected float32, float16, bfloat16"),
    "unknown dtype": (_written(lambda w: w | {"bert/x": torch.ones(2, dtype=torch.complex64)}), "bert/x is TensorFlow's type 8, expected"),
    "in parts": (_field(7, b""), "word_embeddings is kept in parts .a partitioned variable."),
    "object graph": (_written(lambda w: {"model/v/.ATTRIBUTES/VARIABLE_VALUE": torch.ones(2)}), "TensorFlow 2's object graphs"),
    "big-endian": (_written(header=b"\x10\x01"), "big-endian"),
    "shard beyond": (_field(3, 9), "word_embeddings is in data file 9 of 2"),
    "bytes beyond": (_field(4, 1 << 40), "is truncated: bert/embeddings/word_embeddings is in its bytes 1,099"),
    "other bytes than its shape": (_field(2, text(2, b"\x08\xc8\x01") + text(2, b"\x08\x30") + text(2, b"\x08\x01")), r"word_embeddings is \[200, 48, 1\], expected \[200, 48\]; correct"),
    "V1": (_only("bert_model.ckpt", b"abc" + bytes.fromhex("57fb808b247547db")), "bert_model.ckpt is a TensorFlow checkpoint of format V1"),
    "HDF5": (_only("tf_model.h5", b"\x89HDF\r\n\x1a\n..."), "tf_model.h5 is (an HDF5 file, of Keras|damaged)"),
    "pickle": (_only("pytorch_model.bin", b"PK\x03\x04..."), "pytorch_model.bin is a pickle"),
    "nothing": (_only("readme", b"x"), "holds readme: expected"),
    "vocabulary of more words": (lambda f: (f / "vocab.txt").write_text("\n".join(WORDS + [f"w{i}" for i in range(200)])), "vocab.txt has 208 words, and the model 200"),
    "vocabulary without letters": (lambda f: (f / "vocab.txt").write_text("\n".join([*WORDS[:5], "1"])), "no letters of either case: say --cased or --uncased"),
    "vocabulary that is no text": (lambda f: (f / "vocab.txt").write_bytes(b"\xff\xfe"), "vocab.txt is no text in UTF-8"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    weights = tensors(built("Model"), flax=False)
    return google_folder(tmp_path_factory.mktemp("sound"), weights)


@pytest.mark.seconds
@pytest.mark.parametrize("fault", FAULTS)
def test_faults(tmp_path, sound, fault):
    break_it, message = FAULTS[fault]
    folder = tmp_path / "in"
    shutil.copytree(sound, folder)
    break_it(folder)
    refused(CheckpointError, message, convert, folder, tmp_path / "out")
    assert os.listdir(tmp_path) == ["in"]


def _tree(weights):
    return lambda folder: (folder / "flax_model.msgpack").write_bytes(pack(weights))


FLAX = "flax_model.msgpack"
FLAX_FAULTS = {
    "truncated": (_edit(FLAX, lambda d: d[:-7]), f"{FLAX} is damaged, truncated or no MessagePack .take it anew.*it ends at byte"),
    "empty": (_edit(FLAX, lambda d: b""), f"{FLAX} is damaged"),
    "more": (_edit(FLAX, lambda d: d + b"x"), "its value ends at byte"),
    "a pickle": (_edit(FLAX, lambda d: b"\x80\x04\x95rest"), f"{FLAX} is damaged, truncated or no MessagePack"),
    "a list": (_edit(FLAX, lambda d: b"\x91\x01"), "it holds a list, expected names and arrays"),
    "a number": (_tree({"embeddings": {"word": 5}}), "embeddings/word is 5, expected an array"),
    "integers": (_tree({"bert": {"step": torch.ones(2, dtype=torch.int64)}}), "bert/step is int64, expected float32"),
    "nothing of BERT": (_tree({"params": {"x": torch.ones(2)}}), "lacks bert.embeddings.*, and has x: give"),
    "configuration": (_without("config.json"), "config.json is not there"),
    "no family": (_edit("config.json", lambda d: b"{}"), "model_type is None, expected one of"),
    "chunks": (_tree({"x": {"__msgpack_chunked_array__": True, "shape": {"0": 3}, "chunks": {"0": torch.ones(2)}}}), r"x is \[3\], its pieces have 2 numbers"),
    "chunks in disorder": (_tree({"x": {"__msgpack_chunked_array__": True, "shape": {"1": 3}, "chunks": {}}}), FLAX),
}  # fmt: skip


@pytest.mark.seconds
@pytest.mark.parametrize("fault", FLAX_FAULTS)
def test_faults_of_flax(tmp_path, fault):
    break_it, message = FLAX_FAULTS[fault]
    folder = flax_folder(tmp_path / "in", tensors(built("Model"), flax=True))
    break_it(folder)
    refused(CheckpointError, message, convert, folder, tmp_path / "out")
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.seconds
@pytest.mark.parametrize("flax", [False, True])
def test_any_damage_is_of_one_kind(tmp_path, flax):
    """Bytes that changed: an error of a checkpoint, or tensors of sound shapes."""
    weights = {"bert/x": torch.ones(3, 4), "bert/y/z": torch.ones(5)}
    folder = (flax_folder if flax else google_folder)(tmp_path, weights)
    path, read = folder / FLAX, foreign_flax.read
    if not flax:
        path, read = (
            folder / "bert_model.ckpt.index",
            lambda _: bundle.read(folder / "bert_model.ckpt"),
        )
    data, r, raised = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(r.randint(1, 3)):
            changed[r.randrange(len(data))] = r.randrange(256)
        path.write_bytes(changed[: r.choice([None, r.randrange(len(data))])])
        try:
            for stored in read(path).values():
                if stored.dtype in FLOATS:
                    assert stored.read().shape == stored.shape
        except CheckpointError:
            raised += 1
    assert raised > 150


def test_out(tmp_path, sound):
    refused(ConfigError, "the folder of the checkpoint itself", convert, sound, sound)
    other = tmp_path / "other"
    other.mkdir()
    save_file({"x": torch.ones(1)}, other / "model.safetensors")
    refused(ConfigError, "holds model.safetensors: give a new folder", convert, sound, other)
    assert set(load_file(other / "model.safetensors")) == {"x"}
    refused(OSError, "is a file; give another", convert, sound, sound / "bert_config.json" / "x")
    (tmp_path / "empty").mkdir()
    convert(sound, tmp_path / "empty")
    convert(sound, tmp_path / "new" / "deep")
    assert sorted(os.listdir(tmp_path)) == ["empty", "new", "other"]
    assert os.listdir(tmp_path / "new") == ["deep"]


def test_src_that_is_not_there(tmp_path):
    for name in ("gone", "x" * 9999, "a\0b"):
        refused(
            CheckpointError,
            "is not there: give|is no name of",
            convert,
            tmp_path / name,
            tmp_path / "out",
        )


def test_full_disk_leaves_nothing(tmp_path, sound, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused(OSError, "out can't be written: .*No space", convert, sound, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_command(tmp_path, sound, capsys):
    out = str(tmp_path / "out")
    assert main(["convert", str(sound), "--out", out]) == 0
    said, progress = capsys.readouterr()
    result = json.loads(said)
    assert result["class"] == "BertModel" and result["format"] == "TensorFlow"
    assert "note: " in progress and "tanh formula" in result["notes"][0]
    assert main(["convert", str(sound), "--out", out]) == 2
    assert "bertfast: out is" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "gone"), "--out", f"{out}2"]) == 1
    said, error = capsys.readouterr()
    assert said == "" and "gone is not there" in error
    with pytest.raises(SystemExit, match="2"):
        main(["convert", str(sound), "--out", f"{out}2", "--cased", "--uncased"])
