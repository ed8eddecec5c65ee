"""Occlusion: what a model says of a text without each of its words."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .words import Text

WAYS = ("mask", "delete")


def variants(
    texts: "Sequence[Text]", way: str, token: int | None
) -> tuple[list[dict], list[int], list[int]]:
    """(rows, of which text each is, and which word it lacks).

    way: "mask", where `token` stands at each of the word's tokens, or "delete", where they are
    left out. A word that the model doesn't read has no row.
    """
    rows, of, lacks = [], [], []
    for i, text in enumerate(texts):
        names, arrays = zip(*((k, np.asarray(v)) for k, v in text.row.items()), strict=True)
        for w in np.flatnonzero(text.read()):
            gone = text.word == w
            if way == "delete":
                kept = [a[~gone] for a in arrays]
            else:
                kept = [np.where(gone, token, a) if n == "input_ids" else a
                        for n, a in zip(names, arrays, strict=True)]  # fmt: skip
            rows.append(dict(zip(names, kept, strict=True)))
            of.append(i)
            lacks.append(int(w))
    return rows, of, lacks


def occlusion(
    texts: "Sequence[Text]",
    way: str,
    token: int | None,
    whole: np.ndarray,
    values: Callable[..., np.ndarray],
) -> list[np.ndarray]:
    """Each text's scores [words]: how much the target's probability falls without the word.

    All texts' variants are one call. whole: fp64 [texts], the probability with all words.
    values(rows, of): fp64 [rows], that of other rows, each of the text in `of`.
    """
    rows, of, lacks = variants(texts, way, token)
    found = [np.full(len(text.spans), np.nan) for text in texts]
    for i, w, value in zip(of, lacks, values(rows, of) if rows else (), strict=True):
        found[i][w] = whole[i] - value
    return found
