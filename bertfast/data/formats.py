"""The formats of tables, each a generator of (line where the row begins, {column: cell}) that holds
one row at a time; the line is None where a file has none. All raise DataError."""

import csv
import gzip
import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import IO

from ..files import StrPath
from .errors import DataError

_GZIP_MAGIC = b"\x1f\x8b"
_BATCH = 256  # rows of Parquet that are decoded together


@contextmanager
def open_stream(path: StrPath) -> Iterator[IO[bytes]]:
    """Binary stream; gzip is recognised by its first bytes, whatever the file is called."""
    with nullcontext(sys.stdin.buffer) if str(path) == "-" else open(path, "rb") as raw:
        raw = raw if hasattr(raw, "peek") else io.BufferedReader(raw)
        yield gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == _GZIP_MAGIC else raw


@contextmanager
def seekable(raw: IO[bytes]) -> Iterator[IO[bytes]]:
    """`raw`, or a temporary file of all it gives where it can't go back: gzip, a pipe."""
    if not isinstance(raw, gzip.GzipFile) and raw.seekable():
        yield raw
        return
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(raw, copy)
        copy.seek(0)
        yield copy


@dataclass
class Source:
    """A table's stream, its name in errors, the columns that are wanted (None: all), and how many
    rows it has, where the format says so."""

    raw: IO[bytes]
    name: str
    columns: list[str] | None
    rows: int | None = None

    def check(self, there: Iterable[str]) -> None:
        """Raises DataError where a wanted column is not `there`."""
        for column in self.columns or ():
            if column not in there:
                raise DataError(
                    f"{self.name}: no column {column!r}; it has: {', '.join(map(repr, there))}"
                )

    def share(self, rows: int) -> float | None:
        """Of the file that is read after so many rows; None of a pipe."""
        if self.rows is not None:
            return rows / self.rows
        file = self.raw.fileobj if isinstance(self.raw, gzip.GzipFile) else self.raw
        try:
            return min(1.0, file.tell() / os.fstat(file.fileno()).st_size)
        except (OSError, ZeroDivisionError):
            return None


