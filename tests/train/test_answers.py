"""Answers of logits beside transformers' own steps written as plain loops; scores beside SQuAD's
scripts, written anew from what they do, and beside hand-computed ones."""

import math
import re
import time
from collections import Counter

import numpy as np
import pytest

from bertfast.data.spans import NOWHERE, QuestionWindows
from bertfast.train import answers
from bertfast.train.answers import Prediction, Span

TEXT = "".join(chr(97 + i % 26) for i in range(4000))


def _windows(*sizes, question=None, context=None, stride=3):
    """Windows with [CLS], 2 tokens of a question, [SEP], `size` tokens of 4 characters, [SEP];
    each begins `stride` tokens before the one before ended."""
    question = np.array([0] * len(sizes) if question is None else question)
    context = np.zeros(len(sizes), np.int64) if context is None else np.array(context)
    starts, ends, at, last = [], [], 0, None
    for size, key in zip(sizes, zip(question, context, strict=True), strict=True):
        at = max(at - stride, 0) if key == last else 0
        last = key
        begin = np.full(size + 5, NOWHERE, np.int32)
        begin[4:-1] = 4 * np.arange(at, at + size)
        starts.append(begin)
        ends.append(np.where(begin == NOWHERE, NOWHERE, begin + 4).astype(np.int32))
        at += size
    return QuestionWindows([{}] * len(sizes), question, context, starts, ends, None, [])


def _logits(windows, seed=0, scale=3.0):
    r = np.random.default_rng(seed)
    return [r.standard_normal((len(s), 2)).astype(np.float32) * scale for s in windows.starts]


def _official(logits, windows, question, n_best, longest, null):
    """transformers' post-processing of one question: {answer's characters or None, score_diff,
    n_best}, one span and one step at a time."""
    found, least = [], None
    for w in np.flatnonzero(windows.question == question):
        start, end = logits[w].astype(np.float64).T
        score = start[0] + end[0]
        least = score if least is None else min(least, score)
        for i in np.argsort(start)[::-1][:n_best]:
            for j in np.argsort(end)[::-1][:n_best]:
                if windows.starts[w][i] == NOWHERE or windows.ends[w][j] == NOWHERE:
                    continue
                if j < i or j - i + 1 > longest:
                    continue
                span = int(windows.starts[w][i]), int(windows.ends[w][j]), int(windows.context[w])
                found.append((start[i] + end[j], span))
    if null:
        found.append((least, None))
    found = sorted(found, key=lambda f: f[0], reverse=True)
    kept, seen = [], set()
    for score, span in found:  # ours: a span of two windows once
        if span not in seen:
            seen.add(span)
            kept.append((score, span))
    kept = kept[:n_best]
    if null and not any(span is None for _, span in kept):
        kept.append((least, None))
    best = next((f for f in kept if f[1] is not None), (-math.inf,))
    return kept, least - best[0] if null else None


