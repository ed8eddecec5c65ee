"""Questions over contexts, with the answers that stand in them: SQuAD's JSON, and tables."""

import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..files import StrPath
from . import answer_cells, cells
from .answer_cells import Answer
from .clean import clean_text
from .errors import DataError
from .examples import Cells, _place
from .squad import read_squad
from .tables import ROWS, read_chunks, read_table


@dataclass
class Questions:
    """Questions, row by row, each over one context or more.

    contexts: as given, for offsets are into them. answers: a question's annotators' answers, none
    where it can't be answered; None where the data has none. path, rows, lines, share: as of
    `Examples`; ids that the data lacks are the rows' numbers.
    """

    ids: list[str]
    questions: list[str]
    contexts: list[list[str]]
    answers: list[list[Answer]] | None = None
    rows: list[int] = field(default_factory=list)
    lines: list[int] | None = None
    path: str = ""
    share: float | None = None

    def __post_init__(self) -> None:
        self.rows = self.rows or list(range(1, len(self.questions) + 1))
        for name in ("ids", "contexts", "answers", "rows", "lines"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.questions):
                raise ValueError(f"{len(values)} {name} for {len(self.questions)} questions")

    def __len__(self) -> int:
        return len(self.questions)

    def select(self, indices: Iterable[int]) -> "Questions":
        """The questions at these positions, in this order."""
        take = lambda values: None if values is None else [values[i] for i in indices]
        names = ("ids", "questions", "contexts", "answers", "rows", "lines")
        return replace(self, **{name: take(getattr(self, name)) for name in names})

    def place(self, i: int) -> str:
        """Where a question stands, for an error."""
        return (
            f"{_place(self.path, self.rows[i], self.lines and self.lines[i])}, id {self.ids[i]!r}"
        )

    @property
    def total(self) -> float | None:
        """About how many rows the file has."""
        return self.rows[-1] / self.share if self.share else None

    def same(self) -> list[tuple[str, ...]]:
        """What counts as the same question over the same contexts: equal up to case, whitespace and
        Unicode form."""
        asked = (clean_text(question).casefold() for question in self.questions)
        return [(q, *known) for q, known in zip(asked, self.context_keys(), strict=True)]

    def context_keys(self) -> list[list[str]]:
        """What counts as the same context."""
        known = {}  # one stands under several questions

        def key(text):
            if text not in known:
                known[text] = clean_text(text).casefold()
            return known[text]

        return [[key(context) for context in contexts] for contexts in self.contexts]

    def keys(self) -> list[str]:
        """The same for all questions that share a context, for `split` to keep them together."""
        above = {}

        def root(key):
            while above.setdefault(key, key) != key:
                above[key] = above[above[key]]
                key = above[key]
            return key

        given = self.context_keys()
        for first, *others in given:
            for other in others:
                above[root(other)] = root(first)
        return [root(first) for first, *_ in given]

    def strata(self) -> list[int]:
        """One for all: a context's questions are of several kinds."""
        return [0] * len(self)


def load_questions(
    path: StrPath,
    question_column: str = "question",
    context_column: str | None = None,
    answers_column: str | None = None,
    id_column: str = "id",
    answers: bool = True,
) -> Questions:
    """Read SQuAD's JSON (`.json`, versions 1 and 2, gzip'd or not), or a table of `read_table`.

    A table's columns are question, context (or contexts: a list of texts a cell), answers (or
    answer), and id if there is one. Answers are {"text": [...], "answer_start": [...]}, or a list
    of {"text": ..., "answer_start": ...}, in text files as JSON; or a text alone (or a list of
    them), with its place in the column answer_start. "start" is the same as "answer_start"; a key
    "context" names the context, counted from 0. None (an empty list) says that the question can't
    be answered. answers=False reads none.

    Raises DataError: of an answer that isn't at its place, of an id that two rows have, of cells
    that are missing or empty.
    """
    columns = (question_column, context_column, answers_column, id_column)
    whole = read_squad(path) if _is_json(path) else read_table(path)
    found = _questions(path, whole, *columns, answers)
    first = {}
    for i, name in enumerate(found.ids):
        if first.setdefault(name, i) != i:
            raise DataError(
                f"{found.place(i)} stands already in row {found.rows[first[name]]}; scores and "
                "answers are kept by id: give each question its own"
            )
    return found


