"""Cleaning, loading and labels."""

import json
from decimal import Decimal

import numpy as np
import pytest

from bertfast.data import DataError, Examples, LabelSet, clean_text, load_classification


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


LABELS = {  # as JSON and Parquet have it, as CSV does: the name
    "1": ([1, 1.0, "1", "1.0", " 1 "], ["1", "1.0", "1.00"]),
    "0": ([0, 0.0, -0.0, "0"], ["0", "0.0", "-0.0"]),
    "-12": ([-12, -12.0], ["-12", "-12.0"]),
    "True": ([True, "true", "True"], ["true", "True", "TRUE"]),
    "False": ([False, "false"], ["false", "FALSE"]),
    "007": (["007"], ["007"]),
    "2.5": (["2.5"], ["2.5"]),
    "no": (["no"], ["no"]),
    "[UNK]": (["[UNK]"], ["[UNK]"]),
}


@pytest.mark.parametrize("task", ["single_label", "multi_label"])
@pytest.mark.parametrize("name", LABELS)
def test_a_label_has_one_name_whatever_the_format(tmp_path, name, task):
    values, written = LABELS[name]
    table = tmp_path / "t.csv"
    table.write_text("text,label\n" + "".join(f"a,{v}\n" for v in written))
    found = load_classification(_jsonl(tmp_path, *({"text": "a", "label": v} for v in values)), task=task)  # fmt: skip
    expected = name if task == "single_label" else [name]
    assert found.labels == [expected] * len(values)
    assert load_classification(table, task=task).labels == [expected] * len(written)


@pytest.mark.parametrize("kind", ["bool", "int8", "float32", "decimal", "string", "dictionary"])  # fmt: skip
def test_labels_of_parquet(tmp_path, kind):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    values = {
        "bool": [True, False],
        "decimal": [Decimal("1.0"), Decimal("0.0")],
        "string": ["1.0", "x"],
        "dictionary": ["1", "x"],
    }
    column = pa.array(values.get(kind, [1, 0]))
    if kind == "dictionary":
        column = column.dictionary_encode()
    elif kind not in values:
        column = column.cast(kind)
    pq.write_table(pa.table({"text": ["a", "b"], "label": column}), tmp_path / "t.parquet")
    expected = {"bool": ["True", "False"], "string": ["1", "x"], "dictionary": ["1", "x"]}
    assert load_classification(tmp_path / "t.parquet").labels == expected.get(kind, ["1", "0"])


def test_a_list_is_no_single_label_however_it_is_written(tmp_path):
    table = tmp_path / "t.csv"
    for label in ('"[1, 0]"', "['a']", "\"('a', 'b')\""):
        table.write_text(f"text,label\na,{label}\n")
        _refused(table, "row 1", "lists belong to task 'multi_label'")


LISTS = {  # as JSON, Python (pandas), and NumPy write it, and sets and tuples
    '["a", "it\'s", "new york"]': ["a", "it's", "new york"],
    """['a', "it's", 'new york']""": ["a", "it's", "new york"],
    """['a' "it's"\n 'new york']""": ["a", "it's", "new york"],
    "['a']": ["a"],
    "{'b', 'a'}": ["b", "a"],
    "('a',)": ["a"],
    "[]": [],
    "[3, 7]": ["3", "7"],
    "[3 7]": ["3", "7"],
    "[3. 7.]": ["3", "7"],
    "[other]|x": ["[other]", "x"],
    "(a, b)": ["(a, b)"],
}


@pytest.mark.parametrize("written", LISTS)
def test_lists_as_text(tmp_path, written):
    path = _jsonl(tmp_path, {"text": "a", "label": written})
    assert load_classification(path, task="multi_label").labels == [LISTS[written]]


def _flags(row, kind):
    return {
        "list": list(row),
        "bools": [v == 1 for v in row],
        "floats": [float(v) for v in row],
        "json": str(list(row)),
        "numpy": str(np.array(row)),
        "numpy floats": str(np.array(row, float)),
        "spaces": " ".join(map(str, row)),
        "commas": ",".join(map(str, row)),
        "bars": "|".join(map(str, row)),
    }[kind]


