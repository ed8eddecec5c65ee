"""Checkpoints that don't fit, are damaged or unsafe."""

import json
import math
import os
import warnings
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from helpers import refused
from native import batch, config, load
from safetensors.torch import load_file, save_file
from test_model import MINILM

import bertfast
from bertfast.files import write_whole
from bertfast.model import CheckpointError
from bertfast.model.checkpoint import check_finite, verify
from bertfast.model.tokenizer import load_tokenizer


def test_headless_into_classifier_warns(folder):
    with pytest.warns(UserWarning, match=r"newly initialised.*classifier.weight, classifier.bias"):
        model = load(folder, "BertForSequenceClassification", num_labels=7)
    assert model.classifier.weight.shape == (7, 48)
    base = load(folder)
    assert torch.equal(
        model.bert.embeddings.word_embeddings.weight, base.embeddings.word_embeddings.weight
    )


def test_head_is_dropped(tmp_path):
    bertfast.BertForMaskedLM(config()).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="newly initialised.*pooler"):
        model = load(tmp_path)
    assert "cls.predictions.bias" in model.unused_weights


def test_no_warning_where_all_is_there(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForPreTraining"])
def test_no_warning_of_a_tied_decoder(tmp_path, name):
    """Which checkpoints leave out."""
    getattr(bertfast, name)(config()).save_pretrained(tmp_path)
    assert not any("decoder" in key for key in load_file(tmp_path / "model.safetensors"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(tmp_path, name).new_weights == []


def test_sharded_and_old_names(folder, tmp_path):
    expected = load(folder)
    tensors = load_file(folder / "model.safetensors")
    old = {
        "bert."
        + n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): t
        for n, t in tensors.items()
    }
    names = sorted(old)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({n: old[n] for n in part}, folder / file)
    os.remove(folder / "model.safetensors")
    index = {"weight_map": {n: file for file, part in shards.items() for n in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model = load(folder)
    assert torch.equal(model(**batch())[0], expected(**batch())[0])


@pytest.mark.parametrize(
    "target", ["../secret.safetensors", "/etc/passwd", "..", "sub/x.safetensors"]
)
def test_index_outside_its_folder(folder, target):
    os.remove(folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": target}}))
    refused(CheckpointError, "outside its folder: refused", load, folder)


@pytest.mark.parametrize("name", ["gone.safetensors", "x" * 9999, "\ud800"])
def test_index_of_what_is_not_there(folder, name):
    os.remove(folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    refused(CheckpointError, "index.json( names|: )", load, folder)


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_truncated(folder, cut):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    refused(CheckpointError, "corrupt or truncated", verify, folder)
    refused(CheckpointError, "corrupt or truncated", load, folder)


def test_corrupt_header_and_config(folder):
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 16 + path.read_bytes()[16:])
    refused(CheckpointError, "corrupt or truncated", verify, folder)
    (folder / "config.json").write_text("{")
    refused(CheckpointError, "no JSON", verify, folder)
    os.remove(folder / "config.json")
    refused(CheckpointError, "config.json is not there", verify, folder)


def test_sizes_that_do_not_fit(folder):
    refused(
        CheckpointError,
        r"vocab_size is 300, but embeddings.word_embeddings.weight is \[200, 48\]",
        load,
        folder,
        vocab_size=300,
    )


def test_pickle_is_refused_unless_asked_for(folder):
    expected = load(folder)
    torch.save(expected.state_dict(), folder / "pytorch_model.bin")
    os.remove(folder / "model.safetensors")
    refused(CheckpointError, "pickle.*allow_pickle=True", load, folder)
    assert torch.equal(load(folder, allow_pickle=True)(**batch())[0], expected(**batch())[0])
    torch.save({"x": os.system}, folder / "pytorch_model.bin")
    refused(CheckpointError, "weights_only", load, folder, allow_pickle=True)


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_pickle_behind_an_index(folder, index):
    expected = load(folder)
    os.remove(folder / "model.safetensors")
    torch.save(expected.state_dict(), folder / "a.bin")
    (folder / index).write_text(json.dumps({"weight_map": {"x": "a.bin"}}))
    refused(CheckpointError, r"pickle \(a.bin\).*allow_pickle=True", load, folder)
    refused(CheckpointError, "pickle", verify, folder)
    assert torch.equal(load(folder, allow_pickle=True)(**batch())[0], expected(**batch())[0])


@pytest.mark.parametrize(
    "held", [[1], {"model": {}}, {1: torch.ones(1)}, {"x": torch.eye(2).to_sparse()}, {"x": 1}]
)
def test_pickle_of_something_else(folder, held):
    os.remove(folder / "model.safetensors")
    torch.save(held, folder / "pytorch_model.bin")
    refused(CheckpointError, "no dictionary of dense", load, folder, allow_pickle=True)


def test_quantised(folder):
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(values))
    refused(CheckpointError, "quantization_config is .*bitsandbytes.*dequantise", load, folder)
    refused(CheckpointError, "quantization_config", verify, folder)


def test_number_of_layers(folder):
    message = "num_hidden_layers is {}, but it holds 2 layers; correct config.json"
    refused(CheckpointError, message.format(3), load, folder, num_hidden_layers=3)
    assert len(load(folder, num_hidden_layers=1).encoder.layer) == 1
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 1}))
    refused(CheckpointError, message.format(1) + ", or ask for fewer", load, folder)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers(folder, value):
    model = load(folder)
    check_finite(model, folder)
    with torch.no_grad():
        model.pooler.dense.bias[3] = value
    refused(CheckpointError, "pooler.dense.bias holds NaN or inf", check_finite, model, folder)


FILES = ["config.json", "model.safetensors", "model.safetensors.index.json", "a.safetensors"]
FILES += ["tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"]
KINDS = {
    "pipe": lambda path: os.mkfifo(path),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": lambda path: path.mkdir(),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file(tmp_path, awake, name, kind):
    folder = tiny.checkpoint(tmp_path / "m")
    if name == "a.safetensors":
        index = json.dumps({"weight_map": {"x": name}})
        (folder / "model.safetensors.index.json").write_text(index)
    if name.endswith(("index.json", "a.safetensors")):
        os.remove(folder / "model.safetensors")
    (folder / name).unlink(missing_ok=True)
    KINDS[kind](folder / name)
    text = f"{name} is a {'folder' if kind == 'folder' else 'pipe or a device'}, expected a file"
    if "token" in name or name == "vocab.txt":
        refused(CheckpointError, text, load_tokenizer, folder)
        return
    refused(CheckpointError, text, load, folder)
    refused(CheckpointError, text, verify, folder)


def test_other_faults(folder, tmp_path):
    refused(CheckpointError, "is a file", load, folder / "config.json")
    os.remove(folder / "model.safetensors")
    refused(CheckpointError, "has no weights", load, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "roberta"}))
    refused(CheckpointError, "'roberta'", load, folder)
    refused(CheckpointError, "no local folder", load, "no/such-model-anywhere")
    for name in ("x" * 9999, "a\0b", "\ud800", "a b/c/d"):
        refused(CheckpointError, "no (local|name of a) folder", load, name)


def test_dtype_and_overrides():
    model = load(
        MINILM,
        "BertForSequenceClassification",
        dtype=torch.bfloat16,
        id2label={0: "a", 1: "b", 2: "c"},
    )
    assert model.dtype == torch.bfloat16 and model.num_labels == 3


def test_full_disk_keeps_the_old_file(folder):
    def full(temporary):
        Path(temporary).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    before = (folder / "model.safetensors").read_bytes()
    refused(OSError, "No space", write_whole, folder / "model.safetensors", full)
    assert (folder / "model.safetensors").read_bytes() == before
    assert not list(folder.glob("*.tmp"))


def test_transformers_reads_our_config(folder):
    c = transformers.AutoConfig.from_pretrained(folder)
    assert c.architectures == ["BertModel"] and c.model_type == "bert"
