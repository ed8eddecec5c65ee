"""95% intervals: percentiles of a bootstrap (Efron 1979), and Wilson's of a share (1927)."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..data.errors import ConfigError

SAMPLES = 1000
_LEVEL = (0.025, 0.975)
_Z = 1.959963984540054  # of the normal distribution at 0.975
_CELLS = 1 << 22  # numbers drawn at a time


def percentiles(samples: np.ndarray) -> np.ndarray:
    """[samples, ...] -> [2, ...], without what is NaN; NaN where all are."""
    out = np.full((2, *samples.shape[1:]), np.nan)
    known = ~np.isnan(samples).all(0)
    out[:, known] = np.nanquantile(samples[:, known], _LEVEL, axis=0)
    return out


def check(**settings: Any) -> None:
    """ConfigError where a number is below 1."""
    for name, value in settings.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}, expected 1 or more")


def resampled(
    counts: np.ndarray, figures: Callable[[np.ndarray], Any], samples: int, seed: int
) -> np.ndarray:
    """`figures` of tables drawn with replacement from one whose kinds of rows occur `counts`
    times: of int64 [n, kinds] fp64 [n, ...], together [samples, ...]."""
    rng, total = np.random.default_rng(seed), int(counts.sum())
    part = max(1, min(samples, _CELLS // len(counts)))
    sizes = [min(part, samples - start) for start in range(0, samples, part)]
    return np.concatenate([figures(rng.multinomial(total, counts / total, size=n)) for n in sizes])


def of_mean(values: np.ndarray, samples: int = SAMPLES, seed: int = 0) -> list[dict]:
    """Of fp64 [n, k], n > 0: of each column {"mean", "low", "high"}."""
    n = len(values)
    drawn = resampled(np.ones(n), lambda counts: counts @ values / n, samples, seed)
    rows = zip(values.mean(0), *percentiles(drawn), strict=True)
    return [dict(zip(("mean", "low", "high"), map(float, row), strict=True)) for row in rows]


def of_share(k: int, n: int) -> dict:
    """Of k of n: {"share", "low", "high"}; a share of 0 or 1 has an interval too, which no
    bootstrap gives it. NaN of none."""
    if n == 0:
        return dict.fromkeys(("share", "low", "high"), math.nan)
    share, z2 = k / n, _Z**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return {"share": share, "low": low, "high": high}
