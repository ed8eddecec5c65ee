"""Configurations with values that no BERT can be built with: named before anything is built."""

import json
import math

import pytest
import torch
import transformers
from helpers import refused
from native import config

import bertfast
from bertfast.model import CheckpointError
from bertfast.model.checkpoint import verify
from bertfast.model.presets import PRESETS, bert_config

WHOLE = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"]
WHOLE += ["intermediate_size", "max_position_embeddings", "type_vocab_size", "num_labels"]
NUMBERS = ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"]
NUMBERS += ["initializer_range", "layer_norm_eps"]
BAD = {name: [-1, True, "8", 2.0, math.nan, None, [8], 10**9 + 2**30, 10**40] for name in WHOLE}
BAD |= {name: [-1, -0.1, True, "0.1", math.nan, math.inf, 101, 10**400, {}] for name in NUMBERS}
BAD |= {name: [*BAD[name], 1, 1.0] for name in NUMBERS if "dropout" in name}
BAD |= {
    "pad_token_id": [-1, True, "0", 0.0, math.nan, 200],
    "hidden_act": ["mish", "", None, 1, []],
    "is_decoder": [True, 1, "no"],
    "add_cross_attention": [True],
    "position_embedding_type": ["relative_key", 3],
    "id2label": [{}, [], {"0": "a", "2": "b"}, {"a": "b"}, {"0": 1.5}, {"0": "\ud800"}, "ab"],
    "problem_type": ["ranking", 1],
    "dtype": ["int8", "load", 8],
    "torch_dtype": ["int8"],
    "model_type": ["roberta", None, 3],
    "output_attentions": ["yes", 2],
    "per_layer_config": [{"0": {"hidden_size": 8}}],
    "to_dict": [1],
    "__class__": ["x"],
}
CASES = [(name, value) for name, values in BAD.items() for value in values]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    bertfast.BertModel(config()).save_pretrained(folder)
    return folder, json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name, value", CASES)
def test_value_is_named(saved, name, value):
    folder, values = saved
    (folder / "config.json").write_text(json.dumps(values | {name: value}))
    for read in (bertfast.BertModel.from_pretrained, verify):
        refused(CheckpointError, rf"config.json: (.*\b)?{name}\b", read, folder)
    refused(ValueError, rf"\b{name}\b", bert_config, str(folder))


DIRECT = ["num_attention_heads", "hidden_size", "num_hidden_layers", "vocab_size", "pad_token_id"]


@pytest.mark.parametrize("name", DIRECT)
@pytest.mark.parametrize("value", [-2, 10**9 + 2**30])
def test_built_without_a_file(name, value):
    refused(ValueError, name, bertfast.BertModel, config(**{name: value}))


def test_numbers_that_do_not_go_together(saved):
    folder, values = saved
    refused(ValueError, "48 is no multiple of .*heads 5", bertfast.BertModel,
            config(num_attention_heads=5))  # fmt: skip
    for name, value, message in (
        ("num_attention_heads", 5, "no multiple"),
        ("pad_token_id", 200, "less than vocab_size, 200"),
        ("vocab_size", 10**9, "vocab_size is 1000000000, but .*word_emb.* is \\[200, 48\\]"),
        ("hidden_size", 10**9, "hidden_size is 1000000000, but"),
        ("max_position_embeddings", 41, "is 41, but embeddings.position.* \\[40, 48\\]"),
        ("type_vocab_size", 1, "is 1, but embeddings.token_type.* \\[2, 48\\]"),
        ("intermediate_size", 10**9, "is 1000000000, but .*dense.weight is \\[100, 48\\]"),
        ("num_hidden_layers", 999, "is 999, but it holds 2 layers"),
    ):
        (folder / "config.json").write_text(json.dumps(values | {name: value}))
        refused(CheckpointError, message, bertfast.BertModel.from_pretrained, folder)


def test_overrides(saved):
    folder, values = saved
    (folder / "config.json").write_text(json.dumps(values))
    load = bertfast.BertForSequenceClassification.from_pretrained
    refused(CheckpointError, "num_labels is 1000000000", load, folder, num_labels=10**9)
    refused(CheckpointError, "num_label: no setting of a BertConfig", load, folder, num_label=3)
    with pytest.warns(UserWarning, match="classifier"):
        assert load(folder, num_labels=3, hidden_dropout_prob=0).num_labels == 3


@pytest.mark.parametrize(
    "text", ["", "3", "[]", "[" * 10**5, '{"a": ' + "9" * 5000 + "}", "\ufeff{}"]
)
def test_what_is_no_configuration(saved, text):
    folder, _ = saved
    (folder / "config.json").write_text(text)
    refused(CheckpointError, "config.json(: it holds| is no JSON)", verify, folder)


def test_good_values_load(saved):
    """What is at the edge, or that others write."""
    folder, values = saved
    for change in (
        {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0.99, "layer_norm_eps": 0.5},
        {"pad_token_id": None, "classifier_dropout": None, "quantization_config": None},
        {"torch_dtype": "float16", "position_embedding_type": "absolute", "pruned_heads": {}},
        {"id2label": {"0": 0, "1": 1, "2": "c"}, "num_labels": 3},
        {"gradient_checkpointing": False, "directionality": "bidi", "use_cache": True},
    ):
        (folder / "config.json").write_text(json.dumps(values | change))
        ours = bertfast.BertModel.from_pretrained(folder)
        theirs = transformers.BertModel.from_pretrained(folder, dtype=torch.float32)
        ids = torch.tensor([[3, 4, 5]])
        with torch.no_grad():
            assert torch.allclose(ours(ids)[0], theirs.eval()(ids)[0], rtol=1e-3, atol=1e-4)


def test_presets():
    with torch.device("meta"):
        sizes = {
            name: sum(p.numel() for p in bertfast.BertModel(bert_config(name)).parameters())
            for name in PRESETS
        }
    # The published sizes (with 30,522 words and the pooler).
    assert (
        sizes["tiny"] == 4_385_920 and sizes["mini"] == 11_170_560 and sizes["small"] == 28_763_648
    )
    assert sizes["base"] == 109_482_240 and sizes["large"] == 335_141_888
