"""The scripts for GPU machines, as far as a CPU takes them."""

import json
import subprocess
import sys
from pathlib import Path

import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def script(name, *arguments):
    command = [sys.executable, str(BENCHMARKS / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_encoder(tmp_path):
    options = ("--config", "tiny", "--device", "cpu", "--rounds", 2)
    done = script("gpu_encoder.py", "--out", tmp_path, *options)
    assert done.returncode == 0, done.stderr
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


def test_refusals(tmp_path):
    bad = script("gpu_run.py", "--out", tmp_path, "--parts", "speed")
    assert bad.returncode == 2 and "'speed'" in bad.stderr
    if not torch.cuda.is_available():
        for name in ("gpu_run.py", "gpu_ops.py"):
            none = script(name, "--out", tmp_path)
            assert none.returncode == 2 and "no GPU" in none.stderr
