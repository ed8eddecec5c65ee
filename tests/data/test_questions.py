"""Questions of SQuAD's JSON and of tables: every form gives the same, every fault its place."""

import gzip
import json
from pathlib import Path

import pytest

from bertfast.data import split
from bertfast.data.answer_cells import Answer
from bertfast.data.errors import DataError
from bertfast.data.questions import Questions, load_questions, read_questions

ADA = "Ada  lives in\tParis 🎉 and works in Paris."  # as given: two spaces, a tab, an emoji
BOB = "Bob sings."
QAS = [
    {"id": "a", "question": " Where does Ada live? ", "answers": [{"text": "Paris", "answer_start": 14}]},
    {
        "id": "b",
        "question": "Where does Ada work?",
        "is_impossible": False,
        "answers": [{"text": "Paris", "answer_start": 35}, {"text": "in Paris", "answer_start": 32}],
    },
    {
        "id": "c",
        "question": "Who sings?",
        "is_impossible": True,
        "answers": [],
        "plausible_answers": [{"text": "Ada", "answer_start": 0}],
    },
]  # fmt: skip
ANSWERS = [[Answer("Paris", 14)], [Answer("Paris", 35), Answer("in Paris", 32)], []]
DEBIAN = Path(__file__).parents[2] / "../shared/data/debian"


def _squad(*qas, context=ADA):
    return {"version": "v2.0", "data": [{"title": "t", "paragraphs": [{"context": context, "qas": list(qas)}]}]}  # fmt: skip


def _write(tmp_path, rows, name="q.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _flat(answers):
    """Rows of the three questions with their answers in another form."""
    return [{"id": q["id"], "question": q["question"], "context": ADA, "answers": a} for q, a in zip(QAS, answers, strict=True)]  # fmt: skip


HUGGING_FACE = [
    {"text": ["Paris"], "answer_start": [14]},
    {"text": ["Paris", "in Paris"], "answer_start": [35, 32]},
    {"text": [], "answer_start": []},
]


def _is_the_data(found):
    assert (found.ids, found.answers) == (["a", "b", "c"], ANSWERS)
    assert found.questions == ["Where does Ada live?", "Where does Ada work?", "Who sings?"]
    assert found.contexts == [[ADA]] * 3 and found.rows == [1, 2, 3]
    for answers, (context,) in zip(found.answers, found.contexts, strict=True):
        assert all(context[a.start : a.start + len(a.text)] == a.text for a in answers)


@pytest.mark.parametrize("name", ["q.json", "q.JSON", "q.json.gz"])
def test_squad(tmp_path, name):
    text = json.dumps(_squad(*QAS)).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    found = load_questions(tmp_path / name)
    _is_the_data(found)
    assert found.place(1) == f"{tmp_path / name}: row 2, id 'b'" and len(found) == 3
    assert load_questions(tmp_path / name, answers=False).answers is None


@pytest.mark.parametrize(
    "answers",
    [
        HUGGING_FACE,
        [q["answers"] for q in QAS],
        [json.dumps(a) for a in HUGGING_FACE],  # as text files have them
        [repr(a) for a in HUGGING_FACE],
        [
            {"text": "Paris", "start": 14},
            [{"text": "Paris", "start": 35.0}, {"text": "in Paris", "start": "32", "context": 0}],
            [],
        ],
    ],
)
def test_forms_of_answers(tmp_path, answers):
    _is_the_data(load_questions(_write(tmp_path, _flat(answers))))


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_tables(tmp_path, kind):
    pa = pytest.importorskip("pyarrow")
    import csv

    path = tmp_path / f"q.{kind}"
    if kind == "parquet":
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(_flat(HUGGING_FACE)), path)
    else:
        with open(path, "w", newline="") as f:
            out = csv.DictWriter(
                f, ["id", "question", "context", "answers"], delimiter=",\t"[kind == "tsv"]
            )
            out.writeheader()
            out.writerows(r | {"answers": json.dumps(r["answers"])} for r in _flat(HUGGING_FACE))
    _is_the_data(load_questions(path))


def test_answers_beside_their_places(tmp_path):
    rows = [
        {"q": "x", "context": ADA, "answer": "Paris", "answer_start": 14},
        {"q": "y", "context": ADA, "answer": ["Paris", "in Paris"], "answer_start": [35, 32]},
        {"q": "z", "context": ADA, "answer": None, "answer_start": None},
        {"q": "z", "context": ADA, "answer": "", "answer_start": float("nan")},
    ]
    found = load_questions(_write(tmp_path, rows), question_column="q")
    assert found.answers == [*ANSWERS, []] and found.ids == ["1", "2", "3", "4"]
    (tmp_path / "q.csv").write_text(
        "question,context,answer,answer_start\nwho,Bob sings.,Bob,0\nwhere,Bob sings.,,\n"
    )
    assert load_questions(tmp_path / "q.csv").answers == [[Answer("Bob", 0)], []]


