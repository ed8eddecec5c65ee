"""What tagged words look like, before anything is trained on them."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from .aligned import Aligned, warn_silent
from .batching import UNKNOWN, unknown_text
from .report import _QUANTILES
from .tag_schemes import entities_of
from .tagged import Tagged

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 20  # surface forms in the list of what may be noise
_PLACES = 3  # of each


@dataclass
class Part:
    """One part of a data set. `tokens` holds quantiles, special tokens included."""

    rows: int
    words: int
    tokens: dict[str, int]
    windowed: float  # share of rows longer than max_length, read in windows
    windows: int
    unknown: float  # share of tokens that the tokenizer doesn't know, special tokens excluded
    silent: int  # words that the tokenizer makes nothing of
    duplicates: int  # rows whose words stood before in this part
    conflicting: list[str]  # places of rows that have an earlier one's words, with other tags
    kinds: dict[str, int]  # entities of each type; of plain tags the words


@dataclass
class Report:
    """Figures of each part, and `leakage`: distinct rows that two parts share. `noise`: words of
    the training part that are an entity in less than half of their occurrences."""

    max_length: int
    parts: dict[str, Part]
    leakage: dict[str, int]
    noise: list[dict]
    silent: str | None = None  # told of the first of them

    def as_dict(self) -> dict:
        return asdict(self)

    def warnings(self) -> list[str]:
        """What a user should look at before training."""
        out = [f"{n} rows stand in both {pair}" for pair, n in self.leakage.items() if n]
        for name, part in self.parts.items():
            if part.conflicting:
                out.append(
                    f"{name}: {len(part.conflicting)} rows have the words of another with other "
                    f"tags: {'; '.join(part.conflicting[:_PLACES])}"
                )
            if part.unknown > UNKNOWN:
                out.append(f"{name}: {unknown_text(part.unknown)}")
            unseen = sorted(part.kinds.keys() - self.parts["train"].kinds.keys())
            if unseen:
                out.append(f"{name}: types that train lacks: {', '.join(unseen)}")
        if self.silent:
            out.append(self.silent)
        if self.noise:
            out.append(
                "tagged in less than half of their occurrences in train, perhaps by mistake:"
            )
            out += [
                f"  {n['text']!r} as {n['label']} {n['tagged']} of {n['occurrences']} times: "
                f"{'; '.join(n['places'])}"
                for n in self.noise
            ]
        return out

    def __str__(self) -> str:
        table = [["", *self.parts]]
        row = lambda title, value: table.append([title, *(value(p) for p in self.parts.values())])
        row("rows", lambda p: f"{p.rows:,}")
        row("words", lambda p: f"{p.words:,}")
        for q in _QUANTILES:
            row(f"tokens, {q}", lambda p, q=q: f"{p.tokens[q]:,}")
        row(f"in windows of {self.max_length} tokens", lambda p: f"{p.windowed:.1%}")
        row("windows", lambda p: f"{p.windows:,}")
        row("unknown tokens", lambda p: f"{p.unknown:.1%}")
        row("words without a token", lambda p: f"{p.silent:,}")
        row("repeated rows", lambda p: f"{p.duplicates:,}")
        row("rows tagged otherwise", lambda p: f"{len(p.conflicting):,}")
        counts = sum((Counter(part.kinds) for part in self.parts.values()), Counter())
        for kind, _ in counts.most_common():
            row(f"type {kind}", lambda p, k=kind: f"{p.kinds.get(k, 0):,}")
        for pair, n in self.leakage.items():
            table.append([f"shared by {pair}", f"{n:,}", *[""] * (len(self.parts) - 1)])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join([r[0].ljust(widths[0]), *map(str.rjust, r[1:], widths[1:])]).rstrip()
            for r in table
        ]
        return "\n".join(
            lines + [w if w.startswith(" ") else f"warning: {w}" for w in self.warnings()]
        )


def tagged_report(
    parts: dict[str, Tagged],
    aligned: dict[str, Aligned],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
) -> Report:
    """Types, lengths in tokens, repeated rows, leakage between the parts, and what of the tags may
    be noise. Rows are the same when their words are, up to case, whitespace and Unicode form."""
    keys = {name: part.keys() for name, part in parts.items()}
    names = list(parts)
    leakage = {
        f"{a} and {b}": len(set(keys[a]) & set(keys[b]))
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }
    found = {n: _part(part, keys[n], aligned[n], tokenizer) for n, part in parts.items()}
    silent = next(filter(None, (warn_silent(aligned[n], part) for n, part in parts.items())), None)
    noise = [] if parts["train"].plain else noise_candidates(parts["train"])
    return Report(max_length, found, leakage, noise, silent)


def _part(part: Tagged, keys, aligned: Aligned, tokenizer) -> Part:
    specials = tokenizer.num_special_tokens_to_add()
    lengths, unknown, tokens = aligned.lengths, 0, 0
    for window in aligned.windows:
        unknown += window.input_ids.count(tokenizer.unk_token_id)
        tokens += int(window.inside.sum())
    quantile = lambda q: int(np.quantile(lengths, q, method="higher")) + specials
    marks = (t for row in part.tags for t in row)
    kinds = Counter(marks if part.plain else (t[2:] for t in marks if t[:2] == "B-"))
    first, conflicting = {}, []
    for i, key in enumerate(keys):
        j = first.setdefault(key, i)
        if part.tags[i] != part.tags[j]:
            conflicting.append(f"{part.place(i)} and row {part.rows[j]}")
    return Part(
        rows=len(part),
        words=sum(map(len, part.words)),
        tokens={name: quantile(q) for name, q in _QUANTILES.items()},
        windowed=float(np.mean([len(mine) > 1 for mine in aligned.of_rows()])),
        windows=len(aligned.windows),
        unknown=unknown / max(tokens, 1),
        silent=len(aligned.silent),
        duplicates=len(keys) - len(first),
        conflicting=conflicting,
        kinds=dict(kinds),
    )


def noise_candidates(part: Tagged, shown: int = SHOWN) -> list[dict]:
    """Words that are an entity in less than half of their occurrences, by how often they occur,
    with the places where they are one. Occurrences inside of other entities don't count."""
    tagged, by_first = {}, {}
    for i, tags in enumerate(part.tags):
        for start, end, label in entities_of(tags):
            words = tuple(part.words[i][start:end])
            places = tagged.setdefault(words, {})
            places[i, start] = label
            by_first.setdefault(words[0], set()).add(words)
    plain = Counter()  # occurrences that are no entity, nor part of one
    for words, tags in zip(part.words, part.tags, strict=True):
        for at, word in enumerate(words):
            for form in by_first.get(word, ()) if tags[at] == "O" else ():
                end = at + len(form)
                if tuple(words[at:end]) == form and {*tags[at:end]} == {"O"}:
                    plain[form] += 1
    rare = [(plain[w] + len(p), w, p) for w, p in tagged.items() if 0 < len(p) < plain[w]]
    rare.sort(key=lambda item: (-item[0], item[1]))
    return [
        {
            "text": " ".join(words),
            "label": "/".join(sorted({*places.values()})),
            "tagged": len(places),
            "occurrences": count,
            "places": [f"{part.place(i)}, word {at + 1}" for i, at in list(places)[:_PLACES]],
        }
        for count, words, places in rare[:shown]
    ]
