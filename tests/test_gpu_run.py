"""The script for GPU machines, as far as a CPU takes it."""

import json
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def script(*arguments):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_run.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_encoder_part_resumes(tmp_path):
    options = ("--out", tmp_path, "--device", "cpu", "--parts", "encoder_tiny", "--rounds", 2)
    done = script(*options)
    assert done.returncode == 0 and "encoder_tiny     ok" in done.stdout, done.stderr
    rows = json.loads((tmp_path / "encoder_tiny.json").read_text())["rows"]
    assert {r["model"] for r in rows} == {"bertfast", "transformers sdpa"}
    assert {r["what"] for r in rows} == {"inference", "forward and backward"}
    assert all(r["relative_error"] < 0.05 and r["milliseconds"] > 0 for r in rows)
    assert "done before" in script(*options).stdout


def test_refusals(tmp_path):
    bad = script("--out", tmp_path, "--device", "cpu", "--parts", "speed")
    assert bad.returncode == 2 and "'speed'" in bad.stderr
    if not torch.cuda.is_available():
        none = script("--out", tmp_path, "--parts", "build")
        assert none.returncode == 2 and "no GPU" in none.stderr
