"""Readers of tagged words and of texts with spans, and schemes of tags."""

import csv
import gzip
import json
import random

import pytest
from helpers import ROOT

from bertfast.data import DataError
from bertfast.data.tag_schemes import SCHEMES, SchemeError, scheme_of, to_iob2
from bertfast.data.tagged import Tagged, load_tagged, read_tagged
from bertfast.data.text_spans import signed_forms, split_words

WORDS = [["Ada", "Lovelace", "of", "London", "."], ["nothing", "here"]]
TAGS = [["B-PER", "I-PER", "O", "B-LOC", "O"], ["O", "O"]]
TEXTS = ["Ada  Lovelace of London.", "nothing here"]
SPANS = [[{"start": 0, "end": 13, "label": "PER"}, {"start": 17, "end": 23, "label": "LOC"}], []]


def conll(tags=TAGS, between=" ", words=WORDS):
    rows = zip(words, tags, strict=True)
    return "\n\n".join("\n".join(f"{w}{between}{t}" for w, t in zip(*row, strict=True)) for row in rows) + "\n"  # fmt: skip


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["conll", "tab", "four columns", "comments", "gz", "jsonl", "csv", "parquet"])  # fmt: skip
def test_words_with_tags(tmp_path, kind):
    path = tmp_path / {"gz": "d.bio.gz"}.get(kind, f"d.{kind.split()[0].replace('tab', 'iob')}")
    cells = [{"tokens": w, "tags": t} for w, t in zip(WORDS, TAGS, strict=True)]
    lines = [1, 7]
    if kind == "gz":
        path.write_bytes(gzip.compress(conll().encode()))
    elif kind == "four columns":
        path = write(tmp_path / "d.txt", "-DOCSTART- -X- -X- O\n\n" + conll(between=" NN I-NP "))
        lines = [3, 9]
    elif kind == "comments":
        text = "\n\n# sent_id = 1\n# text = x\n" + conll(between="\t")
        path = write(tmp_path / "d.conll", text.replace("\n\nnothing", "\r\n\t\n\n# x\nnothing"))
        lines = [5, 13]
    elif kind == "jsonl":
        write(path, "\n".join(map(json.dumps, cells)))
        lines = [1, 2]
    elif kind == "csv":
        with open(path, "w", newline="") as f:
            csv.writer(f).writerows(
                [("tokens", "tags"), *(map(json.dumps, c.values()) for c in cells)]
            )
        lines = [2, 3]
    elif kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(cells), path)
        lines = None
    else:
        write(path, conll(between="\t" if kind == "tab" else " "))
    found = load_tagged(path)
    assert (found.words, found.tags, found.texts, found.plain) == (WORDS, TAGS, None, False)
    assert found.rows == [1, 2] and found.lines == lines
    assert found.text(0) == "Ada Lovelace of London ."
    assert [found.text(0)[a:b] for a, b in found.spans(0)] == WORDS[0]
    assert str(path) in found.place(1) and "row 2" in found.place(1)


@pytest.mark.parametrize("kind", ["jsonl", "spans", "csv", "parquet"])
def test_texts_with_spans(tmp_path, kind):
    name = "spans" if kind == "spans" else "entities"
    path = tmp_path / f"d.{kind.replace('spans', 'jsonl')}"
    cells = [{"text": t, name: s} for t, s in zip(TEXTS, SPANS, strict=True)]
    if kind == "csv":
        with open(path, "w", newline="") as f:
            csv.writer(f).writerows(
                [("text", name), *((c["text"], json.dumps(c[name])) for c in cells)]
            )
    elif kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(cells), path)
    else:
        write(path, "\n".join(map(json.dumps, cells)))
    found = load_tagged(path)
    assert (found.words, found.tags, found.texts) == (WORDS, TAGS, TEXTS)
    assert [found.text(0)[a:b] for a, b in found.spans(0)] == WORDS[0]
    part = found.select([1])
    assert (part.words, part.texts, part.rows) == (WORDS[1:], TEXTS[1:], [2])


def test_text_is_as_given(tmp_path):
    """Neither NFC nor whitespace is touched: spans count these characters."""
    text = "\u2003e\u0301tude  of\tMu\u0308ller\u200b, \U0001f469\u200d\U0001f4bb"
    path = write(tmp_path / "d.jsonl", json.dumps({"text": text, "entities": [{"start": 12, "end": 19, "label": "X"}]}))  # fmt: skip
    found = load_tagged(path)
    assert found.texts == [text]
    assert found.words[0] == ["e\u0301tude", "of", "Mu\u0308ller", "\u200b", ",", "\U0001f469\u200d\U0001f4bb"]  # fmt: skip
    assert found.tags[0] == ["O", "O", "B-X", "O", "O", "O"]


