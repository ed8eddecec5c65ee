"""benchmarks/frozen.py on few texts: every side, and embeddings that differ."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import refused
from untimed import untimed

pytest.importorskip("sentence_transformers")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import frozen


@pytest.mark.seconds
def test_figures(tmp_path, monkeypatch):
    untimed(monkeypatch)
    monkeypatch.setattr(frozen, "OVERLAP", 0.8)  # of so few texts
    frozen.main(["--rounds", "1", "--texts", "48", "--ranked", "20", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "frozen.json").read_text())
    for cell in result["cells"]:
        assert {row["name"].partition(",")[0] for row in cell["rows"]} == {
            "transformers sdpa",
            "bertfast accelerate",
            "bertfast frozen",
        }
    assert len(result["summary"]) == 8 and result["corpus"] == 20
    loaded = result["load_frozen"]
    assert 0 < loaded["called"] <= 1.2 * loaded["file_bytes"] and loaded["seconds"] > 0


def test_what_differs_is_not_timed():
    x = np.eye(20, 32)
    assert frozen.held("frozen, int8", x, x, (x, x))["cosine"] == 1
    refused(SystemExit, "frozen, int8", frozen.held, "frozen, int8", x, x + 0.1)
    other = x + 1e-4 * np.random.default_rng(0).standard_normal(x.shape)
    refused(SystemExit, "overlap", frozen.held, "frozen, bf16", x, other, (other[::-1], other))
