"""Reading JSONL, CSV, TSV and Parquet, gzip'd or not, into columns."""

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path

from .errors import DataError

_GZIP_MAGIC = b"\x1f\x8b"


class Table(dict):
    """Columns by name, lists of equal length; and the line where each row begins, counted from 1
    (None where the file has no lines)."""

    lines: list[int] | None = None


def read_table(path, columns: Iterable[str] | None = None) -> Table:
    """Read a table into lists of equal length, one a column.

    `path` ends in .jsonl, .csv, .tsv or .parquet, with .gz or not; "-" is JSONL on standard input.
    CSV and TSV have a header line; their values are strings. CSV's separator is the one of comma,
    semicolon and tab that cuts the header into most columns; empty columns and rows at its ends,
    as Excel leaves them, are dropped. Quotes in TSV are plain characters, unless the header is
    quoted or the file is as Python and pandas write it. A JSONL row that lacks a column has None
    there; blank lines are skipped. `columns` restricts the result and must exist. Raises DataError.
    """
    name = "standard input" if str(path) == "-" else str(path)
    kind = ".jsonl" if str(path) == "-" else _kind(Path(path))
    columns = None if columns is None else list(columns)
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses texts over 128 KiB
    try:
        with open_stream(path) as raw:
            table = _READERS[kind](raw, name, columns)
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise DataError(f"{name}: damaged or truncated gzip data ({e})") from e
    except OSError as e:
        raise DataError(f"{name}: cannot be read: {e.strerror or e}") from e
    if columns is not None:
        for column in columns:
            if column not in table:
                raise DataError(
                    f"{name}: no column {column!r}; it has: {', '.join(map(repr, table))}"
                )
        for column in set(table) - set(columns):
            del table[column]
    return table


def _kind(path: Path) -> str:
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    if kind not in _READERS:
        raise DataError(
            f"{path}: unknown format {kind or 'without a suffix'!r}; expected "
            f"{', '.join(_READERS)}, each with .gz or not"
        )
    return kind


@contextmanager
def open_stream(path):
    """Binary stream; gzip is recognised by its first bytes, whatever the file is called."""
    with nullcontext(sys.stdin.buffer) if str(path) == "-" else open(path, "rb") as raw:
        raw = raw if hasattr(raw, "peek") else io.BufferedReader(raw)
        yield gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == _GZIP_MAGIC else raw


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


def _read_jsonl(raw, name, columns) -> Table:
    wanted = None if columns is None else set(columns)
    cells, seen, lines = {}, {}, []
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
        for key, value in row.items():
            seen[key] = True
            if wanted is None or key in wanted:
                column = cells.setdefault(key, [])
                column.extend([None] * (len(lines) - len(column)))  # rows before lacked the key
                column.append(value)
        lines.append(number)
    if not lines:
        raise DataError(f"{name}: is empty; expected one JSON object a line")
    for column in cells.values():
        column.extend([None] * (len(lines) - len(column)))
    table = Table((key, cells.get(key, [])) for key in seen)
    table.lines = lines
    return table


def _read_csv(raw, name, columns) -> Table:
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
    return _records(chain(first, lines), name, columns, delimiter=separator)


def _read_tsv(raw, name, columns) -> Table:
    lines = list(_lines(raw, name))
    quoting = csv.QUOTE_MINIMAL if _quoted(lines) else csv.QUOTE_NONE
    return _records(lines, name, columns, delimiter="\t", quoting=quoting)


def _quoted(lines: list[str]) -> bool:
    """Whether quotes enclose fields. They do where the header's are all enclosed, and where the
    csv module, which pandas uses, would write the same file; in others they are characters."""
    if not any(line.startswith('"') or '\t"' in line for line in lines):
        return False
    header = next(line for line in lines if line.strip()).strip().split("\t")
    if all(len(field) > 1 and field[0] == field[-1] == '"' for field in header):
        return True
    written = io.StringIO()
    try:
        rows = csv.reader(lines, delimiter="\t", strict=True)
        csv.writer(written, delimiter="\t").writerows(rows)
    except csv.Error:
        return False
    plain = lambda text: text.replace("\r\n", "\n").rstrip("\n")
    return plain(written.getvalue()) == plain("".join(lines))


def _records(lines, name, columns, **dialect) -> Table:
    # strict: an unclosed quote would otherwise swallow the rest of the file without a word.
    reader = csv.reader(lines, strict=True, **dialect)
    header = cells = keep = None
    filled, begins = 0, []  # rows up to the last that holds something; where each begins
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
            wanted = set(header if columns is None else columns)
            keep = [i for i, column in enumerate(header) if column in wanted]
            cells = [[] for _ in header]
        elif len(row) < len(header) or any(row[len(header) :]):
            raise DataError(
                f"{name}: line {start} has {len(row)} fields, the header has {len(header)} "
                f"({', '.join(map(repr, header))})"
            )
        else:
            for i in keep:
                cells[i].append(row[i])
            begins.append(start)
            if any(row) or len(row) == 1:
                filled = len(begins)
        start = reader.line_num + 1
    if header is None:
        raise DataError(f"{name}: is empty; expected a header line and rows")
    if not filled:
        raise DataError(f"{name}: has a header ({', '.join(map(repr, header))}) but no rows")
    table = Table((column, cells[i][:filled]) for i, column in enumerate(header))
    table.lines = begins[:filled]
    return table


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


def _read_parquet(raw, name, columns) -> Table:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as e:
        raise DataError(
            f"{name}: reading Parquet needs pyarrow; pip install 'bertfast[train]'"
        ) from e
    try:
        file = pq.ParquetFile(io.BytesIO(raw.read()) if isinstance(raw, gzip.GzipFile) else raw)
        names = file.schema_arrow.names
        _refuse_twins(names, name)
        wanted = names if columns is None else [c for c in names if c in set(columns)]
        data = file.read(columns=wanted)
    except (pa.ArrowException, OSError) as e:
        if isinstance(e, gzip.BadGzipFile):
            raise
        raise DataError(f"{name}: not a readable Parquet file ({e})") from e
    if not file.metadata.num_rows:
        raise DataError(f"{name}: has no rows")
    read = dict(zip(wanted, (column.to_pylist() for column in data.columns), strict=True))
    return Table((column, read.get(column, [])) for column in names)


_READERS = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
