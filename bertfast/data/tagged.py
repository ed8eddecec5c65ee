"""Words with a tag each, of named entities or parts of speech."""

import math
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from ..files import StrPath
from . import cells, conll
from .clean import clean_text
from .errors import DataError
from .examples import Cells, _place
from .tables import CHARACTERS, ROWS, Table, read_chunks
from .tag_schemes import SCHEMES, SchemeError, scheme_of, to_iob2
from .text_spans import joined, split_words, tags_of


@dataclass
class Tagged:
    """Words with their tags, row by row.

    words: of each row. tags: one a word, IOB2, or plain where `plain`; None where the data has
    none. texts: the rows as they were given, to the character, and the `forms` that `split_words`
    kept whole; None where they were given as words, whose text is all of them with spaces between.
    path, rows, lines: the file, and of each
    row its number and the line where it begins, counted from 1, for errors; and the `share` of the
    file that is read.
    """

    words: list[list[str]]
    tags: list[list[str]] | None = None
    texts: list[str] | None = None
    plain: bool = False
    forms: frozenset[str] = frozenset()
    rows: list[int] = field(default_factory=list)
    lines: list[int] | None = None
    path: str = ""
    share: float | None = None

    def __post_init__(self) -> None:
        self.rows = self.rows or list(range(1, len(self.words) + 1))
        for name in ("tags", "texts", "rows", "lines"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.words):
                raise ValueError(f"{len(values)} {name} for {len(self.words)} rows of words")

    def __len__(self) -> int:
        return len(self.words)

    def select(self, indices: Iterable[int]) -> "Tagged":
        """The rows at these positions, in this order."""
        take = lambda values: None if values is None else [values[i] for i in indices]
        names = ("words", "tags", "texts", "rows", "lines")
        return replace(self, **{name: take(getattr(self, name)) for name in names})

    def place(self, i: int) -> str:
        """Where a row stands, for an error."""
        return _place(self.path, self.rows[i], self.lines and self.lines[i])

    def text(self, i: int) -> str:
        return " ".join(self.words[i]) if self.texts is None else self.texts[i]

    def spans(self, i: int) -> list[tuple[int, int]]:
        """The characters of each word in `text(i)`."""
        if self.texts is None:
            return joined(self.words[i])
        return split_words(self.texts[i], self.forms)

    @property
    def total(self) -> float | None:
        """About how many rows the file has."""
        return self.rows[-1] / self.share if self.share else None

    def keys(self) -> list[str]:
        """What counts as the same row: equal up to case, whitespace and Unicode form."""
        return [clean_text(" ".join(words)).casefold() for words in self.words]

    def kinds(self) -> list[set[str]]:
        """The types of entities (or plain tags) that each row has."""
        of = (lambda tag: tag) if self.plain else lambda tag: tag[2:]
        return [{of(tag) for tag in tags if self.plain or tag != "O"} for tags in self.tags]

    def strata(self) -> list[str]:
        """A class for each row, for `split`: the rarest of its types."""
        kinds = self.kinds()
        counts = Counter(kind for row in kinds for kind in row)
        return [min(row, key=lambda k: (counts[k], k), default="") for row in kinds]


def load_tagged(
    path: StrPath, scheme: str | None = None, forms: Iterable[str] = (), **columns: Any
) -> Tagged:
    """Read a file of tagged words, or of texts with their entities.

    CoNLL (.conll, .txt, .iob, .bio, gzip'd or not): a word a line, its tag in the last column, a
    blank line after each row. Tables (see `read_table`): lists in `tokens` and `tags`, or a `text`
    and in `entities` or `spans` a list of {"start", "end", "label"}, its characters, the end not
    included. Lists in CSV and TSV are JSON.

    Args:
        scheme: of the tags, where they don't say (see `scheme_of`); sequences that break it are
            then taken as seqeval's default does.
        forms: words that texts are not to be split within.
        columns: tokens_column, tags_column, text_column, entities_column: other names of these.

    Raises: DataError, with file, row, line, and word or span.
    """
    if scheme is not None and scheme not in SCHEMES:
        raise ValueError(f"scheme is {scheme!r}; expected one of {', '.join(SCHEMES)}")
    chunks = _chunks(path, math.inf, math.inf, True, forms, **columns)
    found = next(chunks, None)
    if found is None:
        raise DataError(f"{path}: has no rows")
    if found.texts is None:
        _unify(found, scheme)
    return found


def read_tagged(
    path: StrPath,
    rows: float = ROWS,
    characters: float = CHARACTERS,
    forms: Iterable[str] = (),
    **columns: Any,
) -> Iterator[Tagged]:
    """`load_tagged` without tags, in the chunks of `read_chunks`. Rows may be empty. An error tells
    of the rows of one chunk."""
    yield from _chunks(path, rows, characters, False, forms, **columns)


