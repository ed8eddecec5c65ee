"""Figures of a classifier by group: fairlearn's, with bootstrap intervals."""

from collections.abc import Sequence
from functools import partial
from types import ModuleType

import numpy as np

from . import intervals

SMALL = 30  # rows that a figure is of, below which it is said to be weak
RATES = ("selection_rate", "true_positive_rate", "false_positive_rate")


def fairlearn() -> ModuleType:
    """fairlearn.metrics. RuntimeError where it isn't installed."""
    try:
        from fairlearn import metrics
    except ImportError as e:
        raise RuntimeError(f"{e}: figures by group need pip install 'bertfast[audit]'") from None
    return metrics


def by_group(
    truth: np.ndarray,
    said: np.ndarray,
    group: np.ndarray,
    classes: Sequence[int],
    samples: int = intervals.SAMPLES,
    seed: int = 0,
) -> dict:
    """Figures of each group, of all rows, and how far apart the groups are.

    Args:
        truth, said: int64 [rows], the classes that are right and the predicted ones.
        group: str [rows], two groups or more.
        classes: ids of those whose rates count, each against all others.

    Returns: {"metrics": {"accuracy", "macro_f1"}, "rates": {class: {*RATES}}}, of each {"groups":
    {name: figure | {"apart"}}, "overall", "difference", "ratio"}, and in a class "equalized_odds"
    {"difference", "ratio"}; "demographic_parity" is that of the selection rate. A figure is
    {"value", "low", "high"}, NaN where there is none: of a true positive rate of a group without
    positives, which the differences then leave out (fairlearn's own functions take it for 0).
    Macro F1 is over the classes that occur in the group. "apart": the interval of the group's
    figure less that of all rows leaves out 0, and it is of `SMALL` rows or more: of few, that all
    are right or wrong, the bootstrap knows no doubt.
    """
    truth, said, group = map(np.asarray, (truth, said, group))
    names, code = np.unique(group, return_inverse=True)
    kinds, counts = np.unique(np.stack([code, truth, said]), axis=1, return_counts=True)
    table = _Table(kinds, len(names))
    frame = partial(fairlearn().MetricFrame, sensitive_features=group)
    drawn = partial(intervals.resampled, counts, samples=samples, seed=seed)
    sizes = table.rows(counts, kinds[1] >= 0)
    overall = frame(metrics=_overall(), y_true=truth, y_pred=said)
    found = {
        "metrics": {
            name: _block(names, overall, name, drawn(getattr(table, name)), sizes)
            for name in ("accuracy", "macro_f1")
        },
        "rates": {},
    }
    for c in classes:
        own = frame(metrics=_rates(), y_true=truth == c, y_pred=said == c)
        rates = drawn(lambda n, c=c: table.rates(n, c))  # [samples, 3, groups + 1]
        positives = table.rows(counts, kinds[1] == c)
        of = sizes, positives, sizes - positives
        one = {name: _block(names, own, name, rates[:, i], of[i]) for i, name in enumerate(RATES)}
        one["demographic_parity"] = {k: one["selection_rate"][k] for k in ("difference", "ratio")}
        one["equalized_odds"] = _equalized_odds(own, rates[:, 1:, :-1])
        found["rates"][int(c)] = one
    return found


def _overall() -> dict:
    from sklearn import metrics as sk

    f1 = partial(sk.f1_score, average="macro", zero_division=0)
    return {"accuracy": sk.accuracy_score, "macro_f1": f1}


def _rates() -> dict:
    own = fairlearn()

    def where_any(rate, of):
        """NaN where no row is `of` the truth that the rate is of."""
        return lambda y, s: rate(y, s, pos_label=True) if (np.asarray(y) == of).any() else np.nan

    return {
        "selection_rate": partial(own.selection_rate, pos_label=True),
        "true_positive_rate": where_any(own.true_positive_rate, True),
        "false_positive_rate": where_any(own.false_positive_rate, False),
    }


