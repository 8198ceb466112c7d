"""Metrics as functions of how often each row was drawn, so that a bootstrap evaluates all resamples at once.

Where no drawn row defines the metric, the result is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Estimator = Callable[[Numbers], Numbers]  # how often each row was drawn [resamples, rows] → the metric [resamples]


@dataclass(frozen=True)
class Means:
    """An estimator that is the mean of ratios of sums: each part holds a row's share of the numerator and of the denominator."""

    parts: tuple[tuple[Numbers, Numbers], ...]

    def __call__(self, drawn: Numbers) -> Numbers:
        """How often each row was drawn [resamples, rows] → [resamples]; NaN where no drawn row defines a part."""
        return self.of_sums([(drawn @ numerator, drawn @ denominator) for numerator, denominator in self.parts])

    def of_sums(self, sums: Sequence[tuple[Numbers, Numbers]]) -> Numbers:
        """The same from the sums of each part, so that those of many metrics can be taken in one product of matrices."""
        return np.asarray(sum(ratio(numerator, denominator) for numerator, denominator in sums) / len(sums))


def mean(values: Numbers, weights: Numbers | None = None) -> Means:
    """The (weighted) mean over the rows where the value is defined."""
    counted = np.where(np.isnan(values), 0.0, 1.0 if weights is None else weights)
    return Means(((np.where(counted > 0, values, 0.0) * counted, counted),))


def quantile(values: Numbers, share: float) -> Estimator:
    """The smallest value that at least `share` of the drawn rows do not exceed (nearest rank)."""
    order = np.argsort(values)[: int((~np.isnan(values)).sum())]
    if not len(order):
        return lambda drawn: np.full(len(drawn), np.nan)

    def evaluate(drawn: Numbers) -> Numbers:
        cumulated = np.cumsum(drawn[:, order], axis=1)  # [resamples, defined rows]
        total = cumulated[:, -1:]
        places = (cumulated < share * total - 1e-9).sum(axis=1).clip(max=len(order) - 1)
        return np.where(total[:, 0] > 0, values[order][places], np.nan)

    return evaluate


def auroc(scores: Numbers, is_right: Numbers) -> Estimator:
    """Area under the ROC curve, as a Mann–Whitney statistic, by one pass over the sorted scores; rows without either are left out."""
    known = np.flatnonzero(~np.isnan(scores) & ~np.isnan(is_right))
    order = known[np.argsort(scores[known], kind="stable")]
    right, wrong = (is_right[order] == 1).astype(np.float64), (is_right[order] == 0).astype(np.float64)
    first = np.searchsorted(scores[order], scores[order], side="left")  # of each score's ties
    end = np.searchsorted(scores[order], scores[order], side="right")

    def evaluate(drawn: Numbers) -> Numbers:
        sorted_draws = drawn[:, order]
        below = np.concatenate([np.zeros((len(drawn), 1)), np.cumsum(sorted_draws * wrong, axis=1)], axis=1)
        of_right = sorted_draws * right
        wins = (of_right * (below[:, first] + below[:, end])).sum(axis=1) / 2
        return ratio(wins, of_right.sum(axis=1) * below[:, -1])

    return evaluate


def ratio(numerator: Numbers, denominator: Numbers) -> Numbers:
    """NaN where the denominator is 0."""
    quotient: Numbers = np.divide(numerator, denominator, out=np.full(len(numerator), np.nan), where=denominator > 0)
    return quotient


def rounded(value: float | None) -> float | None:
    """As reports hold a figure: to six decimals."""
    return None if value is None else round(value, 6)
