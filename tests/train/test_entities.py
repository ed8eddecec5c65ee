"""Entities of tags and their scores, by hand, by brute force, and as transformers' pipeline has them."""

import itertools
import random
import warnings

import numpy as np
import pytest
import tagging
import torch
import transformers
from sklearn.metrics import classification_report

from bertfast.data.aligned import align
from bertfast.data.tagged import Tagged
from bertfast.data.text_spans import split_words
from bertfast.train.entities import (
    STRATEGIES,
    Entity,
    entities_of,
    entity_scores,
    partial_scores,
    scored_entities,
    tag_scores,
    word_scores,
)

TAGS = ["O", "O", "B-A", "I-A", "B-B", "I-B"]


@pytest.mark.parametrize("tags, expected", [
    ("", []),
    ("O O", []),
    ("B-A I-A O B-B", [(0, 2, "A"), (3, 4, "B")]),
    ("B-A B-A I-A", [(0, 1, "A"), (1, 3, "A")]),
    ("O I-A I-A", [(1, 3, "A")]),  # I- after O begins one
    ("I-A", [(0, 1, "A")]),
    ("B-A I-B I-B", [(0, 1, "A"), (1, 3, "B")]),  # so does another type
    ("I-A B-A O", [(0, 1, "A"), (1, 2, "A")]),
    ("B-x-y I-x-y", [(0, 2, "x-y")]),
])  # fmt: skip
def test_entities_of_tags(tags, expected):
    assert entities_of(tags.split()) == [Entity(*e) for e in expected]


def brute_entities(tags):
    """Every stretch, by the definition: it begins where an entity must, and goes on to its end."""
    parts = [("O", "") if t == "O" else (t[0], t[2:]) for t in tags]
    begins = lambda i: (
        parts[i][0] == "B" or (parts[i][0] == "I" and (i == 0 or parts[i - 1][1] != parts[i][1]))
    )
    found = set()
    for a, b in itertools.combinations(range(len(tags) + 1), 2):
        inside = all(
            parts[i][0] == "I" and parts[i][1] == parts[a][1] and not begins(i)
            for i in range(a + 1, b)
        )
        ended = b == len(tags) or begins(b) or parts[b][0] == "O"
        if parts[a][0] != "O" and begins(a) and inside and ended:
            found.add((a, b, parts[a][1]))
    return found


def random_tags(seed, noise=0.3):
    r = random.Random(seed)
    truth = [[r.choice(TAGS) for _ in range(r.randint(1, 10))] for _ in range(4)]
    return truth, [[r.choice(TAGS) if r.random() < noise else t for t in row] for row in truth]


def ratio(a, b):
    return a / b if b else 0.0


def f1(right, said, true):
    p, r = ratio(right, said), ratio(right, true)
    return p, r, ratio(2 * p * r, p + r)


@pytest.mark.parametrize("seed", range(12))
def test_scores_by_brute_force(seed):
    truth, found = random_tags(seed)
    true, said = (
        [(i, *e) for i, row in enumerate(rows) for e in brute_entities(row)]
        for rows in (truth, found)
    )
    scores = entity_scores(truth, found)
    values = lambda s: (s["precision"], s["recall"], s["f1"])
    right = set(true) & set(said)
    assert values(scores["micro"]) == pytest.approx(f1(len(right), len(said), len(true)))
    kinds = {e[3] for e in true + said}
    each = {k: f1(*(sum(e[3] == k for e in part) for part in (right, said, true))) for k in kinds}
    assert scores["per_type"].keys() == kinds
    for k, s in scores["per_type"].items():
        assert values(s) == pytest.approx(each[k])
    support = {k: sum(e[3] == k for e in true) for k in kinds}
    assert {k: s["support"] for k, s in scores["per_type"].items()} == support
    macro = [ratio(sum(each[k][i] for k in kinds), len(kinds)) for i in range(3)]
    weighted = [ratio(sum(each[k][i] * support[k] for k in kinds), len(true)) for i in range(3)]
    assert values(scores["macro"]) == pytest.approx(macro)
    assert values(scores["weighted"]) == pytest.approx(weighted)


def test_scores_by_hand():
    truth = [["B-A", "I-A", "O", "B-B", "O"], ["B-B", "O"]]
    found = [["B-A", "O", "O", "B-B", "O"], ["B-A", "O"]]
    scores = entity_scores(truth, found)
    assert scores["micro"] == {"precision": 1 / 3, "recall": 1 / 3, "f1": 1 / 3, "support": 3}
    assert scores["per_type"]["A"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}
    assert scores["per_type"]["B"] == {"precision": 1.0, "recall": 0.5, "f1": 2 / 3, "support": 2}
    assert scores["macro"]["f1"] == pytest.approx(1 / 3)
    assert scores["weighted"]["f1"] == pytest.approx(4 / 9)
    nothing = entity_scores([["O"]], [["O"]])
    assert nothing["micro"]["f1"] == nothing["macro"]["f1"] == 0 and nothing["per_type"] == {}


