"""Whether explanations depend on what a model has learnt (Adebayo et al. 2018)."""

import copy
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ..dropin import accelerate
from ..train.networks import padded
from ..train.ranking import spearman

if TYPE_CHECKING:
    from .. import data
    from .explainer import Explainer


def untrained(model: nn.Module, seed: int = 0) -> nn.Module:
    """One of the same class and sizes, its weights as the class draws them, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        plain = type(model)(model.config)
    if padded(plain):
        accelerate(plain)
    return plain.to(model.device).eval().requires_grad_(False)


def randomisation(
    explainer: "Explainer", examples: "data.Examples", results: list[dict], max_length: int
) -> dict:
    """For each method the mean over texts of Spearman's correlation of the words' scores with those
    that the same model with random weights gets, and of their absolute values: near 0 where
    scores come of the learnt weights, near 1 where they come of the text alone. Texts of fewer
    than 3 words, or whose scores are all equal, have none.
    """
    other = copy.copy(explainer)
    other.model = untrained(explainer.model)
    targets = [result.get("target") for result in results]
    rivals = other.explained(examples, max_length, targets)
    return {m: _agreement(results, rivals, m) for m in explainer.settings.methods}


def _agreement(results, rivals, method) -> dict:
    plain, absolute = [], []
    for pair in zip(results, rivals, strict=True):
        a, b = (np.array([w["scores"][method] for w in one["words"]], np.float64) for one in pair)
        a, b = a[np.isfinite(a)], b[np.isfinite(b)]
        if len(a) >= 3:
            plain.append(spearman(a, b))
            absolute.append(spearman(abs(a), abs(b)))
    mean = lambda values: float(np.nanmean(values)) if np.isfinite(values).any() else None
    return {
        "spearman": mean(plain),
        "spearman_of_absolute": mean(absolute),
        "texts": int(np.isfinite(plain).sum()),
    }