@pytest.mark.parametrize("text, words", [
    ("C++20's x_1 3.5%", ["C", "+", "+", "20", "'", "s", "x", "_", "1", "3", ".", "5", "%"]),
    ("東京とTokyo", ["東", "京", "と", "Tokyo"]),
    ("สวัสดี", ["ส", "วั", "ส", "ดี"]),
    ("शान्ति में", ["शान्ति", "में"]),
    ("می\u200cروم co\u00adop", ["می\u200cروم", "co\u00adop"]),
    (" \t\n\u3000", []),
    ("", []),
])  # fmt: skip
def test_split_words(text, words):
    spans = split_words(text)
    assert [text[a:b] for a, b in spans] == words
    left = set(range(len(text))) - {i for a, b in spans for i in range(a, b)}
    assert all(text[i].isspace() for i in left)  # nothing dropped but spaces


def test_forms_stay_whole():
    text, forms = "C++20, (C++) gcc's + +C ++", {"C++", "++", "gcc's", "+C", "C++ "}
    words = [text[a:b] for a, b in split_words(text, forms)]
    assert words == ["C++", "20", ",", "(", "C++", ")", "gcc's", "+", "+C", "++"]
    rows = [["C++", "a"], ["C++", "x-y", "ab"], ["a b", "a b", "ab", "q-r", "q-r"]]
    assert signed_forms(rows) == ["C++", "q-r"]  # those that occur twice, without spaces


def test_two_hash_signs(tmp_path):
    """A word "#" is no comment."""
    found = load_tagged(write(tmp_path / "d.conll", "# O\nx O\n# O\n# B-X\n\n# a b\n#1 O\n"))
    assert found.words == [["#", "x", "#", "#"], ["#1"]]


def random_entities(r, n):
    """Types of entities as spans, some side by side."""
    spans, at = [], 0
    while at < n:
        length = r.randint(1, 3)
        if r.random() < 0.6 and at + length <= n:
            spans.append((at, at + length, r.choice(("A", "B-C"))))
            at += length
        else:
            at += 1
    return spans


def written(spans, n, scheme):
    """Tags of spans in a scheme, each from the scheme's definition."""
    tags = ["O"] * n
    for k, (a, b, kind) in enumerate(spans):
        before = k and spans[k - 1][1] == a and spans[k - 1][2] == kind
        first = {"iob1": "B" if before else "I"}.get(scheme, "B")
        single, last = {"bioes": "SE", "bilou": "UL"}.get(scheme, (first, "I"))
        for i in range(a, b):
            letter = single if b - a == 1 else first if i == a else last if i == b - 1 else "I"
            tags[i] = f"{letter}-{kind}"
    return tags


@pytest.mark.parametrize("scheme", SCHEMES[:4])
def test_schemes_are_told_and_brought_to_iob2(scheme):
    for seed in range(30):
        r = random.Random(seed)
        rows = [random_entities(r, n) for n in [r.randint(1, 12) for _ in range(12)]]
        length = [max([b for _, b, _ in row], default=1) for row in rows]
        tags = [written(row, n, scheme) for row, n in zip(rows, length, strict=True)]
        assert scheme_of(tags) == scheme
        expected = [written(row, n, "iob2") for row, n in zip(rows, length, strict=True)]
        assert [to_iob2(row) for row in tags] == expected


def test_plain_tags_and_files_without_entities(tmp_path):
    found = load_tagged(write(tmp_path / "d.conll", conll([["NNP", "NNP", "IN", "NNP", "-LRB-"], ["NN", "RB"]])))  # fmt: skip
    assert found.plain and found.tags[0][4] == "-LRB-"
    assert scheme_of([["O", "O"]]) == "iob2"
    broken = ["I-A", "B-A", "E-A", "I-A", "S-A", "L-A", "O", "E-B"]
    assert to_iob2(broken) == ["B-A", "B-A", "I-A", "B-A", "B-A", "B-A", "O", "B-B"]
    assert scheme_of([["I-A", "I-A"]]) == "iob1" and to_iob2(["I-A", "I-A"]) == ["B-A", "I-A"]


