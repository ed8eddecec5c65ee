"""What a classifier says when terms of a group become those of another: counterfactual swaps."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ..data.errors import DataError
from . import classifier, intervals
from .lexicon import Lexicon, load
from .lexicons import DEFAULT

LIMITS = (
    "A lexicon knows words, not sentences: 'her' is taken for a possessive where a word follows "
    "that may be a noun ('gave her books' becomes 'gave his books'), a/an and forms of verbs stay, "
    "and so do names and words that it doesn't hold. Read examples before figures."
)


class _Swaps(NamedTuple):
    """Texts with their variants, one for each other group: all of one text side by side."""

    texts: list[int]  # the example of each variant
    steps: list[int]  # how many groups on its terms are
    own: list[frozenset]  # of each variant's text, the groups whose terms it has
    variants: list[tuple]  # (text, pair)


def swaps(
    model: str,
    path: str,
    *,
    lexicon: str | Sequence[str] = DEFAULT,
    ignore_case: bool = False,
    worst: int = 10,
    samples: int = intervals.SAMPLES,
    seed: int = 0,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    max_length: int | None = None,
    allow_pickle: bool = False,
    device: str | None = None,
    precision: str | None = None,
) -> dict:
    """What swapping the terms of groups changes in a fine-tuned classifier's answers.

    Every term of a text becomes its counterpart in the next group, and for more than two groups in
    the one after that, and so on: a text has a variant for each other group.

    Args:
        model, path, text_column to precision: as of `train.predict_table`; no labels are read.
        lexicon: built-in names or files, see `audit.lexicon`; ignore_case finds every term in any
            case, as lower-cased texts need it.
        worst: how many examples to give, of the largest shifts.
        samples, seed: of the bootstrap over texts.

    Returns: {"model", "data", "lexicon", "groups", "texts", "with_terms", "without_terms": rows,
    "unseen": rows, "changed", "shift", "absolute_shift", "directions", "worst", "limits"}. unseen:
    no variant gives the model other tokens (terms beyond max_length, unknown words); neither they
    nor texts without a term are in what follows. changed {"texts", "changed", "share", "low",
    "high"}: the texts with another label in some variant. shift {"mean", "low", "high"}: of the
    probability of the class predicted first, a text's being the mean of its variants. The largest
    class can hardly but lose, so a direction {"from", "to", "changed", "shift", "classes"} has the
    shift of each class too.

    Raises: ConfigError, data.DataError, model.CheckpointError.
    """
    intervals.check(samples=samples, worst=worst)
    terms = load(lexicon, ignore_case)
    columns = {"text_column": text_column, "text_pair_column": text_pair_column}
    columns["max_length"] = max_length
    audited = classifier.opened(model, path, False, allow_pickle, device, precision, **columns)
    examples, names = audited.examples, audited.names
    made = _made(examples, terms)
    if not made.texts:
        raise DataError(
            f"{path}: no text has a term of {terms.place} (rows: {len(examples)}): give another "
            "lexicon, or ignore the case of texts that are in lower case"
        )
    held = sorted({*made.texts})
    shifts = _shifts(audited, made)
    if not len(shifts.texts):
        raise DataError(
            f"{path}: the swaps change nothing that the model sees (texts with terms: "
            f"{len(held)}): the terms are unknown to its tokenizer, or beyond max_length"
        )
    found = {
        "model": str(model),
        "data": str(path),
        "lexicon": terms.place,
        "groups": terms.groups,
        "texts": len(examples),
        "with_terms": len(held),
        "without_terms": [r for i, r in enumerate(examples.rows) if i not in {*held}],
        "unseen": [examples.rows[i] for i in sorted({*held} - {*shifts.texts.tolist()})],
    }
    found |= _summary(shifts, samples, seed)
    found["directions"] = _directions(shifts, made, terms.groups, names, samples, seed)
    found["worst"] = [_example(shifts, made, i, examples, names) for i in shifts.worst(worst)]
    return found | {"limits": LIMITS}


class _Shifts(NamedTuple):
    """Of the variants that the model sees."""

    variants: np.ndarray  # int64 [n], of `_Swaps`
    texts: np.ndarray  # int64 [n], the example of each
    before: np.ndarray  # fp64 [n, classes], the original's probabilities
    after: np.ndarray  # the variant's

    @property
    def first(self):
        """The class predicted first."""
        return self.before.argmax(1)

    @property
    def own(self):
        """fp64 [n], of that class's probability."""
        return (self.after - self.before)[np.arange(len(self.texts)), self.first]

    @property
    def changed(self):
        return self.after.argmax(1) != self.first

    def worst(self, n) -> np.ndarray:
        """The first are those with another label, then by size."""
        return np.lexsort((-abs(self.own), ~self.changed))[:n]


