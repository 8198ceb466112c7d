"""A test that may be looked at after every observation: whether a bounded quantity's mean lies above a limit.

Test by betting (Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS B 86(1), 2024): a gambler
stakes a fixed part of his wealth on each next value being above the limit. While the mean, given what came before, is at most the limit,
his wealth is a non-negative supermartingale, so by Ville's inequality it ever reaches 1/alpha with probability at most alpha. Nothing
else is assumed: no variance, no normality, no number of observations set beforehand. A gambler of each of several stakes, with an equal
part of the money, makes another such wealth that grows nearly as fast as the best of them.
"""

from __future__ import annotations

import math

import numpy as np

STAKES = np.array([0.05, 0.1, 0.2, 0.35, 0.55, 0.75, 0.95])  # of the largest stake that can lose no more than everything


class MeanAbove:
    """Evidence that values in [low, ∞) have a mean above `limit`, which is above `low`."""

    def __init__(self, low: float, limit: float) -> None:
        self.low, self.limit = low, limit
        self.count, self.total = 0, 0.0
        self._stakes = STAKES / (limit - low)
        self._logs = np.zeros(len(STAKES))  # of each gambler's wealth, who begins with 1

    def add(self, value: float) -> None:
        """Take the next value, at least `low`."""
        self.count += 1
        self.total += value
        self._logs += np.log1p(self._stakes * (value - self.limit))

    @property
    def log_wealth(self) -> float:
        """Natural logarithm of the mean wealth; 0 at the beginning."""
        return float(np.logaddexp.reduce(self._logs) - math.log(len(STAKES)))

    def rejects(self, alpha: float) -> bool:
        """Whether the mean is above the limit, at a false-alarm rate of `alpha` over all looks together."""
        return self.log_wealth >= -math.log(alpha)
