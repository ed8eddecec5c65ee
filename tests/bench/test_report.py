"""The report of made-up results: its tables, its text, its pictures; and the scripts' files."""

import json
import sys
from pathlib import Path

import pytest
import tiny
import transformers
from untimed import untimed

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import breakdown
import harness
import plots
import report
import rivals_memory
import sweep

ORIGIN = {
    "device": {"name": "D", "threads": 2},
    "versions": {"torch": "2"},
    "build": {"cpu_isa": "avx2"},
    "commit": "abc",
    "date": "2026-01-02T03:04:05",
    "summary": [],
}


def timed(name, milliseconds):
    speed = {"milliseconds": milliseconds, "tokens_per_second": round(1e6 / milliseconds)}
    return {"name": name, **speed, "max_error": 1e-6, "cosine": 1.0}


def cell(**what):
    rows = [timed("bertfast frozen", 2.0), timed("transformers sdpa", 8.0)]
    rows.append({"name": "CTranslate2", "note": "not installed"})
    sizes = {"tokens": 10, "padded_tokens": 20, "matmul_peak_gflops": 100.0}
    return {"task": "MiniLM inference, A, fp32", "precision": "fp32", **sizes, "rows": rows, **what}


def part(operator, **what):
    sizes = {"operator": operator, "uses": 1, "gflop": 2.0, "mb": 4.0, "roof": "products"}
    roofs = {"matmul_peak_gflops": 1000.0, "copy_gb_per_second": 50.0, "roof_ms": 2.0}
    return sizes | roofs | {"bertfast_ms": 4.0, "torch_ms": 10.0} | what


@pytest.fixture
def found():
    norm = part("add_layer_norm", uses=2, gflop=0.0, roof="memory", roof_ms=1.0)
    layer = {"task": "a layer of M, forward, fp32", "model": "M", "step": "forward"}
    layer |= {"precision": "fp32", "tokens": 10, "padded_tokens": 20}
    layer["parts"] = [part("qkv_linear"), norm]
    sizes = [{"name": "bertfast", "inference_peak_mb": 9}, {"name": "r", "inference_peak_mb": 20}]
    cells = {
        "encoder_inference": [cell(workload="m-natural"), cell(workload="m-1x32")],
        "sweep": [cell(axis=a, value=v) for a in ("length", "padding") for v in (0.5, 1)],
        "rivals_memory": [cell(rows=sizes)],
        "breakdown": [layer],
    }
    return {name: {"benchmark": name, **ORIGIN, "cells": made} for name, made in cells.items()}


def test_report(found):
    text = report.report(found)
    for name in plots.PLOTS:
        assert f"![{name}]({name}.png)" in text
    assert "| bertfast frozen | 2.000 | 500000 | 1.0e-06 | 1.00000 |" in text
    assert "CTranslate2: not installed" in text and "| sweep | abc | 2026-01-02 |" in text
    assert text.startswith("# D, avx2, 2 threads\n")


def test_layer_table(found):
    text = report.layers([found["breakdown"]])
    assert "| qkv_linear | 2 | 4 | 2 (products) | 4 | 50% | 10 | 2.50x |" in text
    assert "| add_layer_norm x 2 | 0 | 4 | 1 (memory) | 4 | 25% | 10 | 2.50x |" in text
    assert "| layer | 2 | 8 | 3 | 8 | 38% | 20 | 2.50x |" in text


def test_kind_table():
    """The newest results' time, and its figure, of another benchmark where that has it."""
    row = {"unit": "s", "bertfast": 2.0, "rival": 5.0, "rival_name": "r", "ratio": 2.5}
    figure = row | {"unit": "", "bertfast": 0.5, "rival": 0.25, "ratio": None}
    more = {"sections": 1, "quality": 2, "tokens": 3}
    found = [
        ORIGIN | {"benchmark": f"finetune_{name}", "date": f"2026-0{month}-01", "summary": rows}
        for name, month in more.items()
        for rows in [[row | {"task": "training"}, figure | {"task": "test macro F1"}]]
    ]
    found[0]["summary"][1]["bertfast"] = 0.75  # another run's
    old = found[0] | {
        "date": "2025-01-01",
        "summary": [row | {"bertfast": 4.0, "task": "training"}],
    }
    (line,) = report.kind_table([old, *found]).splitlines()[2:]
    assert line == "| `classify` | 2 s | 5 s | 2.50x | macro F1 | 0.5 | 0.25 |"


def test_pictures(found, tmp_path):
    written = plots.draw(found, tmp_path)
    assert {p.stem for p in written} == set(plots.PLOTS)
    assert all(1_000 < p.stat().st_size < 100_000 for p in written)
    del found["breakdown"], found["sweep"]
    assert {p.stem for p in plots.draw(found, tmp_path)} == {"speed", "latency", "memory"}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A tiny model, for all scripts."""
    folder = str(tiny.checkpoint(tmp_path / "model"))
    monkeypatch.setattr(sweep, "minilm", lambda: folder)
    monkeypatch.setattr(rivals_memory, "checkpoint", lambda _: folder)
    monkeypatch.setattr(rivals_memory, "LENGTHS", [8, 8])
    untimed(monkeypatch)
    return folder


def test_sweep(small, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "LENGTHS", (8, 16))
    monkeypatch.setattr(sweep, "TOKENS", 32)
    monkeypatch.setattr(sweep, "LONGEST", 16)
    sweep.main(["--rounds", "1", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "sweep.json").read_text())
    assert len(result["cells"]) == 2 * (2 + len(sweep.PADDING))
    assert [c["tokens"] for c in result["cells"][:3]] == [32, 32, 256]
    assert len(result["summary"]) == 2 and report.report({"sweep": result})


def test_precisions_that_torch_emulates(small, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "emulated", lambda p: "left out" if p == "bf16" else None)
    monkeypatch.setattr(sweep, "shapes", lambda: [("length", 8, "2 x 8 tokens", [8, 8], 8)])
    sweep.main(["--rounds", "1", "--out", str(tmp_path)])
    cells = json.loads((tmp_path / "sweep.json").read_text())["cells"]
    assert [cell["precision"] for cell in cells] == ["fp32"]
    with pytest.raises(SystemExit, match="no precision is left"):
        breakdown.main(["--precisions", "bf16", "--out", str(tmp_path)])


def test_breakdown(small, tmp_path, monkeypatch):
    config = transformers.BertConfig.from_pretrained(small)
    monkeypatch.setattr(breakdown, "MODELS", {"tiny": (config, [8, 3])})
    breakdown.main(["--rounds", "1", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "breakdown.json").read_text())
    assert result["summary"][0]["task"] == "a layer of tiny, forward, fp32"
    (linear,) = (p for p in result["cells"][0]["parts"] if p["operator"] == "feed_forward")
    assert linear["gflop"] == pytest.approx(2 * 2 * 11 * 32 * 48 / 1e9, abs=1e-4)
    assert report.layers([result]).count("| layer |") == 4


@pytest.mark.slow
def test_memory(small, tmp_path):
    arguments = ["--precisions", "bf16", "--rivals", "transformers sdpa", "--out", str(tmp_path)]
    rivals_memory.main(arguments)
    (found,) = json.loads((tmp_path / "rivals_memory.json").read_text())["cells"]
    rows = {row["name"]: row for row in found["rows"]}
    assert all(rows[name]["inference_peak_mb"] for name in ("bertfast frozen", "transformers sdpa"))
