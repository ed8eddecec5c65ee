"""Pairs of a text and its translation."""

import gzip
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from ..files import StrPath
from . import cells
from .clean import clean_text
from .errors import DataError
from .examples import Cells, _place
from .formats import _lines, open_stream
from .tables import ROWS, Table, read_chunks, read_table

SOURCE, TARGET = "source", "target"  # columns of a table, by default
NESTED = "translation"  # of an object with a text for each language, as OPUS and datasets have it


@dataclass
class Translations:
    """Texts and their translations, row by row; targets: None where there are none. path, rows and
    lines as in `Examples`."""

    sources: list[str]
    targets: list[str] | None
    rows: list[int]
    lines: list[int] | None = None
    path: str = ""
    share: float | None = None

    def __len__(self) -> int:
        return len(self.sources)

    def select(self, indices: Iterable[int]) -> "Translations":
        """Those at these positions, in this order."""
        take = lambda values: None if values is None else [values[i] for i in indices]
        names = ("sources", "targets", "rows", "lines")
        return replace(self, **{name: take(getattr(self, name)) for name in names})

    def place(self, i: int) -> str:
        """Where a pair stands, for an error."""
        return _place(self.path, self.rows[i], self.lines and self.lines[i])

    @property
    def total(self) -> float | None:
        """About how many rows the file has."""
        return self.rows[-1] / self.share if self.share else None

    def keys(self) -> list[str]:
        """What counts as the same source: equal up to case, whitespace and Unicode form."""
        return [clean_text(s).casefold() for s in self.sources]

    def strata(self) -> list[int]:
        return [0] * len(self)


def load_translations(
    path: StrPath, source_column: str | None = None, target_column: str | None = None
) -> Translations:
    """Read pairs of texts, cleaned, into `Translations`.

    Without columns a .tsv (gzip'd or not) has no header: a source, a tab and its target a line;
    quotes are plain characters. Other tables, and a .tsv with columns given, are `read_table`'s,
    with "source" and "target" by default. Where JSON lines hold {"translation": {"en": "...",
    "fr": "..."}}, columns are its languages.

    An empty side and a line without one tab are refused by line. Raises DataError.
    """
    if _headless(path, source_column, target_column):
        table = Table({SOURCE: [], TARGET: []})
        table.lines = []
        for number, text in _numbered(path):
            sides = text.split("\t")
            if len(sides) != 2:
                raise DataError(
                    f"{path}: line {number} has {len(sides) - 1} tabs, expected one: a text, a tab "
                    "and its translation (or name the columns of a header: --source-column, "
                    "--target-column)"
                )
            table[SOURCE].append(sides[0])
            table[TARGET].append(sides[1])
            table.lines.append(number)
        if not table.lines:
            raise DataError(f"{path}: is empty; expected a text, a tab and its translation a line")
        columns = SOURCE, TARGET
    else:
        columns = source_column or SOURCE, target_column or TARGET
        table = _flattened(path, read_table(path), columns)
    given = Cells(path, table)
    sides = [given.parse(c, cells.text) for c in columns]
    return Translations(*sides, given.rows, table.lines, given.name)


def read_sources(path: StrPath, source_column: str | None = None, rows: int = ROWS) -> Iterator:
    """The sources alone, in chunks of so many rows, as `Translations`; of a line without a header
    what stands before its first tab. A .txt is read line by line as well."""
    if _headless(path, source_column) or _suffix(path) == ".txt":
        found, first = _numbered(path), 1
        while chunk := list(islice(found, rows)):
            table = Table({SOURCE: [text.split("\t")[0] for _, text in chunk]})
            table.lines, table.first = [number for number, _ in chunk], first
            first += len(chunk)
            yield _sources(path, table, SOURCE)
        return
    column = source_column or SOURCE
    for table in read_chunks(path, rows=rows):
        yield _sources(path, _flattened(path, table, (column,)), column)


def _sources(path, table, column) -> Translations:
    given = Cells(path, table)
    texts = given.parse(column, cells.text)
    return Translations(texts, None, given.rows, table.lines, given.name, table.share)


def _suffix(path) -> str:
    """Without .gz."""
    found = [s.lower() for s in Path(path).suffixes if s.lower() != ".gz"]
    return found[-1] if found else ""


def _headless(path, *columns) -> bool:
    return _suffix(path) == ".tsv" and not any(columns)


def _numbered(path) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines that hold something."""
    try:
        with open_stream(path) as raw:
            for number, text in enumerate(_lines(raw, str(path)), 1):
                text = text.rstrip("\r\n")
                if text:
                    yield number, text
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise DataError(f"{path}: damaged or truncated gzip data ({e})") from e
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e.strerror or e}") from e


def _flattened(path, table: Table, columns) -> Table:
    """The columns of a table, or those of the objects in its column "translation"."""
    if NESTED in table and not all(c in table for c in columns):
        nested = Cells(path, table).parse(NESTED, lambda cell: _sides(cell, columns))
        for i, column in enumerate(columns):
            table[column] = [sides[i] for sides in nested]
    for column in columns:
        if column not in table:
            there = ", ".join(map(repr, table))
            raise DataError(
                f"{path}: no column {column!r}; it has: {there}; name those of the text and its "
                "translation: --source-column, --target-column"
            )
    return table


def _sides(cell, columns) -> list:
    if not isinstance(cell, dict) or not all(c in cell for c in columns):
        has = ", ".join(map(repr, cell)) if isinstance(cell, dict) else repr(cell)[:80]
        raise ValueError(f"has {has}; expected texts by the names {', '.join(map(repr, columns))}")
    return [cell[c] for c in columns]
