"""Words' tokens over windows, beside transformers' own words and a brute force."""

import json
import random

import numpy as np
import pytest
import tagging

from bertfast.data import DataError
from bertfast.data.aligned import IGNORED, align, check_shared, warn_silent
from bertfast.data.tagged import Tagged, load_tagged
from bertfast.data.text_spans import split_words


def texts(*given, tags=None):
    words = [[t[a:b] for a, b in split_words(t)] for t in given]
    return Tagged(words, tags, list(given))


def random_rows(n=12, seed=0):
    r = random.Random(seed)
    words = tagging.TEXT.split() + ["Lovelacelovelacelove", "x", "東京"]
    return Tagged([[r.choice(words) for _ in range(r.randint(1, 25))] for _ in range(n)])


@pytest.mark.parametrize("kind", ["wordpiece", "pieces"])
def test_words_as_transformers_has_them(kind):
    """Of rows that fit in a window; byte-level BPE would add a space of its own there."""
    read, rows = tagging.tokenizer(kind, 999), random_rows()
    found = align(read, rows, max_length=900, stride=5)
    other = read(rows.words, is_split_into_words=True)
    for i, (window, word, first, best) in enumerate(
        zip(found.windows, found.word, found.first, found.best, strict=True)
    ):
        theirs = [-1 if w is None else w for w in other.word_ids(i)]
        assert window.input_ids == other["input_ids"][i] and word.tolist() == theirs
        assert first.tolist() == [
            w >= 0 and w != before for w, before in zip(theirs, [-1, *theirs[:-1]], strict=True)
        ]
        assert best.tolist() == [w >= 0 for w in theirs]


@pytest.mark.parametrize("kind", tagging.SPECIALS)
def test_every_word_has_its_characters(kind):
    """Of texts as they are, with spaces and signs anywhere."""
    read = tagging.tokenizer(kind)
    rows = texts("  Ada\t Lovelace,(1843)  ", tagging.TEXT, "gcc's", "東京 naïve", "")
    found = align(read, rows, max_length=40, stride=8)
    for i in range(len(rows)):
        spans, text = rows.spans(i), rows.text(i)
        mine = found.of_rows()[i]
        for j, (a, b) in enumerate(spans):
            earlier = found.shared.get((i, j))  # one token is of both, as ")." is
            if earlier is not None:
                over = [
                    w.offsets[t]
                    for k in mine
                    for w in [found.windows[k]]
                    for t in np.flatnonzero(found.word[k] == earlier)
                ]
                assert earlier == j - 1 and max(p[1] for p in over) >= b
                continue
            pieces = {
                tuple(found.windows[k].offsets[t])
                for k in mine
                for t in np.flatnonzero(found.word[k] == j)
            }
            assert min(p[0] for p in pieces) <= a and max(p[1] for p in pieces) >= b
            assert all(text[min(s, a) : a].isspace() or s >= a for s, _ in pieces)
            firsts = [
                t
                for k in mine
                for t in np.flatnonzero((found.word[k] == j) & found.first[k] & found.best[k])
            ]
            assert len(firsts) == 1
    assert found.silent == [] and (found.shared == {}) == (not kind.startswith("byte"))


def brute_force(window, stride, word):
    """(token, window it is taken from) by looking at each word in each window; `word`: all tokens'."""
    starts, at = [], 0
    while True:
        starts.append(at)
        if at + window >= len(word):
            break
        at += window - stride
    chosen = []
    for t, w in enumerate(word):
        mine = [i for i, x in enumerate(word) if x == w]

        def context(k, mine=mine):
            lo, hi = starts[k], min(starts[k] + window, len(word))
            if not all(lo <= i < hi for i in mine):
                return -1
            sides = [] if k == 0 else [mine[0] - lo]
            sides += [] if hi == len(word) else [hi - 1 - mine[-1]]
            return min(sides, default=10**9)

        best = max(range(len(starts)), key=context)
        if context(best) < 0:
            best = max(range(len(starts)), key=lambda k, t=t: context(k, [t]))
        chosen.append(best)
    return chosen


