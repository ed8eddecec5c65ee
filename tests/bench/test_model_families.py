"""benchmarks/model_families.py on tiny models: every cell, outputs that differ, what can't be frozen."""

import json
import sys
from pathlib import Path

import pytest
import tiny
import torch
from untimed import untimed

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import base_sizes
import model_families as families

TINY = base_sizes.TINY | {"vocab_size": 200}


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    untimed(monkeypatch)
    folder = str(tiny.checkpoint(tmp_path / "model"))
    monkeypatch.setattr(families, "minilm", lambda: folder)
    monkeypatch.setattr(families, "NATURAL", [9, 3, 5])
    monkeypatch.setattr(families, "LONG", [70])  # past a window's edge
    monkeypatch.setattr(families, "TINY", TINY)


def run(tmp_path, *options):
    families.main(["--tiny", "--rounds", "1", "--out", str(tmp_path), *options])
    return json.loads((tmp_path / "model_families.json").read_text())


def rows_of(result, name):
    return next(c["rows"] for c in result["cells"] if c["task"].startswith(name))


@pytest.mark.seconds
def test_cells(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(families, "FROZEN", {"ModernBERT-base": ("fp32",)})
    result = run(tmp_path)
    tasks = [cell["task"] for cell in result["cells"]]
    assert len(tasks) == len(set(tasks)) == 8
    for cell in result["cells"]:
        rows = {row["name"]: row for row in cell["rows"]}
        assert rows["bertfast accelerate"]["milliseconds"] > 0
        eager = cell["task"].startswith("DeBERTa")
        assert f"transformers {'eager' if eager else 'sdpa'}" in rows
    timed = [r for c in result["cells"] for r in c["rows"] if "milliseconds" in r]
    assert len(result["summary"]) == len(timed) - 8  # of each cell one is the rival
    assert any(r["name"] == "bertfast frozen, fp32" for r in rows_of(result, "ModernBERT"))
    assert "1 x 4096" in capsys.readouterr().out


@pytest.mark.seconds
def test_what_is_not_frozen_says_why(tmp_path, monkeypatch):
    def refuse(model, precision):
        raise ValueError("so it is")

    monkeypatch.setattr(families.bertfast, "freeze", refuse)
    monkeypatch.setattr(families, "CELLS", {"GTE-base": ("natural",)})
    monkeypatch.setattr(families, "FROZEN", {"GTE-base": ("int8",)})
    *timed, note = rows_of(run(tmp_path, "--families", "GTE-base"), "GTE-base")
    assert len(timed) == 2 and note == {"name": "bertfast frozen, int8", "note": "so it is"}


def test_wrong_outputs_have_no_time(tmp_path, monkeypatch):
    real = families.accelerated

    def spoiled(stock, precision=None):
        ours = real(stock)
        with torch.no_grad():
            ours.layers[0].mlp.Wo.weight.mul_(1.01)
        return ours

    monkeypatch.setattr(families, "accelerated", spoiled)
    with pytest.raises(SystemExit, match="ModernBERT-base, None: outputs are not"):
        run(tmp_path, "--families", "ModernBERT-base")


def test_wrong_gradients_have_no_time(tmp_path, monkeypatch):
    right, seen = families.train.gradients, []

    def spoiled(*given):
        loss, found = right(*given)
        seen.append(loss)  # ours come first
        return loss, {name: g * 1.01 if len(seen) == 1 else g for name, g in found.items()}

    monkeypatch.setattr(families.train, "gradients", spoiled)
    monkeypatch.setattr(families, "CELLS", {"DeBERTa-v3-base": ("training",)})
    with pytest.raises(SystemExit, match="gradients are not the stock model's"):
        run(tmp_path, "--families", "DeBERTa-v3-base")
