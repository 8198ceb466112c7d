"""Intervals by a cluster bootstrap and Student's t: whole documents are drawn, every metric is evaluated on the same draws.

A resample is a row of counts, how often each question was drawn, and a metric is a function of such rows
(`rag.eval.metrics.estimator`). Every model and metric sees the same draws, so differences are paired, and metrics that are no
plain means (balanced accuracy, AUROC, quantiles) need nothing of their own. Questions about one document are not independent, so a
document is drawn with all of its questions (Davison and Hinkley 1997, Bootstrap Methods, 3.8, the first strategy).

With few documents the draws spread too little and their quantiles lie too near: the spread of the draws, times √(G ÷ (G − 1)), is the
standard error, and the interval is the value ± Student's t times that (Cameron and Miller 2015, A Practitioner's Guide to
Cluster-Robust Inference, VI). Its degrees of freedom are the effective number of documents less one, (Σ n)² ÷ Σ n² for n questions each, because
documents of unequal size tell less than as many equal ones (Carter, Schnepel and Steigerwald 2017, Asymptotic Behavior of a t-Test Robust to
Cluster Heterogeneity, at full correlation). How well the intervals hold is simulated by scripts/bench_coverage.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit

from rag.eval.estimators import Estimator, Means, Numbers

FEWEST_CLUSTERS = 5  # with fewer documents, resampling them says nothing
BATCH = 1000  # resamples evaluated at once; bounds memory
CONFIDENCE = 0.95
POWER = 0.8


@dataclass(frozen=True)
class Interval:
    """A value and its interval; None where either is undefined."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Precision:
    """How well a value is known: its standard error, and the degrees of freedom of the t distribution that goes with it."""

    error: float
    freedom: float
    units: int  # documents, or questions that stand alone

    def interval(self, value: float, confidence: float = CONFIDENCE, bounds: tuple[float, float] = (-np.inf, np.inf)) -> Interval:
        """The value ± t standard errors, within the bounds of what it can be; no ends where a single unit tells it."""
        if np.isnan(value):
            return Interval(None, None, None)
        if self.freedom <= 0 or np.isnan(self.error):
            return Interval(float(value), None, None)
        margin = critical(self.freedom, confidence) * self.error
        return Interval(float(value), float(max(value - margin, bounds[0])), float(min(value + margin, bounds[1])))

    def detectable(self, confidence: float = CONFIDENCE) -> float | None:
        """The true difference whose interval leaves out zero 4 times in 5; None where there is no interval."""
        if self.freedom <= 0 or np.isnan(self.error):
            return None
        return (critical(self.freedom, confidence) + float(stdtrit(self.freedom, POWER))) * self.error

    def p(self, value: float) -> float | None:
        """The two-sided p-value of zero: 1 − the confidence at which the interval would just touch it; None where there is no interval.

        Where the value does not vary at all, that of as many equal signs (the sign test).
        """
        if np.isnan(value) or self.freedom <= 0 or np.isnan(self.error):
            return None
        if self.error <= 0:
            return 1.0 if value == 0 else min(1.0, 2.0 ** (1 - self.units))
        return min(1.0, 2 * float(stdtr(self.freedom, -abs(value) / self.error)))


def critical(freedom: float, confidence: float = CONFIDENCE) -> float:
    """Student's t that the middle `confidence` of the distribution lies within."""
    return float(stdtrit(freedom, (1 + confidence) / 2))


def measure(draws: Numbers, units: Sequence[str]) -> Precision:
    """The precision of a value by its draws [resamples]; `units` names what was drawn of each row that defines it.

    Resamples in which it is undefined are left out.
    """
    sizes = np.array(list(Counter(units).values()), dtype=np.float64)
    if len(sizes) < 2:
        return Precision(float("nan"), 0.0, len(sizes))
    return Precision(float(standard_errors(draws[None, :], len(sizes))[0]), float(sizes.sum() ** 2 / (sizes**2).sum() - 1), len(sizes))


def standard_errors(draws: Numbers, units: int) -> Numbers:
    """Spread of the draws [values, resamples] → [values], for that many units: a bootstrap of few spreads too little by √((G − 1) ÷ G)."""
    enough = (~np.isnan(draws)).sum(axis=1) > 1
    found = np.full(len(draws), np.nan)
    found[enough] = np.nanstd(draws[enough], axis=1) * np.sqrt(units / (units - 1))
    return found


def drawn_clusters(clusters: Sequence[str]) -> int:
    """How many documents are resampled; 0 where they are too few, or where every question stands alone."""
    count = len(set(clusters))
    return count if FEWEST_CLUSTERS <= count < len(clusters) else 0


def drawn_units(clusters: Sequence[str]) -> list[str]:
    """What each row is drawn with: its document, or itself where documents are too few."""
    return list(clusters) if drawn_clusters(clusters) else [str(place) for place in range(len(clusters))]


def bootstrap(estimators: Sequence[Estimator], clusters: Sequence[str], resamples: int, seed: int) -> Numbers:
    """Every estimator on the same resamples: [estimators, resamples]."""
    return np.concatenate([evaluate_all(estimators, drawn) for drawn in draw_counts(clusters, resamples, seed)], axis=1)


def draw_counts(clusters: Sequence[str], resamples: int, seed: int) -> Iterator[Numbers]:
    """How often each row is drawn, in batches of [resamples, rows]: as many units as there are, with replacement, each with all of its rows."""
    generator = np.random.default_rng(seed)
    names, places = np.unique(drawn_units(clusters), return_inverse=True)
    for start in range(0, resamples, BATCH):
        chosen = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=min(BATCH, resamples - start))  # [batch, units]
        yield chosen[:, places].astype(np.float64)


def evaluate_all(estimators: Sequence[Estimator], drawn: Numbers) -> Numbers:
    """[estimators, resamples]; all means together take one product of matrices."""
    columns = [column for estimate in estimators if isinstance(estimate, Means) for part in estimate.parts for column in part]
    sums = iter((drawn @ np.stack(columns, axis=1)).T) if columns else iter(())
    found = []
    for estimate in estimators:
        if isinstance(estimate, Means):
            found.append(estimate.of_sums([(next(sums), next(sums)) for _ in estimate.parts]))
        else:
            found.append(estimate(drawn))
    return np.stack(found)


def paired_bootstrap(a: Sequence[float], b: Sequence[float], clusters: Sequence[str] = (), resamples: int = 10_000, seed: int = 0) -> Interval:
    """The mean of b − a over paired values and its 95 % interval."""
    differences = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    names = list(clusters) or [str(place) for place in range(len(differences))]
    mean = Means(((differences, np.ones(len(differences))),))
    return measure(bootstrap([mean], names, resamples, seed)[0], drawn_units(names)).interval(float(differences.mean()))
