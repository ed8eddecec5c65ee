"""How well losses tell who was trained on (Yeom et al., arXiv:1709.01604)."""

import numpy as np

MOST = 10_000  # rows of each side


def membership_auc(members: np.ndarray, others: np.ndarray) -> float:
    """The chance that a member's loss is below another's, ties by half: 0.5 tells nothing.

    members, others: losses [n], [m] of rows trained on, and of rows that were not.
    """
    others = np.sort(np.asarray(others, np.float64))
    below = [np.searchsorted(others, members, side) for side in ("left", "right")]
    return float(1 - np.mean(below) / len(others))


def spread(rows: list) -> list:
    """Up to MOST of them, evenly spread."""
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), MOST)).round().astype(int)
    return [rows[i] for i in chosen]
