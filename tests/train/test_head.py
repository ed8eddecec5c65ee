"""Whose head a fine-tuning starts from: outputs go to classes by name, or a new one is asked for."""

import itertools
import json

import numpy as np
import pytest
import tiny
import torch
import transformers
from helpers import refused

import bertfast
from bertfast import quantize
from bertfast.cli import main
from bertfast.data import LabelSet
from bertfast.model import CheckpointError, checkpoint
from bertfast.train import ClassifyConfig, ConfigError, finetune, heads, predict
from bertfast.train.finetune import _fingerprint
from bertfast.train.tasks.classify_inference import HEAD

NAMES = ("red", "green", "blue")


def headed(folder, names=NAMES, cls=bertfast.BertForSequenceClassification, **options):
    """A checkpoint with a head of these classes."""
    tiny.checkpoint(folder)
    sizes = {"id2label": dict(enumerate(names))} if names else {}
    c = bertfast.BertModel.from_pretrained(folder).config.to_dict() | sizes | options
    torch.manual_seed(1)
    model = cls(transformers.BertConfig(**c)).eval()
    with torch.no_grad():
        model.classifier.bias.normal_()
    model.save_pretrained(folder)
    return folder, model


def load(folder, names, task="single_label", which="auto", flags=False):
    return heads.load(folder, HEAD, LabelSet(tuple(names), task), which, flags=flags)


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([[2, 5, 9, 3], [2, 6, 6, 3]])).logits


def test_classes_in_any_order_keep_their_outputs(tmp_path, capsys):
    folder, model = headed(tmp_path / "m")
    for names in itertools.permutations(NAMES):
        for task in ("single_label", "multi_label"):
            found, labels = load(folder, names, task)
            assert labels == LabelSet(NAMES, task)
            assert found.config.id2label == dict(enumerate(NAMES))
            assert torch.equal(logits(found), logits(model))
    assert "kept from" in capsys.readouterr().err


def test_names_as_data_normalises_them(tmp_path):
    folder, _ = headed(tmp_path / "m", ("true", "1.0", "other"))
    assert load(folder, ("1", "True", "other"))[1].names == ("true", "1.0", "other")


def test_finetune_goes_on_where_it_was(tmp_path):
    """From a head whose classes stand in another order than the data's, sorted."""
    settings = tiny.settings(tmp_path)
    finetune(ClassifyConfig(**settings))
    texts = [row["text"] for row in tiny.rows(9, 2)]
    before, moved = predict(settings["out"], texts), tmp_path / "moved"
    model = bertfast.BertForSequenceClassification.from_pretrained(settings["out"])
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        for p in model.classifier.parameters():
            p.copy_(p[order].clone())
    names = [model.config.id2label[int(i)] for i in order]
    model.config.id2label = dict(enumerate(names))
    model.save_pretrained(moved)
    transformers.AutoTokenizer.from_pretrained(settings["out"]).save_pretrained(moved)
    again = settings | {"model": str(moved), "out": str(tmp_path / "again")}
    finetune(ClassifyConfig(**again | {"max_steps": 1, "lr": 1e-12}))
    for was, now in zip(before, predict(again["out"], texts), strict=True):
        assert was["label"] == now["label"]
        for name, p in was["probabilities"].items():
            assert abs(p - now["probabilities"][name]) < 1e-4
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert list(saved["id2label"].values()) == names


@pytest.mark.parametrize(
    "names", [("red", "green", "pink"), ("red", "green"), ("a", "b", "c", "d")]
)
def test_other_classes_are_refused(names, tmp_path):
    folder, model = headed(tmp_path / "m")
    text = "for the classes red, green, blue, .* give --head fresh for a new one"
    refused(ConfigError, text, load, folder, names)
    found, labels = load(folder, names, which="fresh")
    assert labels.names == names and found.classifier.out_features == found.num_labels == len(names)
    assert not torch.equal(found.classifier.weight[0], model.classifier.weight[0])
    assert torch.equal(found.bert.pooler.dense.weight, model.bert.pooler.dense.weight)
    if len(names) == 3:  # in the order of the data's classes, as asked
        found, labels = load(folder, names, which="keep")
        assert labels.names == names and torch.equal(logits(found), logits(model))
    else:
        refused(ConfigError, "new one$", load, folder, names, which="keep")


def test_a_head_without_names(tmp_path):
    folder, model = headed(tmp_path / "m", (), num_labels=11)
    numbers = tuple(map(str, range(11)))
    for names, expected in ((numbers[::-1], numbers), (tuple(model.config.id2label.values()),) * 2):
        found, labels = load(folder, names)
        assert labels.names == expected and torch.equal(logits(found), logits(model))
    refused(ConfigError, "LABEL_0.*--head keep", load, folder, tuple("abcdefghijk"))


