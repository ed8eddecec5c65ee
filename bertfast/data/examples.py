"""Labelled texts of a classification or regression task."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..files import StrPath
from . import cells
from .clean import clean_text
from .errors import DataError
from .tables import Table, read_chunks, read_table

TASKS = ("single_label", "multi_label", "regression")


@dataclass
class Examples:
    """Texts with their labels, row by row.

    labels: a name (single_label), a list of names (multi_label) or a float (regression) a row;
    None where the data has none. Names of labels that were vectors of flags are their places, "0"
    to "n - 1", and `width` is n. path, rows, lines: the file, and of each example its row and the
    line where it begins, counted from 1, for errors; and the `share` of the file that is read.
    """

    texts: list[str]
    pairs: list[str] | None = None
    labels: list | None = None
    task: str = "single_label"
    rows: list[int] = field(default_factory=list)
    lines: list[int] | None = None
    path: str = ""
    width: int | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task is {self.task!r}; expected one of {', '.join(TASKS)}")
        self.rows = self.rows or list(range(1, len(self.texts) + 1))
        for name in ("pairs", "labels", "rows", "lines"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.texts):
                raise ValueError(f"{len(values)} {name} for {len(self.texts)} texts")

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: Iterable[int]) -> "Examples":
        """The examples at these positions, in this order."""
        take = lambda values: None if values is None else [values[i] for i in indices]
        names = ("texts", "pairs", "labels", "rows", "lines")
        return replace(self, **{name: take(getattr(self, name)) for name in names})

    def place(self, i: int) -> str:
        """Where an example stands, for an error."""
        return _place(self.path, self.rows[i], self.lines and self.lines[i])

    @property
    def total(self) -> float | None:
        """About how many rows the file has."""
        return self.rows[-1] / self.share if self.share else None

    def keys(self) -> list[tuple[str, ...]]:
        """What counts as the same text: equal up to case, whitespace and Unicode form."""
        sides = [self.texts] if self.pairs is None else [self.texts, self.pairs]
        return list(zip(*([clean_text(s).casefold() for s in side] for side in sides), strict=True))

    def strata(self) -> list:
        """A sortable class for each row, of which `split` puts a share into each part: multi-label
        rows have their rarest label, regressions tenths of the range of ranks."""
        labels = self.labels
        if labels is None:
            return [0] * len(self)
        if self.task == "regression":
            ranks = np.argsort(np.argsort(labels, kind="stable"), kind="stable")
            return (ranks * 10 // max(len(labels), 1)).tolist()
        if self.task == "multi_label":
            counts = Counter(name for cell in labels for name in cell)
            return [min(cell, key=lambda n: (counts[n], n), default="") for cell in labels]
        return labels


def _place(path, row, line) -> str:
    return f"{path}: " * bool(path) + f"row {row}" + f" (line {line})" * bool(line)


def load_classification(
    path: StrPath,
    text_column: str = "text",
    text_pair_column: str | None = None,
    label_column: str | None = "label",
    task: str = "single_label",
    clean: bool = True,
    dedup: bool = False,
) -> Examples:
    """Read a table of texts (or pairs of texts) with labels; label_column=None reads texts only.

    Labels are names, in one form whatever the format: 1, 1.0, "1" and "1.0" are "1"; true, "true"
    and "TRUE" are "True". Multi-label cells are lists (in text as JSON, Python or NumPy write
    them), or strings with names separated by "|" (an empty one has no label), or in every row
    vectors of 0 and 1 of one length. `dedup` keeps the first of each text.

    One text of a pair may be empty, null or missing; both, or the only text, are refused by row, as
    are a missing label and a number that is not finite in float32. Raises DataError.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; expected one of {', '.join(TASKS)}")
    columns = [c for c in (text_column, text_pair_column, label_column) if c is not None]
    table = Cells(path, read_table(path, columns))
    texts, pairs = _texts(table, text_column, text_pair_column, clean)
    labels = width = None
    if label_column is not None and task == "multi_label":
        labels, width = _several(table, label_column)
    elif label_column is not None:
        labels = table.parse(label_column, cells.name if task == "single_label" else cells.number)
    examples = Examples(texts, pairs, labels, task, lines=table.lines, path=table.name, width=width)
    if dedup:
        first = {}
        for i, key in enumerate(examples.keys()):
            first.setdefault(key, i)
        examples = examples.select(list(first.values()))
    return examples


def read_texts(
    path: StrPath, text_column: str = "text", text_pair_column: str | None = None, **limits: Any
) -> Iterator[Examples]:
    """`load_classification` without labels, in the chunks of `read_chunks`, which has the `limits`.
    An error tells of the rows of one chunk."""
    columns = [c for c in (text_column, text_pair_column) if c is not None]
    for chunk in read_chunks(path, columns, **limits):
        table = Cells(path, chunk)
        texts, pairs = _texts(table, text_column, text_pair_column, clean=True)
        yield Examples(
            texts, pairs, rows=table.rows, lines=table.lines, path=table.name, share=chunk.share
        )


def _texts(table: "Cells", text_column, text_pair_column, clean):
    needed = text_pair_column is None
    texts, pairs = (
        None if c is None else table.parse(c, lambda v: cells.text(v, clean, needed), needed)
        for c in (text_column, text_pair_column)
    )
    if pairs is not None:
        table.parse(text_column, _one_text, values=list(zip(texts, pairs, strict=True)))
    return texts, pairs


class Cells:
    """The columns of a file's rows, or of some of them, parsed cell by cell."""

    def __init__(self, path: StrPath, table: Table) -> None:
        self.name = "standard input" if str(path) == "-" else str(path)
        self.table, self.lines = table, table.lines
        size = max(map(len, table.values()), default=0)
        self.rows = list(range(table.first, table.first + size))

    def parse(
        self,
        column: str | None,
        parse: Callable[[Any], Any],
        needed: bool = True,
        values: Sequence[Any] | None = None,
    ) -> list:
        """Parse every cell, or these values; the error names the first bad row and how many there
        are."""
        parsed, bad, reason = [], [], None
        values = self.table[column] if values is None else values
        for row, value in zip(self.rows, values, strict=True):
            try:
                if value is None and needed:
                    raise ValueError("is missing; fill it or drop the row")
                parsed.append(parse(value))
            except ValueError as e:
                bad.append(row)
                reason = reason or e
        if bad:
            others = f" (and {len(bad) - 1} more such rows: {_some(bad[1:])})" if bad[1:] else ""
            place = _place(self.name, bad[0], self.lines and self.lines[bad[0] - self.rows[0]])
            raise DataError(f"{place}: column {column!r} {reason}{others}") from reason
        return parsed


def _some(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")


def _one_text(pair):
    if not any(text.strip() for text in pair):
        raise ValueError("is empty, and so is the pair's other text; fill one or drop the row")


def _several(table: Cells, column) -> tuple[list[list[str]], int | None]:
    """Names a row; and the length of vectors of flags, where every row is one."""
    found = table.parse(column, cells.names)
    flags = lambda names: len(names) > 1 and {*names} <= cells.ON | cells.OFF
    width = len(found[0]) if found else 0
    if all(len(names) == width and flags(names) for names in found):
        return [[str(i) for i, v in enumerate(names) if v in cells.ON] for names in found], width

    def no_vector(names):
        if flags(names) and (isinstance(names, cells.Flags) or len({*names}) < len(names)):
            raise ValueError(
                f"is a vector of {len(names)} flags, the first row's label {found[0]}; expected "
                "vectors of one length in every row, or names"
            )

    table.parse(column, no_vector, values=found)
    return [list(dict.fromkeys(names)) for names in found], None
