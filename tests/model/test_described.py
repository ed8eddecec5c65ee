"""A model that was changed since it was made: what it saves says so, and loads as it was."""

import copy
import json
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import transformers
from helpers import refused
from native import batch, config, pair
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrizations

import bertfast
from bertfast.model import BertPreTrainedModel
from bertfast.model.encoder import BertLayer


def fewer_layers(m):
    m.bert.encoder.layer = nn.ModuleList([m.bert.encoder.layer[1]])


def no_layers(m):
    m.bert.encoder.layer = nn.ModuleList()


def more_layers(m):
    torch.manual_seed(3)
    m.bert.encoder.layer.append(BertLayer(m.config).eval())


def larger_tables(m):
    e = m.bert.embeddings
    for name, rows in (("word", 230), ("position", 50), ("token_type", 3)):
        old = getattr(e, f"{name}_embeddings").weight.detach()
        table = nn.Embedding.from_pretrained(torch.cat([old, torch.randn(rows - len(old), 48)]))
        setattr(e, f"{name}_embeddings", table)


def other_inner_size(m):
    for layer in m.bert.encoder.layer:
        layer.intermediate.dense, layer.output.dense = nn.Linear(48, 64), nn.Linear(64, 48)


def relu(m):
    for layer in m.bert.encoder.layer:
        layer.intermediate.intermediate_act_fn = nn.ReLU()


def eps(m):
    for norm in (n for n in m.modules() if isinstance(n, nn.LayerNorm)):
        norm.eps = 0.1


def classes(m):
    m.classifier = nn.Linear(48, 5)


CHANGES = (
    fewer_layers,
    no_layers,
    more_layers,
    larger_tables,
    other_inner_size,
    relu,
    eps,
    classes,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_what_was_changed_is_saved(change, tmp_path):
    _, model = pair({"num_labels": 3}, "BertForSequenceClassification")
    before = copy.deepcopy(model.config)
    change(model)
    model.save_pretrained(tmp_path)
    assert model.config.to_dict() == before.to_dict()  # of others, too: a configuration is shared
    again = bertfast.BertForSequenceClassification.from_pretrained(tmp_path)
    assert not again.new_weights and not again.unused_weights
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    given = batch()
    with torch.no_grad():
        expected = model(**given).logits
        assert torch.equal(again(**given).logits, expected)
        assert stock(**given).logits.shape == expected.shape
    model.train()(**given, labels=torch.tensor([0, 2, 1, 1, 0])).loss.backward()
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (
        tmp_path / "config.json"
    ).read_text()


def test_nothing_changed_nothing_said(tmp_path):
    """All settings stay as they were given, and saving draws no random number."""
    for act in ("gelu_new", "gelu_python"):
        c = config(hidden_act=act, id2label={0: "no", 1: "yes"}, extra=7)
        model = bertfast.BertForSequenceClassification(c)
        state = torch.get_rng_state()
        model.save_pretrained(tmp_path)
        assert torch.equal(torch.get_rng_state(), state)
        saved = json.loads((tmp_path / "config.json").read_text())
        assert saved["hidden_act"] == act and saved["extra"] == 7
        assert saved["id2label"] == {"0": "no", "1": "yes"}


@pytest.mark.seconds
def test_saving_brings_no_compiler():
    code = """import sys, tempfile, bertfast, transformers
        sizes = dict(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, vocab_size=50)
        model = bertfast.BertForPreTraining(transformers.BertConfig(**sizes))
        model.save_pretrained(tempfile.mkdtemp())
        sys.exit("torch._dynamo" in sys.modules)"""
    code = code.replace("\n        ", "\n")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_positions_of_a_larger_table():
    _, model = pair()
    long = torch.ones(1, 45, dtype=int)
    refused(ValueError, "up to 40", model, long)
    model.embeddings.position_embeddings = nn.Embedding(45, 48)
    assert model(long).last_hidden_state.shape == (1, 45, 48)


def test_a_decoder_of_its_own(tmp_path):
    """Untied it stays so, and a tied one that the configuration says isn't."""
    given = batch()
    for tied in (True, False):
        _, model = pair({"tie_word_embeddings": tied}, "BertForMaskedLM")
        words = model.bert.embeddings.word_embeddings
        if tied:
            model.cls.predictions.decoder.weight = nn.Parameter(torch.randn(200, 48))
        else:
            model.cls.predictions.decoder.weight = words.weight
        model.save_pretrained(tmp_path)
        assert (
            "cls.predictions.decoder.weight" in load_file(tmp_path / "model.safetensors")
        ) == tied
        for cls in (bertfast.BertForMaskedLM, transformers.BertForMaskedLM):
            again = cls.from_pretrained(tmp_path).eval()
            same = (
                again.cls.predictions.decoder.weight is again.bert.embeddings.word_embeddings.weight
            )
            assert same != tied
            for name, t in model.state_dict().items():
                assert torch.equal(again.state_dict()[name], t), name
        with torch.no_grad():
            again = bertfast.BertForMaskedLM.from_pretrained(tmp_path)
            assert torch.equal(again(**given).logits, model(**given).logits)


def pruned(m):
    attention = m.bert.encoder.layer[0].attention
    for name in ("query", "key", "value"):
        setattr(attention.self, name, nn.Linear(48, 24))
    attention.output.dense = nn.Linear(24, 48)


def mixed_eps(m):
    m.bert.encoder.layer[0].output.LayerNorm.eps = 0.1


def other_activation(m):
    m.bert.encoder.layer[0].intermediate.intermediate_act_fn = nn.Mish()


def one_layer_wider(m):
    layer = m.bert.encoder.layer[0]
    layer.intermediate.dense, layer.output.dense = nn.Linear(48, 64), nn.Linear(64, 48)


def adapted(m):
    import peft

    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["query"]), m)


