"""benchmarks/training_step.py on a tiny model: it runs, and refuses losses that differ."""

import json
import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import training_step


@pytest.fixture
def folder(tmp_path, monkeypatch):
    folder = str(tiny.checkpoint(tmp_path / "model", max_position_embeddings=128))
    monkeypatch.setattr(training_step, "minilm", lambda: folder)
    return folder


@pytest.mark.seconds
def test_runs(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(training_step, "emulated", lambda _: None)  # tiny steps are quick
    threads = str(torch.get_num_threads())
    options = ["--workloads", "minilm-natural", "--rounds", "1", "--curve", "3"]
    training_step.main([*options, "--threads", threads, "--out", str(tmp_path)])
    result = json.loads((tmp_path / "training_step.json").read_text())
    assert [c["precision"] for c in result["cells"]] == ["fp32", "bf16"]
    for cell in result["cells"]:
        assert len(cell["losses"]["bertfast"]) == training_step.CHECKED
        assert min(cell["useful_gflops"].values()) > 0
    runs = result["curve"]["losses"]
    assert runs["fp32"] != runs["bf16"] and len(runs["bf16"]) == 3
    assert [set(row) for row in result["summary"]] == [
        {"task", "unit", "bertfast", "rival", "rival_name", "ratio"}
    ] * 3


def test_refuses_other_losses(folder, monkeypatch):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    real = training_step.models

    def spoiled(name):
        found = real(name)
        with torch.no_grad():
            found["bertfast"].classifier.bias.add_(torch.tensor([0.01, 0, 0, 0]))
        return found

    monkeypatch.setattr(training_step, "models", spoiled)
    with pytest.raises(SystemExit, match="losses differ"):
        training_step.measure("minilm-natural", "fp32", tokenizer, 1)


def test_slow_precision(folder, monkeypatch):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    monkeypatch.setattr(training_step, "emulated", lambda _: "not timed: reason")
    cell = training_step.measure("minilm-natural", "bf16", tokenizer, 1)
    assert cell["note"] == "not timed: reason" and "ratio" not in cell
    assert training_step.summary([cell], None) == []


def test_masked_batches(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batches = training_step.masked_batches(tokenizer, 2)
    for batch in batches:
        chosen = batch["labels"] != -100
        assert (batch["input_ids"][chosen] == tokenizer.mask_token_id).all()
        assert not chosen[batch["attention_mask"] == 0].any() and not chosen[:, 0].any()
        share = chosen.sum() / batch["attention_mask"].sum()
        assert 0.05 < share < 0.25
