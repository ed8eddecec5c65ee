"""The scripts for GPU machines, as far as a CPU takes them."""

import json
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import triton_interpreter  # noqa: F401

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu_inference
import gpu_loop
import gpu_models
import gpu_ops
import gpu_profile
import gpu_run
import gpu_sanitize
import gpu_training

TINY = ("--config", "tiny", "--device", "cpu", "--rounds", 1)
SHAPES = ("2 x 24", "3 natural to 24")
STOCK = "transformers sdpa"


def script(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    return module.main()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(gpu_models, "product", lambda *_: (lambda: None, 10**9))
    monkeypatch.setattr(gpu_loop, "WORDS", 6000)
    for module in (gpu_models, gpu_loop):
        monkeypatch.setattr(module, "NATURAL", 2)
    for module in (gpu_inference, gpu_training):
        monkeypatch.setattr(
            *(module, "take_turns"),
            lambda runs, *_, **__: {name: len(run()) * 1e-3 for name, run in runs.items()},
        )


def run(monkeypatch, module, name, tmp_path, *options):
    """The tasks and rows of a script's results."""
    assert script(monkeypatch, module, "--out", tmp_path, *TINY, *options) == 0
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert not [r for cell in result["cells"] for r in cell["rows"] if "note" in r]
    return result, {c["task"]: {r["name"]: r for r in c["rows"]} for c in result["cells"]}


def test_inference(tmp_path, monkeypatch):
    result, cells = run(monkeypatch, gpu_inference, "gpu_inference_tiny", tmp_path)
    assert list(cells) == [f"BERT-tiny inference, {shape}, bf16" for shape in SHAPES]
    names = {gpu_inference.FAST, STOCK, "bertfast accelerate, launched"}
    names |= {"bertfast", "bertfast frozen"}
    first, last = cells.values()
    assert set(first) == names and set(last) == names | {gpu_inference.PADDED}
    assert all(0 < r["relative_error"] < 0.05 for r in (first | last).values())
    assert [line["rival_name"] for line in result["summary"]] == [STOCK] * 2


@pytest.mark.seconds
@pytest.mark.parametrize("family", gpu_models.FAMILIES[1:])
def test_other_families(family, tmp_path, monkeypatch):
    file, options = family.split("-")[0].lower() + "_tiny", ("--family", family)
    stock = gpu_models.stock_of(gpu_models.config_of("tiny", family))
    assert stock == f"transformers {'eager' if 'DeBERTa' in family else 'sdpa'}"
    _, cells = run(monkeypatch, gpu_inference, f"gpu_inference_{file}", tmp_path, *options)
    assert list(cells) == [f"{family} inference, {shape}, bf16" for shape in SHAPES]
    names = {gpu_inference.FAST, stock, "bertfast accelerate, launched"}
    first, last = cells.values()
    assert set(first) == names and set(last) == names | {gpu_inference.PADDED}
    _, cells = run(monkeypatch, gpu_training, f"gpu_finetune_{file}", tmp_path, *options)
    for rows in cells.values():
        assert set(rows) == {gpu_training.FAST, gpu_training.LAUNCHED, stock}
        assert all(r["cosine"] > 0.99 for r in rows.values())


@pytest.mark.seconds
def test_wrong_outputs_have_no_speed(tmp_path, monkeypatch):
    states = gpu_inference.Model.states

    def spoiled(self, batch):
        found = states(self, batch)
        return found * 1.2 if self.launch else found

    monkeypatch.setattr(gpu_inference.Model, "states", spoiled)
    assert script(monkeypatch, gpu_inference, "--out", tmp_path, *TINY) == 1
    result = json.loads((tmp_path / "gpu_inference_tiny.json").read_text())
    notes = {r["name"]: r["note"] for c in result["cells"] for r in c["rows"] if "note" in r}
    assert list(notes) == ["bertfast accelerate, launched"] and "wrong" in notes.popitem()[1]


@pytest.mark.seconds
def test_compiled_inference(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)  # minutes
    options = ("--compiled",)
    _, cells = run(monkeypatch, gpu_inference, "gpu_inference_tiny_compiled", tmp_path, *options)
    for rows in cells.values():
        assert set(rows) == {gpu_inference.FAST, "transformers compiled, reduce-overhead"}


@pytest.mark.seconds
def test_finetune(tmp_path, monkeypatch):
    result, cells = run(monkeypatch, gpu_training, "gpu_finetune_tiny", tmp_path)
    assert list(cells) == [f"BERT-tiny fine-tuning, {shape}, bf16" for shape in SHAPES]
    names = {gpu_training.FAST, gpu_training.LAUNCHED, STOCK}
    first, last = cells.values()
    assert set(first) == names | {"bertfast loop", "bertfast loop, launched"}
    assert set(last) == names
    assert all(r["cosine"] > 0.999 for r in last.values())
    assert last[gpu_training.FAST]["gap_to_launch"] == 0 and first[gpu_training.FAST]["cosine"] < 1
    [losses] = result["notes"].values()
    assert losses["equal"] and losses["steps"] >= 4


@pytest.mark.seconds
@pytest.mark.usefixtures("tape")
def test_replays_are_counted_and_compared(tmp_path, monkeypatch):
    _, cells = run(monkeypatch, gpu_inference, "gpu_inference_tiny", tmp_path)
    for rows in cells.values():
        assert rows[gpu_inference.FAST]["replays"] > 0, rows
        assert "replays" not in rows["bertfast accelerate, launched"]
    result, cells = run(monkeypatch, gpu_training, "gpu_finetune_tiny", tmp_path)
    for rows in cells.values():
        fast = rows[gpu_training.FAST]
        assert fast["replays"] > 0 and fast["gap_to_launch"] < 1e-5
    assert cells[f"BERT-tiny fine-tuning, {SHAPES[0]}, bf16"]["bertfast loop"]["replays"] > 0
    [losses] = result["notes"].values()
    assert losses["equal"] and losses["steps"] >= 3  # a replayed step's loss is read late
    what = ("--what", "checks")
    result, _ = run(monkeypatch, gpu_training, "gpu_checks_tiny", tmp_path, *what)
    repeats, losses, replayed = result["notes"].values()
    assert repeats["equal"] and repeats["gap_to_launch"] < 1e-5 and replayed > 0
    assert losses["largest_difference"] < 1e-3


@pytest.mark.seconds
def test_compiled_finetune(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: None)
    what = ("--what", "compiled")
    _, cells = run(monkeypatch, gpu_training, "gpu_compiled_tiny", tmp_path, *what)
    assert [set(rows) for rows in cells.values()] == [
        {gpu_training.FAST, "transformers compiled"}
    ] * 2


@pytest.mark.seconds
def test_pretrain(tmp_path, monkeypatch):
    what = ("--what", "pretrain")
    result, cells = run(monkeypatch, gpu_training, "gpu_pretrain_tiny", tmp_path, *what)
    [rows] = cells.values()
    assert set(rows) == {"bertfast loop", "bertfast loop, launched"}
    assert all(r["sequences_per_second"] > 0 for r in rows.values())
    *rates, losses = result["notes"].values()
    assert len(rates) == 2
    assert losses["equal"] and losses["steps"] >= 4


@pytest.mark.seconds
def test_checks(tmp_path, monkeypatch):
    result, cells = run(monkeypatch, gpu_training, "gpu_checks_tiny", tmp_path, "--what", "checks")
    repeats, losses, _ = result["notes"].values()
    assert not cells and repeats == {"repeats": 6, "equal": True, "gap_to_launch": 0.0}
    assert losses == {"steps": 8, "equal": True, "largest_difference": 0.0}


@pytest.mark.seconds
def test_what_does_not_fit_says_so(tmp_path, monkeypatch):
    for module, name in (
        (gpu_inference, "gpu_inference_tiny"),
        (gpu_training, "gpu_finetune_tiny"),
    ):
        assert script(monkeypatch, module, "--out", tmp_path, *TINY, "--seconds", 0) == 0
        cells = json.loads((tmp_path / f"{name}.json").read_text())["cells"]
        assert {r["note"] for c in cells for r in c["rows"]} == {"left out: no time"}


def test_profile(tmp_path, monkeypatch):
    options = ("--config", "tiny", "--device", "cpu")
    script(monkeypatch, gpu_profile, "--out", tmp_path, *options)
    text = (tmp_path / "profile.txt").read_text()
    assert text.count("=== ") == 4 and "Self CPU" in text and "tottime" in text


@pytest.mark.seconds
def test_sanitize(monkeypatch, capsys):
    monkeypatch.setattr(gpu_sanitize, "LENGTHS", ((5, 1, 9),))
    assert script(monkeypatch, gpu_sanitize, "--device", "cpu", "--seconds", 100) == 0
    found = capsys.readouterr().out
    assert found.count("error") == len(gpu_sanitize.bench.OPERATORS) + 2, found


def test_parts(tmp_path, monkeypatch, capsys):
    """Resuming, the time that all may take, a failure, the archive."""
    python = [sys.executable, "-c"]
    ran = tmp_path / "ran"
    works = f"open({str(ran)!r}, 'a').write('x')"
    made = {
        "works": gpu_run.Part(5, [*python, works]),
        "fails": gpu_run.Part(5, [*python, "raise SystemExit('so it is')"]),
        "long": gpu_run.Part(1000, [*python, works]),
    }
    monkeypatch.setattr(gpu_run, "parts_of", lambda out: made)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    out, file = tmp_path / "out", tmp_path / "all.tgz"
    call = ["--out", str(out), "--total", "100", "--archive", str(file)]
    for _ in range(2):
        assert gpu_run.main(call) == 1
        shown = capsys.readouterr().out
        assert "so it is" in shown and "no time" in shown
    assert ran.read_text() == "x" and "done before" in shown
    with tarfile.open(file) as tar:
        assert {"out/works.done", "out/fails.log"} <= set(tar.getnames())


def test_summary(tmp_path):
    names = ("shipped", "(1, 1)", "Variant(2)", "Variant(3)", "cuDNN")
    rows = [{"name": n, "milliseconds": i} for i, n in enumerate(names)]
    cells = [{"task": "a", "rows": [*rows, {"name": "Tile(4)", "note": "died"}]}]
    for name in ("tune_x", "gpu_x"):
        text = json.dumps({"cells": cells, "notes": {"k": 1}})
        (tmp_path / f"{name}.json").write_text(text)
    whole, note, best, _ = gpu_run.summary(tmp_path)
    assert whole.endswith("Variant(3) 3; cuDNN 4; Tile(4) died") and note == "k: 1"
    assert best == "a: shipped 0; (1, 1) 1; Variant(2) 2; cuDNN 4"


def test_commands_name_what_there_is(tmp_path):
    root = Path(__file__).resolve().parents[2]
    for name, part in gpu_run.parts_of(tmp_path).items():
        assert part.seconds < 180, name
        for word in part.command:
            if word.endswith(".py"):
                assert (root / word).is_file(), word
    for names in (gpu_run.OPERATORS, gpu_run.OPTIONS, gpu_run.CUDA, gpu_run.PARITY):
        assert all(gpu_run.tests(name) for name in names.split())


def test_refusals(tmp_path, monkeypatch, capsys):
    def message(*arguments):
        with pytest.raises(SystemExit, match="2"):
            script(monkeypatch, *arguments)
        return capsys.readouterr().err

    assert "'speed'" in message(gpu_run, "--out", tmp_path, "--parts", "speed")
    if not torch.cuda.is_available():
        for module in (gpu_run, gpu_ops):
            assert "no GPU" in message(module, "--out", tmp_path)
