"""Metrics of a task, by scikit-learn."""

import math

import numpy as np

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


def predicted(logits: np.ndarray, task: str) -> np.ndarray:
    """Class ids [n], flags [n, classes] where p > 1/2, or numbers [n]."""
    if task == "regression":
        return logits[:, 0]
    return logits > 0 if task == "multi_label" else logits.argmax(1)


def summary(logits: np.ndarray, targets: np.ndarray, task: str, loss: float) -> dict:
    """The figures that a validation prints: floats by name, NaN where there is no such figure (r2
    and pearson of equal targets; all of logits that are not finite)."""
    from sklearn import metrics as sk

    if not np.isfinite(logits).all():
        return dict.fromkeys(METRICS[task], math.nan)
    y = predicted(logits, task)
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


def full(logits, targets, task: str, names, loss: float) -> dict:
    """`summary`, and precision, recall and F1 by macro and micro average and by class."""
    from sklearn import metrics as sk

    result = summary(logits, targets, task, loss) | {"examples": len(targets)}
    if task == "regression" or not np.isfinite(logits).all():
        return result
    y = predicted(logits, task)
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