CASES = {
    "one window": _windows(9),
    "three windows": _windows(9, 9, 4),
    "two questions": _windows(9, 9, 7, 5, question=[0, 0, 1, 1]),
    "two contexts": _windows(8, 8, 6, 5, question=[0, 0, 0, 1], context=[0, 0, 1, 0]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("longest", [1, 3, 30])
@pytest.mark.parametrize("null", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_is_the_official_post_processing(case, longest, null, seed):
    """n_best is larger than a window, so that the official search is over all spans, too."""
    windows = CASES[case]
    logits = _logits(windows, seed)
    found = answers.decode(logits, windows, n_best=20, max_answer_length=longest, null=null)
    assert len(found) == windows.question.max() + 1
    for question, prediction in enumerate(found):
        kept, diff = _official(logits, windows, question, 20, longest, null)
        spans = [f for f in kept if f[1] is not None]
        assert [(s.start, s.end, s.context) for s in prediction.spans] == [f[1] for f in spans]
        assert [s.score for s in prediction.spans] == [f[0] for f in spans]
        assert prediction.diff == diff
        for threshold in (-1.0, 0.0, 2.0):
            answered = diff is None or diff <= threshold
            assert prediction.answer(threshold) == (prediction.spans[0] if answered else None)
        e = np.exp([f[0] - kept[0][0] for f in kept])
        p, none = prediction.probabilities()
        expected = dict(zip([f[1] for f in kept], e / e.sum(), strict=True))
        assert p == pytest.approx([expected[f[1]] for f in spans])
        assert (none is None) if not null else none == pytest.approx(expected[None])


def test_n_best_are_the_best_of_all_spans():
    """Beside every span of every window, also where n_best is smaller than a window; the official
    search sees a part of them, and never a better one."""
    windows = _windows(40, 40, 30)
    for seed in range(10):
        logits = _logits(windows, seed)
        found = answers.decode(logits, windows, n_best=6, max_answer_length=4, null=False)[0]
        every = {}
        for w in range(3):
            for i in range(4, len(windows.starts[w]) - 1):
                for j in range(i, min(i + 4, len(windows.starts[w]) - 1)):
                    key = int(windows.starts[w][i]), int(windows.ends[w][j])
                    score = float(logits[w][i, 0]) + float(logits[w][j, 1])
                    every[key] = max(score, every.get(key, -math.inf))
        best = sorted(every.values(), reverse=True)[:6]
        assert [s.score for s in found.spans] == best
        official = _official(logits, windows, 0, 6, 4, False)[0]
        assert found.spans[0].score >= official[0][0]


def test_there_is_an_answer_where_the_official_search_finds_none():
    """The best starts are all behind the best ends."""
    windows = _windows(8)
    logits = [np.zeros((13, 2), np.float32)]
    logits[0][8:12, 0], logits[0][4:8, 1] = 5, 5
    assert not any(f[1] for f in _official(logits, windows, 0, 3, 2, True)[0])
    found = answers.decode(logits, windows, n_best=3, max_answer_length=2)[0]
    assert found.spans[0].score == 5 and len(found.spans) == 3


def test_no_answer_is_one_of_the_n_best():
    windows = _windows(6)
    logits = [np.zeros((11, 2), np.float32)]
    logits[0][[4, 0]] = [[3, 3], [1, 1]]
    found = answers.decode(logits, windows, n_best=2)[0]
    assert found.spans == [Span(6.0, 0, 4, 0), Span(3.0, 0, 8, 0)] or len(found.spans) == 2
    logits[0][0] = 5
    found = answers.decode(logits, windows, n_best=2)[0]
    assert found.spans == [Span(6.0, 0, 4, 0)] and found.null == 10 and found.diff == 4
    assert answers.decode(logits, windows, n_best=1)[0].spans == [Span(6.0, 0, 4, 0)]


def test_contexts_without_tokens():
    empty, full = _windows(0), _windows(0, 5, question=[0, 1])
    zeros = [np.zeros((5, 2))]
    (found,) = answers.decode(zeros, empty)
    assert found.spans == [] and found.answer() is None and found.diff == math.inf
    assert answers.decode(zeros, empty, null=False)[0].answer() is None
    first, second = answers.decode([np.ones((5, 2)), np.ones((10, 2))], full, n_best=3)
    assert first.spans == [] and len(second.spans) == 3
    assert Prediction([]).probabilities() == ([], None)
    assert answers.decode([], _windows()) == []


@pytest.mark.parametrize("place", [0, 5])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite(place, bad):
    logits = _logits(_windows(6))
    logits[0][place, 1] = bad
    with pytest.raises(ValueError, match="not finite"):
        answers.decode(logits, _windows(6))


def test_many_questions_decode_in_a_second():
    """1,000 questions of three windows of 384 tokens; the bound is wide, for a loaded machine."""
    windows = _windows(*[379] * 3000, question=np.repeat(np.arange(1000), 3), stride=128)
    logits = list(np.random.default_rng(0).standard_normal((3000, 384, 2)).astype(np.float32))
    begin = time.perf_counter()
    found = answers.decode(logits, windows)
    took = time.perf_counter() - begin
    assert len(found) == 1000 and all(len(p.spans) in (19, 20) for p in found)
    assert took < 5, took


@pytest.mark.parametrize(
    "text, normal",
    [
        ("The Cat", "cat"),
        ("a cat, an owl & the dog.", "cat owl dog"),
        ("U.S.A.", "usa"),
        ("rock'n'roll", "rocknroll"),
        ("well-known", "wellknown"),
        ("the-end", "theend"),  # punctuation goes first: no article is left
        ("there a-b", "there ab"),
        ("A", ""),
        ("  x \t\u00a0y\n", "x y"),
        ("“The” Beatles…", "“ ” beatles…"),  # only ASCII punctuation goes
        ("CAFÉ", "café"),
        ("İ", "i̇"),
        ("the été", "été"),
        ("éa", "éa"),  # no word boundary inside
        ("$5.50", "550"),
        ("", ""),
    ],
)
def test_normalize(text, normal):
    assert answers.normalize(text) == normal


def _normal(s):
    s = "".join(c for c in s.lower() if c not in set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"))
    return " ".join(re.sub(r"\b(?:an|a|the)\b", " ", s).split())


def _v1(text, gold):
    """(exact, F1) by the steps of SQuAD 1.1's script."""

    def f1(g):
        a, b = _normal(text).split(), _normal(g).split()
        same = sum((Counter(a) & Counter(b)).values())
        return 0 if not same else 2 * (same / len(a)) * (same / len(b)) / (same / len(a) + same / len(b))  # fmt: skip

    return float(_normal(text) in map(_normal, gold)), max(map(f1, gold))


def _v2(text, gold):
    """(exact, F1) by the steps of SQuAD 2's script."""
    gold = [g for g in gold if _normal(g)] or [""]

    def f1(g):
        a, b = _normal(text).split(), _normal(g).split()
        if not a or not b:
            return int(a == b)
        same = sum((Counter(a) & Counter(b)).values())
        return 0 if not same else 2 * (same / len(a)) * (same / len(b)) / (same / len(a) + same / len(b))  # fmt: skip

    return max(int(_normal(text) == _normal(g)) for g in gold), max(map(f1, gold))


TEXTS = ["", "the", "Ada", "ada.", "Ada of the Paris", "in Paris, the river", "Paris Paris", "-", "12", "à Paris"]  # fmt: skip


@pytest.mark.parametrize("null", [True, False])
def test_scores_are_the_official_ones(null):
    golds = [[a, b] for a in TEXTS[1:] for b in TEXTS[1:]] + [[a] for a in TEXTS[1:]]
    golds += [[]] * null
    pairs = [(t, g) for t in TEXTS for g in golds]
    exact, f1 = answers.raw_scores(*zip(*pairs, strict=True), null)
    for i, (text, gold) in enumerate(pairs):
        assert (exact[i], f1[i]) == pytest.approx((_v2 if null else _v1)(text, gold)), (text, gold)


def test_scores_by_hand():
    texts = ["in Paris", "The Ada", "", "red", "the"]
    gold = [["Paris", "in Rome by night"], ["ada"], [], [], ["a"]]
    exact, f1 = answers.raw_scores(texts, gold, True)
    assert exact.tolist() == [0, 1, 1, 0, 1] and f1 == pytest.approx([2 / 3, 1, 1, 0, 1])
    found = answers.summary(exact, f1, np.array([bool(g) for g in gold]), True)
    assert found == pytest.approx(
        {"exact_match": 3 / 5, "f1": 11 / 15, "has_answer_exact_match": 2 / 3}
        | {"has_answer_f1": 8 / 9, "no_answer_exact_match": 1 / 2, "no_answer_f1": 1 / 2}
    )
    # 1.1's F1 of two texts of articles alone is 0, though they match
    exact, f1 = answers.raw_scores(texts[:2] + texts[4:], gold[:2] + gold[4:], False)
    assert exact.tolist() == [0, 1, 1] and f1.tolist() == pytest.approx([2 / 3, 1, 0])
    assert answers.summary(exact, f1, np.ones(3, bool), False).keys() == {"exact_match", "f1"}
    alone = answers.summary(np.ones(2), np.ones(2), np.zeros(2, bool), True)
    assert "no_answer_f1" in alone and "has_answer_f1" not in alone


def _sweep(diffs, scores, answerable):
    """SQuAD 2's search for the best threshold, one question at a time."""
    total = best = sum(not a for a in answerable)
    threshold = 0.0
    for i in sorted(range(len(diffs)), key=lambda i: diffs[i]):
        total += scores[i] if answerable[i] else -1
        if total > best:
            best, threshold = total, diffs[i]
    return threshold, best / len(diffs)


@pytest.mark.parametrize("tied", [False, True])
def test_threshold_is_the_official_one(tied):
    r = np.random.default_rng(0)
    for n in (1, 2, 7, 50):
        for _ in range(30):
            diffs = r.standard_normal(n)
            if tied:
                diffs = diffs.round()
            scores, answerable = r.choice([0, 0.5, 2 / 3, 1], n), r.random(n) < 0.7
            expected = _sweep(diffs, scores, answerable)
            found = answers.best_threshold(diffs, scores, answerable)
            assert found[1] == pytest.approx(expected[1])
            if expected[1] > np.mean(~answerable):
                assert found[0] == expected[0]
            else:  # no answer to any question is best: theirs is 0
                assert found[0] < diffs.min()
            if not tied:  # what the threshold gives is what the sweep says
                given = np.where(diffs > found[0], ~answerable, np.where(answerable, scores, 0))
                assert given.mean() == pytest.approx(found[1])
