"""`bertfast quantize`, and `--precision` of evaluate and predict."""

import json
import math
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from helpers import refused

import bertfast
from bertfast import quantize
from bertfast.cli import main
from bertfast.model import CheckpointError
from bertfast.train import ClassifyConfig, ConfigError, evaluate, finetune, predict, predict_table

PRECISIONS = ["fp32", "bf16", "int8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A fine-tuned tiny model in out/, a headless one in model/, labelled valid.jsonl."""
    folder = tmp_path_factory.mktemp("quantize")
    finetune(ClassifyConfig(**tiny.settings(folder, epochs=6)))
    return folder


def by_precision(result):
    return {row["precision"]: row for row in result["rows"]}


def test_classifier(folder):
    model, data = str(folder / "out"), str(folder / "valid.jsonl")
    result = quantize.report(model, data, batch_size=4)
    assert (result["texts"], result["batches"], result["task"]) == (21, 6, "single_label")
    rows = by_precision(result)
    assert list(rows) == ["not frozen", *PRECISIONS]
    texts = [row["text"] for row in tiny.rows(21, 1)]
    labels = [row["label"] for row in predict(model, texts)]
    for precision, row in rows.items():
        asked = None if precision == "not frozen" else precision
        scores = evaluate(model, data, precision=asked)
        assert row["accuracy"] == scores["accuracy"] and row["macro_f1"] == scores["macro_f1"]
        assert row["milliseconds"] > 0 and row["speedup"] > 0
        if asked:
            own = [r["label"] for r in predict(model, texts, precision=asked)]
            same = sum(a == b for a, b in zip(own, labels, strict=True)) / 21
            assert row["agreement"] == same
            assert row["least_cosine"] <= row["percentile_1"] <= row["cosine"] <= 1 + 1e-6
    assert rows["fp32"]["max_error"] < 2e-5 < rows["bf16"]["max_error"] < 0.1
    assert rows["fp32"]["least_cosine"] > 0.99999 and rows["int8"]["cosine"] > 0.99


def test_figures_against_plain_arithmetic(folder):
    """Cosines and error by hand, text by text; and without a head, no labels."""
    model, data = str(folder / "model"), str(folder / "valid.jsonl")
    row = by_precision(quantize.report(model, data, precisions=["int8"], batch_size=5))["int8"]
    assert not {"agreement", "accuracy", "macro_f1"} & set(row)
    plain = bertfast.BertModel.from_pretrained(model)
    packed = bertfast.freeze(bertfast.BertModel.from_pretrained(model), "int8")
    tokenizer = quantize.load_tokenizer(model)
    cosines, error = [], 0.0
    with torch.inference_mode():
        for one in tiny.rows(21, 1):
            given = tokenizer(one["text"], return_tensors="pt")
            a, e = (m(**given).last_hidden_state[0] for m in (packed, plain))
            cosines.append(torch.cosine_similarity(a.mean(0), e.mean(0), dim=0).item())
            error = max(error, (a - e).abs().max().item())
    assert row["cosine"] == pytest.approx(sum(cosines) / 21, abs=1e-5)
    assert row["least_cosine"] == pytest.approx(min(cosines), abs=1e-5)
    assert row["max_error"] == pytest.approx(error, rel=1e-3)


def test_a_bad_precision_shows(folder, monkeypatch):
    def spoiled(model, precision):
        model = bertfast.freeze(model, precision)
        with torch.no_grad():
            model.bert.embeddings.word_embeddings.weight.mul_(-1)
            model.bert.pooler.dense.bias.fill_(math.nan)
        return model

    monkeypatch.setattr(quantize, "freeze", spoiled)
    result = quantize.report(str(folder / "out"), str(folder / "valid.jsonl"), precisions=["fp32"])
    row = by_precision(result)["fp32"]
    assert row["cosine"] < 0.99 and row["agreement"] < 0.9 and row["max_error"] > 0.1


@pytest.mark.parametrize("task", ["multi_label", "regression"])
def test_other_tasks(tmp_path, task):
    settings = tiny.settings(tmp_path, task=task, epochs=1)
    for name in ("train", "valid"):
        table = [json.loads(line) for line in Path(settings[name]).read_text().splitlines()]
        for i, row in enumerate(table):
            row["label"] = [row["label"]] * (i % 4 > 0) if task == "multi_label" else i % 5 / 5
        tiny.write(tmp_path / f"{name}.jsonl", table)
    finetune(ClassifyConfig(**settings))
    model, data = settings["out"], settings["valid"]
    row = by_precision(quantize.report(model, data, precisions=["int8"]))["int8"]
    scores = evaluate(model, data, precision="int8")
    for key in ("micro_f1", "macro_f1") if task == "multi_label" else ("mse", "mae"):
        assert row[key] == pytest.approx(scores[key], rel=1e-5)
    assert row["agreement"] > 0.5 if task == "multi_label" else 0 < row["max_difference"] < 0.1
    unlabelled = quantize.report(model, data, precisions=["int8"], label_column="")
    assert not {"micro_f1", "mse"} & set(by_precision(unlabelled)["int8"])


def test_says_which_layers_int8_suits_ill(folder, tmp_path):
    model = bertfast.BertModel.from_pretrained(str(folder / "model"))
    with torch.no_grad():
        for p in model.encoder.parameters():
            if p.dim() == 2:
                p[5] *= 50
                p[9:12] *= 20
    model.save_pretrained(tmp_path)
    for file in (folder / "model").iterdir():  # the tokenizer's
        if not (tmp_path / file.name).exists():
            shutil.copy(file, tmp_path)
    result = quantize.report(str(tmp_path), str(folder / "valid.jsonl"), limit=4)
    assert any("int8" in text and "encoder.layer." in text for text in result["warnings"])
    assert quantize.table(result).endswith(result["warnings"][-1])


def test_limit_spreads_over_the_table(folder):
    result = quantize.report(
        str(folder / "model"), str(folder / "valid.jsonl"), precisions=["fp32"], limit=5
    )
    assert result["texts"] == 5
    tokenizer = quantize.load_tokenizer(str(folder / "model"))
    texts = [tiny.rows(21, 1)[i]["text"] for i in (0, 5, 10, 15, 20)]
    assert result["tokens"] == sum(map(len, tokenizer(texts)["input_ids"]))


def test_command(folder, tmp_path, capsys):
    command = ["quantize", "--model", str(folder / "out"), "--check", str(folder / "valid.jsonl")]
    assert main([*command, "--json", str(tmp_path / "q.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads((tmp_path / "q.json").read_text())["rows"]
    own = lines[3:6]  # behind them a processor's own warnings
    assert [line.split()[0] for line in own] == PRECISIONS
    for line, row in zip(own, rows[1:], strict=True):
        assert f"{row['cosine']:.6f}" in line and f"{row['macro_f1']:.4f}" in line
    assert main([*command, "--precision", "bf16", "--label-column", ""]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].startswith("bf16") and "macro" not in lines[1] and "agreement" in lines[1]
    with pytest.raises(SystemExit) as e:
        main([*command, "--precision", "int4"])
    assert e.value.code == 2


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"check": "none.jsonl"}, 1, "none.jsonl"),
        ({"text_column": "body"}, 1, "no column 'body'"),
        ({"label_column": "colour"}, 1, "no column 'colour'"),
        ({"check": "pink.jsonl"}, 1, "unknown label 'pink'"),
        ({"check": "empty.jsonl"}, 1, "is empty"),
        ({"model": "."}, 1, "config.json"),
        ({"model": "model", "label_column": "label"}, 2, "no classifier"),
        ({"batch_size": 0}, 2, "batch_size is 0"),
        ({"limit": 0}, 2, "limit is 0"),
    ],
)
def test_refusals(folder, monkeypatch, capsys, changes, code, message):
    monkeypatch.chdir(folder)
    tiny.write(folder / "pink.jsonl", [{"text": "red", "label": "pink"}])
    (folder / "empty.jsonl").write_text("")
    values = {"model": "out", "check": "valid.jsonl"} | changes
    options = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    assert main(["quantize", *options]) == code
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert out == "" and last.startswith("bertfast: ") and message in last


