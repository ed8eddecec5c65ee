"""Labelled texts of a classification or regression task."""

import json
import math
import reprlib
from dataclasses import dataclass, field

from .clean import clean_text
from .errors import DataError
from .tables import read_table

TASKS = ("single_label", "multi_label", "regression")


@dataclass
class Examples:
    """Texts with their labels, row by row.

    labels: a name (single_label), a list of names (multi_label) or a float (regression) a row;
    None where the data has none. rows: each example's row in its file, counted from 1.
    """

    texts: list[str]
    pairs: list[str] | None = None
    labels: list | None = None
    task: str = "single_label"
    rows: list[int] = field(default_factory=list)

    def __post_init__(self):
        if self.task not in TASKS:
            raise ValueError(f"task is {self.task!r}; expected one of {', '.join(TASKS)}")
        self.rows = self.rows or list(range(1, len(self.texts) + 1))
        for name in ("pairs", "labels", "rows"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.texts):
                raise ValueError(f"{len(values)} {name} for {len(self.texts)} texts")

    def __len__(self):
        return len(self.texts)

    def select(self, indices) -> "Examples":
        """The examples at these positions, in this order."""
        take = lambda values: None if values is None else [values[i] for i in indices]
        return Examples(*map(take, (self.texts, self.pairs, self.labels)), self.task,
                        take(self.rows))  # fmt: skip

    def keys(self) -> list[tuple[str, ...]]:
        """What counts as the same text: equal up to case, whitespace and Unicode form."""
        sides = [self.texts] if self.pairs is None else [self.texts, self.pairs]
        return list(zip(*([clean_text(s).casefold() for s in side] for side in sides), strict=True))


def load_classification(
    path,
    text_column: str = "text",
    text_pair_column: str | None = None,
    label_column: str | None = "label",
    task: str = "single_label",
    clean: bool = True,
    dedup: bool = False,
) -> Examples:
    """Read a table of texts (or pairs of texts) with labels; label_column=None reads texts only.

    Labels are names: integers and booleans become strings. Multi-label cells are lists, or strings
    with names separated by "|" (an empty one has no label). `dedup` keeps the first of each text.
    A missing, null or empty text, a missing label and a non-finite number are refused by row.
    Raises DataError.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; expected one of {', '.join(TASKS)}")
    columns = [c for c in (text_column, text_pair_column, label_column) if c is not None]
    table = read_table(path, columns)
    texts, pairs = (
        None if c is None else _column(path, c, table[c], lambda v: _text(v, clean))
        for c in (text_column, text_pair_column)
    )
    labels = None
    if label_column is not None:
        labels = _column(path, label_column, table[label_column], _LABEL[task])
    examples = Examples(texts, pairs, labels, task)
    if dedup:
        first = {}
        for i, key in enumerate(examples.keys()):
            first.setdefault(key, i)
        examples = examples.select(list(first.values()))
    return examples


def _column(path, name, values, parse) -> list:
    """Parse every cell; the error names the first bad row and how many there are."""
    parsed, bad, reason = [], [], None
    for row, value in enumerate(values, 1):
        try:
            if value is None:
                raise ValueError("is missing; fill it or drop the row")
            parsed.append(parse(value))
        except ValueError as e:
            bad.append(row)
            reason = reason or e
    if bad:
        others = f" (and {len(bad) - 1} more such rows: {_some(bad[1:])})" if bad[1:] else ""
        raise DataError(f"{path}: row {bad[0]}: column {name!r} {reason}{others}") from reason
    return parsed


def _some(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")


def _text(value, clean: bool) -> str:
    if not isinstance(value, str):
        raise ValueError(f"is {reprlib.repr(value)}, a {type(value).__name__}; expected a string")
    text = clean_text(value) if clean else value
    if not text.strip():
        raise ValueError("is an empty text; fill it or drop the row")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds a lone surrogate, which has no UTF-8 form; clean it") from None
    return text


def _name(value) -> str:
    """A label as a name; the same for "1", 1 and the 1.0 that Parquet makes of it."""
    if isinstance(value, float):
        if not value.is_integer():
            raise ValueError(
                f"is {reprlib.repr(value)}, no class name; for numbers use task 'regression'"
            )
        value = int(value)
    if not isinstance(value, (str, int)):
        raise ValueError(
            f"is {reprlib.repr(value)}; expected one name (lists belong to task 'multi_label')"
        )
    name = clean_text(str(value))
    if not name:
        raise ValueError("is an empty label; fill it or drop the row")
    return name


def _names(value) -> list[str]:
    if isinstance(value, str):
        text = value.strip()
        try:
            value = json.loads(text) if text[:1] == "[" else None
        except ValueError:
            value = None
        if value is None:
            value = text.split("|") if text else []
    if not isinstance(value, list):
        raise ValueError(
            f"is {reprlib.repr(value)}; expected a list of names or names separated by '|'"
        )
    return list(dict.fromkeys(map(_name, value)))


def _number(value) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"is {reprlib.repr(value)}; expected a number") from None
    if not math.isfinite(number):
        raise ValueError(f"is {reprlib.repr(value)}; expected a finite number")
    return number


_LABEL = {"single_label": _name, "multi_label": _names, "regression": _number}
