"""What a cell of answers says: texts, and where in the question's contexts they stand."""

import json
import math
import re
import reprlib
from ast import literal_eval
from collections.abc import Sequence
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """A text that stands at character `start` of the question's context number `context`."""

    text: str
    start: int
    context: int = 0


def plain(value: Any) -> bool:
    """Whether a cell is a text, or texts, without their places."""
    items = value if isinstance(value, list) else [value]
    return all(v is None or isinstance(v, str) for v in items)


def beside(value: Any, start: Any) -> list[tuple]:
    """Texts with their places in a column of their own."""
    texts = value if isinstance(value, list) else [value] * (value not in (None, ""))
    starts = start if isinstance(start, list) else [start] * (not _missing(start))
    if len(texts) != len(starts):
        raise ValueError(f"has {len(texts)} texts, and answer_start {len(starts)} places")
    return [(text, place, None) for text, place in zip(texts, starts, strict=True)]


def _missing(value) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def listed(value: Any) -> list[tuple]:
    """(text, start, context or None) of the answers in a cell."""
    shown = reprlib.repr(value)
    if isinstance(value, str):
        value = _decoded(value)
    expected = (
        f'is {shown}; expected {{"text": [...], "answer_start": [...]}} or a list of {{"text": '
        '..., "answer_start": ...}; an answer alone needs its place in a column answer_start'
    )
    if isinstance(value, dict):
        if "text" not in value:
            raise ValueError(expected)
        columns = [value["text"], _start(value, expected), value.get("context")]
        if not isinstance(columns[0], list):
            value = [value]
        else:
            columns[2] = [None] * len(columns[0]) if columns[2] is None else columns[2]
            if not all(isinstance(c, list) for c in columns):
                raise ValueError(expected)
            sizes = [len(c) for c in columns]
            if len({*sizes}) > 1:
                raise ValueError(
                    f"has {sizes[0]} texts, {sizes[1]} places and {sizes[2]} contexts; expected "
                    "as many of each"
                )
            return list(zip(*columns, strict=True))
    if not isinstance(value, list) or not all(isinstance(v, dict) and "text" in v for v in value):
        raise ValueError(expected)
    return [(v["text"], _start(v, expected), v.get("context")) for v in value]


def _start(answer: dict, expected):
    for name in ("answer_start", "start"):
        if name in answer:
            return answer[name]
    raise ValueError(expected)


def _decoded(written: str):
    """A cell of a text file, as JSON or as Python writes it."""
    for read in (json.loads, literal_eval):
        try:
            return read(written)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            pass
    return None


def _whole(value, what) -> int:
    try:
        if isinstance(value, bool) or float(value) % 1 or float(value) < 0:
            raise ValueError
        return int(float(value))
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"has {what} {reprlib.repr(value)}; expected a whole number, 0 or more"
        ) from None


def placed(answer: Answer, contexts: Sequence[str]) -> Answer:
    """The answer, which must stand where it says."""
    text, start, number = answer
    if not isinstance(text, str) or not text.strip():
        raise ValueError(
            f"has the answer {reprlib.repr(text)}; expected a text, or an empty list for a "
            "question that can't be answered"
        )
    start = _whole(start, "answer_start")
    here = [i for i, c in enumerate(contexts) if c[start : start + len(text)] == text]
    if number is not None:
        number = _whole(number, "context")
        if number >= len(contexts):
            raise ValueError(f"names context {number} of {len(contexts)}, counted from 0")
        here = [i for i in here if i == number]
    if len(here) == 1:
        return Answer(text, start, here[0])
    if here:
        raise ValueError(
            f"has {text!r} at character {start} of contexts {', '.join(map(str, here))}: name one "
            'by a key "context", counted from 0'
        )
    raise ValueError(_misplaced(text, start, contexts, number))


def _misplaced(text, start, contexts, number) -> str:
    among = range(len(contexts)) if number is None else [number]
    there = [contexts[i][start : start + len(text)] for i in among]
    raw = text.encode()
    if any(contexts[i].encode()[start : start + len(raw)] == raw for i in among):
        why = "it is the offset in UTF-8 bytes"
    else:
        found = [m.start() for i in among for m in re.finditer(re.escape(text), contexts[i])]
        places = ", ".join(map(str, found[:3])) + ", ..." * bool(found[3:])
        why = f"it stands at {places}" if found else "it stands nowhere in it"
    return (
        f"has {text!r} at character {start} of its context, where there is "
        f"{', '.join(map(repr, there))} ({why}): offsets are characters (Unicode code points) of "
        "the context as given, counted from 0; correct them or drop the rows"
    )
