"""Pictures of entities, as PNG."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..entities import entities_of, scored_entities
from ..plots import _figure, _label

SHOWN = 40  # types, those with the most entities


def entity_f1(per_type: dict, path: Path) -> None:
    """F1, precision and recall of each type. ValueError where there is none."""
    if not per_type:
        raise ValueError("there are no entities, neither true nor found")
    chosen = sorted(per_type.items(), key=lambda item: -item[1]["support"])[:SHOWN][::-1]
    figure = _figure(7, 1.5 + 0.35 * len(chosen))
    axes = figure.subplots()
    y = np.arange(len(chosen))
    axes.barh(y, [s["f1"] for _, s in chosen], color="tab:blue", alpha=0.6, label="F1")
    for score, marker in (("precision", ">"), ("recall", "<")):
        axes.plot(
            [s[score] for _, s in chosen], y, marker, color="black", markersize=4, label=score
        )
    names = [f"{_label(name, i)} ({s['support']:,})" for i, (name, s) in enumerate(chosen)]
    axes.set_yticks(y, names, parse_math=False)
    axes.set(xlim=(0, 1.02), xlabel="of whole entities (in brackets: true ones)")
    if len(chosen) < len(per_type):
        axes.set_title(f"the {SHOWN} of {len(per_type):,} types with the most", fontsize=10)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    figure.savefig(path)


def score_histogram(
    truth: Sequence[list[str]], found: Sequence[tuple[list[str], np.ndarray]], path: Path
) -> None:
    """Scores of the entities that were found, right and wrong ones.

    truth: IOB2 tags of each row. found: (tags, scores [words]) of each.
    """
    right, wrong = [], []
    for true, (tags, scores) in zip(truth, found, strict=True):
        true = set(entities_of(true))
        for entity, score in scored_entities(tags, scores):
            (right if entity in true else wrong).append(score)
    figure = _figure(7, 4)
    axes = figure.subplots()
    labels = [f"right ({len(right):,})", f"wrong ({len(wrong):,})"]
    bins = np.linspace(0, 1, 21)
    axes.hist([right, wrong], bins, stacked=True, color=["tab:blue", "tab:orange"], label=labels)
    axes.set(xlabel="score of an entity", ylabel="entities found")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    figure.savefig(path)
