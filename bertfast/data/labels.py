"""Names of classes and their ids."""

from dataclasses import dataclass

import numpy as np

from .errors import DataError
from .examples import Examples


def _order(names: set[str]) -> tuple[str, ...]:
    """Sorted; whole numbers by value, so that labels 0..n-1 keep their own ids."""
    if all(n.lstrip("-").isdecimal() for n in names):
        return tuple(sorted(names, key=lambda n: (int(n), n)))
    return tuple(sorted(names))


@dataclass(frozen=True)
class LabelSet:
    """The classes of a task, by id; a regression has none."""

    names: tuple[str, ...]
    task: str = "single_label"

    @classmethod
    def from_examples(cls, *parts: Examples) -> "LabelSet":
        """The names that occur in labelled examples. DataError with fewer than two classes."""
        task = parts[0].task
        if any(part.labels is None for part in parts):
            raise DataError("the examples have no labels; name the column that holds them")
        if task == "regression":
            return cls((), task)
        cells = [cell for part in parts for cell in part.labels]
        names = {n for cell in cells for n in (cell if task == "multi_label" else [cell])}
        least = 1 if task == "multi_label" else 2
        if len(names) < least:
            raise DataError(f"the labels are {sorted(names)}; expected {least} or more classes")
        return cls(_order(names), task)

    def __len__(self):
        return len(self.names)

    def encode(self, labels, rows=None) -> np.ndarray:
        """int64 [n] ids; for multi_label float32 [n, classes] of 0 and 1; for a regression
        float32 [n].

        `rows` are the row numbers an error names, by default the positions counted from 1.
        """
        if isinstance(labels, Examples):
            labels, rows = labels.labels, labels.rows
        if self.task == "regression":
            return np.asarray(labels, np.float32)
        ids = {name: i for i, name in enumerate(self.names)}
        out = np.zeros((len(labels), len(self)), np.float32)
        single = np.zeros(len(labels), np.int64)
        for i, cell in enumerate(labels):
            for name in cell if self.task == "multi_label" else [cell]:
                if name not in ids:
                    row = i + 1 if rows is None else rows[i]
                    raise DataError(
                        f"row {row}: unknown label {name!r}; known are {', '.join(self.names)}"
                    )
                out[i, ids[name]] = 1
                single[i] = ids[name]
        return out if self.task == "multi_label" else single

    def decode(self, values) -> list:
        """Names of ids [n]; lists of names of flags [n, classes]; plain floats for a regression."""
        if self.task == "regression":
            return [float(v) for v in values]
        if self.task == "multi_label":
            return [[self.names[i] for i in np.flatnonzero(row)] for row in np.asarray(values)]
        return [self.names[int(i)] for i in values]
