"""What a run leaves: the model first, whatever fails after it; no folder that isn't its own."""

import csv
import json
import math
import resource
import struct
import sys
import warnings

import numpy as np
import pytest
import tiny
import tiny_pretrain
from helpers import refused
from transformers import BertConfig

import bertfast
from bertfast import files
from bertfast.cli import main
from bertfast.data import DataError
from bertfast.progress import Progress
from bertfast.train import (
    ClassifyConfig,
    ConfigError,
    PretrainConfig,
    finetune,
    outputs,
    plots,
    predict,
    predict_table,
    pretrain,
)

finetuning = sys.modules["bertfast.train.finetune"]  # the package's name is the function's


def run(folder, **options):
    return finetune(ClassifyConfig(**tiny.settings(folder, epochs=1, **options)))


def arguments(folder, **options):
    values = tiny.settings(folder, epochs=1, **options)
    return [t for k, v in values.items() for t in ("--" + k.replace("_", "-"), str(v))]


def labelled(folder, names):
    """Settings of a run whose three classes have these names."""
    base = tiny.settings(folder)
    of = dict(zip(("red", "green", "blue"), names, strict=True))
    for name, n in (("train", 60), ("valid", 21)):
        tiny.write(folder / f"{name}.jsonl", [r | {"label": of[r["label"]]} for r in tiny.rows(n)])
    return base


AFTER = [
    (plots, "confusion_matrix", "confusion_matrix.png", MemoryError),
    (plots, "training_curve", "training_curve.png", ValueError),
    (finetuning, "_write_card", "README.md", UnicodeError),
    (outputs, "write_json", "eval_results.json", OSError),
]


@pytest.mark.seconds
@pytest.mark.parametrize("module, function, file, error", AFTER, ids=[a[2] for a in AFTER])
def test_the_model_comes_first(tmp_path, monkeypatch, capfd, module, function, file, error):
    out, real, called = tmp_path / "out", getattr(module, function), []

    def fails(path, *rest):
        if function == "write_json" and path.name != file:
            return real(path, *rest)
        called.append((out / "model.safetensors").exists() and (out / "tokenizer.json").exists())
        raise error("as it may")

    monkeypatch.setattr(module, function, fails)
    assert run(tmp_path)["valid"]["examples"] == 21
    assert called == [True]
    assert f"{file} is not written: {error.__name__}: as it may" in capfd.readouterr().err
    assert predict(str(out), ["red cat"])


def test_pretraining_saves_first(tmp_path, monkeypatch, capfd):
    out = tmp_path / "out"

    def fails(*_):
        assert (out / "model.safetensors").exists() and (out / "tokenizer.json").exists()
        raise MemoryError("as it may")

    monkeypatch.setattr(plots, "training_curve", fails)
    pretrain(PretrainConfig(**tiny_pretrain.settings(tmp_path, max_steps=2, eval_steps=2)))
    assert "training_curve.png is not written" in capfd.readouterr().err
    assert json.loads((out / "eval_results.json").read_text())["valid"]["loss"] > 0


