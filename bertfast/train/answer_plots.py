"""Pictures of question answering."""

import numpy as np

from ..files import StrPath
from .plots import _figure


def score_diffs(diffs: np.ndarray, answerable: np.ndarray, threshold: float, path: StrPath) -> None:
    """By how much no answer scores above the best span: of questions that have an answer, of those
    that have none, and the threshold above which none is given."""
    shown = np.isfinite(diffs)
    edges = np.histogram_bin_edges(diffs[shown], bins=40) if shown.any() else 40
    figure = _figure(7, 4)
    axes = figure.subplots()
    for name, part, color in (
        ("with an answer", answerable, "tab:blue"),
        ("without", ~answerable, "tab:orange"),
    ):
        axes.hist(diffs[shown & part], edges, alpha=0.6, color=color, label=f"{name}: {part.sum()}")
    axes.axvline(threshold, color="black", linestyle="--", label=f"threshold {threshold:.3g}")
    axes.set(xlabel="score of no answer - score of the best span", ylabel="questions")
    axes.legend()
    figure.savefig(path)