# truth, found, and correct, incorrect, partial, missed, spurious of each scheme
PARTIAL = [
    ("B-A I-A O", "B-A I-A O", {s: (1, 0, 0, 0, 0) for s in ("strict", "exact", "partial", "type")}),
    ("B-A I-A O", "B-B I-B O", {"strict": (0, 1, 0, 0, 0), "exact": (1, 0, 0, 0, 0), "partial": (1, 0, 0, 0, 0), "type": (0, 1, 0, 0, 0)}),
    ("B-A I-A O", "B-A O O", {"strict": (0, 1, 0, 0, 0), "exact": (0, 1, 0, 0, 0), "partial": (0, 0, 1, 0, 0), "type": (1, 0, 0, 0, 0)}),
    ("B-A I-A O", "O B-B I-B", {"strict": (0, 1, 0, 0, 0), "exact": (0, 1, 0, 0, 0), "partial": (0, 0, 1, 0, 0), "type": (0, 1, 0, 0, 0)}),
    ("B-A O O", "O O B-A", {s: (0, 0, 0, 1, 1) for s in ("strict", "exact", "partial", "type")}),
    # one found over two true: it takes the first, or of its type the one with the nearest ends
    ("B-A B-B I-B", "B-B I-B I-B", {"strict": (0, 1, 0, 1, 0), "exact": (0, 1, 0, 1, 0), "partial": (0, 0, 1, 1, 0), "type": (1, 0, 0, 1, 0)}),
    # it takes the second, which is nearer; what that leaves is neither's
    ("B-A B-A I-A I-A I-A", "B-A I-A I-A I-A B-A", {"strict": (0, 2, 0, 0, 0), "exact": (0, 2, 0, 0, 0), "partial": (0, 0, 2, 0, 0), "type": (1, 0, 0, 1, 1)}),
    # two found in one true: the second has nothing left
    ("B-A I-A I-A", "B-A B-A O", {"strict": (0, 1, 0, 0, 1), "exact": (0, 1, 0, 0, 1), "partial": (0, 0, 1, 0, 1), "type": (1, 0, 0, 0, 1)}),
    # the found one that fits comes second: the first has taken the true one
    ("O B-A I-A", "B-A I-A B-A", {"strict": (0, 1, 0, 0, 1), "exact": (0, 1, 0, 0, 1), "partial": (0, 0, 1, 0, 1), "type": (1, 0, 0, 0, 1)}),
]  # fmt: skip


@pytest.mark.parametrize("truth, found, expected", PARTIAL)
def test_partial_matches_by_hand(truth, found, expected):
    scores = partial_scores([truth.split()], [found.split()])
    assert scores.keys() == expected.keys()
    for scheme, (correct, incorrect, partial, missed, spurious) in expected.items():
        s = scores[scheme]
        counts = (s["correct"], s["incorrect"], s["partial"], s["missed"], s["spurious"])
        assert counts == (correct, incorrect, partial, missed, spurious), scheme
        right = correct + partial / 2
        said, true = (
            correct + incorrect + partial + spurious,
            correct + incorrect + partial + missed,
        )
        assert (s["precision"], s["recall"], s["f1"]) == pytest.approx(f1(right, said, true))


@pytest.mark.parametrize("seed", range(8))
def test_partial_matches_are_of_every_entity_once(seed):
    truth, found = random_tags(seed)
    n, m = (sum(map(len, map(brute_entities, rows))) for rows in (truth, found))
    rows = list(zip(truth, found, strict=True))
    same = {
        "strict": sum(len(brute_entities(a) & brute_entities(b)) for a, b in rows),
        "exact": sum(
            len({e[:2] for e in brute_entities(a)} & {e[:2] for e in brute_entities(b)})
            for a, b in rows
        ),
    }
    for scheme, s in partial_scores(truth, found).items():
        assert s["correct"] + s["incorrect"] + s["partial"] + s["missed"] == n
        assert s["correct"] + s["incorrect"] + s["partial"] + s["spurious"] == m
        # an earlier overlap may take a true entity that a later one fits
        assert scheme not in same or s["correct"] <= same[scheme]


