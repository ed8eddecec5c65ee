"""What the data looks like, before anything is trained on it."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .batching import UNKNOWN, encode, unknown_share, unknown_text
from .examples import Examples
from .noise import suspects
from .splitting import MIN_TEXTS_TO_SPLIT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN, _JUDGED = 5, 20_000  # suspects, and rows evenly spread of which they are
_QUANTILES = {"min": 0, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1}


@dataclass
class Part:
    """One part of a data set. `tokens` holds quantiles, special tokens included."""

    rows: int
    tokens: dict[str, int]
    truncated: float  # share of rows longer than max_length
    unknown: float  # share of tokens that the tokenizer doesn't know, special tokens excluded
    empty: int  # pairs of which one text is empty
    duplicates: int  # rows whose text stood before in this part
    conflicting: int  # distinct texts that have more than one label
    classes: dict[str, int] | None  # rows a class; None without labels and for a regression
    values: dict[str, float] | None = None  # a regression's min, mean, max


@dataclass
class Report:
    """Figures of each part, `leakage`: distinct texts that two parts share, and `suspects`: rows to
    train on whose label may be wrong, the clearest first, each with what it reads like."""

    max_length: int
    parts: dict[str, Part]
    leakage: dict[str, int]
    suspects: list[dict] = field(default_factory=list)

    def as_dict(self) -> dict:
        return asdict(self)

    def warnings(self) -> list[str]:
        """What a user should look at before training."""
        out = [f"{n} texts stand in both {pair}" for pair, n in self.leakage.items() if n]
        for name, part in self.parts.items():
            if part.conflicting:
                out.append(f"{name}: {part.conflicting} texts have more than one label")
            if part.empty:
                out.append(f"{name}: {part.empty} pairs have an empty text")
            if part.unknown > UNKNOWN:
                out.append(f"{name}: {unknown_text(part.unknown)}")
            if part.truncated > 0.05:
                out.append(
                    f"{name}: {part.truncated:.1%} of the texts are cut at {self.max_length} tokens"
                )
        classes = self.parts["train"].classes or {}
        rare = sorted(c for c, n in classes.items() if n < MIN_TEXTS_TO_SPLIT)
        if rare:
            out.append(f"train: fewer than {MIN_TEXTS_TO_SPLIT} rows: {', '.join(rare)}")
        for name, part in self.parts.items():
            unseen = sorted(set(part.classes or ()) - set(classes))
            if unseen and name != "train":
                out.append(f"{name}: classes that train lacks: {', '.join(unseen)}")
        return out

    def __str__(self) -> str:
        names = list(self.parts)
        table = [["", *names]]
        row = lambda title, value: table.append([title, *(value(p) for p in self.parts.values())])
        row("rows", lambda p: f"{p.rows:,}")
        for q in _QUANTILES:
            row(f"tokens, {q}", lambda p, q=q: str(p.tokens[q]))
        row(f"cut at {self.max_length} tokens", lambda p: f"{p.truncated:.1%}")
        row("unknown tokens", lambda p: f"{p.unknown:.1%}")
        row("repeated texts", lambda p: f"{p.duplicates:,}")
        row("texts of several labels", lambda p: f"{p.conflicting:,}")
        if any(p.values for p in self.parts.values()):
            for v in ("min", "mean", "max"):
                row(f"label, {v}", lambda p, v=v: f"{p.values[v]:.4g}" if p.values else "-")
        counts = Counter()
        for part in self.parts.values():
            counts.update(part.classes or {})
        for c, _ in counts.most_common():
            row(f"class {c}", lambda p, c=c: f"{(p.classes or {}).get(c, 0):,}")
        for pair, n in self.leakage.items():
            table.append([f"shared by {pair}", f"{n:,}", *[""] * (len(names) - 1)])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join([r[0].ljust(widths[0]), *map(str.rjust, r[1:], widths[1:])]).rstrip()
            for r in table
        ]
        for one in self.suspects[:_SHOWN]:
            lines.append(f"look at {one['place']}: {one['label']}, which reads like {one['like']}")
        return "\n".join(lines + [f"warning: {w}" for w in self.warnings()])


def dataset_report(
    train: Examples,
    valid: Examples | None,
    test: Examples | None,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
) -> Report:
    """Classes, lengths in tokens, repeated texts and leakage between the parts; None is left out.

    Texts are the same when they are equal up to case, whitespace and Unicode form.
    """
    given = {"train": train, "valid": valid, "test": test}
    given = {name: part for name, part in given.items() if part is not None and len(part)}
    keys = {name: part.keys() for name, part in given.items()}
    names = list(given)
    leakage = {
        f"{a} and {b}": len(set(keys[a]) & set(keys[b]))
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }
    rows = {n: encode(tokenizer, part.texts, part.pairs) for n, part in given.items()}
    sizes = tokenizer, max_length
    # A query's documents go to one part by its key alone, which isn't all of a row.
    parts = {n: _part(part, rows[n], Examples.keys(part), *sizes) for n, part in given.items()}
    return Report(max_length, parts, leakage, _suspects(train, rows["train"]))


def _suspects(train, rows) -> list[dict]:
    if train.labels is None or train.task != "single_label":
        return []
    own = np.unique(np.linspace(0, len(train) - 1, min(len(train), _JUDGED)).astype(int))
    labels = [train.labels[i] for i in own]
    found = [(own[i], like) for i, like in suspects([rows[i]["input_ids"] for i in own], labels)]
    return [{"place": train.place(i), "label": train.labels[i], "like": like} for i, like in found]


def _part(examples, rows, keys, tokenizer, max_length) -> Part:
    lengths = np.array([len(row["input_ids"]) for row in rows])
    tokens = {n: int(np.quantile(lengths, q, method="higher")) for n, q in _QUANTILES.items()}
    labels, classes, values, conflicting = examples.labels, None, None, 0
    if labels is not None:
        if examples.task == "regression":
            values = {f: float(getattr(np, f)(labels)) for f in ("min", "mean", "max")}
            cells = labels
        else:
            several = examples.task == "multi_label"
            classes = dict(Counter(n for c in labels for n in (c if several else [c])))
            cells = [frozenset(c) for c in labels] if several else labels
        found = {}
        for key, cell in zip(keys, cells, strict=True):
            found.setdefault(key, set()).add(cell)
        conflicting = sum(len(s) > 1 for s in found.values())
    return Part(
        rows=len(examples),
        tokens=tokens,
        truncated=float((lengths > max_length).mean()),
        unknown=unknown_share(tokenizer, rows, examples.pairs is not None),
        empty=sum(
            not (a and b)
            for a, b in zip(examples.texts, examples.pairs or examples.texts, strict=True)
        ),
        duplicates=len(keys) - len(set(keys)),
        conflicting=conflicting,
        classes=classes,
        values=values,
    )
