"""Entities of words' scores, and what found ones are worth beside the true."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from ..data.tag_schemes import Entity, entities_of

STRATEGIES = ("first", "average", "max")  # from sub-words to a word, as transformers' pipeline


def _scores(correct: float, found: int, true: int) -> dict:
    """Precision, recall and F1; 0 where there is nothing to divide by."""
    precision, recall = correct / found if found else 0.0, correct / true if true else 0.0
    total = precision + recall
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / total if total else 0.0,
    }


def entity_scores(truth: list[list[str]], found: list[list[str]]) -> dict:
    """Precision, recall, F1 and support of whole entities, as seqeval's default mode.

    truth, found: IOB2 tags of each row. Returns {"per_type": {type: scores}, "micro": over all
    entities, "macro": the mean over the types that occur, "weighted": the mean by support}.
    """
    true, said, both = Counter(), Counter(), Counter()
    for a, b in zip(truth, found, strict=True):
        a, b = set(entities_of(a)), set(entities_of(b))
        true.update(e.label for e in a)
        said.update(e.label for e in b)
        both.update(e.label for e in a & b)
    per_type = {
        name: _scores(both[name], said[name], true[name]) | {"support": true[name]}
        for name in sorted(true | said)
    }
    support = true.total()
    micro = _scores(both.total(), said.total(), support) | {"support": support}
    weights = {"macro": [1] * len(per_type), "weighted": [s["support"] for s in per_type.values()]}
    means = {
        mean: {
            score: _mean([s[score] for s in per_type.values()], w)
            for score in ("precision", "recall", "f1")
        }
        | {"support": support}
        for mean, w in weights.items()
    }
    return {"micro": micro, **means, "per_type": per_type}


def _mean(values, weights) -> float:
    total = sum(weights)
    return sum(v * w for v, w in zip(values, weights, strict=True)) / total if total else 0.0


SCHEMES = {  # what makes a found entity correct; overlaps that don't are incorrect, or partial
    "strict": lambda a, b: a == b,
    "exact": lambda a, b: a[:2] == b[:2],
    "partial": lambda a, b: a[:2] == b[:2],
    "type": lambda a, b: a.label == b.label,
}


def partial_scores(truth: list[list[str]], found: list[list[str]]) -> dict:
    """By each of nervaluate's schemes how many entities are correct, incorrect, partial, missed and
    spurious, and their precision, recall and F1.

    A found entity, in the order of the text, is compared with the true ones that it overlaps and
    that no earlier one took: strict wants the same words and type, exact the same words, type the
    same type (of several the one whose ends are nearest). Where none is correct, the first is taken
    as incorrect; by partial, which asks for no type, as partial, which counts one half.
    """
    rows = [(entities_of(a), entities_of(b)) for a, b in zip(truth, found, strict=True)]
    out = {}
    for name, same in SCHEMES.items():
        n = Counter(dict.fromkeys(("correct", "incorrect", "partial", "missed", "spurious"), 0))
        for true, said in rows:
            n.update(_outcomes(true, said, same, "partial" if name == "partial" else "incorrect"))
        matched = n["correct"] + n["incorrect"] + n["partial"]
        right = n["correct"] + 0.5 * n["partial"]
        out[name] = dict(n) | _scores(right, matched + n["spurious"], matched + n["missed"])
    return out


def _outcomes(true: list[Entity], said: list[Entity], same, other: str):
    left = list(true)
    for b in said:
        near = [a for a in left if a.start < b.end and b.start < a.end]
        right = [a for a in near if same(a, b)]
        distance = lambda a, b=b: abs(a.start - b.start) + abs(a.end - b.end)
        taken = min(right, key=distance) if right else near[0] if near else None
        if taken is not None:
            left.remove(taken)
        yield "correct" if right else other if near else "spurious"
    yield from ["missed"] * len(left)


def tag_scores(truth: list[list[str]], found: list[list[str]]) -> dict:
    """Of tags word by word: accuracy, F1 over the tags that occur (macro, weighted by support), and
    precision, recall, F1 and support of each tag."""
    true, said, both = Counter(), Counter(), Counter()
    for a, b in zip(truth, found, strict=True):
        for x, y in zip(a, b, strict=True):
            true[x] += 1
            said[y] += 1
            both[x] += x == y
    per_tag = {
        name: _scores(both[name], said[name], true[name]) | {"support": true[name]}
        for name in sorted(true | said)
    }
    f1, words = [s["f1"] for s in per_tag.values()], true.total()
    return {
        "accuracy": both.total() / words if words else 0.0,
        "macro_f1": _mean(f1, [1] * len(f1)),
        "weighted_f1": _mean(f1, [s["support"] for s in per_tag.values()]),
        "words": words,
        "per_tag": per_tag,
    }


def word_scores(
    probabilities: np.ndarray, words: np.ndarray, strategy: str = "first"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One tag a word from the tokens of a row: (words int64 [n], tags int64 [n], scores [n]).

    Args:
        probabilities: [tokens, tags].
        words: int64 [tokens], each token's word, rising.
        strategy: "first": the first sub-word's; "average": the mean's best; "max": that of the
            sub-word that is surest of its own.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy is {strategy!r}; expected one of {', '.join(STRATEGIES)}")
    there, starts, counts = np.unique(words, return_index=True, return_counts=True)
    if strategy == "average" and len(there):
        rows = np.add.reduceat(probabilities, starts, 0) / counts[:, None]
    elif strategy == "max":
        best = probabilities.max(1, initial=0)
        surest = [s + int(best[s : s + n].argmax()) for s, n in zip(starts, counts, strict=True)]
        rows = probabilities[np.array(surest, np.int64)]
    else:
        rows = probabilities[starts]
    tags = rows.argmax(1)
    return there, tags, rows[np.arange(len(rows)), tags]


def scored_entities(
    tags: list[str], scores: Sequence[float] | np.ndarray
) -> list[tuple[Entity, float]]:
    """A row's entities, each with the mean of its words' scores."""
    scores = np.asarray(scores)
    return [(e, float(scores[e.start : e.end].mean())) for e in entities_of(tags)]
