"""CoNLL files: a word a line with its tag in the last column, blank lines between the rows."""

import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from ..files import StrPath
from .errors import DataError
from .formats import Source, _lines, open_stream

SUFFIXES = (".conll", ".txt", ".iob", ".bio")
_SPACES = re.compile("[ \t]+")  # a no-break space is part of a word


def is_conll(path: StrPath) -> bool:
    suffixes = [s.lower() for s in Path(path).suffixes if s.lower() != ".gz"]
    return bool(suffixes) and suffixes[-1] in SUFFIXES


def read(path: StrPath, tagged: bool, rows: float, characters: float) -> Iterator[tuple]:
    """Chunks of up to `rows` rows and about `characters` of text: words and tags (None where not
    `tagged`) a row, the line of each one's first word, the first one's number, and the share of the
    file that is read. Raises DataError."""
    name = str(path)
    try:
        with open_stream(path) as raw:
            source = Source(raw, name, None)
            words, tags, lines, first, size = [], [], [], 1, 0
            for line, row in _rows(_lines(raw, name), name, 1 + tagged):
                words.append([columns[0] for columns in row])
                tags.append([columns[-1] for columns in row])
                lines.append(line)
                size += sum(map(len, words[-1]))
                if len(words) >= rows or size >= characters:
                    done = first + len(words)
                    yield words, tags if tagged else None, lines, first, source.share(done - 1)
                    words, tags, lines, first, size = [], [], [], done, 0
            if words:
                yield words, tags if tagged else None, lines, first, 1.0
            elif first == 1:
                raise DataError(f"{name}: is empty; expected a word and its tag a line")
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise DataError(f"{name}: damaged or truncated gzip data ({e})") from e
    except OSError as e:
        raise DataError(f"{name}: cannot be read: {e.strerror or e}") from e


def _rows(lines, name: str, least: int) -> Iterator[tuple[int, list[list[str]]]]:
    """(line of the first word, columns of each word's line) a row."""
    width, begun = None, None  # columns, and the line that was the first to have so many
    for start, block in _blocks(lines):
        at, block = _after_comments(start, block, width)
        found = []
        for number, line in enumerate(block, at):
            columns = _split(line)
            if columns[0] == "-DOCSTART-":
                if found:
                    raise DataError(
                        f"{name}: line {number} is -DOCSTART- within a row: put a blank line before"
                    )
                at = number + 1
                continue
            if len(columns) < least:
                raise DataError(
                    f"{name}: line {number} is {line.strip()!r}, one column; expected a word and "
                    "its tag, with a space or tab between"
                )
            if width is None:
                width, begun = len(columns), number
            if len(columns) != width:
                raise DataError(
                    f"{name}: line {number} has {len(columns)} columns, line {begun} has {width}; "
                    "expected as many in each, a word first, its tag last"
                )
            for column, what in ((columns[0], "word"), (columns[-1], "tag")):
                if not column.strip():
                    raise DataError(f"{name}: line {number} has an empty {what}; fill it")
            found.append(columns)
        if found:
            yield at, found


def _blocks(lines) -> Iterator[tuple[int, list[str]]]:
    """(number of the first line, lines) of what stands between blank lines."""
    block = []
    for number, line in enumerate(lines, 1):
        if line.strip(" \t\r\n"):
            block.append(line.rstrip("\r\n"))
        elif block:
            yield number - len(block), block
            block = []
    if block:
        yield number + 1 - len(block), block


def _split(line: str) -> list[str]:
    return line.split("\t") if "\t" in line else _SPACES.split(line.strip(" "))


def _after_comments(start: int, block: list[str], width: int | None) -> tuple[int, list[str]]:
    """A row without the comments before it: lines of "# " that have other columns than words."""
    words = next((line for line in block if not line.startswith("# ")), "")
    width = width or (len(_split(words)) if words else 2)
    split = (lambda line: line.split("\t")) if "\t" in words else _split
    while block and block[0].startswith("# ") and len(split(block[0])) != width:
        start, block = start + 1, block[1:]
    return start, block
