"""The paired cluster bootstrap: documents, then the questions inside, every resample evaluated at once.

A resample is a row of counts, how often each question was drawn, and a metric is a function of such rows
(`rag.eval.metrics.estimator`). Every model and metric sees the same draws, so differences are paired, and metrics that are no
plain means (balanced accuracy, AUROC, quantiles) need nothing of their own. Two stages (Davison and Hinkley 1997, Bootstrap
Methods, 3.8): questions about one document are not independent, and intervals that forget it are too narrow. How well the
intervals hold is simulated by scripts/bench_coverage.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri

from rag.eval.estimators import Estimator, Means, Numbers

FEWEST_CLUSTERS = 5  # with fewer documents, resampling them says nothing
FEWEST_BEYOND = 10  # resamples beyond zero
BATCH = 1000  # resamples evaluated at once; bounds memory
CONFIDENCE = 0.95
POWER = 0.8


@dataclass(frozen=True)
class Interval:
    """A value and its interval; None where either is undefined."""

    value: float | None
    low: float | None
    high: float | None


def drawn_clusters(clusters: Sequence[str]) -> int:
    """How many documents are resampled; 0 where they are too few, or where every question stands alone."""
    count = len(set(clusters))
    return count if FEWEST_CLUSTERS <= count < len(clusters) else 0


def bootstrap(estimators: Sequence[Estimator], clusters: Sequence[str], resamples: int, seed: int) -> Numbers:
    """Every estimator on the same resamples: [estimators, resamples]."""
    return np.concatenate([evaluate_all(estimators, drawn) for drawn in draw_counts(clusters, resamples, seed)], axis=1)


def draw_counts(clusters: Sequence[str], resamples: int, seed: int) -> Iterator[Numbers]:
    """How often each row is drawn, in batches of [resamples, rows]: clusters with replacement, then as many rows
    from each drawn cluster as it has, with replacement; rows alone where clusters are too few."""
    generator = np.random.default_rng(seed)
    names = np.array(clusters if drawn_clusters(clusters) else ["all"] * len(clusters))
    members = [np.flatnonzero(names == name) for name in dict.fromkeys(names.tolist())]
    for start in range(0, resamples, BATCH):
        batch = min(BATCH, resamples - start)
        chosen = generator.multinomial(len(members), np.full(len(members), 1 / len(members)), size=batch)  # [batch, clusters]
        drawn = np.zeros((batch, len(clusters)))
        for place, rows in enumerate(members):
            drawn[:, rows] = generator.multinomial(chosen[:, place] * len(rows), np.full(len(rows), 1 / len(rows)))
        yield drawn


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


def make_interval(value: float, draws: Numbers, confidence: float = CONFIDENCE) -> Interval:
    """The percentile interval of a value; resamples in which it is undefined are left out."""
    defined = draws[~np.isnan(draws)]
    if np.isnan(value) or not len(defined):
        return Interval(None, None, None)
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(value), float(low), float(high))


def detectable_sds(confidence: float = CONFIDENCE) -> float:
    """The true difference, in standard deviations of the draws, whose interval leaves out zero 4 times in 5."""
    return float(ndtri((1 + confidence) / 2) + ndtri(POWER))


def two_sided_p(value: float, draws: Numbers) -> float | None:
    """The p-value of a difference being zero: 1 − the confidence at which its interval would just touch zero; None where undefined.

    Where fewer than FEWEST_BEYOND resamples lie beyond zero, their share says little, and the tail is taken to be a normal one.
    """
    defined = draws[~np.isnan(draws)]
    if np.isnan(value) or not len(defined):
        return None
    beyond = min(int((defined <= 0).sum()), int((defined >= 0).sum()))
    tail, deviation = (beyond + 1) / (len(defined) + 1), float(defined.std())
    if beyond < FEWEST_BEYOND and deviation > 0:
        tail = min(tail, float(ndtr(-abs(value) / deviation)))
    return min(1.0, 2 * tail)


def paired_bootstrap(a: Sequence[float], b: Sequence[float], clusters: Sequence[str] = (), resamples: int = 10_000, seed: int = 0) -> Interval:
    """The mean of b − a over paired values and its 95 % interval."""
    differences = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    names = list(clusters) or [str(place) for place in range(len(differences))]
    mean = Means(((differences, np.ones(len(differences))),))
    return make_interval(float(differences.mean()), bootstrap([mean], names, resamples, seed)[0])
