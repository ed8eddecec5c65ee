"""Names of classes and their ids."""

import re
from dataclasses import dataclass

import numpy as np

from .cells import normal
from .errors import DataError
from .examples import Examples


def _order(names: set[str]) -> tuple[str, ...]:
    """Sorted; whole numbers by value, so that labels 0..n-1 keep their own ids."""
    if all(re.fullmatch(r"-?\d{1,100}", n) for n in names):
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
        names |= {str(i) for part in parts for i in range(part.width or 0)}
        least = 1 if task == "multi_label" else 2
        if len(names) < least:
            of = f"{parts[0].path}: " if parts[0].path else ""
            raise DataError(f"{of}the labels are {sorted(names)}; expected {least} or more classes")
        return cls(_order(names), task)

    def __len__(self) -> int:
        return len(self.names)

    def encode(self, examples: Examples) -> np.ndarray:
        """int64 [n] ids; for multi_label float32 [n, classes] of 0 and 1; for a regression
        float32 [n]. Of `Examples` or of labels alone. Vectors of flags have a place for each class,
        in the order of ids. DataError names the place of a label that is unknown."""
        if not isinstance(examples, Examples):
            examples = Examples([""] * len(examples), labels=list(examples), task=self.task)
        if self.task == "regression":
            return np.asarray(examples.labels, np.float32)
        if examples.width not in (None, len(self)):
            raise DataError(
                f"{examples.place(0)}: the label is a vector of {examples.width} flags, expected "
                f"{len(self)}: {', '.join(self.names)}"
            )
        ids = {normal(name): i for i, name in enumerate(self.names)}
        ids |= {name: i for i, name in enumerate(self.names)}
        if examples.width is not None:
            ids = {str(i): i for i in range(len(self))}
        out = np.zeros((len(examples), len(self)), np.float32)
        single = np.zeros(len(examples), np.int64)
        for i, cell in enumerate(examples.labels):
            for name in cell if self.task == "multi_label" else [cell]:
                if name not in ids:
                    raise DataError(
                        f"{examples.place(i)}: unknown label {name!r}; known are "
                        f"{', '.join(self.names)}"
                    )
                out[i, ids[name]] = 1
                single[i] = ids[name]
        return out if self.task == "multi_label" else single

    def decode(self, values: np.ndarray) -> list:
        """Names of ids [n]; lists of names of flags [n, classes]; plain floats for a regression."""
        if self.task == "regression":
            return [float(v) for v in values]
        if self.task == "multi_label":
            return [[self.names[i] for i in np.flatnonzero(row)] for row in np.asarray(values)]
        return [self.names[int(i)] for i in values]