def read_questions(
    path: StrPath,
    question_column: str = "question",
    context_column: str | None = None,
    id_column: str = "id",
    **limits: Any,
) -> Iterator[Questions]:
    """`load_questions` without answers in the chunks of `read_chunks`, which has the `limits`; of
    JSON, which is read whole, in as many rows. Ids may repeat."""
    columns = question_column, context_column, None, id_column
    if not _is_json(path):
        for chunk in read_chunks(path, **limits):
            yield _questions(path, chunk, *columns, False)
        return
    whole = _questions(path, read_squad(path), *columns, False)
    size = min(limits.get("rows", ROWS), len(whole))
    for start in range(0, len(whole), size):
        rows = range(start, min(start + size, len(whole)))
        yield replace(whole.select(rows), share=rows.stop / len(whole))


def _is_json(path) -> bool:
    return Path(path).name.lower().removesuffix(".gz").endswith(".json")


def _questions(path, table, question_column, context_column, answers_column, id_column, answers):
    name = "standard input" if str(path) == "-" else str(path)
    context_column = context_column or ("context" if "context" in table else "contexts")
    answers_column = answers_column or ("answers" if "answers" in table else "answer")
    wanted = [question_column, context_column, *[answers_column] * answers]
    for column in wanted:
        if column not in table:
            raise DataError(f"{name}: no column {column!r}; it has: {', '.join(map(repr, table))}")
    parsed = Cells(path, table)
    ids = [str(row) for row in parsed.rows]
    if id_column in table:
        ids = parsed.parse(id_column, _id)
    questions = parsed.parse(question_column, lambda v: cells.text(v, clean=False).strip())
    contexts = parsed.parse(context_column, _contexts)
    found = Questions(
        *(ids, questions, contexts, None, parsed.rows, parsed.lines, parsed.name, table.share)
    )
    if answers:
        found.answers = _answers(parsed, found, answers_column)
    return found


def _id(value) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise ValueError(f"is {reprlib.repr(value)}; expected a name or a whole number")
    return str(value)


def _contexts(value) -> list[str]:
    if isinstance(value, list) and not value:
        raise ValueError("is an empty list; give one context or more, or drop the row")
    return [cells.text(v, clean=False) for v in (value if isinstance(value, list) else [value])]


def _answers(parsed: Cells, found: Questions, column) -> list[list[Answer]]:
    table, size = parsed.table, len(found)
    alone = "answer_start" in table
    starts = table["answer_start"] if alone else [None] * size
    impossible = table.get("is_impossible", [None] * size)

    def parse(row):
        i, value, start, flag = row
        try:
            if alone and answer_cells.plain(value):
                answers = answer_cells.beside(value, start)
            elif value is None:
                raise ValueError(
                    "is missing; give an empty list for a question that can't be answered, or "
                    "drop the row"
                )
            else:
                answers = answer_cells.listed(value)
            flag = None if flag is None or flag == "" else cells.name(flag) in cells.ON
            if flag is not None and flag == bool(answers):
                raise ValueError(
                    f"has {len(answers)} answers, and is_impossible is {flag}: correct one of them"
                )
            return [answer_cells.placed(answer, found.contexts[i]) for answer in answers]
        except ValueError as e:
            raise ValueError(f"of id {found.ids[i]!r} {e}") from None

    rows = list(zip(range(size), table[column], starts, impossible, strict=True))
    return parsed.parse(column, parse, values=rows)