@pytest.mark.parametrize("rows, place, part", [
    ([["O"], ["B-A", "O", "I-A"]], (1, 2), "row 2, word 1 begins one with 'B-A', as in IOB2"),
    ([["B-A", "X"]], (0, 1), "is 'X', beside 'B-A'"),
    ([["B-A", "o"]], (0, 1), "is 'o', beside"),
    ([["B-A", "B-"]], (0, 1), "is 'B-', beside"),
    ([["S-A", "U-A"]], (0, 1), "is 'U-A', of BILOU, beside 'S-A', of BIOES"),
    ([["B-A", "O", "S-A"]], (0, 0), "no E- or L- ends it"),
    ([["S-A", "B-A"]], (0, 1), "no E- or L- ends it"),
    ([["S-A", "I-A", "E-A"]], (0, 1), "which no B- began"),
    ([["B-A", "I-A", "E-B"]], (0, 2), "inside of 'A'"),
    ([["B-A", "L-A", "L-A"]], (0, 2), "which no B- began"),
])  # fmt: skip
def test_broken_schemes_say_where(rows, place, part):
    with pytest.raises(SchemeError) as e:
        scheme_of(rows)
    assert (e.value.row, e.value.word) == place and part in str(e.value)
    assert "name the scheme" in str(e.value)


def test_a_named_scheme_takes_what_breaks_it(tmp_path):
    path = write(tmp_path / "d.conll", conll([["B-A", "I-A", "O", "I-A", "O"], ["O", "B-A"]]))
    with pytest.raises(DataError, match=r"d.conll: row 1 \(line 4\): the tag of word 4, 'London', is 'I-A'"):  # fmt: skip
        load_tagged(path)
    assert load_tagged(path, scheme="iob2").tags[0] == ["B-A", "I-A", "O", "B-A", "O"]
    assert load_tagged(path, scheme="plain").plain


def jsonl(*rows):
    return "\n".join(map(json.dumps, rows))


def spanned(*spans, text="Ada of Paris!"):
    return jsonl({"text": "x", "entities": []}, {"text": text, "entities": list(spans)})


def span(start, end, label="X", **more):
    return {"start": start, "end": end, "label": label, **more}