def parametrized(m):
    parametrizations.weight_norm(m.bert.encoder.layer[0].output.dense)


def another_layer(m):
    m.bert.encoder.layer[0] = nn.Identity()


def another_head(m):
    m.classifier = nn.Sequential(nn.Linear(48, 8), nn.Tanh(), nn.Linear(8, 3))


REFUSED = {
    pruned: r"query.weight is \[24, 48\], expected \[48, 48\]",
    mixed_eps: r"layer_norm_eps is 0.1 and 1e-12 in its modules",
    other_activation: "hidden_act is None and gelu",
    one_layer_wider: "intermediate_size is 100 and 64",
    adapted: "Merge adapters",
    parametrized: "output.dense.parametrizations.weight.original0 is not BERT's",
    another_layer: "layer.0.attention.self.query.weight is missing",
    another_head: "classifier.weight is missing",
    bertfast.freeze: "frozen",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda f: f.__name__)
def test_what_no_configuration_says_is_refused(change, tmp_path):
    _, model = pair({"num_labels": 3}, "BertForSequenceClassification")
    change(model)
    refused(ValueError, REFUSED[change], model.save_pretrained, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Ordinal(bertfast.BertForSequenceClassification):
    """With a head of its own, of which the configuration says something else."""

    def __init__(self, c, size=8):
        super().__init__(c)
        self.classifier = nn.Linear(48, c.num_labels - 1)
        self.more = nn.ModuleDict({"LayerNorm": nn.LayerNorm(size, eps=0.5)})


class Needs(Ordinal):
    def __init__(self, c, size):
        super().__init__(c, size)


class Apart(BertPreTrainedModel):
    def __init__(self, c):
        super().__init__(c)
        self.bert = bertfast.BertModel(c, add_pooling_layer=False)
        self.head = nn.Linear(48, 2)


@pytest.mark.parametrize("make", [Ordinal, lambda c: Needs(c, 4), Apart])
def test_subclasses(make, tmp_path):
    model = make(config(num_labels=4))
    fewer_layers(model)
    model.bert.pooler = None  # as without one: made anew, with a warning
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["num_hidden_layers"] == 1 and len(saved["id2label"]) == 4
    if not isinstance(model, Needs):
        with pytest.warns(UserWarning) if isinstance(model, Ordinal) else nullcontext():
            again = type(model).from_pretrained(tmp_path)
        assert not again.unused_weights and again.bert.encoder.layer[0] is not None
        for name, t in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], t), name
    pruned(model)
    refused(ValueError, r"query.weight is \[24, 48\]", model.save_pretrained, tmp_path)


def test_adapters_that_are_merged(tmp_path):
    peft = pytest.importorskip("peft")
    _, model = pair({"num_labels": 3}, "BertForSequenceClassification")
    lora = peft.LoraConfig(target_modules=["query", "dense"], init_lora_weights=False)
    merged = peft.get_peft_model(model, lora).eval().merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = bertfast.BertForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**batch()).logits, merged(**batch()).logits)


def test_finetunes(tmp_path):
    """A model with a layer less goes through `bertfast finetune`, and what comes out has as many."""
    import tiny

    from bertfast.train import ClassifyConfig, evaluate, finetune

    settings = tiny.settings(tmp_path, max_steps=1)
    model = bertfast.BertModel.from_pretrained(settings["model"])
    model.encoder.layer = model.encoder.layer[:1]
    model.save_pretrained(settings["model"])
    results = finetune(ClassifyConfig(**settings))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 1
    assert evaluate(settings["out"], settings["valid"])["accuracy"] == results["valid"]["accuracy"]
