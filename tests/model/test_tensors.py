"""Weights of a checkpoint by whatever names and dtypes they were saved: right, or refused."""

import json
import math
import os
import warnings

import pytest
import torch
from helpers import refused
from native import config, load
from safetensors.torch import load_file, save_file

import bertfast
from bertfast.model import CheckpointError


def rewrite(folder, change):
    """The checkpoint's tensors as `change` makes them, in place or anew."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors = change(tensors) or tensors
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata={"format": "pt"})


DENSE = "encoder.layer.1.output.dense.weight"
OTHER_DTYPES = ["int8", "uint8", "int64", "bool", "complex64", "float8_e4m3fn", "float8_e5m2"]


@pytest.mark.parametrize("dtype", OTHER_DTYPES)
def test_dtypes_that_are_no_weights(folder, dtype):
    def change(tensors):
        tensors[DENSE] = tensors[DENSE].to(getattr(torch, dtype))

    rewrite(folder, change)
    refused(CheckpointError, f"{DENSE} is {dtype}, expected a float.*dequantise", load, folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cast", [False, True])
def test_floats_and_buffers_load(folder, dtype, cast):
    """Of transformers' older versions, which some cast with the weights."""
    expected = load(folder).state_dict()

    def change(tensors):
        tensors = {n: t.to(dtype) for n, t in tensors.items()}
        buffer = torch.arange(40)[None].to(dtype if cast else torch.int64)
        names = "position_ids", "token_type_ids"
        return tensors | {f"embeddings.{name}": buffer.clone() for name in names}

    rewrite(folder, change)
    for name, t in load(folder).state_dict().items():
        assert torch.equal(t, expected[name].to(dtype).float()), name


def test_numbers_beyond_a_dtype(folder):
    def change(tensors, value, dtype):
        tensors[DENSE] = tensors[DENSE].to(dtype)
        tensors[DENSE][0, 0] = value

    rewrite(folder, lambda t: change(t, 1e300, torch.float64))
    refused(CheckpointError, f"{DENSE} holds numbers beyond torch.float32", load, folder)
    rewrite(folder, lambda t: change(t, 1e5, torch.float32))
    load(folder)
    refused(CheckpointError, "beyond torch.float16", load, folder, dtype=torch.float16)
    rewrite(folder, lambda t: change(t, math.nan, torch.float64))
    assert load(folder).state_dict()[DENSE][0, 0].isnan()  # not lost: every output has it
    refused(ValueError, "dtype is torch.int8", load, folder, dtype=torch.int8)


PREFIXES = {
    "ddp": lambda n: f"module.{n}",
    "compiled": lambda n: f"_orig_mod.{n}",
    "compiled ddp": lambda n: f"module._orig_mod.bert.{n}",
    "compiled encoder": lambda n: f"bert._orig_mod.{n}" if "pooler" not in n else f"bert.{n}",
    "compiled layers": lambda n: n.replace("layer.1.", "layer.1._orig_mod."),
    "fsdp": lambda n: f"_fsdp_wrapped_module.{n}",
    "recomputed": lambda n: n.replace("layer.0.", "layer.0._checkpoint_wrapped_module."),
    "mixed": lambda n: f"bert.{n}" if "query" in n else f"module.{n}" if "key" in n else n,
}


@pytest.mark.parametrize("kind", PREFIXES)
@pytest.mark.parametrize("name", ["BertModel", "BertForSequenceClassification"])
def test_prefixes_of_wrappers(tmp_path, kind, name):
    torch.manual_seed(0)
    getattr(bertfast, name)(config()).save_pretrained(tmp_path)
    expected = load(tmp_path, name).state_dict()
    rename = PREFIXES[kind]

    def change(tensors):
        return {rename(n.removeprefix("bert.")): t for n, t in tensors.items()}

    rewrite(tmp_path, change)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(tmp_path, name)
    assert not model.new_weights and not model.unused_weights
    for n, t in model.state_dict().items():
        assert torch.equal(t, expected[n]), n


def test_unknown_prefix(folder):
    rewrite(folder, lambda tensors: {f"student.{n}": t for n, t in tensors.items()})
    refused(CheckpointError, "no embeddings.word.* but student.embeddings", load, folder)


@pytest.mark.parametrize(
    "first, second",
    [
        ("embeddings.LayerNorm.weight", "embeddings.LayerNorm.gamma"),
        ("encoder.layer.1.output.LayerNorm.bias", "bert.encoder.layer.1.output.LayerNorm.beta"),
        (DENSE, f"bert.{DENSE}"),
        (DENSE, f"module.{DENSE}"),
    ],
)
def test_two_spellings(folder, first, second):
    def change(tensors, add):
        tensors[second] = tensors[first] + add

    rewrite(folder, lambda tensors: change(tensors, 0))
    load(folder)  # equal: nothing is lost
    rewrite(folder, lambda tensors: change(tensors, 1))
    with pytest.raises(CheckpointError, match="two names of one weight, and they differ") as e:
        load(folder)
    assert first in str(e.value) and second in str(e.value)


def test_one_name_in_two_shards(folder):
    tensors = load_file(folder / "model.safetensors")
    os.rename(folder / "model.safetensors", folder / "a.safetensors")
    save_file({DENSE: tensors[DENSE] + 1}, folder / "b.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "a.safetensors") | {"x": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(CheckpointError, f"{DENSE} is in both .*a.safetensors and .*b.safet", load, folder)


def test_tied_weights_that_differ(tmp_path):
    bertfast.BertForMaskedLM(config(tie_word_embeddings=False)).save_pretrained(tmp_path)
    load(tmp_path, "BertForMaskedLM", tie_word_embeddings=False)
    refused(
        CheckpointError,
        "decoder.weight and bert.*word_embeddings.weight differ.*tie_word_embeddings",
        load,
        tmp_path,
        "BertForMaskedLM",
        tie_word_embeddings=True,
    )


def test_tied_weights_by_either_name(tmp_path):
    """Converters keep one of the two, whichever it is; what is not tied has no other name."""
    bertfast.BertForMaskedLM(config()).save_pretrained(tmp_path)
    bias = torch.rand(200)

    def change(tensors):
        del tensors["cls.predictions.bias"]
        tensors["cls.predictions.decoder.bias"] = bias

    rewrite(tmp_path, change)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(tmp_path, "BertForMaskedLM")
    assert not model.new_weights and torch.equal(model.cls.predictions.bias, bias)
    with pytest.warns(UserWarning, match="newly initialised.*decoder.weight"):
        load(tmp_path, "BertForMaskedLM", tie_word_embeddings=False)


@pytest.mark.parametrize("lost", [DENSE, "embeddings.LayerNorm.bias"])
def test_encoder_that_lacks_weights(folder, lost):
    def change(tensors):
        tensors[f"base.{lost}"] = tensors.pop(lost)

    rewrite(folder, change)
    refused(CheckpointError, f"lacks weights of the encoder: {lost}", load, folder)


@pytest.mark.parametrize(
    "more", ["encoder.layer.0.attention.self.distance_embedding.weight", "embeddings.scale"]
)
def test_encoder_of_another_kind(folder, more):
    rewrite(folder, lambda tensors: tensors | {f"bert.{more}": torch.ones(3)})
    refused(CheckpointError, f"has no place for: bert.{more}", load, folder)
