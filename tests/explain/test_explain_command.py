"""`bertfast explain`: files, options, and what it refuses."""

import json
import sys

import pytest
import tiny
import tiny_families
import transformers
from helpers import refused

import bertfast
from bertfast.cli import main
from bertfast.explain import explain, explain_table
from bertfast.model import CheckpointError
from bertfast.train import ConfigError

pytest.importorskip("captum")
TEXTS = [" red, cat", "dog  blue walk", "green " + "stone " * 30]


@pytest.fixture
def table(tmp_path):
    return tiny.write(tmp_path / "t.jsonl", [{"text": t} for t in TEXTS])


def run(colours, table, *more):
    return main(
        ["explain", "--model", colours, "--input", table, "--device", "cpu", *map(str, more)]
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_page_and_lines(colours, table, tmp_path, capsys):
    out, rows = tmp_path / "r.html", tmp_path / "r.jsonl"
    more = ["--method", "integrated_gradients", "occlusion", "--sanity"]
    assert run(colours, table, "--out", out, "--json", rows, *more) == 0
    said = capsys.readouterr()
    about, found = json.loads(said.out), lines(rows)
    assert about["texts"] == 3 and about["cut_texts"] == 1 and about["left_out"] == 0
    assert about["methods"]["integrated_gradients"]["complete"] == 3
    assert {*about["sanity"]} == {"integrated_gradients", "occlusion"}
    assert (
        "1 of 3 texts have words that the model doesn't read" in said.err and "rows 3" in said.err
    )
    assert out.read_text().startswith("<!DOCTYPE html>") and '<section id="t3">' in out.read_text()
    for row, text in zip(found, TEXTS, strict=True):
        assert row["text"] == text and row["target"] == row["predicted"] in text
        assert all(w["text"] == text[w["start"] : w["end"]] for w in row["words"])
    assert found[2]["unread_words"] == 31 - 14
    assert found == json.loads(json.dumps(explain(colours, TEXTS, methods=more[1:3], device="cpu")))


def test_lines_to_stdout_of_stdin(colours, table, capsys, monkeypatch, tmp_path):
    with open(table) as f:
        monkeypatch.setattr(sys, "stdin", f)
        assert run(colours, "-", "--json", "-", "--method", "occlusion", "--limit", 2) == 0
    said = capsys.readouterr()
    assert [json.loads(line)["row"] for line in said.out.splitlines()] == [1, 2]
    assert "1 rows behind the limit" in said.err and '"left_out": 1' in said.err


def test_probabilities_are_predicts(colours, table, capsys):
    from bertfast.train import predict

    assert run(colours, table, "--json", "-", "--method", "attention_rollout") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for row, own in zip(rows, predict(colours, TEXTS), strict=True):
        assert row["predicted"] == own["label"]
        assert row["probability"] == pytest.approx(own["probabilities"][own["label"]], abs=1e-6)


def test_regressions_and_pairs(tmp_path):
    from bertfast.train import ClassifyConfig, finetune

    pairs = [{"text": a["text"], "text_pair": b["text"], "label": float(a["label"] == b["label"])}
             for a, b in zip(tiny.rows(40), tiny.rows(40, 5)[::-1], strict=True)]  # fmt: skip
    file = tiny.write(tmp_path / "pairs.jsonl", pairs)
    given = tiny.settings(tmp_path, task="regression", text_pair_column="text_pair", epochs=1)
    finetune(ClassifyConfig(**given | {"train": file, "valid": file, "max_length": 32}))
    about = explain_table(given["out"], file, json=str(tmp_path / "r.jsonl"), limit=5,
                          methods=["integrated_gradients", "occlusion"], device="cpu")  # fmt: skip
    found = lines(tmp_path / "r.jsonl")
    assert about["classes"] == [] and "target" not in found[0] and "value" in found[0]
    for row in found:
        sides = row["text"], row["pair"]
        assert all(
            w["text"] == sides[w.get("side", 0)][w["start"] : w["end"]] for w in row["words"]
        )
        own = row["methods"]["integrated_gradients"]
        assert own["logit"] == pytest.approx(row["value"], abs=1e-5) and own["complete"]
        assert {w.get("side", 0) for w in row["words"]} == {0, 1}
    refused(ConfigError, "only output is a number", explain, given["out"], ["a"], ["b"], target="x")


def test_several_labels(tmp_path):
    from bertfast.train import predict

    options = {"num_labels": 3, "problem_type": "multi_label_classification"}
    options |= {"initializer_range": 0.5}
    head = "ForSequenceClassification"
    folder = str(tiny_families.checkpoint(tmp_path, "Bert", head, **options))
    found = explain(folder, TEXTS, methods=["occlusion"], device="cpu")
    for row, own in zip(found, predict(folder, TEXTS), strict=True):
        best = max(own["probabilities"], key=own["probabilities"].get)
        assert row["predicted"] == own["labels"] and row["target"] == best
        assert row["probability"] == pytest.approx(own["probabilities"][best], abs=1e-6)
    page = tmp_path / "page.html"
    table = tiny.write(tmp_path / "t.jsonl", [{"text": t} for t in TEXTS])
    explain_table(folder, table, str(page), methods=["occlusion"], target="LABEL_1", device="cpu")
    for row in explain(folder, TEXTS, methods=["occlusion"], target="LABEL_1", device="cpu"):
        assert f"LABEL_1 {row['probability']:.1%}" in page.read_text()


def test_a_frozen_model_is_occluded_alone(colours, tmp_path, capsys, table):
    model = bertfast.BertForSequenceClassification.from_pretrained(colours)
    bertfast.freeze(model, "int8")
    frozen = str(bertfast.save_frozen(model, tmp_path / "int8"))
    transformers.AutoTokenizer.from_pretrained(colours).save_pretrained(frozen)
    assert run(frozen, table, "--json", "-") == 2
    said = capsys.readouterr().err
    assert "is frozen" in said and "integrated_gradients: give --method occlusion, or" in said
    assert (
        main(
            ["explain", "--model", frozen, "--input", table, "--json", "-", "--method", "occlusion"]
        )
        == 0
    )
    quantised = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    exact = explain(colours, TEXTS, methods=["occlusion"], device="cpu")
    for a, b in zip(quantised, exact, strict=True):
        best = [
            max(r["words"], key=lambda w: w["scores"]["occlusion"] or 0)["text"] for r in (a, b)
        ]
        assert best[0] == best[1]
    packed = {"methods": ["occlusion"], "precision": "int8"}
    assert explain(colours, TEXTS, **packed)[0]["words"][0]["scores"]["occlusion"] > 0.1
    refused(ConfigError, "precision is 'int8'", explain, colours, TEXTS, precision="int8")
    refused(
        ConfigError,
        "random weights",
        explain_table,
        colours,
        table,
        json="-",
        sanity=True,
        **packed,
    )


def test_other_models_are_refused(colours, tmp_path, table, capsys):
    for head in ("TokenClassification", "QuestionAnswering"):
        folder = tiny.checkpoint(tmp_path / head)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps(config | {"architectures": [f"BertFor{head}"]})
        )
        assert run(str(folder), table, "--json", "-") == 1
        said = capsys.readouterr().err
        assert f"is a BertFor{head}; explain is for models that decide on a whole text" in said
    base = str(tiny.checkpoint(tmp_path / "base"))
    refused(CheckpointError, "is a BertModel", explain, base, ["a"])


