"""SQuAD's JSON as a table of questions."""

import json
import zlib
from collections.abc import Iterator

from ..files import StrPath
from .errors import DataError
from .formats import _object, open_stream
from .tables import Table

_SHAPE = '{"data": [{"paragraphs": [{"context": "...", "qas": [{"id": ..., "question": ...}]}]}]}'
_COLUMNS = ("id", "question", "context", "answers", "is_impossible")


def read_squad(path: StrPath) -> Table:
    """A row a question: id, question, context, answers, is_impossible, each only where a question
    has it; plausible_answers are no answers. Raises DataError, which says where in the JSON."""
    rows = [
        {"context": paragraph["context"], **{k: qa[k] for k in _COLUMNS if k in qa}}
        for paragraph, place in _paragraphs(path)
        for qa in _items(paragraph, "qas", place, path, {"question": "a question"})
    ]
    if not rows:
        raise DataError(f"{path}: has no questions; expected {_SHAPE}")
    there = [c for c in _COLUMNS if any(c in row for row in rows)]
    table = Table({c: [row.get(c) for row in rows] for c in there})
    table.share = 1.0
    return table


def _paragraphs(path) -> Iterator[tuple[dict, str]]:
    whole = _decoded(path)
    if not isinstance(whole, dict):
        raise DataError(
            f"{path}: is a JSON {type(whole).__name__}; expected {_SHAPE} (one object a line is "
            "JSONL: name the file .jsonl)"
        )
    for i, article in enumerate(_items(whole, "data", "", path)):
        place = f"data[{i}]"
        needed = {"context": "the text that the questions are about"}
        for j, paragraph in enumerate(_items(article, "paragraphs", place, path, needed)):
            yield paragraph, f"{place}.paragraphs[{j}]"


def _items(holder: dict, key, place, path, needed=()) -> list[dict]:
    """The objects of a list, each with the `needed` keys."""
    where = f"{place}.{key}" if place else key
    if key not in holder:
        raise DataError(f"{path}: no {where}; expected {_SHAPE}")
    items = holder[key]
    if not isinstance(items, list):
        raise DataError(f"{path}: {where} is a {type(items).__name__}; expected a list: {_SHAPE}")
    for i, item in enumerate(items):
        if not isinstance(item, dict):
            raise DataError(
                f"{path}: {where}[{i}] is a {type(item).__name__}; expected an object: {_SHAPE}"
            )
        for name in needed:
            if name not in item:
                raise DataError(f"{path}: {where}[{i}] has no {name!r}, {needed[name]}: add it")
    return items


def _decoded(path):
    try:
        with open_stream(path) as raw:
            text = raw.read()
    except (EOFError, zlib.error) as e:
        raise DataError(f"{path}: damaged or truncated gzip data ({e})") from e
    except OSError as e:  # also gzip's own
        raise DataError(f"{path}: cannot be read: {e.strerror or e}") from e
    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError as e:
        line = text.count(b"\n", 0, e.start) + 1
        raise DataError(
            f"{path}: not UTF-8: byte 0x{text[e.start]:02x} at line {line}; convert the file"
        ) from e
    except (ValueError, RecursionError) as e:
        raise DataError(
            f"{path}: not valid JSON: {e} (one object a line is JSONL: name the file .jsonl)"
        ) from e