@pytest.mark.parametrize("length, stride", [(10, 0), (10, 3), (10, 7), (16, 5), (9, 6)])
def test_a_word_is_taken_from_where_it_has_most_context(length, stride):
    read, rows = tagging.tokenizer("wordpiece"), random_rows(8, seed=length)
    rows.words[0] = ["Lovelacelovelacelovelacexyzxyzxyz", "Ada"]  # longer than a window
    found = align(read, rows, max_length=length, stride=stride)
    whole = align(read, rows, max_length=900, stride=0)
    # Each token's value says which window it is of, and which token of the text.
    for i, mine in enumerate(found.of_rows()):
        word = whole.word[i][1:-1]
        expected = brute_force(length - 2, stride, word.tolist())
        starts = [k * (length - 2 - stride) for k in range(len(mine))]
        values = [
            np.array([(k, starts[k] + t - 1) for t in range(len(found.word[w]))])
            for k, w in enumerate(mine)
        ]
        one = align(read, rows.select([i]), max_length=length, stride=stride)
        ((words, taken),) = one.merged(values)
        assert words.tolist() == word.tolist()
        assert taken[:, 1].tolist() == list(range(len(word)))  # every token once, in order
        assert taken[:, 0].tolist() == expected


@pytest.mark.parametrize("label_all", [False, True])
def test_a_word_is_a_target_once(label_all):
    read, rows = tagging.tokenizer("byte"), random_rows(9, seed=3)
    found = align(read, rows, max_length=12, stride=4)
    assert len(found.windows) > 2 * len(rows)
    tags = [np.arange(len(w)) + 100 * i for i, w in enumerate(rows.words)]
    targets = found.targets(tags, label_all)
    whole = align(read, rows, max_length=900, stride=0)
    tokens = [t for target in targets for t in target[target != IGNORED]]
    if label_all:
        expected = [100 * i + w for i, word in enumerate(whole.word) for w in word if w >= 0]
    else:
        expected = [t for row in tags for t in row]
    assert sorted(tokens) == sorted(expected)
    for target, window in zip(targets, found.windows, strict=True):
        assert (target[~window.inside] == IGNORED).all()


def test_words_apart_or_as_they_stand(tmp_path):
    """A byte-level token over two words of the text; apart they have one each."""
    read = tagging.tokenizer("byte", text="(x). " * 50)
    rows = texts("(x).", tags=[["O", "B-A", "O", "O"]])
    tokens = read.convert_ids_to_tokens(read("(x).")["input_ids"])[1:-1]
    assert tokens[-1] in (").", "x).") or "(x)." in tokens
    found = align(read, rows, max_length=20, stride=0)
    apart = align(read, rows, max_length=20, stride=0, spaced=True)
    assert found.shared and not apart.shared
    assert set(apart.word[0].tolist()) == {-1, 0, 1, 2, 3}
    path = tmp_path / "d.jsonl"
    path.write_text(
        json.dumps({"text": "(x).", "entities": [{"start": 3, "end": 4, "label": "A"}]})
    )
    rows = load_tagged(path)
    with pytest.raises(
        DataError, match=r"d.jsonl: row 1 \(line 1\): .* is one token .*B-A.*--spaced"
    ):
        check_shared(align(read, rows, max_length=20, stride=0), rows)
    rows.tags = [["O"] * 4]
    check_shared(align(read, rows, max_length=20, stride=0), rows)


def test_words_that_are_nothing_to_the_tokenizer():
    read = tagging.tokenizer("wordpiece")
    rows = Tagged([["Ada", "\u200b", "x"], [], ["\u200b\u200d"]], path="d.conll", lines=[1, 5, 7])
    found = align(read, rows, max_length=20, stride=0)
    assert found.silent == [(0, 1), (2, 0)]
    assert (
        "2 words are nothing to the tokenizer and get the tag O: d.conll: row 1 (line 1), word 2 '\\u200b'"
        in warn_silent(found, rows)
    )
    assert warn_silent(align(read, rows.select([1]), max_length=20, stride=0), rows) is None
    assert [w.tolist() for w, _ in found.merged([np.zeros(len(w)) for w in found.word])][1] == []
