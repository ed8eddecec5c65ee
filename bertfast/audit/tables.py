"""What `groups`, `swaps` and `pairs` return, as lines of text."""

import math

from ..bench.measure import aligned
from .figures import SMALL

_SHOWN = 3  # worst examples
_LEAD, _LONGEST = 60, 160  # characters of one, before its first change and in all
_ROWS = 10  # row numbers of texts without a term
_TITLES = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "selection_rate": "selection rate",
    "true_positive_rate": "true positive rate",
    "false_positive_rate": "false positive rate",
}


def groups(result: dict) -> list[str]:
    out = [
        f"{result['rows']:,} rows of {result['data']}, groups by {result['by']}",
        f"95% intervals of {result['samples']:,} bootstrap samples; * where that of the group's "
        "figure less that of all rows leaves out 0 (of 20 such, one does by chance), of "
        f"{SMALL} rows or more",
    ]
    out += [f"left out: {n:,} rows with {why}" for why, n in result["left_out"].items()]
    out += ["", *_blocks(result["sizes"], "rows", result["metrics"])]
    for name, rates in result["rates"].items():
        sizes = {g: {"positives": s["positives"][name]} for g, s in result["sizes"].items()}
        out += ["", f"class {name!r} against the others", *_blocks(sizes, "positives", rates)]
        for what in ("demographic_parity", "equalized_odds"):
            parts = (f"{key} {_figure(rates[what][key])}" for key in ("difference", "ratio"))
            out.append(f"{what.replace('_', ' ')}: {', '.join(parts)}")
    out += ["", "A difference is of the extreme groups and never below 0: its interval stays above"]
    out += ["0 of groups that are alike, too. Figures tell what differs, not why or whether it is"]
    return [*out, "fair; they hold for these rows and their labels.", *map(_note, result["notes"])]


def _blocks(sizes, count, blocks) -> list[str]:
    """A line a group, all, their difference and ratio; a column a metric."""
    blocks = {name: block for name, block in blocks.items() if "groups" in block}
    lines = [["group", count, *(_TITLES[name] for name in blocks)]]
    for group, size in sizes.items():
        own = [block["groups"][group] for block in blocks.values()]
        lines.append([group, f"{size[count]:,}", *(_figure(v) + " *"[v["apart"]] for v in own)])
    total = sum(size[count] for size in sizes.values())
    for key, n in (("overall", f"{total:,}"), ("difference", ""), ("ratio", "")):
        lines.append([f"({key})", n, *(_figure(b[key]) + " " for b in blocks.values())])
    return [line.rstrip() for line in aligned(lines)]


def swaps(result: dict) -> list[str]:
    without = result["without_terms"]
    out = [
        f"{result['texts']:,} texts of {result['data']}, lexicon {result['lexicon']}: "
        f"{result['with_terms']:,} have a term"
    ]
    for rows, what in (
        (without, "without a term"),
        (result["unseen"], "whose swap the model doesn't see"),
    ):
        if rows:
            out.append(f"not in the figures: {len(rows):,} texts {what} (rows {_some(rows)})")
    changed = result["changed"]
    out += [
        "",
        f"label changed: {_share(changed)} of {changed['texts']:,} texts",
        f"probability of the class predicted first: {_mean(result['shift'])}, without the sign "
        f"{_mean(result['absolute_shift'], '')}",
        "",
    ]
    lines = [["swap", "texts", "label changed", "its probability", "most moved class"]]
    for one in result["directions"]:
        name, most = max(one["classes"].items(), key=lambda kv: abs(kv[1]["mean"]))
        swap = f"{one['from']} -> {one['to']}"
        cells = [_share(one["changed"]), _mean(one["shift"]), f"{name} {_mean(most)}"]
        lines.append([swap, f"{one['changed']['texts']:,}", *cells])
    out += [*aligned(lines), "", "95% intervals: Wilson's of shares, a bootstrap's of means", ""]
    shown = {one["row"]: one for one in reversed(result["worst"])}  # the worst of each text
    for one in [one for one in result["worst"] if shown[one["row"]] is one][:_SHOWN]:
        out.append(
            f"row {one['row']}: {one['label_before']} {one['probability_before']:.3f} -> "
            f"{one['probability_after']:.3f}, label {one['label_after']}"
        )
        before, after = (_line(one[side]) for side in ("before", "after"))
        pairs = enumerate(zip(before, after, strict=False))
        start = max(0, next((i for i, (a, b) in pairs if a != b), 0) - _LEAD)
        out += [f"  - {_cut(before, start)}", f"  + {_cut(after, start)}"]
    return [*out, _note(result["limits"])]


def pairs(result: dict) -> list[str]:
    lines = [["", "pairs", "neutral", "prefers sent_more", "whole sentences", "difference"]]
    parts = {"overall": result["overall"]} | result["directions"] | result["bias_types"]
    for name, one in parts.items():
        shares = [_share(one["shared"]), _share(one["all"])]
        difference = _mean(one["difference"])
        lines.append([name, f"{one['pairs']:,}", f"{one['neutral']:,}", *shares, difference])
    return [
        f"{result['overall']['pairs']:,} pairs of {result['data']}, {result['masked']:,} masked "
        f"variants by {result['model']}",
        "prefers sent_more: by the tokens that both sentences have (CrowS-Pairs' metric); whole "
        "sentences: by pseudo-log-likelihood; 95% intervals",
        "",
        *aligned(lines),
        "",
        _note(result["caveat"]),
    ]


def _note(text) -> str:
    return f"note: {text}"


def _figure(v) -> str:
    if math.isnan(v["value"]):
        return "-"
    return f"{v['value']:.3f} [{v['low']:.3f}, {v['high']:.3f}]"


def _share(v) -> str:
    return f"{v['share']:.1%} [{v['low']:.1%}, {v['high']:.1%}]"


def _mean(v, sign="+") -> str:
    return f"{v['mean']:{sign}.3f} [{v['low']:{sign}.3f}, {v['high']:{sign}.3f}]"


def _some(rows) -> str:
    return ", ".join(map(str, rows[:_ROWS])) + (", ..." if len(rows) > _ROWS else "")


def _line(text) -> str:
    return text if isinstance(text, str) else " || ".join(text)


def _cut(text, start) -> str:
    """From where it gets interesting."""
    end = start + _LONGEST
    return "..." * (start > 0) + text[start:end] + "..." * (end < len(text))
