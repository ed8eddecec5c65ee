"""The split into train, validation and test."""

from collections import Counter

import numpy as np
import pytest

from bertfast.data import DataError, Examples, split


def _many(n=1000, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.choice(["a", "b", "c", "d"], n, p=[0.6, 0.25, 0.1, 0.05]).tolist()
    return Examples([f"text {i}" for i in range(n)], labels=labels)


def test_split_is_stratified_disjoint_and_seeded():
    examples = _many()
    parts = split(examples, seed=3)
    assert [len(p) for p in parts] == [800, 100, 100]
    assert sorted(r for p in parts for r in p.rows) == examples.rows
    for name, n in Counter(examples.labels).items():
        for part, fraction in zip(parts, (0.8, 0.1, 0.1), strict=True):
            assert abs(part.labels.count(name) - fraction * n) <= 2
    assert [p.rows for p in split(examples, seed=3)] == [p.rows for p in parts]
    assert split(examples, seed=4)[1].rows != parts[1].rows
    assert parts[0].rows == sorted(parts[0].rows)


def test_split_keeps_duplicates_on_one_side():
    """Also where they are one row apart, or an odd number of rows."""
    texts = [f"{'TEXT' if i % 2 else 'text'}  {i % 51 // 2}" for i in range(300)]
    parts = split(Examples(texts, labels=[str(i % 51 // 2 % 2) for i in range(300)]))
    seen = [{text.split()[1] for text in p.texts} for p in parts]
    assert all(seen) and not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


def test_split_same_text_with_another_pair_is_another_example():
    examples = Examples(["q"] * 40, [f"d{i}" for i in range(40)], ["x", "y"] * 20)
    assert [len(p) for p in split(examples)] == [32, 4, 4]


def test_split_tiny_classes_stay_in_train():
    big = _many(100)
    labels = [*big.labels, "one", "two", "two"]
    train, valid, test = split(Examples([*big.texts, "x", "y", "z"], labels=labels))
    assert train.labels.count("one") == 1 and train.labels.count("two") == 2
    assert not {"one", "two"} & {*valid.labels, *test.labels}


def test_split_every_class_keeps_a_training_text():
    examples = Examples([f"t{i}" for i in range(30)], labels=[str(i // 3) for i in range(30)])
    assert set(split(examples, (0.1, 0.45, 0.45))[0].labels) == set(examples.labels)


def test_split_other_tasks_and_an_empty_part():
    n = 200
    texts = [f"t{i}" for i in range(n)]
    _, valid, test = split(Examples(texts, labels=[float(i) for i in range(n)], task="regression"))
    assert abs(np.mean(valid.labels) - 99.5) < 15 and len(test) == 20
    multi = [["common"] + ["rare"] * (i % 20 == 0) for i in range(n)]
    _, valid, test = split(Examples(texts, labels=multi, task="multi_label"), (0.8, 0.2, 0.0))
    assert sum("rare" in c for c in valid.labels) == 2 and len(test) == 0
    assert [len(p) for p in split(Examples(texts))] == [160, 20, 20]


def test_split_refuses_bad_fractions_and_too_few_rows():
    with pytest.raises(ValueError, match="of sum 1"):
        split(_many(10), (0.8, 0.1, 0.2))
    with pytest.raises(ValueError, match="above 0"):
        split(_many(10), (0.0, 0.5, 0.5))
    with pytest.raises(DataError, match="validation part empty"):
        split(Examples(["a", "b", "c"], labels=["x", "y", "x"]))
