"""Pictures of a run, as PNG."""

import csv
import json
from pathlib import Path

import numpy as np


def _figure(width, height):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=120)


def confusion_matrix(matrix: np.ndarray, names, folder: Path) -> None:
    """confusion_matrix.csv and .png: rows the truth, columns the prediction."""
    with open(folder / "confusion_matrix.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(["truth \\ predicted", *names])
        writer.writerows([name, *row] for name, row in zip(names, matrix.tolist(), strict=True))
    side = 3 + 0.3 * len(names)
    figure = _figure(side + 1, side)
    axes = figure.subplots()
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="truth")
    for i, j in np.argwhere(matrix) if len(names) <= 40 else ():
        color = "white" if share[i, j] > 0.5 else "black"
        axes.text(j, i, matrix[i, j], ha="center", va="center", fontsize=6, color=color)
    figure.colorbar(image, label="share of the true class", shrink=0.7)
    figure.savefig(folder / "confusion_matrix.png")


def training_curve(metrics_file: Path, metric: str, path: Path) -> None:
    """The loss of every step, and the validation metric beside it."""
    with open(metrics_file, encoding="utf-8") as f:
        records = [json.loads(line) for line in f]
    steps = [(r["step"], r["loss"]) for r in records if "loss" in r]
    valid = [
        (r["step"], r[f"valid_{metric}"], r["valid_loss"]) for r in records if "valid_loss" in r
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