def _unify(found: Tagged, scheme) -> None:
    """Bring tags of any scheme to IOB2, or to plain ones."""
    try:
        scheme = scheme or scheme_of(found.tags)
    except SchemeError as e:
        line = found.lines and found.lines[e.row]
        if line and conll.is_conll(found.path):
            line += e.word  # a word a line
        place = _place(found.path, found.rows[e.row], line)
        word = found.words[e.row][e.word]
        raise DataError(f"{place}: the tag of word {e.word + 1}, {word!r}, {e}") from None
    found.plain = scheme == "plain"
    if not found.plain:
        found.tags = [to_iob2(tags) for tags in found.tags]


def _chunks(
    path,
    rows,
    characters,
    tagged,
    forms,
    tokens_column: str | None = None,
    tags_column: str | None = None,
    text_column: str | None = None,
    entities_column: str | None = None,
) -> Iterator[Tagged]:
    given = (tokens_column, tags_column, text_column, entities_column)
    if conll.is_conll(path):
        if any(given):
            name = next(filter(None, given))
            raise DataError(f"{path}: is CoNLL, which has no column {name!r}; leave its name out")
        for words, tags, lines, first, share in conll.read(path, tagged, rows, characters):
            numbers = list(range(first, first + len(words)))
            at = {"rows": numbers, "lines": lines, "path": str(path), "share": share}
            yield Tagged(words, tags, **at)
        return
    for chunk in read_chunks(path, None, rows, characters):
        table = Cells(path, chunk)
        tokens = tokens_column or (None if text_column else _first(chunk, "tokens"))
        if tokens is None:
            text = text_column or "text"
            entities = entities_column or _first(chunk, "entities", "spans") or "entities"
            _need(table, chunk, tagged, text, entities)
            yield _of_texts(table, text, entities if tagged else None, frozenset(forms), chunk)
        else:
            _need(table, chunk, tagged, tokens, tags_column or "tags")
            yield _of_words(table, tokens, tags_column or "tags", tagged, chunk)


def _first(chunk: Table, *names):
    return next((name for name in names if name in chunk), None)


def _need(table: Cells, chunk: Table, tagged, words, tags) -> None:
    for column in (words, tags)[: 1 + tagged]:
        if column not in chunk:
            also = "tokens and tags, or text and entities" if tagged else "tokens, or text"
            raise DataError(
                f"{table.name}: no column {column!r}; it has: {', '.join(map(repr, chunk))}; "
                f"expected {also}, or name the columns"
            )


def _of_words(table: Cells, tokens, tags, tagged, chunk) -> Tagged:
    words = table.parse(tokens, lambda v: _strings(v, "words", needed=tagged))
    found = None
    if tagged:
        found = table.parse(tags, lambda v: _strings(v, "tags", needed=tagged))
        table.parse(tags, _as_many, values=list(zip(words, found, strict=True)))
    return Tagged(words, found, **_at(table, chunk))


def _at(table: Cells, chunk: Table) -> dict:
    return {"rows": table.rows, "lines": table.lines, "path": table.name, "share": chunk.share}


def _of_texts(table: Cells, text, entities, forms, chunk) -> Tagged:
    needed = entities is not None
    texts = table.parse(text, lambda v: _text(v, needed))
    spans = [split_words(t, forms) for t in texts]
    words = [[t[a:b] for a, b in places] for t, places in zip(texts, spans, strict=True)]
    tags = None
    if needed:
        values = list(zip(texts, spans, table.table[entities], strict=True))
        tags = table.parse(entities, lambda v: tags_of(*v), values=values)
    return Tagged(words, tags, texts, forms=forms, **_at(table, chunk))


def _text(value, needed) -> str:
    """As it is: a cleaned text would shift the characters that spans count."""
    if needed and value is not None and not str(value).strip():
        raise ValueError("is an empty text; fill it or drop the row")
    return cells.text(value, clean=False, needed=False) if value is not None else _missing()


def _missing():
    raise ValueError("is missing; fill it or drop the row")


def _strings(value, what: str, needed: bool) -> list[str]:
    """A list of strings, also as text formats hold it."""
    found = cells._items(value.strip()) if isinstance(value, str) else value
    if not isinstance(found, list):
        raise ValueError(f"is {reprlib.repr(value)}; expected a list of {what}")
    for i, item in enumerate(found, 1):
        if not isinstance(item, str):
            names = ", names such as B-PER in place of numbers" if what == "tags" else ""
            raise ValueError(
                f"holds {item!r} as number {i}, a {type(item).__name__}; expected a list of strings"
                f"{names}"
            )
        cells.text(item, clean=False, needed=False)
        if what == "tags" and not item.strip():
            raise ValueError(f"holds an empty tag as number {i}; expected O for no entity")
    if needed and not any(map(str.strip, found)):
        raise ValueError(f"holds no {what}; fill it or drop the row")
    return found


def _as_many(pair) -> None:
    words, tags = pair
    if len(words) != len(tags):
        raise ValueError(f"has {len(tags)} tags for {len(words)} tokens; expected one for each")