def test_several_rows_are_summed():
    truth, found = zip(*(([t.split()], [f.split()]) for t, f, _ in PARTIAL), strict=True)
    scores = partial_scores([t for (t,) in truth], [f for (f,) in found])
    for scheme in scores:
        columns = [sum(row[2][scheme][i] for row in PARTIAL) for i in range(5)]
        assert [
            scores[scheme][k] for k in ("correct", "incorrect", "partial", "missed", "spurious")
        ] == columns


def test_tags_word_by_word_beside_scikit_learn():
    r = random.Random(0)
    truth = [[r.choice("NVDA") for _ in range(7)] for _ in range(9)]
    found = [[r.choice("NVX") if r.random() < 0.5 else t for t in row] for row in truth]
    scores = tag_scores(truth, found)
    expected = classification_report(
        *([t for row in rows for t in row] for rows in (truth, found)),
        output_dict=True,
        zero_division=0,
    )
    assert scores["accuracy"] == pytest.approx(expected["accuracy"])
    assert scores["macro_f1"] == pytest.approx(expected["macro avg"]["f1-score"])
    assert scores["weighted_f1"] == pytest.approx(expected["weighted avg"]["f1-score"])
    assert scores["words"] == 63 and scores["per_tag"].keys() == {*"NVDAX"}
    for tag, s in scores["per_tag"].items():
        assert (
            s["f1"] == pytest.approx(expected[tag]["f1-score"])
            and s["support"] == expected[tag]["support"]
        )


def test_words_by_strategy():
    probabilities = np.array([[0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.0, 0.1, 0.9]])
    words = np.array([0, 0, 2, 2])
    expected = {
        "first": ([0, 2], [0.6, 0.6]),
        "average": ([1, 2], [0.55, 0.75]),
        "max": ([1, 2], [0.8, 0.9]),
    }
    for strategy, (tags, scores) in expected.items():
        got = word_scores(probabilities, words, strategy)
        assert got[0].tolist() == [0, 2] and got[1].tolist() == tags
        assert got[2] == pytest.approx(scores)
        assert [len(x) for x in word_scores(probabilities[:0], words[:0], strategy)] == [0, 0, 0]
    with pytest.raises(ValueError, match="'last'; expected one of first, average, max"):
        word_scores(probabilities, words, "last")
    (one,) = scored_entities(["O", "B-A", "I-A"], [1.0, 0.5, 0.25])
    assert one == (Entity(1, 3, "A"), 0.375)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", tagging.KINDS)
def test_as_the_pipeline(family, strategy):
    """The same entities, characters and scores from the same weights. Where a tokenizer's words are
    not its own, the pipeline has none but those between spaces, and takes a space for one that is a
    token; and ModernBERT's offsets hold the space before."""
    model, read = tagging.model(family)
    texts = [
        "Ada Lovelace to Charles London the toolchain Lovelace Charles the",
        "Ada Charles the toolchain",
    ]
    if tagging.KINDS[family] == "wordpiece":
        texts = [tagging.TEXT[:80].lower(), "gcc's front-ends, Qt6: GTK!"]
    rows = Tagged([[t[a:b] for a, b in split_words(t)] for t in texts], None, texts)
    found = align(read, rows, max_length=60, stride=0)
    tokens = [t for w in found.windows for t in read.convert_ids_to_tokens(w.input_ids)]
    assert not {"▁", "Ġ"} & {*tokens} and len(tokens) > 1.3 * sum(map(len, rows.words))
    probabilities = []
    with torch.no_grad():
        for window in found.windows:
            logits = model(input_ids=torch.tensor([window.input_ids])).logits[0]
            probabilities.append(logits.softmax(-1).numpy())
    pipe = transformers.pipeline(
        "token-classification", model=model, tokenizer=read, aggregation_strategy=strategy
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = pipe(texts)
    for i, (words, values) in enumerate(found.merged(probabilities)):
        there, tags, scores = word_scores(values, words, strategy)
        assert there.tolist() == list(range(len(rows.words[i])))
        spans = rows.spans(i)
        ours = [
            (spans[e.start][0], spans[e.end - 1][1], e.label)
            for e, _ in scored_entities([tagging.LABELS[t] for t in tags], scores)
        ]
        start = lambda e, text=texts[i]: e["start"] + (text[e["start"]] == " ")
        assert ours == [(start(e), e["end"], e["entity_group"]) for e in expected[i]]
        assert [
            s for _, s in scored_entities([tagging.LABELS[t] for t in tags], scores)
        ] == pytest.approx([e["score"] for e in expected[i]], rel=1e-5)
    assert sum(map(len, expected)) > 2
