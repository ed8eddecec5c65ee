"""Schemes of tags: IOB1, IOB2, BIOES and BILOU are recognised and brought to IOB2; its entities."""

import re
from typing import NamedTuple

SCHEMES = ("iob1", "iob2", "bioes", "bilou", "plain")
_PREFIXED = re.compile(r"([BIESLU])-(.+)", re.DOTALL)
_OPEN, _CLOSE = set("BSU"), set("ESLU")  # begin an entity, end one
_FORCE = "or name the scheme (scheme: iob1, iob2, bioes, bilou; plain: tags that make no entities)"


class SchemeError(ValueError):
    """Tags of no scheme; `row` and `word` say where, counted from 0."""

    def __init__(self, row: int, word: int, message: str) -> None:
        super().__init__(message)
        self.row, self.word = row, word


def parts(tag: str) -> tuple[str, str]:
    """("B", "PER") of "B-PER"; ("O", "") of a tag without such a prefix."""
    found = _PREFIXED.fullmatch(tag)
    return (found[1], found[2]) if found else ("O", "")


def scheme_of(rows: list[list[str]]) -> str:
    """The one scheme that all rows keep to.

    No tag with a prefix: plain ("iob2" where all are O). E- or S- make it BIOES, L- or U- BILOU.
    With B- and I- alone it is IOB2 where each entity begins with B-, and IOB1 where B- stands only
    where an entity follows another of its type. Raises SchemeError at a tag that breaks the scheme
    the others are of.
    """
    places = {}  # of each tag, its first
    for i, row in enumerate(rows):
        for j, tag in enumerate(row):
            places.setdefault(tag, (i, j))
    prefixed = [tag for tag in places if _PREFIXED.fullmatch(tag)]
    others = [tag for tag in places if tag != "O" and tag not in prefixed]
    if not prefixed:
        return "plain" if others else "iob2"
    if others:
        raise SchemeError(
            *places[others[0]],
            f"is {others[0]!r}, beside {prefixed[0]!r}; expected O, or B- or I- and a type: "
            f"correct it, {_FORCE}",
        )
    bioes, bilou = (next((t for t in prefixed if t[0] in two), None) for two in ("ES", "LU"))
    if bioes and bilou:
        raise SchemeError(
            *places[bilou],
            f"is {bilou!r}, of BILOU, beside {bioes!r}, of BIOES: keep to one, {_FORCE}",
        )
    if bioes or bilou:
        _check_closed(rows)
        return "bioes" if bioes else "bilou"
    return _iob(rows)


def _check_closed(rows):
    """SchemeError where an entity of BIOES or BILOU is not begun or not ended."""
    for i, row in enumerate(rows):
        inside = ""  # the type of the entity that is open
        for j, tag in enumerate([*row, "O"]):
            letter, kind = parts(tag)
            goes_on = letter not in _OPEN and letter != "O"
            if goes_on and inside != kind:
                opened = f"inside of {inside!r}" if inside else "which no B- began"
                raise SchemeError(i, j, f"is {tag!r}, {opened}: correct it, {_FORCE}")
            if inside and not goes_on:
                ends = "E- or L-"
                raise SchemeError(
                    i,
                    j - 1,
                    f"is {row[j - 1]!r}, after which the entity goes on, but no {ends} ends it: "
                    f"correct it, {_FORCE}",
                )
            inside = "" if letter == "O" or letter in _CLOSE else kind


def _iob(rows) -> str:
    """IOB1 or IOB2: by who begins an entity where none of its type stands before."""
    begun = {}  # letter -> place of the first entity that it begins so
    for i, row in enumerate(rows):
        before = ""
        for j, tag in enumerate(row):
            letter, kind = parts(tag)
            if letter != "O" and kind != before:
                begun.setdefault(letter, (i, j))
            before = kind
    if len(begun) == 2:
        i, j = begun["B"]
        k, m = begun["I"]
        raise SchemeError(
            k,
            m,
            f"is {rows[k][m]!r}, which begins an entity as in IOB1, but row {i + 1}, word {j + 1} "
            f"begins one with {rows[i][j]!r}, as in IOB2: correct it, {_FORCE}",
        )
    return "iob1" if "I" in begun else "iob2"


def to_iob2(tags: list[str]) -> list[str]:
    """Tags of any scheme with prefixes, as IOB2. A tag that goes on with no entity begins one."""
    out, before, closed = [], "", True
    for tag in tags:
        letter, kind = parts(tag)
        begins = letter in _OPEN or closed or kind != before
        out.append("O" if letter == "O" else f"{'B' if begins else 'I'}-{kind}")
        before, closed = kind, letter == "O" or letter in _CLOSE
    return out


class Entity(NamedTuple):
    """Words `start` to `end` (not included) of a row, of the type `label`."""

    start: int
    end: int
    label: str


def entities_of(tags: list[str]) -> list[Entity]:
    """The entities of one row's IOB2 tags. As in seqeval's default mode an I- that goes on with no
    entity of its type begins one."""
    found, start, kind = [], 0, None
    for i, tag in enumerate([*tags, "O"]):
        begins, label = tag[:2] == "B-", tag[2:] if tag != "O" else None
        if kind is not None and (begins or label != kind):
            found.append(Entity(start, i, kind))
            kind = None
        if label is not None and kind is None:
            start, kind = i, label
    return found
