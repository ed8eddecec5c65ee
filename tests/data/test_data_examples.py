"""Cleaning, loading, labels and the split."""

import json
from collections import Counter

import numpy as np
import pytest

from bertfast.data import DataError, Examples, LabelSet, clean_text, load_classification, split


def _jsonl(tmp_path, *rows):
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def _refused(path, *parts, **kwargs):
    with pytest.raises(DataError) as e:
        load_classification(path, **kwargs)
    for part in (str(path), *parts):
        assert part in str(e.value)


@pytest.mark.parametrize(
    "dirty, clean",
    [
        ("cafe\u0301", "café"),  # NFC
        ("\u212b", "Å"),
        ("a\x00b\x1b\x7f\x9fc", "abc"),  # controls
        ("\ufeffa\ud800b", "ab"),  # byte-order mark, lone surrogate
        ("  a\t\n\r b\u00a0\u2003c\x85d\x0be\x1c", "a b c d e"),  # whitespace
        ("👩\u200d💻 \u0645\u06cc\u200c\u062e", "👩\u200d💻 \u0645\u06cc\u200c\u062e"),  # joiners
        ("", ""),
    ],
)
def test_clean_text(dirty, clean):
    assert clean_text(dirty) == clean
    assert clean_text(clean) == clean


def test_load_cleans_unless_told_otherwise(tmp_path):
    path = _jsonl(tmp_path, {"text": " a\x00  b", "label": " x "})
    assert load_classification(path).texts == ["a b"]
    raw = load_classification(path, clean=False)
    assert raw.texts == [" a\x00  b"]
    assert raw.labels == ["x"]


def test_columns_pairs_and_no_labels(tmp_path):
    path = _jsonl(tmp_path, {"q": "a", "d": "b", "y": 1}, {"q": "c", "d": "e", "y": 0})
    got = load_classification(path, "q", "d", "y")
    assert (got.texts, got.pairs, got.labels, got.rows) == (
        ["a", "c"],
        ["b", "e"],
        ["1", "0"],
        [1, 2],
    )
    assert load_classification(path, "q", label_column=None).labels is None
    _refused(path, "no column 'label'", "'q', 'd', 'y'", text_column="q")


@pytest.mark.parametrize(
    "row, part",
    [
        ({"label": "x"}, "column 'text' is missing"),
        ({"text": None, "label": "x"}, "column 'text' is missing"),
        ({"text": " \t", "label": "x"}, "empty text"),
        ({"text": 5, "label": "x"}, "is 5, a int; expected a string"),
        ({"text": "a"}, "column 'label' is missing"),
        ({"text": "a", "label": ""}, "empty label"),
        ({"text": "a", "label": 0.5}, "regression"),
        ({"text": "a", "label": ["x"]}, "multi_label"),
    ],
)
def test_bad_cells_name_row_and_column(tmp_path, row, part):
    path = _jsonl(tmp_path, {"text": "a", "label": "x"}, row, row)
    _refused(path, "row 2", part, "1 more such rows: 3")


def test_lone_surrogate_is_refused_uncleaned_and_dropped_cleaned(tmp_path):
    path = _jsonl(tmp_path, {"text": "a\ud800", "label": "x"})
    assert load_classification(path).texts == ["a"]
    _refused(path, "row 1", "lone surrogate", clean=False)


def test_single_labels_are_names_whatever_the_type(tmp_path):
    path = _jsonl(tmp_path, *({"text": "a", "label": v} for v in ("1", 1, 1.0, True)))
    assert load_classification(path).labels == ["1", "1", "1", "True"]


def test_multi_label_lists_strings_and_none(tmp_path):
    path = _jsonl(
        tmp_path, *({"text": "a", "label": v} for v in (["x", "y", "x"], "y|z", [], '["x"]'))
    )
    got = load_classification(path, task="multi_label").labels
    assert got == [["x", "y"], ["y", "z"], [], ["x"]]
    table = tmp_path / "t.csv"
    table.write_text("text,label\na,x| y\nb,\n")
    assert load_classification(table, task="multi_label").labels == [["x", "y"], []]
    for bad, part in (
        (None, "missing"),
        (3, "expected a list"),
        (["x", None], "one name"),
        ("x||y", "empty"),
    ):
        _refused(_jsonl(tmp_path, {"text": "a", "label": bad}), "row 1", part, task="multi_label")


def test_regression_numbers(tmp_path):
    table = tmp_path / "t.tsv"
    table.write_text("text\tlabel\na\t-1.5\nb\t2e3\n")
    assert load_classification(table, task="regression").labels == [-1.5, 2000.0]
    for bad in ("nan", "inf", "-Infinity"):
        table.write_text(f"text\tlabel\na\t1\nb\t{bad}\n")
        _refused(table, "row 2", repr(bad), "finite", task="regression")
    for bad in ("good", True, [1]):
        path = _jsonl(tmp_path, {"text": "a", "label": bad})
        _refused(path, "row 1", "expected a number", task="regression")


def test_dedup_keeps_the_first_and_its_row_number(tmp_path):
    path = _jsonl(
        tmp_path,
        {"text": "A b", "label": "x"},
        {"text": "c", "label": "y"},
        {"text": " a  B", "label": "z"},
        {"text": "d", "label": "x"},
    )
    got = load_classification(path, dedup=True)
    assert (got.texts, got.labels, got.rows) == (["A b", "c", "d"], ["x", "y", "x"], [1, 2, 4])
    assert len(load_classification(path)) == 4


def test_unknown_task():
    with pytest.raises(ValueError, match=r"'rank'.*single_label, multi_label, regression"):
        load_classification("t.csv", task="rank")


def test_label_set_single():
    labels = LabelSet.from_examples(Examples(["a", "b", "c"], labels=["y", "x", "y"]))
    assert labels.names == ("x", "y")
    ids = labels.encode(["y", "x"])
    assert ids.dtype == np.int64 and ids.tolist() == [1, 0]
    assert labels.decode(ids) == ["y", "x"]
    with pytest.raises(DataError, match=r"row 2: unknown label 'w'; known are x, y"):
        labels.encode(["x", "w"])
    with pytest.raises(DataError, match=r"row 7: unknown label 'w'"):
        labels.encode(Examples(["a"], labels=["w"], rows=[7]))


def test_label_set_numbers_sort_by_value():
    labels = LabelSet.from_examples(Examples(list("abc"), labels=["10", "9", "-1"]))
    assert labels.names == ("-1", "9", "10")


def test_label_set_multi_and_regression():
    multi = LabelSet.from_examples(
        Examples(["a", "b"], labels=[["y", "x"], []], task="multi_label")
    )
    flags = multi.encode([["y"], [], ["x", "y"]])
    assert flags.dtype == np.float32 and flags.tolist() == [[0, 1], [0, 0], [1, 1]]
    assert multi.decode(flags) == [["y"], [], ["x", "y"]]
    with pytest.raises(DataError, match="row 1: unknown label 'z'"):
        multi.encode([["x", "z"]])
    number = LabelSet.from_examples(Examples(["a"], labels=[0.5], task="regression"))
    assert number.names == () and number.encode([0.5]).dtype == np.float32
    assert number.decode(np.array([0.5])) == [0.5]


def test_label_set_needs_two_classes_and_labels():
    with pytest.raises(DataError, match="expected 2 or more classes"):
        LabelSet.from_examples(Examples(["a"], labels=["x"]))
    with pytest.raises(DataError, match="no labels"):
        LabelSet.from_examples(Examples(["a"]))


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
