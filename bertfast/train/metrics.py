"""Metrics of a task, by scikit-learn."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from .config import METRICS


def probabilities(logits: np.ndarray, task: str) -> np.ndarray:
    """Softmax over classes, a sigmoid each, or the numbers themselves; fp64 [n, outputs]."""
    logits = logits.astype(np.float64)
    if task == "regression":
        return logits
    if task == "multi_label":
        return 1 / (1 + np.exp(-np.clip(logits, -500, 500)))
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def predicted(
    logits: np.ndarray, task: str, thresholds: Sequence[float] | None = None
) -> np.ndarray:
    """Class ids [n], flags [n, classes] where p > 1/2 (or thresholds [classes]), or numbers [n]."""
    if task == "regression":
        return logits[:, 0]
    if task == "multi_label" and thresholds is not None:
        return probabilities(logits, task) > np.asarray(thresholds)
    return logits > 0 if task == "multi_label" else logits.argmax(1)


def mean_loss(logits: np.ndarray, targets: Sequence[Any] | np.ndarray, task: str) -> float:
    """Of logits [n, outputs], as a model's own loss without weights."""
    logits, targets = torch.from_numpy(logits), torch.from_numpy(targets)
    if task == "regression":
        return F.mse_loss(logits[:, 0], targets.float()).item()
    if task == "multi_label":
        return F.binary_cross_entropy_with_logits(logits, targets.float()).item()
    return F.cross_entropy(logits, targets).item()


def best_thresholds(logits: np.ndarray, targets: Sequence[Any] | np.ndarray) -> list[float]:
    """For each class of a multi-label task the probability above which its F1 is largest: midway
    between two neighbours of the sorted ones, the lowest of equals nearest 1/2; 1/2 for a class
    that no row has."""
    found = []
    for p, truth in zip(probabilities(logits, "multi_label").T, targets.T > 0, strict=True):
        order = np.argsort(-p, kind="stable")
        p, right = p[order], np.cumsum(truth[order])
        f1 = 2 * right / (np.arange(1, len(p) + 1) + max(1, truth.sum()))
        f1[:-1][p[:-1] == p[1:]] = -1  # no threshold is between equals
        below = np.append(p[1:], 0.0)
        middle = (p + below) / 2
        best = np.flatnonzero(f1 == f1.max())
        nearest = best[np.argmin(np.abs(middle[best] - 0.5))]
        found.append(float(middle[nearest]) if truth.any() else 0.5)
    return found


def summary(
    logits: np.ndarray,
    targets: np.ndarray,
    task: str,
    loss: float,
    cut: Sequence[float] | None = None,
) -> dict:
    """The figures that a validation prints: floats by name, NaN where there is no such figure (r2
    and pearson of equal targets; all of logits that are not finite). cut: `predicted`'s
    thresholds."""
    from sklearn import metrics as sk

    if not np.isfinite(logits).all():
        return dict.fromkeys(METRICS[task], math.nan)
    y = predicted(logits, task, cut)
    if task == "regression":
        varies = np.ptp(targets) > 0
        return {
            "loss": loss,
            "mse": float(sk.mean_squared_error(targets, y)),
            "mae": float(sk.mean_absolute_error(targets, y)),
            "r2": float(sk.r2_score(targets, y)) if varies else math.nan,
            "pearson": _pearson(targets, y) if varies else math.nan,
        }
    labels = _present(targets, y, logits.shape[1], task)
    score = lambda average: float(
        sk.f1_score(targets, y, average=average, labels=labels, zero_division=0)
    )
    return {
        "loss": loss,
        "accuracy": float(sk.accuracy_score(targets, y)),
        "macro_f1": score("macro"),
        "micro_f1": score("micro"),
    }


def _pearson(targets, y) -> float:
    return float(np.corrcoef(targets, y)[0, 1]) if np.ptp(y) > 0 else 0.0


def _present(targets, y, classes, task):
    """Macro averages run over the classes that occur, as scikit-learn's default does."""
    if task == "multi_label":
        return list(range(classes))
    return sorted(set(np.unique(targets)) | set(np.unique(y)))


def full(
    logits: np.ndarray,
    targets: np.ndarray,
    task: str,
    names: Sequence[str],
    loss: float,
    cut: Sequence[float] | None = None,
) -> dict:
    """`summary`, and precision, recall and F1 by macro and micro average and by class."""
    from sklearn import metrics as sk

    result = summary(logits, targets, task, loss, cut) | {"examples": len(targets)}
    if task == "regression" or not np.isfinite(logits).all():
        return result
    y = predicted(logits, task, cut)
    labels = _present(targets, y, logits.shape[1], task)
    for average in ("macro", "micro"):
        p, r, f, _ = sk.precision_recall_fscore_support(
            targets, y, average=average, labels=labels, zero_division=0
        )
        result[average] = {"precision": float(p), "recall": float(r), "f1": float(f)}
    rows = sk.precision_recall_fscore_support(
        targets, y, labels=list(range(len(names))), zero_division=0
    )
    result["per_class"] = {
        name: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
        for name, p, r, f, s in zip(names, *rows, strict=True)
    }
    return result
