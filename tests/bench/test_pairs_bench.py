"""benchmarks/finetune_pairs.py on a tiny model: it runs, and refuses losses that differ."""

import gzip
import json
import sys
from pathlib import Path

import pytest
import tiny
from torch.nn import functional as F

pytest.importorskip("sentence_transformers")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import finetune_pairs


@pytest.fixture
def options(tmp_path):
    folder = tiny.checkpoint(tmp_path / "model", hidden_size=16)
    for name in ("train", "val", "test"):
        rows = [
            {"text": f"{r['text']}. {r['text']} {i}", "label": "a"}
            for i, r in enumerate(tiny.rows(12))
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"sections.{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    given = ["--data", str(tmp_path), "--model", str(folder), "--seeds", "0", "--queries", "8"]
    given += ["--test-queries", "4", "--wrong", "2", "--loss-steps", "3", "--batch-size", "4"]
    return given + ["--max-length", "16", "--out", str(tmp_path)]


@pytest.mark.seconds
def test_runs(options, tmp_path):
    finetune_pairs.main(options)
    result = json.loads((tmp_path / "finetune_pairs.json").read_text())
    assert len(result["losses"]["bertfast"]) == 3
    (run,) = result["runs"]
    assert run["bertfast"]["steps"] == run["sentence-transformers"]["steps"] == 6
    assert [row["unit"] for row in result["summary"]] == ["s", ""]


@pytest.mark.seconds
def test_losses_that_differ(options, monkeypatch):
    from bertfast.train.tasks.pairs import PairsTask

    def wrong(self, model, batch):
        return F.mse_loss(self.logits(model, batch)[:, 0], batch.targets.float(), reduction="sum")

    monkeypatch.setattr(PairsTask, "loss", wrong)
    with pytest.raises(SystemExit, match="losses differ"):
        finetune_pairs.main(options)


def test_lists():
    rows = [{"text": f"q{i}. d{i}", "label": "ab"[i % 2]} for i in range(8)]
    made = finetune_pairs.lists([*rows, {"text": "no description", "label": "a"}], 5, 3)
    assert [row["query"] for row in made] == [f"q{i}" for i in range(5)]
    for i, row in enumerate(made):
        assert row["positive"] == [f"d{i}"]
        assert {*row["negative"]} == {f"d{j}" for j in range(8) if j % 2 == i % 2 and j != i}
