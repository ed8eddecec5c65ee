"""What pairs of texts and translations look like, before anything is trained on them."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from .batching import UNKNOWN, encode, unknown_share, unknown_text
from .report import _QUANTILES
from .translations import Translations

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SIDES = "source", "target"


@dataclass
class PairPart:
    """One part of a data set; by side. `tokens` holds quantiles, special tokens included."""

    rows: int
    tokens: dict[str, dict[str, int]]
    truncated: dict[str, float]  # share of texts longer than max_length
    unknown: dict[str, float]  # share of tokens that the tokenizer doesn't know
    duplicates: int  # rows whose source stood before in this part
    copied: int  # rows whose target is their source


@dataclass
class PairReport:
    """Figures of each part, and `leakage`: distinct sources that two parts share."""

    max_length: int
    parts: dict[str, PairPart]
    leakage: dict[str, int]

    def as_dict(self) -> dict:
        return asdict(self)

    def warnings(self) -> list[str]:
        """What a user should look at before training."""
        out = [f"{n} sources stand in both {pair}" for pair, n in self.leakage.items() if n]
        for name, part in self.parts.items():
            for side in _SIDES:
                if part.unknown[side] > UNKNOWN:
                    out.append(f"{name}, {side}s: {unknown_text(part.unknown[side])}")
                if part.truncated[side]:
                    share = f"{part.truncated[side]:.1%} of the {side}s"
                    out.append(f"{name}: {share} are cut at {self.max_length} tokens")
            if part.copied > 0.1 * part.rows:
                out.append(f"{name}: {part.copied} targets are their source")
        return out

    def __str__(self) -> str:
        table = [["", *self.parts]]
        row = lambda title, value: table.append([title, *(value(p) for p in self.parts.values())])
        row("rows", lambda p: f"{p.rows:,}")
        for side in _SIDES:
            for q in _QUANTILES:
                row(f"{side} tokens, {q}", lambda p, q=q, side=side: str(p.tokens[side][q]))
            cut = f"{side}s cut at {self.max_length} tokens"
            row(cut, lambda p, side=side: f"{p.truncated[side]:.1%}")
            row(f"{side}s' unknown tokens", lambda p, side=side: f"{p.unknown[side]:.1%}")
        row("repeated sources", lambda p: f"{p.duplicates:,}")
        row("targets that are their source", lambda p: f"{p.copied:,}")
        for pair, n in self.leakage.items():
            table.append([f"shared by {pair}", f"{n:,}", *[""] * (len(self.parts) - 1)])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join([r[0].ljust(widths[0]), *map(str.rjust, r[1:], widths[1:])]).rstrip()
            for r in table
        ]
        return "\n".join(lines + [f"warning: {w}" for w in self.warnings()])


def pair_report(
    parts: dict[str, Translations], tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> PairReport:
    """Lengths in tokens, what is cut, repeated sources and leakage between the parts."""
    keys, names = {name: part.keys() for name, part in parts.items()}, list(parts)
    leakage = {
        f"{a} and {b}": len(set(keys[a]) & set(keys[b]))
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }
    found = {n: _part(part, keys[n], tokenizer, max_length) for n, part in parts.items()}
    return PairReport(max_length, found, leakage)


def _part(part, keys, tokenizer, max_length) -> PairPart:
    tokens, truncated, unknown = {}, {}, {}
    for side, texts, more in ((_SIDES[0], part.sources, 0), (_SIDES[1], part.targets, 1)):
        rows = encode(tokenizer, texts)
        lengths = np.array([len(row["input_ids"]) for row in rows])
        tokens[side] = {
            n: int(np.quantile(lengths, q, method="higher")) for n, q in _QUANTILES.items()
        }
        truncated[side] = float((lengths > max_length + more).mean())  # a target's start is extra
        unknown[side] = unknown_share(tokenizer, rows, pairs=False)
    copied = sum(a == b for a, b in zip(part.sources, part.targets, strict=True))
    return PairPart(len(part), tokens, truncated, unknown, len(keys) - len(set(keys)), copied)
