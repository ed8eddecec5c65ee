"""How well documents are ranked for queries, and how well scores follow others."""

from collections.abc import Sequence

import numpy as np

AT = 10  # the ranks that count


def ranked(scores: np.ndarray) -> np.ndarray:
    """Positions from the best down; equal scores in their order."""
    return np.argsort(-np.asarray(scores, np.float64), kind="stable")


def reciprocal_rank(
    scores: Sequence[float] | np.ndarray, labels: Sequence[float] | np.ndarray, at: int = AT
) -> float:
    """1 / the rank of the best relevant document (label above 0), 0 where that is beyond `at`
    (Craswell 2009)."""
    hits = np.flatnonzero(np.asarray(labels)[ranked(scores)][:at] > 0)
    return 1.0 / (hits[0] + 1) if len(hits) else 0.0


def ndcg(
    scores: Sequence[float] | np.ndarray, labels: Sequence[float] | np.ndarray, at: int = AT
) -> float:
    """Discounted cumulative gain, labels as gains and log2(rank + 1) as discounts, over the best
    possible (Jaervelin and Kekaelaeinen 2002)."""
    labels = np.asarray(labels, np.float64)
    discounts = 1 / np.log2(np.arange(2, min(at, len(labels)) + 2))
    gain = lambda order: float(labels[order][:at] @ discounts)
    return gain(ranked(scores)) / gain(ranked(labels))


def average_precision(
    scores: Sequence[float] | np.ndarray, labels: Sequence[float] | np.ndarray
) -> float:
    """The mean of precisions at the ranks of relevant documents."""
    hits = np.asarray(labels)[ranked(scores)] > 0
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return float(precision[hits].mean())


def of_queries(
    scores: Sequence[float] | np.ndarray,
    labels: Sequence[float] | np.ndarray,
    groups: list[np.ndarray],
) -> dict:
    """Means over queries that have a relevant document; `queries`, and `unanswerable` ones."""
    own = [(scores[g], labels[g]) for g in groups if (labels[g] > 0).any()]
    mean = lambda measure: float(np.mean([measure(*pair) for pair in own])) if own else float("nan")
    return {
        f"mrr@{AT}": mean(reciprocal_rank),
        f"ndcg@{AT}": mean(ndcg),
        "map": mean(average_precision),
        "queries": len(own),
        "unanswerable": len(groups) - len(own),
    }


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """The correlation of ranks; NaN where all of one side are equal."""
    from scipy import stats

    return float(stats.spearmanr(a, b)[0]) if np.ptp(a) and np.ptp(b) else float("nan")


def agreement(scores: Sequence[float] | np.ndarray, labels: Sequence[float] | np.ndarray) -> dict:
    """Spearman's and Pearson's correlations and the mean squared error; NaN where either side's
    values are all equal."""
    varied = np.ptp(scores) > 0 and np.ptp(labels) > 0
    scores, labels = scores.astype(np.float64), labels.astype(np.float64)
    return {
        "spearman": spearman(scores, labels),
        "pearson": float(np.corrcoef(scores, labels)[0, 1]) if varied else float("nan"),
        "mse": float(np.mean((scores - labels) ** 2)),
    }
