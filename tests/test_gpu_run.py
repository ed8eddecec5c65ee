"""The scripts for GPU machines, as far as a CPU takes them."""

import json
import subprocess
import sys
from pathlib import Path

import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def script(name, *arguments):
    command = [sys.executable, str(BENCHMARKS / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_encoder(tmp_path):
    options = ("--config", "tiny", "--device", "cpu", "--rounds", 2)
    done = script("gpu_encoder.py", "--out", tmp_path, *options)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "encoder_tiny.json").read_text())["rows"]
    names = {"bertfast", "transformers sdpa", "bertfast pre-training"}
    assert {r["model"] for r in rows} == names
    assert {r["what"] for r in rows} == {"inference", "training, classify", "training, mlm"}
    assert not [r for r in rows if r["model"].startswith("bertfast") and "note" in r]
    inference = [r for r in rows if r["what"] == "inference"]
    assert all(r["relative_error"] < 0.05 and r["milliseconds"] > 0 for r in inference)


def test_refusals(tmp_path):
    bad = script("gpu_run.py", "--out", tmp_path, "--parts", "speed")
    assert bad.returncode == 2 and "'speed'" in bad.stderr
    if not torch.cuda.is_available():
        for name in ("gpu_run.py", "gpu_ops.py"):
            none = script(name, "--out", tmp_path)
            assert none.returncode == 2 and "no GPU" in none.stderr