KINDS = ["list", "bools", "floats", "json", "numpy", "numpy floats", "spaces", "commas", "bars"]


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_of_flags(tmp_path, kind):
    """A class for each place, those of no row too; never classes "0" and "1"."""
    vectors = [(1, 0, 0, 0), (0, 1, 1, 0), (0, 0, 0, 0)]
    path = _jsonl(tmp_path, *({"text": "a", "label": _flags(v, kind)} for v in vectors))
    found = load_classification(path, task="multi_label")
    assert (found.labels, found.width) == ([["0"], ["1", "2"], []], 4)
    labels = LabelSet.from_examples(found)
    assert labels.names == ("0", "1", "2", "3")
    assert labels.encode(found).tolist() == [list(v) for v in vectors]
    named = LabelSet(("w", "x", "y", "z"), "multi_label")  # a model's classes, in their order
    assert named.decode(named.encode(found)) == [["w"], ["x", "y"], []]
    with pytest.raises(DataError, match=r"row 1 \(line 1\): the label is a vector of 4 flags, expected 3"):  # fmt: skip
        LabelSet(("x", "y", "z"), "multi_label").encode(found)
    for other in ("", "a", [1, 0, 0]):
        rows = [*vectors, other]
        label = lambda v: _flags(v, kind) if isinstance(v, tuple) else v
        path = _jsonl(tmp_path, *({"text": "a", "label": label(v)} for v in rows))
        _refused(path, "row 1", "is a vector of 4 flags", "one length", task="multi_label")


def test_ids_are_no_flags(tmp_path):
    ids = [[0, 1], [1], [2, 0], []]
    path = _jsonl(tmp_path, *({"text": "a", "label": v} for v in ids))
    found = load_classification(path, task="multi_label")
    assert found.labels == [["0", "1"], ["1"], ["2", "0"], []] and found.width is None
    path = _jsonl(tmp_path, *({"text": "a", "label": v} for v in ("2", "0 1")))
    _refused(path, "row 2", "is a vector of 2 flags", task="multi_label")


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
        (["x", None], "one name"),
        (["x", ["y"]], "one name"),
        ("['x', y]", "no list that can be read"),
        ("[x y, z]", "no list that can be read"),
        ("['x' + 'y']", "no list that can be read"),
        ("x||y", "empty"),
    ):
        _refused(_jsonl(tmp_path, {"text": "a", "label": bad}), "row 1", part, task="multi_label")


def test_regression_numbers(tmp_path):
    table = tmp_path / "t.tsv"
    table.write_text("text\tlabel\na\t-1.5\nb\t2e3\n")
    assert load_classification(table, task="regression").labels == [-1.5, 2000.0]
    for bad in ("nan", "inf", "-Infinity", "1e39", "-1e400", "9" * 400):
        table.write_text(f"text\tlabel\na\t1\nb\t{bad}\n")
        _refused(table, "row 2 (line 3)", "finite", "float32", task="regression")
        if bad[-1].isdigit():
            path = tmp_path / "t.jsonl"
            path.write_text(f'{{"text": "a", "label": {bad}}}\n')
            _refused(path, "row 1", "float32", task="regression")
    table.write_text("text\tlabel\na\t1,5\n")
    _refused(table, "'1,5'; expected a number with a decimal point", task="regression")
    for bad in ("good", True, [1]):
        path = _jsonl(tmp_path, {"text": "a", "label": bad})
        _refused(path, "row 1", "expected a number", task="regression")


def test_one_text_of_a_pair_may_be_empty(tmp_path):
    given = [{"a": "x", "b": ""}, {"a": None, "b": "y"}, {"a": "z"}, {"a": " ", "b": None}]
    path = _jsonl(tmp_path, *given[:3])
    found = load_classification(path, "a", "b", None)
    assert (found.texts, found.pairs) == (["x", "", "z"], ["", "y", ""])
    _refused(path, "row 2", "column 'a' is missing", text_column="a", label_column=None)
    both = {"text_column": "a", "text_pair_column": "b", "label_column": None}
    _refused(_jsonl(tmp_path, *given), "row 4", "so is the pair's other text", **both)


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
    with pytest.raises(DataError, match=r"t.csv: row 7 \(line 9\): unknown label 'w'"):
        labels.encode(Examples(["a"], labels=["w"], rows=[7], lines=[9], path="t.csv"))
    with pytest.raises(DataError, match=r"t.csv: the labels are \['w'\]"):
        LabelSet.from_examples(Examples(["a"], labels=["w"], path="t.csv"))


def test_label_set_of_a_model_with_other_spellings():
    labels = LabelSet(("true", "1", "1.0", "a"))
    assert labels.encode(["True", "1", "a"]).tolist() == [0, 1, 3]
    assert LabelSet(("2.0", "x")).encode(["2"]).tolist() == [0]


def test_label_set_numbers_sort_by_value():
    labels = LabelSet.from_examples(Examples(list("abc"), labels=["10", "9", "-1"]))
    assert labels.names == ("-1", "9", "10")
    for odd in ("--5", "-", "5-", "\u00b2", "9" * 5000):
        labels = LabelSet.from_examples(Examples(list("abc"), labels=["10", "9", odd]))
        assert labels.names == tuple(sorted(["10", "9", odd]))


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
