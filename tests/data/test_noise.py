"""Labels that may be wrong are found."""

import numpy as np
import tiny
from transformers import AutoTokenizer

from bertfast.data import dataset_report, encode, load_classification
from bertfast.data.noise import suspects


def changed(n=400, share=0.05, seed=0):
    """Rows, some with another's label, and which."""
    rows, r = tiny.rows(n), np.random.default_rng(seed)
    bad = sorted(r.choice(n, int(share * n), replace=False).tolist())
    for i in bad:
        rows[i]["label"] = tiny.WORDS[(tiny.WORDS.index(rows[i]["label"]) + 1) % 3]
    return rows, bad


def test_changed_labels_come_first(tmp_path):
    rows, bad = changed()
    tokenizer = AutoTokenizer.from_pretrained(tiny.checkpoint(tmp_path / "m"))
    ids = [row["input_ids"] for row in encode(tokenizer, [row["text"] for row in rows])]
    found = suspects(ids, [row["label"] for row in rows])
    assert sorted(i for i, _ in found) == bad  # 20, all of them
    for i, like in found:
        assert like in rows[i]["text"].split() and like != rows[i]["label"]
    assert len(suspects(ids, [row["label"] for row in rows], most=3)) == 3


def test_of_the_report(tmp_path):
    rows, bad = changed(200)
    path = tiny.write(tmp_path / "t.jsonl", rows)
    tokenizer = AutoTokenizer.from_pretrained(tiny.checkpoint(tmp_path / "m"))
    report = dataset_report(load_classification(path), None, None, tokenizer, 32)
    places = [one["place"] for one in report.as_dict()["suspects"]]
    assert sorted(places) == sorted(f"{path}: row {i + 1} (line {i + 1})" for i in bad)
    first = report.suspects[0]
    assert f"look at {places[0]}: {first['label']}, which reads like {first['like']}" in str(report)


def test_too_little_to_say():
    assert suspects([[5]] * 7, ["a", "b"] * 3 + ["a"]) == []
    assert suspects([[5]] * 20, ["a"] * 20) == []
    one = [*["a"] * 19, "b"]  # a class that the other folds lack
    assert all(i != 19 for i, _ in suspects([[5]] * 19 + [[9]], one))
    assert suspects([[]] * 20, ["a", "b"] * 10) is not None
