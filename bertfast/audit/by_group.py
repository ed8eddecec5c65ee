"""A classifier's figures by group."""

from collections import Counter

import numpy as np

from .. import data
from ..data import cells
from ..data.errors import ConfigError
from . import classifier, figures, intervals, lexicon
from .figures import SMALL


def groups(
    model: str,
    path: str,
    *,
    group_column: str | None = None,
    lexicon: str | list[str] | None = None,
    ignore_case: bool = False,
    positive: list[str] | None = None,
    samples: int = intervals.SAMPLES,
    seed: int = 0,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_column: str | None = None,
    max_length: int | None = None,
    allow_pickle: bool = False,
    device: str | None = None,
    precision: str | None = None,
) -> dict:
    """How a fine-tuned classifier does on each group of the rows of a labelled table.

    Args:
        model, path, text_column to precision: as of `train.evaluate`.
        group_column: says a row's group; or
        lexicon: built-in names or files, see `audit.lexicon`: a row's group is the one whose terms
            its text has. Rows with no term, or of several groups, are counted and left out.
        positive: classes whose selection, true and false positive rates count, each against all
            others. None: of two classes the model's second, of more none.
        samples, seed: of the bootstrap.

    Returns: {"model", "data", "by", "rows", "sizes": {group: {"rows", "positives": {class: n}}},
    "left_out": {why: n}, "notes"} and what `figures.by_group` gives, classes by name.

    Raises: ConfigError, data.DataError, model.CheckpointError; RuntimeError without fairlearn.
    """
    if (group_column is None) == (lexicon is None):
        raise ConfigError("give either group_column or lexicon: what makes the groups")
    intervals.check(samples=samples)
    figures.fairlearn()
    columns = {"text_column": text_column, "text_pair_column": text_pair_column}
    columns |= {"label_column": label_column, "max_length": max_length}
    audited = classifier.opened(model, path, True, allow_pickle, device, precision, **columns)
    examples, names = audited.examples, audited.names
    if examples.labels is None:
        raise ConfigError("label_column is none: figures by group need the column of the labels")
    chosen = _positive(positive, names)
    if group_column is not None:
        by, group = f"column {group_column!r}", classifier.column(path, group_column, cells.name)
    else:
        by, group = _by_terms(examples, lexicon, ignore_case)
    left_out = Counter(g[0] for g in group if isinstance(g, tuple))
    kept = [i for i, g in enumerate(group) if isinstance(g, str)]
    group = np.array([group[i] for i in kept])
    if len({*group}) < 2:
        found = ", ".join(sorted({*group})) or "none"
        raise data.DataError(
            f"{path}: the groups by {by} are: {found}; expected two or more to compare "
            f"(rows: {len(examples)}, left out: {dict(left_out) or 'none'})"
        )
    rows, examples = len(examples), examples.select(kept)
    truth = audited.given.labels.encode(examples)
    said = audited.probabilities(examples, audited.rows(examples)).argmax(1)
    ids = [names.index(c) for c in chosen]
    found = figures.by_group(truth, said, group, ids, samples, seed)
    found["rates"] = {names[c]: block for c, block in found["rates"].items()}
    sizes = {
        str(g): {
            "rows": int((group == g).sum()),
            "positives": {names[c]: int(((group == g) & (truth == c)).sum()) for c in ids},
        }
        for g in np.unique(group)
    }
    about = {"model": str(model), "data": str(path), "by": by, "rows": rows}
    about |= {"samples": samples, "sizes": sizes, "left_out": dict(left_out)}
    return about | found | {"notes": _notes(sizes, names, ids)}


def _positive(given, names) -> list[str]:
    own = {data.normal(name): name for name in names}
    if given is None:
        return [names[1]] if len(names) == 2 else []
    unknown = [name for name in given if data.normal(name) not in own]
    if unknown:
        raise ConfigError(
            f"positive is {unknown[0]!r}, no class of the model; known are {', '.join(names)}"
        )
    return [own[data.normal(name)] for name in given]


def _by_terms(examples, names, ignore_case) -> tuple[str, list]:
    """Of each text the group, or (why it has none,)."""
    terms, found = lexicon.load(names, ignore_case), []
    for i, text in enumerate(examples.texts):
        own = {term.group for term in terms.find(text)}
        if examples.pairs is not None:
            own |= {term.group for term in terms.find(examples.pairs[i])}
        several = ("terms of several groups",) if own else ("no term",)
        found.append(terms.groups[own.pop()] if len(own) == 1 else several)
    return f"terms of {terms.place}", found


def _notes(sizes, names, ids) -> list[str]:
    """What of the figures is weak or missing."""
    notes = []
    if not ids:
        notes.append(f"no rates: give positive, a class or several of {', '.join(names)}")
    for group, size in sizes.items():
        if size["rows"] < SMALL:
            notes.append(f"group {group!r} is small ({size['rows']} rows): its figures are weak")
        for name, n in size["positives"].items():
            for what, k, rate in (
                (f"of {name!r}", n, "true"),
                (f"not of {name!r}", size["rows"] - n, "false"),
            ):
                if k < SMALL <= size["rows"] or k == 0:
                    weak = "is weak" if k else "is missing, and not in the differences"
                    notes.append(
                        f"group {group!r} has {k} rows {what}: its {rate} positive rate {weak}"
                    )
    return notes
