"""Reading JSONL, CSV, TSV and Parquet, gzip'd or not, into columns."""

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from .errors import DataError

_GZIP_MAGIC = b"\x1f\x8b"


def read_table(path, columns: Iterable[str] | None = None) -> dict[str, list]:
    """Read a table into lists of equal length, one a column.

    `path` ends in .jsonl, .csv, .tsv or .parquet, with .gz or not; "-" is JSONL on standard input.
    CSV and TSV have a header line; quotes in TSV are plain characters; their values are strings.
    A JSONL row that lacks a column has None there; blank lines are skipped. `columns` restricts
    the result and must exist. Raises DataError.
    """
    name = "standard input" if str(path) == "-" else str(path)
    kind = ".jsonl" if str(path) == "-" else _kind(Path(path))
    try:
        with open_stream(path) as raw:
            table = _READERS[kind](raw, name, columns)
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise DataError(f"{name}: damaged or truncated gzip data ({e})") from e
    except OSError as e:
        raise DataError(f"{name}: cannot be read: {e.strerror or e}") from e
    if columns is not None:
        columns = list(columns)
        for column in columns:
            if column not in table:
                raise DataError(
                    f"{name}: no column {column!r}; it has: {', '.join(map(repr, table))}"
                )
        table = {column: table[column] for column in columns}
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


def _read_jsonl(raw, name, columns) -> dict[str, list]:
    wanted = None if columns is None else set(columns)
    table, seen, rows = {}, {}, 0
    for number, line in enumerate(_lines(raw, name), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
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
                cells = table.setdefault(key, [])
                cells.extend([None] * (rows - len(cells)))  # rows before that lacked the key
                cells.append(value)
        rows += 1
    if not rows:
        raise DataError(f"{name}: is empty; expected one JSON object a line")
    for cells in table.values():
        cells.extend([None] * (rows - len(cells)))
    return {key: table.get(key, []) for key in seen}


def _read_csv(raw, name, columns, **dialect) -> dict[str, list]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses texts over 128 KiB
    # strict: an unclosed quote would otherwise swallow the rest of the file without a word.
    reader = csv.reader(_lines(raw, name), strict=True, **dialect)
    header = cells = keep = None
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
            header = row
            _refuse_twins(header, name)
            wanted = set(header if columns is None else columns)
            keep = [i for i, column in enumerate(header) if column in wanted]
            cells = [[] for _ in header]
        elif len(row) != len(header):
            raise DataError(
                f"{name}: line {start} has {len(row)} fields, the header has {len(header)} "
                f"({', '.join(map(repr, header))})"
            )
        else:
            for i in keep:
                cells[i].append(row[i])
        start = reader.line_num + 1
    if header is None:
        raise DataError(f"{name}: is empty; expected a header line and rows")
    table = dict(zip(header, cells, strict=True))
    if keep and not cells[keep[0]]:
        raise DataError(f"{name}: has a header ({', '.join(map(repr, header))}) but no rows")
    return table


def _refuse_twins(header: list[str], name: str) -> None:
    for column in header:
        if header.count(column) > 1:
            raise DataError(f"{name}: column {column!r} stands twice in the header")


def _read_tsv(raw, name, columns) -> dict[str, list]:
    return _read_csv(raw, name, columns, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_parquet(raw, name, columns) -> dict[str, list]:
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
    return {column: read.get(column, []) for column in names}


_READERS = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