def test_without_matplotlib(tmp_path, monkeypatch, capfd):
    for name in [m for m in sys.modules if m.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run(tmp_path)
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert capfd.readouterr().err.count("is not written") == 2


HOSTILE = ["Ca$$h", "$\\frac{", "a_{^$b$", "猫", "\U0001f600", "a\nb", "x" * 300, "{0} %s", "<&>"]


@pytest.mark.seconds
@pytest.mark.parametrize("names", [HOSTILE[i : i + 3] for i in (0, 3, 6)], ids=str)
def test_names_of_classes(tmp_path, capfd, names):
    """No name is a formula, none needs a font: all files are there, nothing warns."""
    settings = labelled(tmp_path, names)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*newly initialised")
        results = finetune(ClassifyConfig(**settings | {"epochs": 1}))
    assert len(results["valid"]["per_class"]) == 3
    assert "is not written" not in capfd.readouterr().err
    with open(tmp_path / "out" / "confusion_matrix.csv", newline="", encoding="utf-8") as f:
        assert next(csv.reader(f))[1:] == list(results["valid"]["per_class"])


@pytest.mark.seconds
def test_many_classes(tmp_path):
    """A picture of bounded size that says what it leaves out: not the class with the errors."""
    n = 1000
    truth = np.arange(n).repeat(2)
    predicted = truth.copy()
    predicted[2 * 700 : 2 * 700 + 2] = 3
    drawn = []
    figure, plots_figure = plots._figure, lambda *s: drawn.append(figure(*s)) or drawn[-1]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(plots, "_figure", plots_figure)
        plots.confusion_matrix(truth, predicted, [f"class {i}" for i in range(n)], tmp_path)
    width, height = struct.unpack(">II", (tmp_path / "confusion_matrix.png").read_bytes()[16:24])
    assert max(width, height) < 2500
    axes = drawn[0].axes[0]
    shown = [t.get_text() for t in axes.get_yticklabels()]
    assert len(shown) == plots.SHOWN and {"class 3", "class 700"} <= set(shown)
    assert axes.get_title() == "the 40 of 1,000 classes with the most errors"
    with open(tmp_path / "confusion_matrix.csv", newline="") as f:
        rows = list(csv.reader(f))
    assert len(rows) == n + 1 and rows[701][4] == "2"  # truth 700, predicted 3
    other = tmp_path / "other"
    other.mkdir()
    names = [str(i) for i in range(plots.LISTED + 1)]
    refused(ValueError, "2,001 classes", plots.confusion_matrix, [0], [0], names, other)
    assert not list(other.iterdir())


@pytest.mark.seconds
def test_a_readme_of_someone_else(tmp_path, capfd):
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("my notes")
    run(tmp_path)
    assert (out / "README.md").read_text() == "my notes"
    assert "README.md is not written" in capfd.readouterr().err
    (out / "README.md").unlink()
    run(tmp_path)
    run(tmp_path)
    assert "fine-tuned with bertfast" in (out / "README.md").read_text()
    assert "is not written" not in capfd.readouterr().err


def test_folder_is_checked_before(tmp_path, capfd):
    (tmp_path / "file").write_text("x")
    for out in ("file", "file/below"):
        assert main(["finetune", "classify", *arguments(tmp_path, out=str(tmp_path / out)),
                     "--dry-run"]) == 1  # fmt: skip
        assert f"{tmp_path / 'file'} is a file" in capfd.readouterr().err
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    refused(ConfigError, "the folder of the model", run, tmp_path, out=str(tmp_path / "model"))
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


@pytest.mark.seconds
def test_full_disk_at_the_end(tmp_path, capfd):
    """The weights stay in the checkpoint; the same command saves them without training."""
    given = arguments(tmp_path)
    assert main(["finetune", "classify", *given]) == 0
    model = tmp_path / "out" / "model.safetensors"
    expected = model.read_bytes()
    model.unlink()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(expected) // 2, old[1]))
    try:
        assert main(["finetune", "classify", *given]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    err = capfd.readouterr().err
    assert "File too large" in err and "--resume auto saves it" in err
    assert "Traceback" not in err and not list(model.parent.glob("*.tmp")) and not model.exists()
    assert main(["finetune", "classify", *given]) == 0
    assert model.read_bytes() == expected


def test_base_model_is_part_of_the_settings(tmp_path):
    from bertfast.train import TrainingError

    run(tmp_path)
    weights = tmp_path / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    refused(TrainingError, r"other settings \(model_sha256\)", run, tmp_path)


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_one_process_only(tmp_path, monkeypatch, capfd, command):
    """Under torchrun each rank would do it all and write every file."""
    given = {
        "evaluate": ["--model", "m", "--data", "d"],
        "predict": ["--model", "m", "--input", "d"],
    }[command]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([command, "classify", *given]) == 2
    err = capfd.readouterr().err
    assert "WORLD_SIZE is 2" in err and "without torchrun" in err


def test_files_of_results_are_checked_first(tmp_path, monkeypatch, capfd):
    from bertfast.train.tasks import classify

    ran = []
    for name in ("evaluate", "predict_table"):
        monkeypatch.setattr(classify, name, lambda *_, **__: ran.append(1) or {"f1": 1})
    ev = ["evaluate", "classify", "--model", "m", "--data", "d", "--json"]
    pr = ["predict", "classify", "--model", "m", "--input", "d", "--output"]
    for command in (ev, pr):
        for target, message in ((tmp_path, "is a folder"), (tmp_path / "no" / "x", "not there")):
            assert main([*command, str(target)]) == 1
            assert message in capfd.readouterr().err
    assert not ran
    # A disk that fills up later loses no figures.
    monkeypatch.setattr("bertfast.files.write_whole", lambda *_: (_ for _ in ()).throw(OSError(28)))
    assert main([*ev, str(tmp_path / "r.json")]) == 1
    assert json.loads(capfd.readouterr().out) == {"f1": 1}


def test_predictions_are_written_as_they_are_made(tmp_path, monkeypatch, capfd):
    """In order, a chunk of the table at a time; a fault leaves those before it, and the old file."""
    folder = tiny.settings(tmp_path) and tmp_path
    config = BertConfig.from_pretrained(folder / "model")
    bertfast.BertForSequenceClassification(config).save_pretrained(folder / "model")
    model, table, out = str(folder / "model"), tmp_path / "t.jsonl", tmp_path / "out.jsonl"
    tiny.write(table, tiny.rows(30))
    monkeypatch.setattr("bertfast.data.ROWS", 8)
    monkeypatch.setattr(Progress, "EVERY", 0)
    arguments = ["predict", "classify", "--model", model, "--input", str(table)]
    arguments += ["--batch-tokens", "30", "--output"]
    assert main([*arguments, str(out)]) == 0
    said = [line for line in capfd.readouterr().err.splitlines() if "texts/s" in line]
    assert [line.split()[0] for line in said] == ["8", "16", "24", "30"] and "left" in said[1]
    written = out.read_text()
    rows = [json.loads(line) for line in written.splitlines()]
    expected = predict(model, [row["text"] for row in tiny.rows(30)])
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):  # other batches, other roundings
        assert row["probabilities"] == pytest.approx(other["probabilities"], rel=1e-4)
    assert main([*arguments, "-"]) == 0 and capfd.readouterr().out == written
    tiny.write(table, [*tiny.rows(30)[:20], {"text": None}])
    found = iter(predict_table(model, str(table), batch_tokens=30))
    assert [next(found) for _ in range(16)] == rows[:16]
    with pytest.raises(DataError, match=r"row 21 \(line 21\): column 'text' is missing"):
        next(found)
    assert main([*arguments, str(out)]) == 1
    partial = tmp_path / "out.jsonl.partial"
    assert f"the 16 rows that were done are in {partial}" in capfd.readouterr().err
    assert partial.read_text().splitlines() == written.splitlines()[:16]
    assert out.read_text() == written
    assert main([*arguments[:-3], "--batch-tokens", "0"]) == 2
    assert "batch_tokens is 0, expected 1 or more" in capfd.readouterr().err


def test_no_result_takes_an_inputs_place(tmp_path, capfd):
    """Nor a file's of the model's folder, whose scores may be written again."""
    model, data = tmp_path / "m", tmp_path / "d.jsonl"
    model.mkdir()
    for path in (model / "config.json", model / "scores.json", data):
        path.write_text("x")
    (tmp_path / "link").symlink_to(data)
    commands = (
        ["evaluate", "classify", "--data", str(data), "--json"],
        ["predict", "classify", "--input", str(data), "--output"],
        ["quantize", "--check", str(data), "--json"],
    )
    names = ["model.safetensors", "config.json", "tokenizer.json", "run_config.yaml", "README.md"]
    for command in commands:
        for target in (data, tmp_path / "link", *(model / name for name in names)):
            assert main([*command, str(target), "--model", str(model)]) == 2
            assert f"{target} is read from, and would be overwritten" in capfd.readouterr().err
        for target in (model / "scores.json", model / "new.json", tmp_path / "config.json"):
            assert main([*command, str(target), "--model", str(model)]) == 1  # no model is there
            assert "overwritten" not in capfd.readouterr().err
    assert data.read_text() == "x"


def test_nobodys_files_are_lost(tmp_path, capfd):
    """`out` may be a folder with other things in it, not with files of the run's names that no run
    made, nor with the run's data under such a name; a dry run says so too."""
    settings = tiny.settings(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("x")
    (out / "README.md").write_text("x")
    outputs.check(out, settings["model"])
    for name in ("metrics.jsonl", "config.json", "confusion_matrix.csv"):
        (out / name).write_text("mine")
        config = ClassifyConfig(**settings)
        refused(ConfigError, f"out is {out}, which holds {name} but no run_config.yaml",
                finetune, config, dry_run=True)  # fmt: skip
        refused(ConfigError, f"holds {name}", pretrain, PretrainConfig(data="d", out=str(out)))
        assert (out / name).read_text() == "mine"
        (out / name).unlink()
    (out / "run_config.yaml").write_text("")
    (out / "metrics.jsonl").write_text("mine")
    for name in ("train", "valid", "test"):
        config = ClassifyConfig(**settings | {name: str(out / "metrics.jsonl")})
        refused(ConfigError, "metrics.jsonl is a name of the run's own files", finetune, config)
    assert (out / "metrics.jsonl").read_text() == "mine"


@pytest.mark.parametrize("name", ["model.safetensors", "metrics.jsonl", "checkpoints"])
def test_what_stands_in_the_place_of_a_file(tmp_path, name):
    settings = tiny.settings(tmp_path)
    out = tmp_path / "out"
    (out / name).mkdir(parents=True)
    (out / "run_config.yaml").write_text("")
    if name == "checkpoints":
        (out / name).rmdir()
        (out / name).write_text("x")
    refused(OSError, name, finetune, ClassifyConfig(**settings), dry_run=True)


def test_what_is_resumed_is_there(tmp_path):
    settings = tiny.settings(tmp_path, resume=str(tmp_path / "none"))
    refused(ConfigError, "resume is .*none', expected auto, no or a checkpoint's folder",
            finetune, ClassifyConfig(**settings), dry_run=True)  # fmt: skip


def test_json_has_no_nan():
    value = {"a": [math.nan, {"b": (math.inf, 1.5, "NaN", True, None)}], "c": -math.inf}
    expected = '{"a": [null, {"b": [null, 1.5, "NaN", true, null]}], "c": null}'
    assert files.json_text(value) == expected
