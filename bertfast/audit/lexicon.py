"""Terms of groups and their counterparts, found and swapped in text.

A lexicon is a text file. Its first line names the groups, each other line has a term of each, in
the groups' order; `#` begins a comment. Of several in a cell, with commas between, all are found
and the first is what comes in for another group's:

    female | male
    mother, mum | father
    Ms, Mrs | Mr
    her+ | his+     # + : only where a word follows that it can belong to
    her | him
    hers | his

A term in lower case is found in any case; one with capitals ("Emma", "US") as it is written, or all
in capitals where it has three letters or more: "will" is no "Will", "MS" no "Ms". A term of several
words stands with any space between them, and where terms begin alike the longest counts.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..data.errors import ConfigError, DataError
from ..files import regular
from .lexicons import BUILT_IN

# What follows "her" or "his" where that is no possessive: "told her that", "his and mine".
_AFTER = (
    "a about after again alone although an and any are as at because before but by can could did "
    "do does during for from had has have he her here him his how i if in into is it its me my not "
    "now of off on or our out over she should since so some than that the their them then there "
    "these they this those though through to today together tomorrow too under until up was we "
    "were what when where which while who why will with without would yesterday yet you your"
)
_NO_NOUN = {*_AFTER.split()}
_NEXT = re.compile(r"\s+(\w[\w'’]*)")  # noqa: RUF001


class Found(NamedTuple):
    """A term in a text."""

    start: int
    end: int
    term: str  # as the lexicon has it
    row: int  # there
    group: int


@dataclass
class Lexicon:
    """See the module. rows: of each group its terms, `+` and all; place: where it is from."""

    place: str
    groups: tuple[str, ...]
    rows: list[tuple[list[str], ...]]
    ignore_case: bool = False

    def __post_init__(self) -> None:
        self._where, words = {}, set()
        for r, row in enumerate(self.rows):
            for g, term in ((g, term) for g, terms in enumerate(row) for term in terms):
                self._where[_key(term)] = term.removesuffix("+"), r, g
                words.add(r"\s+".join(map(re.escape, _key(term)[0].split())))
        longest = "|".join(sorted(words, key=len, reverse=True))
        self._pattern = re.compile(rf"(?<!\w)(?:{longest})(?!\w)", re.IGNORECASE)

    def find(self, text: str) -> list[Found]:
        """The terms in a text, from left to right."""
        found = []
        for m in self._pattern.finditer(text):
            word = " ".join(m[0].split()).casefold()
            after = _NEXT.match(text, m.end())
            owns = after is not None and after[1].lower() not in _NO_NOUN
            where = (owns and self._where.get((word, True))) or self._where.get((word, False))
            if where and (self.ignore_case or _fits(m[0], where[0])):
                found.append(Found(m.start(), m.end(), *where))
        return found

    def swap(self, text: str, found: list[Found], step: int = 1) -> str:
        """The text with each term that `find` found as its counterpart `step` groups on, in its
        case; everything else stays."""
        out, at = [], 0
        for start, end, term, row, group in found:
            new = self.rows[row][(group + step) % len(self.groups)][0].removesuffix("+")
            out += [text[at:start], _cased(text[start:end], term, new)]
            at = end
        return "".join([*out, text[at:]])


def _key(term: str) -> tuple[str, bool]:
    return " ".join(term.removesuffix("+").split()).casefold(), term.endswith("+")


def _fits(found: str, term: str) -> bool:
    found = " ".join(found.split())
    return term.islower() or found == term or (found == term.upper() and len(term) > 2)


def _cased(found: str, term: str, new: str) -> str:
    """`new` in the case in which `found` is written, `term` being as the lexicon has it."""
    if found == term:
        return new
    if found.isupper() and len(found) > 1:
        return new.upper()
    if found.islower():
        return new.lower()
    return new[:1].upper() + new[1:] if found[:1].isupper() else new


def load(names: Sequence[str], ignore_case: bool = False) -> Lexicon:
    """A lexicon of built-in names and files, whose groups must be the same. DataError names file
    and line of what is wrong in one, ConfigError what doesn't fit together; OSError."""
    names = [names] if isinstance(names, str | Path) else list(names)
    if not names:
        raise ConfigError(f"lexicon is empty, expected a file or one of {', '.join(BUILT_IN)}")
    parts = [_lines(name) for name in names]
    place, groups, _ = parts[0]
    for other, others, _ in parts[1:]:
        if others != groups:
            raise ConfigError(
                f"lexicon {other} is of the groups {', '.join(others)}, {place} of "
                f"{', '.join(groups)}: give them one at a time"
            )
    terms = [(place, *line) for place, _, lines in parts for line in lines]
    _check(terms)
    where = ", ".join(place for place, _, _ in parts)
    return Lexicon(where, groups, [row for _, _, row in terms], ignore_case)


def _lines(name) -> tuple[str, tuple[str, ...], list]:
    """(place, groups, (line, terms of each group) of each row)"""
    text, place = BUILT_IN.get(str(name)), str(name)
    if text is None:
        if not Path(name).exists():
            raise ConfigError(
                f"lexicon is {place!r}: no such file, and none of {', '.join(BUILT_IN)}"
            )
        try:
            text = regular(name).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as e:
            raise DataError(f"{place} is no UTF-8 ({e.reason}); save it as such") from None
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        cells = [[" ".join(t.split()) for t in cell.split(",")] for cell in line.split("|")]
        if not all(term.removesuffix("+") for cell in cells for term in cell):
            raise DataError(f"{place}: line {number}: {line!r:.80} lacks a term; fill it in")
        rows.append((number, cells))
    if len(rows) < 2:
        raise DataError(
            f"{place} has {len(rows)} lines, expected the groups' names ('female | male') and a "
            "line of terms at least"
        )
    number, groups = rows[0][0], tuple(", ".join(cell) for cell in rows[0][1])
    if len({*groups}) < max(2, len(groups)):
        raise DataError(
            f"{place}: line {number}: the groups are {' | '.join(groups)}, expected two or more "
            "different names with | between"
        )
    for number, cells in rows[1:]:
        if len(cells) != len(groups):
            raise DataError(
                f"{place}: line {number} has {len(cells)} cells, expected one for each of "
                f"{', '.join(groups)}, with | between"
            )
    return place, groups, rows[1:]


def _check(terms) -> None:
    """DataError where a term stands twice: what to swap it for would be a guess."""
    seen = {}
    for place, number, row in terms:
        for term in (term for cell in row for term in cell):
            if _key(term) in seen:
                raise DataError(
                    f"{place}: line {number}: {term!r} stands in {seen[_key(term)]} too; keep one "
                    "(or mark the one before nouns with +)"
                )
            seen[_key(term)] = f"{place}, line {number},"