def test_encoder_that_lacks_weights(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    bad = tiny.checkpoint(tmp_path / "bad")
    tensors = load_file(bad / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, bad / "model.safetensors")
    with pytest.raises(bertfast.model.CheckpointError, match=r"layer\.1\.output\.dense"):
        quantize.report(str(bad), str(folder / "valid.jsonl"))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_evaluate_and_predict(folder, precision, capsys, monkeypatch):
    from bertfast.train import trained

    model, data = str(folder / "out"), str(folder / "valid.jsonl")
    asked = []
    real = trained.freeze
    monkeypatch.setattr(trained, "freeze", lambda m, p: asked.append(p) or real(m, p))
    options = ["--precision", precision]
    plain = evaluate(model, data)
    assert not asked
    assert main(["evaluate", "classify", "--model", model, "--data", data, *options]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["accuracy"] == pytest.approx(plain["accuracy"], abs=0.1)
    assert scores["loss"] == pytest.approx(plain["loss"], rel=1e-5 if precision == "fp32" else 0.05)
    assert main(["predict", "classify", "--model", model, "--input", data, *options]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 21
    assert asked == [precision] * 2


def test_precision_is_a_cpu_s(folder):
    with pytest.raises(ConfigError, match="is for a CPU"):
        predict(str(folder / "out"), ["red"], device="cuda", precision="int8")
    with pytest.raises(ValueError, match="'int4'"):
        predict(str(folder / "out"), ["red"], precision="int4")


@pytest.mark.parametrize("kind", ["classifier", "sentences"])
def test_a_folder_of_one_precision(folder, saved, tmp_path, kind, capsys):
    """By the command: what `load_frozen` gives is what freezing here gives, tokenizer and all."""
    from transformers import AutoTokenizer, BertForSequenceClassification

    out, told = str(tmp_path / "small"), ["--precision", "int8"]
    if kind == "sentences":
        st = pytest.importorskip("sentence_transformers")
        st.SentenceTransformer(saved(), device="cpu").save_pretrained(str(tmp_path / "model"))
        model = str(tmp_path / "model")
    else:
        model, told = str(folder / "out"), ["--check", str(folder / "valid.jsonl")]  # auto
    assert main(["quantize", "--model", model, "--out", out, *told]) == 0
    loaded = bertfast.load_frozen(out)
    capsys.readouterr()
    assert main(["quantize", "--model", out, "--out", str(tmp_path / "again"), *told]) == 1
    assert "is frozen: give the model" in capsys.readouterr().err
    if kind == "sentences":
        expected = bertfast.freeze(st.SentenceTransformer(model, device="cpu"), "int8")
        texts = ["a cat", "the dog ran far away"]
        assert (loaded.encode(texts) == expected.encode(texts)).all()
        return
    precision = loaded.bert.encoder.packed.precision
    expected = bertfast.freeze(BertForSequenceClassification.from_pretrained(model), precision)
    given = AutoTokenizer.from_pretrained(out)(
        ["red cat", "blue"], padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        assert torch.equal(loaded(**given).logits, expected(**given).logits)


def test_out_of_another_model_is_left_alone(folder, saved, tmp_path):
    """Its tokenizer, too."""
    out = Path(shutil.copytree(saved(), tmp_path / "other"))
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    options = ["--precision", "fp32", "--out", str(out)]
    assert main(["quantize", "--model", str(folder / "out"), *options]) != 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_predict_and_evaluate_take_a_frozen_folder(folder, tmp_path):
    """With the columns that it was trained on; what asks for another precision is told."""
    model, data = str(folder / "out"), str(folder / "valid.jsonl")
    small = str(tmp_path / "small")
    quantize.save(model, small, "fp32")
    expected, found = evaluate(model, data), evaluate(small, data)
    assert found["accuracy"] == expected["accuracy"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    rows = zip(predict_table(small, data), predict_table(model, data), strict=True)
    for a, b in rows:
        assert a["label"] == b["label"]
        assert a["probabilities"] == pytest.approx(b["probabilities"], abs=1e-5)
    for options in ({"precision": "int8"}, {"device": "cuda"}):
        refused(ConfigError, "is frozen", evaluate, small, data, **options)
    quantize.save(str(folder / "model"), str(tmp_path / "encoder"), "fp32")
    refused(
        CheckpointError, "frozen Bert.*no fine-tuned", evaluate, str(tmp_path / "encoder"), data
    )


@pytest.mark.parametrize(
    "options, code",
    [
        ([], 2),
        (["--out", "there", "--precision", "int8", "bf16"], 2),
        (["--check", "valid.jsonl", "--precision", "auto"], 2),
        (["--out", "valid.jsonl/below"], 1),
        (["--out", "model"], 2),
    ],
)
def test_wrong_usage_of_out(folder, monkeypatch, options, code):
    monkeypatch.chdir(folder)
    assert main(["quantize", "--model", "model", *options]) == code


def test_a_frozen_model_within_its_run(tmp_path):
    """It decides by the run's thresholds, and the run's own model is none the less there."""
    given = tiny.settings(tmp_path, task="multi_label", thresholds=True, max_steps=2)
    for name in ("train", "valid"):
        rows = tiny.rows(30)
        for row in rows:
            row["label"] = [w for w in ("cat", "dog") if w in row["text"].split()]
        tiny.write(Path(given[name]), rows)
    expected = finetune(ClassifyConfig(**given))["valid"]["micro_f1"]
    out = Path(given["out"])
    assert {*json.loads((out / "decision.json").read_text())["thresholds"].values()} != {0.5}
    quantize.save(str(out), str(out / "frozen"), "fp32")
    for folder in (out, out / "frozen"):
        assert evaluate(str(folder), given["valid"])["micro_f1"] == pytest.approx(expected)
    (out / "decision.json").unlink()
    quantize.save(str(out), str(out / "frozen"), "fp32")
    assert not (out / "frozen" / "decision.json").exists()