BAD = {  # name of the file, what it holds, what the error says
    "one column": ("d.conll", "a O\nb\n", ["line 2", "'b', one column", "expected a word and its tag"]),
    "columns": ("d.conll", "a O\n\nb x O\n", ["line 3 has 3 columns, line 1 has 2"]),
    "no word": ("d.conll", "a\tO\n\tO\n", ["line 2 has an empty word"]),
    "no tag": ("d.conll", "a\tO\nb\t\n", ["line 2 has an empty tag"]),
    "empty": ("d.conll", "\n\n", ["is empty; expected a word"]),
    "docstart": ("d.conll", "a O\n-DOCSTART- O\nb O\n", ["line 2 is -DOCSTART- within a row"]),
    "suffix": ("d.xml", "<a/>", ["unknown format '.xml'", ".jsonl"]),
    "lengths": ("d.jsonl", jsonl({"tokens": ["a"], "tags": ["O"]}, {"tokens": ["a"], "tags": ["O", "O"]}),
                ["row 2 (line 2): column 'tags' has 2 tags for 1 tokens; expected one for each"]),
    "numbers": ("d.jsonl", jsonl({"tokens": ["a"], "tags": [3]}), ["row 1", "holds 3 as number 1, a int", "names such as B-PER"]),
    "no list": ("d.jsonl", jsonl({"tokens": "a b", "tags": ["O", "O"]}), ["row 1", "is 'a b'; expected a list of words"]),
    "no words": ("d.jsonl", jsonl({"tokens": [], "tags": []}), ["row 1", "holds no words; fill it or drop the row"]),
    "columns' names": ("d.jsonl", jsonl({"token": ["a"], "tags": ["O"]}), ["no column 'text'; it has: 'token', 'tags'", "expected tokens and tags"]),
    "null": ("d.jsonl", jsonl({"tokens": ["a"], "tags": ["O"]}, {"tags": ["O"]}), ["row 2", "column 'tokens' is missing"]),
    "surrogate": ("d.jsonl", '{"tokens": ["\\ud800"], "tags": ["O"]}', ["row 1", "lone surrogate"]),
    "empty text": ("d.jsonl", spanned(text=" "), ["row 2 (line 2): column 'text' is an empty text"]),
    "inside": ("d.jsonl", spanned(span(7, 10)), ["row 2 (line 2)", "span 1, 7 to 10 ('Par', X)", "ends inside the word 'Paris'", "expected whole words"]),
    "space": ("d.jsonl", spanned(span(3, 6)), ["span 1", "begins at no word", "without spaces around"]),
    "overlap": ("d.jsonl", spanned(span(0, 6), span(4, 12)), ["row 2", "span 2, 4 to 12", "overlaps span 1"]),
    "twice": ("d.jsonl", spanned(span(0, 3), span(0, 3, "Y")), ["span 2", "overlaps span 1"]),
    "nothing in it": ("d.jsonl", spanned(span(3, 3)), ["span 1, 3 to 3", "0 <= start < end"]),
    "beyond": ("d.jsonl", spanned(span(7, 14)), ["span 1, 7 to 14, of a text of 13 characters", "not bytes"]),
    "negative": ("d.jsonl", spanned(span(-3, 13)), ["span 1, -3 to 13"]),
    "other text": ("d.jsonl", spanned(span(0, 3, text="Bob")), ["of 'Bob', where the text has 'Ada'"]),
    "no label": ("d.jsonl", spanned({"start": 0, "end": 3}), ["span 1", 'expected {"start": 0, "end": 5, "label": "PER"}']),
    "empty label": ("d.jsonl", spanned(span(0, 3, " ")), ["span 1 with an empty label"]),
    "a float": ("d.jsonl", spanned(span(0, 3.0)), ["span 1", "expected whole numbers"]),
    "a string": ("d.jsonl", jsonl({"text": "a", "entities": "PER"}), ["row 1", "is 'PER'; expected a list of", "[] for none"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files(tmp_path, case):
    name, text, parts = BAD[case]
    path = write(tmp_path / name, text)
    with pytest.raises(DataError) as e:
        load_tagged(path)
    for part in (str(path), *parts):
        assert part in str(e.value)


def test_several_bad_rows_are_counted(tmp_path):
    path = write(tmp_path / "d.jsonl", jsonl(*[{"text": "ab", "entities": [span(0, 1)]}] * 3))
    with pytest.raises(DataError, match=r"row 1 .*\(and 2 more such rows: 2, 3\)"):
        load_tagged(path)


def test_not_utf8_and_cut_gzip(tmp_path):
    path = tmp_path / "d.conll"
    path.write_bytes(b"a O\nM\xfcller O\n")
    with pytest.raises(DataError, match="not UTF-8: byte 0xfc at line 2"):
        load_tagged(path)
    path.write_bytes(gzip.compress(conll().encode())[:-9])
    with pytest.raises(DataError, match="damaged or truncated gzip"):
        load_tagged(path)
    with pytest.raises(DataError, match="cannot be read"):
        load_tagged(tmp_path / "none.conll")


def test_chunks_for_predictions(tmp_path):
    """Of words without tags too, and with rows that are empty."""
    path = write(tmp_path / "d.conll", "\n\n".join("a\nb" for _ in range(7)))
    parts = list(read_tagged(path, rows=3))
    assert [len(p) for p in parts] == [3, 3, 1] and parts[1].rows == [4, 5, 6]
    assert all(p.tags is None and p.words[0] == ["a", "b"] for p in parts)
    assert parts[1].lines == [10, 13, 16] and 0 < parts[0].share <= parts[2].share == 1
    path = write(tmp_path / "d.jsonl", jsonl({"text": ""}, {"text": " a "}, {"text": "\u200b"}))
    (part,) = read_tagged(path)
    assert part.words == [[], ["a"], ["\u200b"]] and part.texts == ["", " a ", "\u200b"]
    path = write(tmp_path / "w.jsonl", jsonl({"text": "x", "tokens": []}, {"text": "y", "tokens": ["a"]}))  # fmt: skip
    assert next(read_tagged(path)).words == [[], ["a"]]
    assert next(read_tagged(path, text_column="text")).words == [["x"], ["y"]]


def test_columns_by_name(tmp_path):
    path = write(tmp_path / "d.jsonl", jsonl({"w": ["a"], "t": ["O"], "s": "a", "e": [span(0, 1)]}))
    assert load_tagged(path, tokens_column="w", tags_column="t").tags == [["O"]]
    assert load_tagged(path, text_column="s", entities_column="e").tags == [["B-X"]]
    with pytest.raises(DataError, match="is CoNLL, which has no column 'w'"):
        load_tagged(write(tmp_path / "d.conll", conll()), tokens_column="w")


def test_same_rows():
    found = Tagged([["A", "b "], ["a", "B"], ["a"]])
    assert found.keys()[0] == found.keys()[1] != found.keys()[2]


def test_real_data():
    path = ROOT.parent / "shared/data/debian/ner.val.conll.gz"
    if not path.exists():
        pytest.skip("no shared data here")
    found = load_tagged(path)
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    assert len(found) == sum(
        a != "" and b == "" for a, b in zip(lines, [*lines[1:], ""], strict=True)
    )
    assert [w for row in found.words for w in row] == [line.split()[0] for line in lines if line]
    assert [t for row in found.tags for t in row] == [line.split()[1] for line in lines if line]