def test_several_contexts(tmp_path):
    rows = [
        {"question": "who", "contexts": [ADA, BOB], "answers": [{"text": "Bob", "start": 0}]},
        {"question": "who", "contexts": [BOB, BOB], "answers": {"text": ["Bob"], "answer_start": [0], "context": [1]}},
        {"question": "who", "contexts": [BOB], "answers": []},
    ]  # fmt: skip
    found = load_questions(_write(tmp_path, rows))
    assert found.answers == [[Answer("Bob", 0, 1)], [Answer("Bob", 0, 1)], []]
    assert [len(c) for c in found.contexts] == [2, 2, 1]
    assert found.same()[0] == ("who", "ada lives in paris 🎉 and works in paris.", "bob sings.")
    part = found.select([2, 0])
    assert part.ids == ["3", "1"] and part.place(0).endswith("row 3 (line 3), id '3'")
    assert part.answers == [[], [Answer("Bob", 0, 1)]]


def test_questions_of_one_context_stay_together():
    contexts = [
        ["A"],
        ["B", "C"],
        ["a "],
        ["C", "D"],
        ["E"],
        ["d"],
        *[[f"x{i}"] for i in range(20)],
    ]
    given = Questions([str(i) for i in range(26)], ["q"] * 26, contexts)
    keys = given.keys()
    assert keys[0] == keys[2] and keys[1] == keys[3] == keys[5] and len(set(keys)) == 23
    parts = split(given, (0.6, 0.2, 0.2))
    owners = [{str(k) for q in p.ids for k in [keys[int(q)]]} for p in parts]
    assert not owners[0] & owners[1] and not owners[1] & owners[2] and not owners[0] & owners[2]
    assert sum(map(len, parts)) == 26 and all(map(len, parts))


ROW = {"id": "x", "question": "who", "context": BOB, "answers": [{"text": "Bob", "start": 0}]}


@pytest.mark.parametrize(
    "change, parts",
    [
        ({"answers": [{"text": "Bob", "start": 1}]}, ["'Bob' at character 1", "there is 'ob '", "stands at 0", "correct them"]),
        ({"answers": [{"text": "bob", "start": 0}]}, ["there is 'Bob'", "stands nowhere in it"]),
        ({"context": "café Bob", "answers": [{"text": "Bob", "start": 6}]}, ["it is the offset in UTF-8 bytes"]),
        ({"context": "🎉 Bob", "answers": [{"text": "Bob", "start": 3}]}, ["there is 'ob'", "Unicode code points"]),
        ({"answers": [{"text": "Bob", "start": 99}]}, ["at character 99", "there is ''"]),
        ({"answers": [{"text": "Bob", "start": -1}]}, ["answer_start -1", "0 or more"]),
        ({"answers": [{"text": "Bob", "start": 0.5}]}, ["answer_start 0.5"]),
        ({"answers": [{"text": "Bob", "start": True}]}, ["answer_start True"]),
        ({"answers": [{"text": "Bob", "start": None}]}, ["answer_start None"]),
        ({"answers": [{"text": "", "start": 0}]}, ["the answer ''", "an empty list"]),
        ({"answers": [{"text": None, "start": 0}]}, ["the answer None"]),
        ({"answers": {"text": ["Bob"], "answer_start": []}}, ["1 texts, 0 places"]),
        ({"answers": {"text": ["Bob"], "answer_start": [0], "context": 0}}, ['expected {"text": [...]']),
        ({"answers": {"text": ["Bob"], "answer_start": [0], "context": [0, 0]}}, ["1 texts, 1 places and 2"]),
        ({"answers": "Bob"}, ["is 'Bob'", "a column answer_start"]),
        ({"answers": ["Bob"]}, ["is ['Bob']", "a column answer_start"]),
        ({"answers": [{"answer": "Bob"}]}, ['expected {"text": [...]']),
        ({"answers": [{"text": "Bob"}]}, ['expected {"text": [...]']),
        ({"answers": 5}, ["is 5"]),
        ({"answers": None}, ["is missing", "an empty list"]),
        ({"answers": [{"text": "Bob", "start": 0, "context": 1}]}, ["names context 1 of 1"]),
        ({"context": [BOB, BOB]}, ["'Bob' at character 0 of contexts 0, 1", 'a key "context"']),
        ({"context": []}, ["column 'context' is an empty list"]),
        ({"context": [BOB, None]}, ["column 'context' is None"]),
        ({"context": " "}, ["column 'context' is an empty text"]),
        ({"context": "Bob \ud800"}, ["lone surrogate"]),
        ({"question": "\t"}, ["column 'question' is an empty text"]),
        ({"question": 5}, ["column 'question' is 5"]),
        ({"id": ""}, ["column 'id' is ''"]),
        ({"id": None}, ["column 'id' is missing"]),
        ({"is_impossible": True}, ["has 1 answers, and is_impossible is True"]),
        ({"answers": [], "is_impossible": "false"}, ["has 0 answers, and is_impossible is False"]),
    ],
)  # fmt: skip
def test_bad_rows_are_named_and_counted(tmp_path, change, parts):
    path = _write(
        tmp_path, [ROW | {"id": "w"}, ROW | change, ROW | change | {"id": change.get("id", "y")}]
    )
    with pytest.raises(DataError) as e:
        load_questions(path)
    for part in (f"{path}: row 2 (line 2): column '", "1 more such rows: 3", *parts):
        assert part in str(e.value), e.value
    if "answers" in change:
        assert "of id 'x'" in str(e.value)


