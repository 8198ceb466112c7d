"""What a difference is worth: paired cluster bootstrap, exact McNemar test, smallest detectable difference.

All resamples are evaluated at once: a resample is a row of counts, how often each question was drawn, and a
metric is a function of such rows (`rag.eval.metrics.estimator`). Every model and metric sees the same draws,
so differences are paired, and metrics that are no plain means (balanced accuracy, AUROC, quantiles) need nothing
of their own. Two stages, documents and then the questions inside (Davison and Hinkley, Bootstrap Methods, 3.8):
questions about one document are not independent, and intervals that forget it are too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rag.eval.metrics import METRICS, Estimator, Numbers, Row, column, estimator
from understudy.records import Question

FEWEST_CLUSTERS = 5  # with fewer documents, resampling them says nothing
BATCH = 1000  # resamples evaluated at once; bounds memory
DETECTABLE_SDS = 1.96 + 0.84  # two-sided 5 % and 80 % power, in standard deviations of the difference


@dataclass(frozen=True)
class Interval:
    """A value and its percentile 95 % interval; None where it is undefined."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class McNemar:
    """Discordant questions, and the exact two-sided p-value of their split being chance."""

    gained: int  # b is 1 where a is 0
    lost: int
    p: float


@dataclass(frozen=True)
class Comparison:
    """b against a on one metric; difference = b − a."""

    a: str
    b: str
    metric: str
    n: int  # questions on which either defines the metric
    difference: float | None
    low: float | None
    high: float | None
    detectable: float | None  # the smallest true difference that this many questions find 4 times in 5
    mcnemar: McNemar | None

    @property
    def is_gain(self) -> bool:
        """Whether the whole interval lies on the better side of zero."""
        return self._beyond_zero(METRICS[self.metric].better)

    @property
    def is_loss(self) -> bool:
        """Whether the whole interval lies on the worse side of zero."""
        return self._beyond_zero({"higher": "lower", "lower": "higher"}.get(METRICS[self.metric].better, ""))

    def _beyond_zero(self, side: str) -> bool:
        if self.low is None or self.high is None:
            return False
        return (side == "higher" and self.low > 0) or (side == "lower" and self.high < 0)


@dataclass(frozen=True)
class Statistics:
    """Everything the report states with an interval."""

    intervals: dict[str, dict[str, Interval]]  # by model, metric
    comparisons: list[Comparison]  # every model but the first against the first
    clusters: int
    resampled: str  # what was drawn, in words


def cluster_of(question: Question) -> str:
    """The document that a question belongs to; a question without one is a cluster of its own."""
    return question.documents[0] if question.documents else f"question {question.id}"


def compute_statistics(rows: dict[str, list[Row]], clusters: Sequence[str], resamples: int = 10_000, seed: int = 0) -> Statistics:
    """Intervals of every model and of its difference to the first; `clusters` names each row's document."""
    keys = [(name, metric) for name in rows for metric in METRICS]
    estimators = [estimator(rows[name], metric) for name, metric in keys]
    points = dict(zip(keys, _evaluate(estimators, np.ones((1, len(clusters))))[:, 0], strict=True))
    draws = dict(zip(keys, bootstrap(estimators, clusters, resamples, seed), strict=True))
    intervals: dict[str, dict[str, Interval]] = {name: {} for name in rows}
    for name, metric in keys:
        intervals[name][metric] = make_interval(points[name, metric], draws[name, metric])
    baseline, *rivals = rows
    comparisons = []
    for b in rivals:
        for metric in METRICS:
            difference = draws[b, metric] - draws[baseline, metric]
            found = make_interval(points[b, metric] - points[baseline, metric], difference)
            spread = float(np.nanstd(difference)) if found.value is not None else None
            is_defined = ~np.isnan(row_values(rows[baseline], metric)) | ~np.isnan(row_values(rows[b], metric))
            detectable = None if spread is None else DETECTABLE_SDS * spread
            test = mcnemar(rows[baseline], rows[b], metric) if METRICS[metric].is_binary else None
            comparisons.append(Comparison(baseline, b, metric, int(is_defined.sum()), found.value, found.low, found.high, detectable, test))
    count = len(set(clusters))
    resampled = "documents, then questions inside" if drawn_clusters(clusters) else "questions only"
    return Statistics(intervals, comparisons, count, resampled)


def drawn_clusters(clusters: Sequence[str]) -> int:
    """How many documents are resampled; 0 where they are too few, or where every question stands alone."""
    count = len(set(clusters))
    return count if FEWEST_CLUSTERS <= count < len(clusters) else 0


def bootstrap(estimators: Sequence[Estimator], clusters: Sequence[str], resamples: int, seed: int) -> Numbers:
    """Every estimator on the same resamples: [estimators, resamples]."""
    return np.concatenate([_evaluate(estimators, drawn) for drawn in draw_counts(clusters, resamples, seed)], axis=1)


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


def make_interval(value: float, draws: Numbers) -> Interval:
    """Percentile 95 % interval; resamples in which the metric is undefined are left out."""
    defined = draws[~np.isnan(draws)]
    if np.isnan(value) or not len(defined):
        return Interval(None, None, None)
    low, high = np.percentile(defined, [2.5, 97.5])
    return Interval(float(value), float(low), float(high))


def paired_bootstrap(a: Sequence[float], b: Sequence[float], clusters: Sequence[str] = (), resamples: int = 10_000, seed: int = 0) -> Interval:
    """The mean of b − a over paired values and its 95 % interval."""
    differences = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)

    def mean(drawn: Numbers) -> Numbers:
        return np.asarray(drawn @ differences / drawn.sum(axis=1))

    names = list(clusters) or [str(place) for place in range(len(differences))]
    return make_interval(float(differences.mean()), bootstrap([mean], names, resamples, seed)[0])


def mcnemar(a: Sequence[Row], b: Sequence[Row], metric: str) -> McNemar:
    """Exact two-sided McNemar test over the rows on which both define the binary metric."""
    before, after = column(a, metric), column(b, metric)
    gained, lost = int(((before == 0) & (after == 1)).sum()), int(((before == 1) & (after == 0)).sum())
    return McNemar(gained, lost, exact_p(gained, lost))


def exact_p(gained: int, lost: int) -> float:
    """The two-sided binomial p-value of a split at least this uneven, at one half."""
    total = gained + lost
    tail: int = sum(math.comb(total, count) for count in range(min(gained, lost) + 1))
    return min(1.0, float(2 * tail / 2**total))


def row_values(rows: Sequence[Row], metric: str) -> Numbers:
    """Each row's own value of a metric; for metrics over all rows, what they are made of."""
    return column(rows, {"validator_auroc": "score", "latency_p50": "seconds", "latency_p95": "seconds"}.get(metric, metric))


def _evaluate(estimators: Sequence[Estimator], drawn: Numbers) -> Numbers:
    return np.stack([evaluate(drawn) for evaluate in estimators])
