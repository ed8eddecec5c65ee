"""The scripts for GPU machines, as far as a CPU takes them."""

import json
import sys
from pathlib import Path

import pytest
import torch
from untimed import untimed

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu_encoder
import gpu_ops
import gpu_run


def script(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    return module.main()


def test_encoder(tmp_path, monkeypatch):
    untimed(monkeypatch, gpu_encoder)
    options = ("--config", "tiny", "--device", "cpu", "--rounds", 2)
    assert script(monkeypatch, gpu_encoder, "--out", tmp_path, *options) == 0
    result = json.loads((tmp_path / "gpu_encoder_tiny.json").read_text())
    tasks = [cell["task"] for cell in result["cells"]]
    kinds = ("inference", "training (mlm)", "training (classify)")
    batches = ("2 x 24", "3 natural to 24")
    assert tasks == [f"BERT-tiny {kind}, {batch}, bf16" for kind in kinds for batch in batches]
    rows = [row for cell in result["cells"] for row in cell["rows"]]
    assert {r["name"] for r in rows} == {"bertfast", "transformers sdpa", "bertfast pre-training"}
    assert not [r for r in rows if r["name"].startswith("bertfast") and "note" in r]
    for cell in result["cells"][:2]:
        assert all(r["relative_error"] < 0.05 and r["milliseconds"] > 0 for r in cell["rows"])
    for line in result["summary"]:
        assert line["rival_name"] == "transformers sdpa" and line["task"].split(" (b")[0] in tasks


def test_refusals(tmp_path, monkeypatch, capsys):
    def message(*arguments):
        with pytest.raises(SystemExit, match="2"):
            script(monkeypatch, *arguments)
        return capsys.readouterr().err

    assert "'speed'" in message(gpu_run, "--out", tmp_path, "--parts", "speed")
    if not torch.cuda.is_available():
        for module in (gpu_run, gpu_ops):
            assert "no GPU" in message(module, "--out", tmp_path)
