"""benchmarks/finetune_translate.py on a tiny model: it runs, and refuses losses that differ."""

import gzip
import json
import sys
from pathlib import Path

import pytest
import tiny

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import finetune_translate


@pytest.fixture
def options(tmp_path):
    folder = tiny.checkpoint(tmp_path / "model", hidden_size=16, vocab_size=17)
    for name, n in (("train", 40), ("test", 6)):
        texts = [row["text"] for row in tiny.rows(n)]
        lines = "".join(f"{a}\t{b}\n" for a, b in zip(texts, texts[::-1], strict=True))
        (tmp_path / f"en-fr.{name}.tsv.gz").write_bytes(gzip.compress(lines.encode()))
    size = str(folder / "config.json")
    given = ["--data", str(tmp_path), "--tokenizer", str(folder), "--size", size]
    given += ["--max-length", "16", "--batch-tokens", "100", "--steps", "2", "--loss-steps", "2"]
    return given + ["--rounds", "1", "--decode-batch", "3", "--beams", "2", "--out", str(tmp_path)]


@pytest.mark.seconds
def test_runs(options, tmp_path):
    finetune_translate.main(options)
    result = json.loads((tmp_path / "finetune_translate.json").read_text())
    for search in result["decoding"].values():
        assert search["same"] == search["of"] == 9
    (run,) = result["runs"]
    sides = run["bertfast"], run["transformers"]
    assert {len(side["losses"]) for side in sides} == {2}
    assert sides[0]["tokens"] == sides[1]["tokens"] > 0
    assert [set(row) for row in result["summary"]] == [
        {"task", "unit", "bertfast", "rival", "rival_name", "ratio"}
    ] * 5

    result["decoding"], result["steps"]["bertfast"]["step_seconds"] = {}, 7.0
    (tmp_path / "finetune_translate.json").write_text(json.dumps(result))
    finetune_translate.main([*options, "--only-decoding"])
    again = json.loads((tmp_path / "finetune_translate.json").read_text())
    assert {search["same"] for search in again["decoding"].values()} == {9}
    assert again["commit"] == result["commit"] and again["decoding_again"]["steps"] == 2
    assert again["summary"][0]["bertfast"] == 7000

    finetune_translate.main([*options, "--seeds", "3"])  # goes on
    more = json.loads((tmp_path / "finetune_translate.json").read_text())
    assert [r["seed"] for r in more["runs"]] == [0, 1, 2] and more["runs"][0] == run
    assert more["steps"] == again["steps"] and more["decoding"] == again["decoding"]
    assert more["runs"][1]["bertfast"]["losses"] != run["bertfast"]["losses"]
    losses = [r["bertfast"]["loss"] - r["transformers"]["loss"] for r in more["runs"]]
    assert more["quality"]["loss"]["difference"] == pytest.approx(sum(losses) / 3)


def test_losses_that_differ(options, monkeypatch):
    monkeypatch.setattr(
        finetune_translate.Ours, "loss", lambda self, batch: self.model.loss_packed(*batch)[0]
    )
    with pytest.raises(SystemExit, match="losses differ"):
        finetune_translate.main(options)