def test_vectors_of_flags_name_places(tmp_path):
    numbers = ("0", "1", "2")
    folder, _ = headed(tmp_path / "m")
    assert load(folder, numbers, "multi_label", flags=True)[1].names == NAMES
    refused(ConfigError, "the classes 0, 1, 2: give", load, folder, numbers, "multi_label")
    folder, _ = headed(tmp_path / "unnamed", (), num_labels=3)
    assert load(folder, numbers, "multi_label", flags=True)[1].names == numbers


def test_regression(tmp_path):
    folder, model = headed(tmp_path / "m", (), num_labels=1)
    found, labels = load(folder, (), "regression")
    assert torch.equal(logits(found), logits(model)) and labels.names == ()
    assert found.config.problem_type == "regression"
    refused(
        ConfigError, r"a number \(regression\).*the classes a", load, folder, "a", "multi_label"
    )
    folder, _ = headed(tmp_path / "classes", ("spam",), problem_type="multi_label_classification")
    refused(ConfigError, "the classes spam.*a number", load, folder, (), "regression")
    assert load(folder, (), "regression", which="fresh")[0].classifier.out_features == 1


@pytest.mark.parametrize("task", ["TokenClassification", "MultipleChoice"])
def test_a_head_of_another_task_is_none(task, tmp_path, capsys):
    """Though its weight has the same name, and may have the same shape."""
    folder, model = headed(tmp_path / "m", cls=getattr(transformers, f"BertFor{task}"))
    found, _ = load(folder, NAMES)
    assert found.classifier.weight.shape == (3, 32)
    assert not torch.equal(found.classifier.weight[0], model.classifier.weight[0])
    assert "head: new" in capsys.readouterr().err


def test_a_head_of_another_task_predicts_nothing(tmp_path):
    choice = transformers.BertForMultipleChoice
    folder, _ = headed(tmp_path / "m", (), cls=choice, num_labels=1)
    refused(CheckpointError, "but a BertForMultipleChoice", predict, str(folder), ["cat"])
    texts = tiny.write(tmp_path / "texts.jsonl", tiny.rows(3))
    assert quantize.report(str(folder), texts, precisions=["fp32"])["task"] is None


def test_names_that_are_numbers(tmp_path):
    """In the configuration too, as transformers keeps them."""
    folder, _ = headed(tmp_path / "m", ("10", "2", "7"))
    values = json.loads((folder / "config.json").read_text())
    values["id2label"] = {key: int(name) for key, name in values["id2label"].items()}
    (folder / "config.json").write_text(json.dumps(values))
    model, labels = load(folder, ("2", "7", "10"))
    assert labels.names == ("10", "2", "7") == tuple(model.config.id2label.values())
    assert predict(str(folder), ["cat"])[0]["label"] in labels.names


def test_without_a_head(tmp_path, capsys):
    folder = tiny.checkpoint(tmp_path / "m")
    refused(ConfigError, "has none for this task", load, folder, NAMES, which="keep")
    model, labels = load(folder, NAMES)
    assert labels.names == NAMES and model.config.num_labels == 3
    scale = model.classifier.weight.std() / model.config.initializer_range
    assert 0.5 < scale < 2 and not model.classifier.bias.any()
    assert "head: new" in capsys.readouterr().err


@pytest.mark.parametrize("value", [5, "BertModel", [3], {"a": 1}, ["\ud800"]])
def test_architectures_of_another_kind(value, tmp_path):
    folder, _ = headed(tmp_path / "m")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"architectures": value}))
    refused(CheckpointError, "architectures is", load, folder, NAMES)


def test_command_line(tmp_path, capsys):
    settings = tiny.settings(tmp_path)
    folder, _ = headed(tmp_path / "headed", ("a", "b", "c"))
    command = [
        "finetune",
        "classify",
        "--model",
        str(folder),
        "--max-steps",
        "1",
        "--device",
        "cpu",
    ]
    command += ["--max-length", "16", "--train", settings["train"], "--out", settings["out"]]
    assert main(command) == 2
    assert main([*command, "--dry-run"]) == 2
    assert "--head fresh" in capsys.readouterr().err.splitlines()[-1]
    for which, kind in (("fresh", "new"), ("keep", "kept")):
        assert main([*command, "--head", which, "--dry-run"]) == 0
        assert f"head: {kind}" in capsys.readouterr().err
    assert main([*command, "--head", "fresh"]) == 0
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [*saved["id2label"].values()] == sorted(NAMES)


def test_runs_of_before_go_on(tmp_path):
    """The setting is a run's own where it is given."""
    settings = tiny.settings(tmp_path)
    folder = checkpoint.resolve(settings["model"])
    assert "head" not in _fingerprint(ClassifyConfig(**settings), folder)
    given = _fingerprint(ClassifyConfig(**settings, head="fresh"), folder)
    assert given["head"] == "fresh"


def test_seeds(tmp_path):
    """A new head is the seed's."""
    folder = tiny.checkpoint(tmp_path / "m")
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(load(folder, NAMES)[0].classifier.weight.detach().numpy())
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])
