"""Words, rows for a model, and tags out of its outputs: what training and inference share."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ...data.aligned import Aligned, continued
from ...data.errors import DataError
from ...data.tag_schemes import parts, to_iob2
from ...data.tagged import Tagged
from .. import metrics
from ..entities import entity_scores, partial_scores, tag_scores, word_scores
from ..packed import IGNORED


class Tags:
    """The tags of a model's outputs, in their order.

    plain: that none of them has a prefix and so none makes an entity. iob2: whether there are B-
    and I- alone, or those of BIOES or BILOU, which are brought to IOB2.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        letters = {parts(name)[0] for name in self.names}
        self.plain, self.iob2 = letters == {"O"}, letters <= {"O", "B", "I"}
        self.ids = {name: i for i, name in enumerate(self.names)}

    def of(self, tags: list[str]) -> list[str]:
        return tags if self.plain else to_iob2(tags)

    def encode(self, examples: Tagged) -> list[np.ndarray]:
        """int64 [words] of each row. DataError names row and word of a tag that is unknown; a
        model's of another scheme are IGNORED where it doesn't have IOB2's."""
        kinds = {parts(name)[1] for name in self.names}
        out = []
        for i, row in enumerate(examples.tags):
            for j, tag in enumerate(row):
                known = tag in self.ids if self.plain or self.iob2 else parts(tag)[1] in kinds
                if not known:
                    raise DataError(
                        f"{examples.place(i)}: word {j + 1}, {examples.words[i][j]!r}, has the "
                        f"unknown tag {tag!r}; known are {', '.join(self.names)}"
                    )
            out.append(np.array([self.ids.get(tag, IGNORED) for tag in row], np.int64))
        return out


@dataclass
class Encoded:
    """Rows for `Packed.of_rows`, a window each; those without a word's token are left out.

    windows: of which window of `aligned` each row is.
    """

    aligned: Aligned
    rows: list[dict]
    windows: list[int]

    def place(self, examples: Tagged, row: int) -> str:
        """Where what the row is of stands, for an error."""
        return examples.place(self.aligned.windows[self.windows[row]].example)


def encoded(
    aligned: Aligned, every: bool, tags: list[np.ndarray] | None = None, label_all: bool = False
) -> Encoded:
    """every: outputs for all sub-words, or for each word's first. tags: `Tags.encode`'s, where
    there are targets: at the first sub-words, with label_all at all."""
    out = Encoded(aligned, [], [])
    targets = None if tags is None else aligned.targets(tags, label_all)
    for i, window in enumerate(aligned.windows):
        places = np.flatnonzero(_counts(aligned, i, every))
        if len(places):
            row = {"input_ids": window.input_ids, "places": places}
            if window.token_type_ids is not None:
                row["token_type_ids"] = window.token_type_ids
            if targets is not None:
                row["tags"] = targets[i][places]
            out.rows.append(row)
            out.windows.append(i)
    return out


def _counts(aligned: Aligned, window: int, every: bool) -> np.ndarray:
    return aligned.best[window] if every else aligned.best[window] & aligned.first[window]


def words_tagged(
    given: Encoded,
    found: list[np.ndarray],
    examples: Tagged,
    tags: Tags,
    strategy: str,
    every: bool,
) -> list[tuple[list[str], np.ndarray]]:
    """(each word's tag, its score [words]) of each example, from logits [places, tags] of each row.
    Words without a token are O, with score 0; those whose token another word has go on with it."""
    aligned, names = given.aligned, tags.names
    values = [np.empty((len(w), len(names))) for w in aligned.word]
    for i, logits in zip(given.windows, found, strict=True):
        values[i][_counts(aligned, i, every)] = metrics.probabilities(logits, "single_label")
    if not every:
        strategy = "first"
    chosen = []
    for i, (words, rows) in enumerate(aligned.merged(values, every)):
        there, ids, best = word_scores(rows, words, strategy)
        own, scores = ["O"] * len(examples.words[i]), np.zeros(len(examples.words[i]))
        for word, tag in zip(there, ids, strict=True):
            own[word] = names[tag]
        scores[there] = best
        chosen.append((own, scores))
    for (i, word), earlier in aligned.shared.items():
        own, scores = chosen[i]
        own[word], scores[word] = continued(own[earlier], tags.plain), scores[earlier]
    return [(tags.of(own), scores) for own, scores in chosen]


def scored(
    given: Encoded,
    found: list[np.ndarray],
    examples: Tagged,
    tags: Tags,
    strategy: str,
    every: bool,
    brief: bool = False,
) -> dict:
    """Metrics of logits on tagged words: brief ones are floats by name, NaN where logits are not
    finite. Micro, macro and weighted F1 are over whole entities, of plain tags over words."""
    names = ("loss", "micro_f1", "macro_f1", "weighted_f1", "precision", "recall", "accuracy")
    if not all(np.isfinite(logits).all() for logits in found):
        return dict.fromkeys(names, math.nan)
    chosen = [own for own, _ in words_tagged(given, found, examples, tags, strategy, every)]
    truth, by_tag = examples.tags, tag_scores(examples.tags, chosen)
    whole = None if tags.plain else entity_scores(truth, chosen)
    if whole:
        micro = whole["micro"]
        f1 = (micro["f1"], whole["macro"]["f1"], whole["weighted"]["f1"])
    else:  # each word has one tag, so that micro averages are the share of right ones
        micro = dict.fromkeys(("precision", "recall"), by_tag["accuracy"])
        f1 = (by_tag["accuracy"], by_tag["macro_f1"], by_tag["weighted_f1"])
    values = (_loss(given, found), *f1, micro["precision"], micro["recall"], by_tag["accuracy"])
    out = dict(zip(names, values, strict=True))
    if brief:
        return out
    out |= {"rows": len(examples), "words": by_tag["words"]}
    if whole:
        out |= {"entities": micro["support"]} | whole | {"partial": partial_scores(truth, chosen)}
    return out | {"per_tag": by_tag["per_tag"]}


def _loss(given: Encoded, found) -> float:
    """The mean cross entropy of the targets, without weights."""
    losses = [np.empty(0)]
    for row, logits in zip(given.rows, found, strict=True):
        real = row["tags"] != IGNORED
        p = metrics.probabilities(logits[real], "single_label")
        losses.append(-np.log(np.maximum(p[np.arange(len(p)), row["tags"][real]], 1e-300)))
    losses = np.concatenate(losses)
    return float(losses.mean()) if len(losses) else math.nan