@pytest.mark.parametrize(
    "rows, said",
    [
        ([{"text": "red"}, {"text": "  "}], "row 2 (line 2): column 'text' is an empty text"),
        ([{"text": "red"}, {"text": "\u200b \x01"}], "row 2 (line 2): the tokenizer finds no word"),
        ([{"other": "red"}], "text"),
        ([], "is empty"),
    ],
)
def test_bad_tables(colours, tmp_path, capsys, rows, said):
    file = tiny.write(tmp_path / "bad.jsonl", rows)
    assert run(colours, file, "--json", "-", "--method", "occlusion") == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, said",
    [
        ([], "--out FILE for a page"),
        (["--json", "-", "--target", "purple"], "known are blue, green, none, red"),
        (["--json", "-", "--steps", "0"], "steps is 0"),
        (["--json", "-", "--steps", "9", "--max-steps", "8"], "above max_steps"),
        (["--json", "-", "--limit", "0"], "limit is 0"),
        (["--json", "-", "--max-length", "99"], "max_length is 99"),
        (["--out", "-"], "a page goes into a file"),
    ],
)
def test_bad_settings(colours, table, capsys, more, said):
    assert run(colours, table, *more) == 2
    assert said in capsys.readouterr().err


def test_bad_settings_from_python(colours):
    for options, said in (
        ({"methods": ["lime"]}, "methods is lime; expected some of"),
        ({"methods": []}, "methods is empty"),
        ({"baseline": "zero"}, "baseline is 'zero'"),
        ({"occlusion": "swap"}, "occlusion is 'swap'"),
    ):
        refused(ConfigError, said, explain, colours, ["a"], **options)


def test_without_captum(colours, table, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    monkeypatch.setitem(sys.modules, "captum", None)
    assert run(colours, table, "--json", "-") == 1
    assert "pip install 'bertfast[explain]'" in capsys.readouterr().err
    assert run(colours, table, "--json", "-", "--method", "occlusion", "gradient_attention") == 0


def test_the_page_takes_no_input_s_place(colours, table, capsys):
    assert run(colours, table, "--out", table, "--method", "occlusion") == 2
    assert "would be overwritten" in capsys.readouterr().err
