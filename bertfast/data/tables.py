"""Reading JSONL, CSV, TSV and Parquet, gzip'd or not, into columns: whole, or in chunks of rows."""

import csv
import gzip
import math
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from ..files import StrPath
from .errors import DataError
from .formats import READERS, SEEKING, Source, open_stream, seekable

ROWS, CHARACTERS = 1024, 1 << 22  # of a chunk


class Table(dict):
    """Columns by name, lists of equal length; and the line where each row begins, counted from 1
    (None where the file has no lines). `first`: the number of its first row in the file, from 1;
    `share`: of the file that is read so far, None where that can't be known."""

    lines: list[int] | None = None
    first: int = 1
    share: float | None = None


def read_table(path: StrPath, columns: Iterable[str] | None = None) -> Table:
    """Read a table into lists of equal length, one a column.

    `path` ends in .jsonl, .csv, .tsv or .parquet, with .gz or not; "-" is JSONL on standard input.
    CSV and TSV have a header line; their values are strings. CSV's separator is the one of comma,
    semicolon and tab that cuts the header into most columns; empty columns and rows at its ends,
    as Excel leaves them, are dropped. Quotes in TSV are plain characters, unless the header is
    quoted or the file is as Python and pandas write it. A JSONL row that lacks a column has None
    there; blank lines are skipped. `columns` restricts the result and must exist. Raises DataError.
    """
    return next(read_chunks(path, columns, math.inf, math.inf), Table())


def read_chunks(
    path: StrPath,
    columns: Iterable[str] | None = None,
    rows: float = ROWS,
    characters: float = CHARACTERS,
) -> Iterator[Table]:
    """The table of `read_table` in chunks of up to `rows` rows, each ended by the row with which it
    has `characters` of text. What is read is cut in the same places from whichever chunk on.

    One chunk is held at a time (of TSV and of Parquet that is gzip'd a copy on disk). `columns`
    must be in the first one. Raises DataError, after the chunks before the fault.
    """
    name = "standard input" if str(path) == "-" else str(path)
    kind = ".jsonl" if str(path) == "-" else _kind(Path(path))
    columns = None if columns is None else list(columns)
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses texts over 128 KiB
    try:
        with ExitStack() as stack:
            raw = stack.enter_context(open_stream(path))
            if kind in SEEKING:
                raw = stack.enter_context(seekable(raw))
            source = Source(raw, name, columns)
            records, seen, first = READERS[kind](source), {}, 1
            while lines := (table := _chunk(records, seen, columns, rows, characters)).lines:
                if first == 1:
                    source.check(seen)
                table.first, first = first, first + len(lines)
                table.share = source.share(first - 1)
                table.lines = None if lines[0] is None else lines
                yield table
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise DataError(f"{name}: damaged or truncated gzip data ({e})") from e
    except OSError as e:
        raise DataError(f"{name}: cannot be read: {e.strerror or e}") from e


def _kind(path: Path) -> str:
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    if kind not in READERS:
        raise DataError(
            f"{path}: unknown format {kind or 'without a suffix'!r}; expected "
            f"{', '.join(READERS)}, each with .gz or not"
        )
    return kind


def _chunk(records, seen: dict, columns, rows, characters) -> Table:
    """The next records as columns; `seen` gets the names of all that the file had so far."""
    cells, lines, size = {}, [], 0
    for line, row in records:
        for key, value in row.items():
            seen[key] = True
            if columns is None or key in columns:
                column = cells.setdefault(key, [])
                column.extend([None] * (len(lines) - len(column)))  # rows before lacked the key
                column.append(value)
                size += len(value) if isinstance(value, str) else 0
        lines.append(line)
        if len(lines) >= rows or size >= characters:
            break
    for column in cells.values():
        column.extend([None] * (len(lines) - len(column)))
    kept = (key for key in seen if columns is None or key in columns)
    table = Table((key, cells.get(key) or [None] * len(lines)) for key in kept)
    table.lines = lines
    return table