def _lines(raw, name: str) -> Iterator[str]:
    """Lines split at line feeds only (JSON strings may hold U+2028), decoded one by one."""
    offset = 0
    for number, line in enumerate(raw, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as e:
            start = e.start + len(line) - len(e.object)  # e.object lacks the byte-order mark
            raise DataError(
                f"{name}: not UTF-8: byte 0x{line[start]:02x} at line {number}, "
                f"byte offset {offset + start}; convert the file to UTF-8"
            ) from e
        offset += len(line)
        yield text


def _object(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return found


def _read_jsonl(source: Source):
    raw, name = source.raw, source.name
    empty = True
    for number, line in enumerate(_lines(raw, name), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_object)
        except (ValueError, RecursionError) as e:
            raise DataError(f"{name}: line {number} is not valid JSON: {e}") from e
        if not isinstance(row, dict):
            raise DataError(
                f"{name}: line {number} is a JSON {type(row).__name__}; "
                'expected one object a line, such as {"text": "...", "label": "..."}'
            )
        empty = False
        yield number, row
    if empty:
        raise DataError(f"{name}: is empty; expected one JSON object a line")


def _read_csv(source: Source):
    raw, name = source.raw, source.name
    lines = _lines(raw, name)
    first = []  # blank lines, and the header's first
    for line in lines:
        first.append(line)
        if line.strip():
            break
    given = re.fullmatch(r"sep=(.)\s*", first[-1]) if first else None  # Excel's own first line
    if given:
        first[-1] = "\n"
        separator = given[1]
    else:
        unquoted = re.sub(r'"[^"]*("|$)', "", "".join(first[-1:]))
        separator = max(",;\t", key=unquoted.count)
    return _records(chain(first, lines), name, delimiter=separator)


def _read_tsv(source: Source):
    raw, name = source.raw, source.name
    quoting = csv.QUOTE_MINIMAL if _quoted(_lines(raw, name)) else csv.QUOTE_NONE
    raw.seek(0)
    return _records(_lines(raw, name), name, delimiter="\t", quoting=quoting)


def _quoted(lines: Iterator[str]) -> bool:
    """Whether quotes enclose fields. They do where the header's are all enclosed, and where the
    csv module, which pandas uses, would write the same file; in others they are characters."""
    header, quotes, read = None, False, []  # read: lines of the record at hand

    def noted():
        nonlocal header, quotes
        for line in lines:
            header = header or line.strip()
            quotes = quotes or line.startswith('"') or '\t"' in line
            read.append(line)
            yield line

    plain = lambda text: text.replace("\r\n", "\n").rstrip("\n")
    same = True
    try:
        for row in csv.reader(noted(), delimiter="\t", strict=True):
            text, written = "".join(read), io.StringIO()
            read.clear()
            if '"' in text:
                csv.writer(written, delimiter="\t").writerow(row)
                same = plain(written.getvalue()) == plain(text)
            if not same:
                break
    except csv.Error:
        same = False
    fields = (header or "").split("\t")
    if all(len(field) > 1 and field[0] == field[-1] == '"' for field in fields):
        return True
    return same and quotes


def _records(lines, name, **dialect):
    # strict: an unclosed quote would otherwise swallow the rest of the file without a word.
    reader = csv.reader(lines, strict=True, **dialect)
    header, filled = None, False
    held = []  # rows that hold nothing: told only where one that holds something follows
    start = 1  # line where the current record begins; quoted fields may hold line feeds
    while True:
        try:
            row = next(reader, None)
        except csv.Error as e:
            raise DataError(
                f"{name}: the record that begins at line {start} is malformed: {e}"
            ) from e
        if row is None:
            break
        if not row:  # blank line
            pass
        elif header is None:
            header = _header(row, name)
        elif len(row) < len(header) or any(row[len(header) :]):
            raise DataError(
                f"{name}: line {start} has {len(row)} fields, the header has {len(header)} "
                f"({', '.join(map(repr, header))})"
            )
        else:
            held.append((start, dict(zip(header, row, strict=False))))
            if any(row) or len(row) == 1:
                filled = True
                yield from held
                held.clear()
        start = reader.line_num + 1
    if header is None:
        raise DataError(f"{name}: is empty; expected a header line and rows")
    if not filled:
        raise DataError(f"{name}: has a header ({', '.join(map(repr, header))}) but no rows")


def _header(row: list[str], name: str) -> list[str]:
    """The columns' names, without the nameless ones at the end."""
    while len(row) > 1 and not row[-1]:
        row = row[:-1]
    _refuse_twins(row, name)
    return row


def _refuse_twins(header: list[str], name: str) -> None:
    for column in header:
        if header.count(column) > 1:
            raise DataError(f"{name}: column {column!r} stands twice in the header")


def _read_parquet(source: Source):
    raw, name = source.raw, source.name
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as e:
        raise DataError(
            f"{name}: reading Parquet needs pyarrow; pip install 'bertfast[train]'"
        ) from e
    try:
        file = pq.ParquetFile(raw, buffer_size=1 << 20)
        names = file.schema_arrow.names
        _refuse_twins(names, name)
        source.check(names)
        source.rows = file.metadata.num_rows
        wanted = [c for c in names if source.columns is None or c in source.columns]
        for batch in file.iter_batches(_BATCH, columns=wanted):
            cells = (column.to_pylist() for column in batch.columns)
            for row in zip(*cells, strict=True):
                yield None, dict(zip(wanted, row, strict=True))
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"{name}: not a readable Parquet file ({e})") from e
    if not source.rows:
        raise DataError(f"{name}: has no rows")


READERS = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
SEEKING = {".tsv", ".parquet"}  # read from a `seekable` stream