def _summary(shifts, samples, seed) -> dict:
    mean = lambda v: intervals.of_mean(_by_text(shifts.texts, v)[:, None], samples, seed)[0]
    return {
        "changed": _changed(shifts.texts, shifts.changed),
        "shift": mean(shifts.own),
        "absolute_shift": mean(abs(shifts.own)),
    }


def _directions(shifts, made, groups, names, samples, seed) -> list[dict]:
    kinds = [(tuple(sorted(made.own[v])), made.steps[v]) for v in shifts.variants]
    found = []
    for own, step in sorted({*kinds}):
        at = np.array([kind == (own, step) for kind in kinds])
        values = np.column_stack([shifts.own, shifts.after - shifts.before])[at]
        first, *classes = intervals.of_mean(values, samples, seed)
        one = {
            "from": " and ".join(groups[g] for g in own),
            "to": " and ".join(groups[(g + step) % len(groups)] for g in own),
            "changed": _changed(shifts.texts[at], shifts.changed[at]),
        }
        found.append(one | {"shift": first, "classes": dict(zip(names, classes, strict=True))})
    return found


def _example(shifts, made, i, examples, names) -> dict:
    text, first = shifts.texts[i], shifts.first[i]
    return {
        "row": examples.rows[text],
        "before": _text(examples.texts[text], examples.pairs and examples.pairs[text]),
        "after": _text(*made.variants[shifts.variants[i]]),
        "label_before": names[first],
        "label_after": names[shifts.after[i].argmax()],
        "probability_before": float(shifts.before[i, first]),
        "probability_after": float(shifts.after[i, first]),
    }


def _made(examples, terms: Lexicon) -> _Swaps:
    made = _Swaps([], [], [], [])
    for i, text in enumerate(examples.texts):
        sides = [text] if examples.pairs is None else [text, examples.pairs[i]]
        found = [terms.find(side) for side in sides]
        own = frozenset(term.group for side in found for term in side)
        for step in range(1, len(terms.groups)) if own else ():
            swapped = [terms.swap(*side, step) for side in zip(sides, found, strict=True)]
            made.texts.append(i)
            made.steps.append(step)
            made.own.append(own)
            made.variants.append((*swapped, None)[:2])
    return made


def _shifts(audited, made: _Swaps) -> _Shifts:
    """Originals and variants in the same packed batches."""
    examples = audited.examples
    held, of = np.unique(made.texts, return_inverse=True)
    originals = examples.select(held)
    variants = replace(
        examples.select(made.texts),
        texts=[text for text, _ in made.variants],
        pairs=None if examples.pairs is None else [pair for _, pair in made.variants],
    )
    rows, others = audited.rows(originals), audited.rows(variants, warn=False)
    ids = [row["input_ids"] for row in rows]
    seen = [v for v, row in enumerate(others) if row["input_ids"] != ids[of[v]]]
    seen = np.array(seen, np.int64)
    texts = np.array(made.texts)[seen]
    both = examples.select([*held, *texts])  # for the place of what is not finite
    found = audited.probabilities(both, rows + [others[v] for v in seen])
    return _Shifts(seen, texts, found[of[seen]], found[len(held) :])


def _by_text(of, values) -> np.ndarray:
    """The mean of each text's variants."""
    _, at = np.unique(of, return_inverse=True)
    return np.bincount(at, values) / np.bincount(at)


def _changed(of, other) -> dict:
    texts, changed = len({*of.tolist()}), len({*of[other].tolist()})
    return {"texts": texts, "changed": changed} | intervals.of_share(changed, texts)


def _text(text, pair) -> str | list[str]:
    return text if pair is None else [text, pair]
