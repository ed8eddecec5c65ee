"""Queries with the documents to rank for each."""

import math
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..files import StrPath
from . import cells
from .clean import clean_text
from .errors import DataError
from .examples import Cells, Examples
from .tables import read_chunks

# Columns with lists of a query's documents: what is right and wrong, or all and how relevant each.
POSITIVE, NEGATIVE, DOCUMENTS, LABELS = "positive", "negative", "documents", "labels"


@dataclass
class Candidates(Examples):
    """Queries (`texts`) and documents (`pairs`), an example each pair; labels are relevances, 0 or
    more. A query's examples may stand in several rows: equal queries are one.

    listed: whether each row is a query with lists of documents.
    """

    task: str = "regression"
    listed: bool = False

    def keys(self) -> list[tuple]:
        """A query's documents stand in one part of a split."""
        return [(clean_text(text).casefold(),) for text in self.texts]

    def strata(self) -> list:
        return [0] * len(self)

    def groups(self) -> list[np.ndarray]:
        """Positions of each query's examples, queries in the order in which they first come."""
        found = {}
        for i, text in enumerate(self.texts):
            found.setdefault(text, []).append(i)
        return [np.array(group) for group in found.values()]


def load_candidates(
    path: StrPath,
    query_column: str = "query",
    document_column: str = "document",
    label_column: str | None = "label",
) -> Candidates:
    """A table with a row for a query and a document, or for a query and lists of documents:
    "positive" and "negative", or "documents" with "labels".

    label_column: None reads no labels, nor `labels`. Raises DataError, by row: for a missing or
    empty text, a relevance that is no finite number from 0 up, lists that don't fit together.
    """
    whole = {"rows": math.inf, "characters": math.inf}
    found = read_candidates(path, query_column, document_column, label_column, **whole)
    empty = Candidates([], [], None if label_column is None else [], path=str(path))
    return next(found, empty)


def read_candidates(
    path: StrPath,
    query_column: str = "query",
    document_column: str = "document",
    label_column: str | None = None,
    **limits: Any,
) -> Iterator[Candidates]:
    """`load_candidates` in the chunks of `read_chunks`, which has the `limits`."""
    for chunk in read_chunks(path, None, **limits):
        table = Cells(path, chunk)
        lists = [c for c in (POSITIVE, DOCUMENTS) if c in chunk]
        needed = [query_column, *([] if lists else [document_column])]
        if label_column is not None and not lists:
            needed.append(label_column)
        for column in needed:
            if column not in chunk:
                raise DataError(
                    f"{table.name}: no column {column!r}; it has: {', '.join(map(repr, chunk))}. "
                    f"Expected {query_column!r} with {document_column!r} and a label in each row, "
                    f"or with lists: {POSITIVE!r} and {NEGATIVE!r}, or {DOCUMENTS!r} and {LABELS!r}"
                )
        queries = table.parse(query_column, cells.text)
        if lists:
            yield _listed(table, queries, label_column is not None)
        else:
            yield _flat(table, queries, document_column, label_column)


def _flat(table, queries, document_column, label_column):
    documents = table.parse(document_column, cells.text)
    labels = None if label_column is None else table.parse(label_column, _relevance)
    rows, lines = table.rows, table.lines
    return Candidates(queries, documents, labels, "regression", rows, lines, table.name)


def _listed(table, queries, labelled):
    has = lambda column: column in table.table
    if has(DOCUMENTS):
        documents = table.parse(DOCUMENTS, _texts)
        labels = None
        if labelled:
            if not has(LABELS):
                raise DataError(f"{table.name}: no column {LABELS!r} beside {DOCUMENTS!r}: add it")
            labels = table.parse(LABELS, _relevances)
            fit = lambda pair: _alike(*pair)
            table.parse(LABELS, fit, values=list(zip(documents, labels, strict=True)))
    else:
        right = table.parse(POSITIVE, _texts)
        wrong = [[] for _ in right]
        if has(NEGATIVE):
            wrong = table.parse(NEGATIVE, lambda v: _texts(v, least=0), needed=False)
        documents = [a + b for a, b in zip(right, wrong, strict=True)]
        labels = [[1.0] * len(a) + [0.0] * len(b) for a, b in zip(right, wrong, strict=True)]
    at = [i for i, own in enumerate(documents) for _ in own]
    take = lambda values: None if values is None else [values[i] for i in at]
    flat = lambda values: [v for own in values for v in own]
    return Candidates(
        take(queries),
        flat(documents),
        flat(labels) if labelled else None,
        "regression",
        take(table.rows),
        take(table.lines),
        table.name,
        listed=True,
    )


def _texts(value, least=1) -> list[str]:
    if isinstance(value, str) or value is None:
        value = [] if value is None else [value]
    if not isinstance(value, list):
        raise ValueError(f"is {reprlib.repr(value)}, expected a list of texts")
    if len(value) < least:
        raise ValueError("is an empty list; give a text or drop the row")
    return [cells.text(v) for v in value]


def _relevances(value) -> list[float]:
    if not isinstance(value, list):
        raise ValueError(f"is {reprlib.repr(value)}, expected a list of numbers")
    return [_relevance(v) for v in value]


def _alike(documents, labels):
    if len(documents) != len(labels):
        raise ValueError(
            f"has {len(labels)} labels for {len(documents)} documents; give one for each"
        )


def _relevance(value) -> float:
    found = cells.number(value)
    if found < 0:
        raise ValueError(f"is {found:g}; expected a relevance, 0 or more")
    return found
