"""Words of a text by their characters, and their tags from spans of those."""

import json
import reprlib
from collections import Counter
from collections.abc import Container, Iterable
from contextlib import suppress
from typing import Any

import regex

from .clean import UNSPACED

_PARTS = 15  # that a form may have beside its first
_OFTEN, _FORMS = 2, 5000  # a form's occurrences, forms
_LETTER = rf"[[\p{{L}}\p{{N}}]--\p{{Han}}--{UNSPACED.pattern}]\p{{M}}*"
_INNER = r"[\u00ad\u200c\u200d\u2060]*"  # between letters: soft hyphens and joiners
_WORD = regex.compile(rf"{_LETTER}(?:{_INNER}{_LETTER})*|(?=\S)\X", regex.V1)


def split_words(text: str, forms: Container[str] = ()) -> list[tuple[int, int]]:
    """Where the words of a text stand: runs of letters and digits with their marks, and every other
    sign, and letter of a script without spaces, for itself; those of `forms` ("C++") whole."""
    spans = [m.span() for m in _WORD.finditer(text)]
    return _whole(text, spans, forms) if forms else spans


def _whole(text, spans, forms) -> list[tuple[int, int]]:
    """The spans, with those put together whose text, without a space in it, is the longest form."""
    out, at = [], 0
    while at < len(spans):
        start, end = spans[at]
        best = last = at
        while last + 1 < len(spans) and spans[last + 1][0] == end and last - at < _PARTS:
            last, end = last + 1, spans[last + 1][1]
            best = last if text[start:end] in forms else best
        out.append((start, spans[best][1]))
        at = best + 1
    return out


def signed_forms(rows: Iterable[list[str]]) -> list[str]:
    """The commonest words of rows that `split_words` would take apart, sorted."""
    counts = Counter(word for row in rows for word in row)
    whole = lambda word: len(split_words(word)) > 1 and not any(map(str.isspace, word))
    common = [w for w, n in counts.most_common() if n >= _OFTEN and whole(w)]
    return sorted(common[:_FORMS])


def joined(words: list[str]) -> list[tuple[int, int]]:
    """Where words stand in the text that is all of them with spaces between."""
    spans, at = [], 0
    for word in words:
        spans.append((at, at + len(word)))
        at += len(word) + 1
    return spans


def tags_of(text: str, words: list[tuple[int, int]], entities: Iterable[Any]) -> list[str]:
    """IOB2 tags of a text's words from spans of its characters."""
    if isinstance(entities, str):
        with suppress(ValueError, RecursionError):
            entities = json.loads(entities)
    if not isinstance(entities, list):
        raise ValueError(
            f"is {reprlib.repr(entities)}; expected a list of "
            '{"start": 0, "end": 5, "label": "PER"}, [] for none'
        )
    begins, ends = ({w[k]: i for i, w in enumerate(words)} for k in (0, 1))
    tags, owner = ["O"] * len(words), {}
    for number, span in enumerate(entities, 1):
        start, end, label = _span(text, number, span)
        shown = f"span {number}, {start} to {end} ({text[start:end]!r}, {label})"
        for at, borders, what in ((start, begins, "begins"), (end, ends, "ends")):
            if at not in borders:
                inside = next((text[a:b] for a, b in words if a < at < b), None)
                where = f"inside the word {inside!r}" if inside else "at no word"
                raise ValueError(
                    f"has {shown}, that {what} {where}; expected whole words, without spaces around"
                )
        for i in range(begins[start], ends[end] + 1):
            if i in owner:
                raise ValueError(
                    f"has {shown}, that overlaps span {owner[i]}; expected one entity a word: keep "
                    "one of them"
                )
            owner[i] = number
            tags[i] = f"{'B' if words[i][0] == start else 'I'}-{label}"
    return tags


def _span(text: str, number: int, span) -> tuple[int, int, str]:
    if not isinstance(span, dict) or not {"start", "end", "label"} <= span.keys():
        raise ValueError(
            f"has as span {number} {reprlib.repr(span)}; expected "
            '{"start": 0, "end": 5, "label": "PER"}'
        )
    start, end, label = span["start"], span["end"], span["label"]
    if type(start) is not int or type(end) is not int or not isinstance(label, str):
        raise ValueError(
            f"has as span {number} {reprlib.repr(span)}; expected whole numbers as start and "
            "end, a string as label"
        )
    if not label.strip():
        raise ValueError(f"has span {number} with an empty label; name its type")
    if not 0 <= start < end <= len(text):
        raise ValueError(
            f"has span {number}, {start} to {end}, of a text of {len(text)} characters; expected "
            "0 <= start < end <= the text's length, counted in characters, not bytes"
        )
    said = span.get("text")
    if isinstance(said, str) and said != text[start:end]:
        raise ValueError(
            f"has span {number}, {start} to {end}, of {said!r}, where the text has "
            f"{text[start:end]!r}; expected Unicode characters counted from 0, the end not included"
        )
    return start, end, label
