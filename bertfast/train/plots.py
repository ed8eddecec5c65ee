"""Pictures of a run, as PNG."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

SHOWN, LISTED = 40, 2000  # classes in a confusion matrix: in the picture, at all
LONGEST = 30  # characters of a class's name in the picture


def _figure(width, height):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=120)


def confusion_matrix(
    truth: Sequence[int] | np.ndarray,
    predicted: Sequence[int] | np.ndarray,
    names: Sequence[str],
    folder: Path,
) -> None:
    """confusion_matrix.csv and .png: rows the truth, columns the prediction.

    truth, predicted: class ids [n]. The picture shows SHOWN classes at most, those with the most
    errors. ValueError, and no file, for more than LISTED.
    """
    n = len(names)
    if n > LISTED:
        raise ValueError(f"{n:,} classes, a confusion matrix is for up to {LISTED:,}")
    matrix = np.bincount(np.asarray(truth) * n + predicted, minlength=n * n).reshape(n, n)
    with open(folder / "confusion_matrix.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(["truth \\ predicted", *names])
        writer.writerows([name, *row] for name, row in zip(names, matrix.tolist(), strict=True))
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    errors = matrix.sum(0) + matrix.sum(1) - 2 * matrix.diagonal()
    chosen = np.sort(np.argsort(-errors, kind="stable")[:SHOWN])
    matrix, share = (m[np.ix_(chosen, chosen)] for m in (matrix, share))
    side = 3 + 0.3 * len(chosen)
    figure = _figure(side + 1, side)
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    ticks, shown = range(len(chosen)), [_label(names[i], i) for i in chosen]
    axes.set_xticks(ticks, shown, rotation=90, parse_math=False)
    axes.set_yticks(ticks, shown, parse_math=False)
    axes.set(xlabel="predicted", ylabel="truth")
    if len(chosen) < n:
        axes.set_title(f"the {SHOWN} of {n:,} classes with the most errors", fontsize=10)
    for i, j in np.argwhere(matrix):
        color = "white" if share[i, j] > 0.5 else "black"
        axes.text(j, i, matrix[i, j], ha="center", va="center", fontsize=6, color=color)
    figure.colorbar(image, label="share of the true class", shrink=0.7)
    figure.savefig(folder / "confusion_matrix.png")


def _label(name: str, i: int) -> str:
    """A class's name, cut to fit; its number where the font lacks a letter of it."""
    from matplotlib import font_manager

    name = " ".join(name.split())
    has = font_manager.get_font(font_manager.findfont(None)).get_char_index
    if not all(has(ord(c)) for c in name):
        return f"class {i}"
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"


def training_curve(metrics_file: Path, metric: str, path: Path) -> None:
    """The loss of every step, and the validation metric beside it."""
    with open(metrics_file, encoding="utf-8") as f:
        records = [json.loads(line) for line in f]
    steps = [(r["step"], r["loss"]) for r in records if "loss" in r]
    valid = [
        # null where it is no number, which matplotlib takes for a gap
        (r["step"], r[f"valid_{metric}"], r["valid_loss"])
        for r in records
        if "valid_loss" in r
    ]
    figure = _figure(8, 4.5)
    axes = figure.subplots()
    if steps:
        x, y = map(np.array, zip(*steps, strict=True))
        width = max(1, len(y) // 50)
        smooth = np.convolve(y, np.ones(width) / width, "valid")
        axes.plot(x, y, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(
            x[width - 1 :], smooth, color="tab:blue", label=f"training loss (mean of {width})"
        )
    axes.set(xlabel="optimizer step", ylabel="loss")
    if valid:
        x, y, losses = zip(*valid, strict=True)
        axes.plot(x, losses, "o--", color="tab:orange", label="validation loss")
        if metric != "loss":
            other = axes.twinx()
            other.plot(x, y, "s-", color="tab:green", label=f"validation {metric}")
            other.set_ylabel(metric)
            other.legend(loc="lower right", bbox_to_anchor=(1, 1))
    # Above the axes: curves that fall and rise leave no corner free.
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    figure.savefig(path)


def scores(found: np.ndarray, labels: np.ndarray, goal: str, path: Path) -> None:
    """Scores [n] beside their labels: a point each, or of ranking histograms of the relevant and of
    the others."""
    figure = _figure(6, 4.5)
    axes = figure.subplots()
    if goal == "similarity":
        axes.scatter(labels, found, s=8, alpha=0.4)
        axes.set(xlabel="label", ylabel="score")
    else:
        bins = np.histogram_bin_edges(found, 40)
        for name, chosen in (("relevant", labels > 0), ("not relevant", labels <= 0)):
            axes.hist(found[chosen], bins, alpha=0.5, label=name, density=bool(chosen.any()))
        axes.set(xlabel="output", ylabel="density")
        axes.legend()
    figure.savefig(path)