def _block(names, frame, metric, drawn, sizes) -> dict:
    """A metric of fairlearn's frame, its intervals by what is drawn: [samples, groups + 1]. sizes:
    how many rows it is of, in each group."""
    groups, total = drawn[:, :-1], drawn[:, -1:]
    gap = intervals.percentiles(groups - total)
    apart = ((gap[0] > 0) | (gap[1] < 0)) & (sizes[:-1] >= SMALL)
    ends, values = intervals.percentiles(drawn), frame.by_group[metric]
    own = {
        str(name): _figure(values[name], ends[:, i]) | {"apart": bool(apart[i])}
        for i, name in enumerate(names)
    }
    return {
        "groups": own,
        "overall": _figure(frame.overall[metric], ends[:, -1]),
        "difference": _figure(frame.difference()[metric], intervals.percentiles(_spread(groups))),
        "ratio": _figure(frame.ratio()[metric], intervals.percentiles(_ratio(groups))),
    }


def _equalized_odds(frame, drawn) -> dict:
    """The worse of the two rates'. drawn: [samples, 2, groups]."""
    both = ["true_positive_rate", "false_positive_rate"]
    apart, ratio = _known(_spread(drawn), -np.inf).max(1), _known(_ratio(drawn), np.inf).min(1)
    apart, ratio = (np.where(np.isfinite(v), v, np.nan) for v in (apart, ratio))
    return {
        "difference": _figure(frame.difference()[both].max(), intervals.percentiles(apart)),
        "ratio": _figure(frame.ratio()[both].min(), intervals.percentiles(ratio)),
    }


def _figure(value, ends) -> dict:
    return dict(zip(("value", "low", "high"), map(float, (value, *ends)), strict=True))


def _known(drawn, least):
    """NaN as what no maximum (or minimum) takes."""
    return np.where(np.isnan(drawn), least, drawn)


def _spread(drawn):
    spread = _known(drawn, -np.inf).max(-1) - _known(drawn, np.inf).min(-1)
    return np.where(np.isfinite(spread), spread, np.nan)


def _ratio(drawn):
    return _divided(_known(drawn, np.inf).min(-1), _known(drawn, -np.inf).max(-1))


def _divided(a, b):
    """NaN for nothing of nothing."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.divide(a, b, out=np.full(a.shape, np.nan), where=b > 0)


class _Table:
    """Figures of many tables at once that say how often each kind of row occurs. A bootstrap's draw
    of rows is a multinomial draw of those numbers.

    kinds: int64 [3, kinds]: group, truth and prediction. Its methods take int64 [n, kinds] and give
    fp64 [n, groups + 1], the last of all rows.
    """

    def __init__(self, kinds, groups: int):
        self.code, self.truth, self.said = kinds
        self.group = np.concatenate([np.eye(groups)[self.code], np.ones((kinds.shape[1], 1))], 1)

    def rows(self, counts, of) -> np.ndarray:
        """Those whose kind is `of` bool [kinds]."""
        return counts @ (self.group * np.asarray(of)[:, None])

    def accuracy(self, counts):
        right = self.rows(counts, self.truth == self.said)
        return _divided(right, self.rows(counts, self.truth >= 0))

    def macro_f1(self, counts):
        total = present = 0.0
        for c in np.union1d(self.truth, self.said):
            right = self.rows(counts, (self.truth == c) & (self.said == c))
            either = self.rows(counts, self.truth == c) + self.rows(counts, self.said == c)
            total = total + np.nan_to_num(_divided(2 * right, either))
            present = present + (either > 0)
        return _divided(total, present)

    def rates(self, counts, c):
        """[n, 3, groups + 1], as `RATES`."""
        truth, said = self.truth == c, self.said == c
        parts = (said, truth | True), (truth & said, truth), (~truth & said, ~truth)
        shares = (_divided(self.rows(counts, a), self.rows(counts, b)) for a, b in parts)
        return np.stack([*shares], 1)
