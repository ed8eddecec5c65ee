"""How evaluate, predict and quantize read text: as the model was trained, with a tokenizer that
fits."""

import csv
import json
import math
import shutil

import pytest
import tiny
import torch
import yaml
from helpers import refused
from transformers import AutoTokenizer, BertConfig

import bertfast
from bertfast.cli import main
from bertfast.data import DataError
from bertfast.model import CheckpointError, checkpoint
from bertfast.quantize import report
from bertfast.train import (
    ClassifyConfig,
    ConfigError,
    evaluate,
    finetune,
    inputs,
    predict,
    predict_table,
)

PAIRS = {"text_column": "q", "text_pair_column": "d", "label_column": "y", "max_length": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A classifier of pairs as a run leaves it, untrained, in "model"; a table for it."""
    folder = tmp_path_factory.mktemp("inputs")
    classifier(folder / "model")
    (folder / "model" / "run_config.yaml").write_text(
        yaml.safe_dump(ClassifyConfig(**PAIRS).as_dict())
    )
    table = [
        {"q": row["text"], "d": "river stone run", "y": row["label"], "text": "cat", "label": "red"}
        for row in tiny.rows(30)
    ]
    tiny.write(folder / "pairs.jsonl", table)
    return folder


def classifier(folder, **options):
    tiny.checkpoint(folder, **options)
    config = BertConfig.from_pretrained(folder)
    config.id2label = dict(enumerate(("red", "green", "blue")))
    torch.manual_seed(0)
    bertfast.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_as_trained(folder, capfd):
    model, table = str(folder / "model"), str(folder / "pairs.jsonl")
    remembered, said = evaluate(model, table), capfd.readouterr().err
    assert "text_column 'q', text_pair_column 'd', label_column 'y'" in said
    assert remembered == evaluate(model, table, **PAIRS) and "note" not in capfd.readouterr().err
    longer = evaluate(model, table, max_length=32)
    assert longer["loss"] != remembered["loss"]
    assert "max_length is 32, the model was trained with 8" in capfd.readouterr().err
    single = evaluate(model, table, text_pair_column="", label_column="label")
    assert single["loss"] != remembered["loss"]
    said = capfd.readouterr().err
    assert "text_pair_column is None, the model was trained with 'd'" in said
    assert "label_column is 'label', the model was trained with 'y'" in said
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    sides = [row["q"] for row in rows], [row["d"] for row in rows]
    assert list(predict_table(model, table)) == predict(model, *sides)
    assert "warning" not in capfd.readouterr().err
    assert predict(model, *sides) != predict(model, *sides, max_length=32)
    predict(model, sides[0])
    said = capfd.readouterr().err
    assert "given single texts, the model was trained on pairs" in said
    figures = report(model, table, precisions=())
    assert figures["tokens"] == 30 * 8 and "accuracy" in figures["rows"][0]


def test_of_no_run(folder, tmp_path, capfd):
    model, table = classifier(tmp_path / "m"), str(folder / "pairs.jsonl")
    assert evaluate(str(model), table)["per_class"]["red"]["support"] == 30
    predict(str(model), ["cat"], ["dog"])
    assert capfd.readouterr().err == ""
    (model / "run_config.yaml").write_text("max_length: [")
    assert evaluate(str(model), table)["examples"] == 30
    assert "how the model was trained is not known" in capfd.readouterr().err
    given = inputs.as_trained(tmp_path, text_column=None, text_pair_column="d", max_length=None)
    assert given == {"text_column": "text", "text_pair_column": "d", "max_length": None}


def test_command_line(folder, tmp_path, capfd):
    model, table = str(folder / "model"), str(folder / "pairs.jsonl")
    for command in ("evaluate", "predict"):
        arguments = [command, "classify", "--model", model]
        arguments += ["--data" if command == "evaluate" else "--input", table]
        assert main(arguments) == 0
        out, err = capfd.readouterr()
        assert "text_pair_column 'd'" in err and out
        assert main([*arguments, "--text-pair-column", "", "--max-length", "16"]) == 0
        assert "max_length is 16, the model was trained with 8" in capfd.readouterr().err
        for length in (0, -3, 3, 33):
            assert main([*arguments, "--max-length", str(length)]) == 2
            assert f"max_length is {length}, " in capfd.readouterr().err


def test_a_column_that_is_needed(folder):
    model, table = str(folder / "model"), str(folder / "pairs.jsonl")
    refused(DataError, "no column ''", lambda: list(predict_table(model, table, text_column="")))
    refused(ConfigError, "evaluate needs the column", evaluate, model, table, label_column="")
    assert ClassifyConfig(text_pair_column="").text_pair_column is None


def test_empty_texts_have_one_rule(folder, tmp_path, capfd):
    """One text of a pair may be empty, both not: for finetune, evaluate and predict."""
    table = tmp_path / "t.csv"
    commands = (
        ["finetune", "--out", str(tmp_path / "o"), "--train", str(table), "--dry-run"],
        ["evaluate", "--data", str(table)],
        ["predict", "--input", str(table)],
    )
    options = ["--model", str(folder / "model"), "--max-length", "16", "--text-column", "q"]
    options += ["--text-pair-column", "d"]
    for empty, code in (((), 0), ((3,), 0), ((3, 7), 1)):
        with open(table, "w", newline="") as f:
            writer = csv.writer(f)
            writer.writerow(["q", "d", "y"])
            for i, row in enumerate(tiny.rows(60)):
                first = "" if empty[1:] and i == 7 else row["text"]
                writer.writerow([first, "" if i in empty else "cat", row["label"]])
        for command, *rest in commands:
            label = [] if command == "predict" else ["--label-column", "y"]
            assert main([command, "classify", *options, *label, *rest]) == code
            err = capfd.readouterr().err
            assert code == 0 or f"{table}: row 8 (line 9): column 'q' is empty" in err
            assert command != "finetune" or not empty[:1] or code or "1 pairs have an empty" in err


@pytest.mark.parametrize("change, message", [
    ("tokens", "the tokenizer has 18 tokens, the model embeddings for 17"),
    ("types", "2 token types, the model has 1"),
    ("padding", "it pads with None"),
])  # fmt: skip
def test_a_tokenizer_that_does_not_fit(folder, tmp_path, capfd, change, message):
    """Found at the start, whatever the texts hold; a dry run checks it too."""
    model = tmp_path / "m"
    shutil.copytree(folder / "model", model)
    if change == "types":
        classifier(model, type_vocab_size=1)
    tokenizer = AutoTokenizer.from_pretrained(model)
    if change == "tokens":
        tokenizer.add_tokens(["[E1]"])
    elif change == "padding":
        tokenizer.pad_token = None
    tokenizer.save_pretrained(model)
    table = str(folder / "pairs.jsonl")
    settings = {"train": table, "out": str(tmp_path / "o"), "device": "cpu", **PAIRS}
    for function, given in (
        (evaluate, (table,)),
        (predict, (["cat"], ["dog"])),
        (predict_table, (table,)),
        (report, (table,)),
        (lambda model: finetune(ClassifyConfig(model=model, **settings), dry_run=True), ()),
    ):
        refused(CheckpointError, message, function, str(model), *given)
    assert not (tmp_path / "o").exists()


def test_length_is_checked_at_the_start(tmp_path):
    settings = tiny.settings(tmp_path)
    for length in (2, 33):
        config = ClassifyConfig(**settings | {"max_length": length})
        refused(ConfigError, f"max_length is {length}, ", finetune, config, dry_run=True)


def test_unknown_tokens_are_told(folder, capfd):
    model = str(folder / "model")
    predict(model, ["cat dog", "cat"], ["dog", "run"])
    assert "unknown" not in capfd.readouterr().err
    predict(model, ["Katze dog", "cat"], ["dog", "run"])
    assert "20.0% of the tokens are unknown to the tokenizer" in capfd.readouterr().err
    tiny.write(folder / "unknown.jsonl", [{"q": "katze", "d": "hund", "y": "red"}])
    evaluate(model, str(folder / "unknown.jsonl"))
    assert "100.0% of the tokens are unknown" in capfd.readouterr().err


def test_logits_that_are_not_finite(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "check_finite", lambda *_: None)  # of weights: it comes first
    model = bertfast.BertForSequenceClassification.from_pretrained(folder / "model")
    ids = AutoTokenizer.from_pretrained(folder / "model")
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[ids.vocab["cat"]] = math.nan
    shutil.copytree(folder / "model", tmp_path / "m")
    model.save_pretrained(tmp_path / "m")
    tiny.write(tmp_path / "t.jsonl", [{"q": t, "d": "dog", "y": "red"} for t in ("run", "cat")])
    for function in (evaluate, lambda *given: list(predict_table(*given))):
        refused(CheckpointError, r"for 1 of 2 texts, the first in .*t.jsonl: row 2 \(line 2\)",
                function, str(tmp_path / "m"), str(tmp_path / "t.jsonl"))  # fmt: skip
    refused(CheckpointError, "the first in row 1", predict, str(tmp_path / "m"), ["cat"], ["dog"])