def test_two_rows_of_one_id(tmp_path):
    with pytest.raises(DataError, match=r"row 3 \(line 3\), id 'x' stands already in row 1"):
        load_questions(_write(tmp_path, [ROW, ROW | {"id": "y"}, ROW]))


def test_columns_that_lack(tmp_path):
    path = _write(tmp_path, [{"question": "who", "text": BOB}])
    with pytest.raises(DataError, match="no column 'contexts'; it has: 'question', 'text'"):
        load_questions(path)
    with pytest.raises(DataError, match="no column 'answer'"):
        load_questions(path, context_column="text")
    found = load_questions(path, context_column="text", answers=False)
    assert (found.contexts, found.answers) == ([[BOB]], None)


@pytest.mark.parametrize(
    "content, parts",
    [
        (b"", ["not valid JSON"]),
        (b'{"question": "who"}\n{"question": "who"}', ["not valid JSON", "JSONL"]),
        (b"[]", ["is a JSON list", "data"]),
        (b"{}", ["no data;"]),
        (b'{"data": {}}', ["data is a dict; expected a list"]),
        (b'{"data": [1]}', ["data[0] is a int"]),
        (b'{"data": [{"paragraphs": []}, {}]}', ["no data[1].paragraphs"]),
        (b'{"data": [{"paragraphs": [{"qas": []}]}]}', ["data[0].paragraphs[0] has no 'context'"]),
        (b'{"data": [{"paragraphs": [{"context": "c"}]}]}', ["no data[0].paragraphs[0].qas"]),
        (b'{"data": [{"paragraphs": [{"context": "c", "qas": []}]}]}', ["has no questions"]),
        (json.dumps(_squad({"id": "a"})).encode(), ["data[0].paragraphs[0].qas[0] has no 'question'"]),
        (json.dumps(_squad(QAS[0], QAS[0] | {"id": None})).encode(), ["row 2: column 'id' is missing"]),
        (json.dumps(_squad(QAS[0], {"id": 1, "question": "x"})).encode(), ["row 2", "of id '1' is missing"]),
        (b'{"data": [], "data": []}', ["'data' stands twice"]),
        (b'{"data":\n "\xff"}', ["byte 0xff at line 2"]),
        (gzip.compress(b'{"data": []}', mtime=0)[:-9], ["truncated gzip"]),
    ],
)  # fmt: skip
def test_bad_json(tmp_path, content, parts):
    path = tmp_path / "q.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as e:
        load_questions(path)
    assert all(part in str(e.value) for part in (str(path), *parts)), e.value


def test_no_such_file(tmp_path):
    for name in ("q.json", "q.jsonl"):
        with pytest.raises(DataError, match=f"{name}: cannot be read: No such file"):
            load_questions(tmp_path / name)


def test_in_chunks(tmp_path):
    rows = [{"id": "x", "question": f"q{i}", "context": BOB} for i in range(7)]
    (tmp_path / "q.json").write_text(json.dumps(_squad(*({k: r[k] for k in ("id", "question")} for r in rows), context=BOB)))  # fmt: skip
    for path in (_write(tmp_path, rows), tmp_path / "q.json"):
        parts = list(read_questions(path, rows=3))
        assert [p.rows for p in parts] == [[1, 2, 3], [4, 5, 6], [7]]
        assert [q for p in parts for q in p.questions] == [r["question"] for r in rows]
        assert parts[-1].share == 1 and parts[-1].total == 7 and parts[0].answers is None


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="1 contexts for 2 questions"):
        Questions(["a", "b"], ["x", "y"], [["c"]])


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="no data beside the repository")
def test_real_data():
    found = load_questions(DEBIAN / "qa.val.json.gz")
    assert (len(found), sum(not a for a in found.answers)) == (900, 150)
