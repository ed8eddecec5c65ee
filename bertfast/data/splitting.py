"""A stratified split that keeps duplicates of a text together."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import DataError

# A class with fewer distinct texts cannot stand in all three parts: all of it goes to train.
MIN_TEXTS_TO_SPLIT = 3


def split(examples: Any, fractions: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 0) -> tuple:
    """Train, validation and test parts, the same for the same seed, rows in their old order.

    examples: `Examples`, or another that has its `keys`, `strata`, `select` and length.

    Each class is shared out within one text of its fraction, rounding carried from class to class
    so that the totals hold too (scikit-learn's stratified splits refuse classes of one, and test
    parts smaller than the number of classes). Equal texts go to one part; a class of fewer than
    three distinct texts goes to train. A fraction of 0 gives an empty part.
    """
    if len(fractions) != 3 or min(fractions) < 0 or not math.isclose(sum(fractions), 1):
        raise ValueError(f"fractions are {fractions!r}; expected three, 0 or more, of sum 1")
    if not fractions[0]:
        raise ValueError(f"fractions are {fractions!r}; the first, for training, must be above 0")
    groups = {}
    for i, key in enumerate(examples.keys()):
        groups.setdefault(key, []).append(i)
    classes = {}
    strata = examples.strata()
    for group in groups.values():
        classes.setdefault(strata[group[0]], []).append(group)

    rng = np.random.default_rng(seed)
    parts = ([], [], [])
    due = [0.0, 0.0]  # texts owed to validation and test
    for name in sorted(classes):
        members, size = classes[name], len(classes[name])
        rng.shuffle(members)
        if size >= MIN_TEXTS_TO_SPLIT:
            for k in (0, 1):
                due[k] += fractions[k + 1] * size
                count = min(int(due[k] + 1e-9), len(members) - 1)  # one stays in train
                due[k] -= count
                for _ in range(count):
                    parts[k + 1].extend(members.pop())
        for group in members:
            parts[0].extend(group)
    for part, fraction, name in zip(parts, fractions, ("train", "validation", "test"), strict=True):
        if fraction and not part:
            raise DataError(
                f"{len(groups)} distinct texts in {len(classes)} classes leave the {name} part "
                f"empty at fractions {tuple(fractions)}; give more rows or a {name} file"
            )
    return tuple(examples.select(sorted(part)) for part in parts)
