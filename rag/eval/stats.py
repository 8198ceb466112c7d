"""What a difference is worth: its interval, p-values corrected for looking at many, effect size, smallest detectable difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from rag.eval.coverage import simulated_coverage
from rag.eval.estimators import Numbers
from rag.eval.metrics import METRICS, QUANTILES, Row, column, estimator
from rag.eval.resampling import CONFIDENCE, Interval, Precision, bootstrap, drawn_clusters, drawn_units, evaluate_all, measure
from understudy.records import Question

OVER_ALL_ROWS = {"validator_auroc": "score", "calibration_error": "score", **{metric: key for metric, (key, _) in QUANTILES.items()}}
VERDICT_METRICS = ("token_f1", "citation_precision", "citation_recall", "abstention_accuracy")
LEAST_COVERAGE = 0.93  # of 95 % intervals, by simulation; below it the questions are called too few


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
    p: float | None = None  # two-sided, of the bootstrap
    p_holm: float | None = None  # corrected for the comparisons of its family: the verdict's metrics, or all the others
    effect_size: float | None = None  # Cohen's d of the paired differences; None for metrics over all rows at once
    coverage: float | None = None  # how often such an interval holds the truth, simulated; None: nothing so small was simulated

    @property
    def is_gain(self) -> bool:
        """Whether the whole interval lies on the better side of zero."""
        return self._beyond_zero(METRICS[self.metric].better)

    @property
    def is_loss(self) -> bool:
        """Whether the whole interval lies on the worse side of zero."""
        return self._beyond_zero({"higher": "lower", "lower": "higher"}.get(METRICS[self.metric].better, ""))

    @property
    def is_too_small(self) -> bool:
        """Whether there are too few questions or documents for the interval to mean what it says."""
        return self.difference is not None and (self.coverage is None or self.coverage < LEAST_COVERAGE)

    def _beyond_zero(self, side: str) -> bool:
        if self.low is None or self.high is None:
            return False
        return (side == "higher" and self.low > 0) or (side == "lower" and self.high < 0)


@dataclass(frozen=True)
class Draws:
    """Every metric of every model, measured and on the same resamples, so that any two models can be compared."""

    rows: dict[str, list[Row]]
    clusters: Sequence[str]
    points: dict[tuple[str, str], float]  # by (model, metric); NaN where undefined
    resampled: dict[tuple[str, str], Numbers]  # [resamples]

    def interval(self, name: str, metric: str) -> Interval:
        """A model's metric with its interval."""
        bounds = (0.0, 1.0 if METRICS[metric].unit == "share" else np.inf)
        return self._precision(metric, self.resampled[name, metric], name).interval(self.points[name, metric], bounds=bounds)

    def difference(self, a: str, b: str, metric: str, confidence: float = CONFIDENCE) -> Interval:
        """b − a with its interval."""
        bounds = (-1.0, 1.0) if METRICS[metric].unit == "share" else (-np.inf, np.inf)
        return self.precision(a, b, metric).interval(self.points[b, metric] - self.points[a, metric], confidence, bounds)

    def precision(self, a: str, b: str, metric: str) -> Precision:
        """How well b − a is known."""
        return self._precision(metric, self.resampled[b, metric] - self.resampled[a, metric], a, b)

    def _precision(self, metric: str, draws: Numbers, *names: str) -> Precision:
        units = drawn_units(self.clusters)
        return measure(draws, [units[place] for place in np.flatnonzero(self.defined(metric, *names))])

    def compare(self, a: str, b: str, metric: str) -> Comparison:
        """b against a on one metric, before any correction."""
        found, is_defined = self.difference(a, b, metric), self.defined(metric, a, b)
        n, precision = int(is_defined.sum()), self.precision(a, b, metric)
        test = mcnemar(self.rows[a], self.rows[b], metric) if METRICS[metric].is_binary else None
        if found.value is None:
            return Comparison(a, b, metric, n, None, None, None, None, test)
        documents = round(precision.freedom + 1) if drawn_clusters(self.clusters) else 0
        return Comparison(
            *(a, b, metric, n, found.value, found.low, found.high),
            detectable=precision.detectable(),
            mcnemar=test,
            p=precision.p(found.value),
            effect_size=effect_size(self.rows[a], self.rows[b], metric),
            coverage=simulated_coverage(n, documents, skewness(self.rows[a], self.rows[b], metric)),
        )

    def defined(self, metric: str, *names: str) -> np.ndarray:
        """Whether any of the models defines the metric on a row, [rows]."""
        return np.asarray(np.any([~np.isnan(row_values(self.rows[name], metric)) for name in names], axis=0))


@dataclass(frozen=True)
class Statistics:
    """Everything the report states with an interval."""

    intervals: dict[str, dict[str, Interval]]  # by model, metric
    comparisons: list[Comparison]  # every model but the first against the first
    clusters: int
    resampled: str  # what was drawn, in words
    draws: Draws = field(compare=False, repr=False)


def cluster_of(question: Question) -> str:
    """The document that a question belongs to; a question without one is a cluster of its own."""
    return question.documents[0] if question.documents else f"question {question.id}"


def compute_statistics(rows: dict[str, list[Row]], clusters: Sequence[str], resamples: int = 10_000, seed: int = 0) -> Statistics:
    """Intervals of every model and of its difference to the first; `clusters` names each row's document."""
    draws = draw(rows, clusters, resamples, seed)
    intervals = {name: {metric: draws.interval(name, metric) for metric in METRICS} for name in rows}
    baseline, *rivals = rows
    comparisons = correct([draws.compare(baseline, b, metric) for b in rivals for metric in METRICS])
    resampled = "documents" if drawn_clusters(clusters) else "questions alone"
    return Statistics(intervals, comparisons, len(set(clusters)), resampled, draws)


def draw(rows: dict[str, list[Row]], clusters: Sequence[str], resamples: int, seed: int) -> Draws:
    """Evaluate every metric of every model on the same resamples."""
    keys = [(name, metric) for name in rows for metric in METRICS]
    estimators = [estimator(rows[name], metric) for name, metric in keys]
    points = dict(zip(keys, evaluate_all(estimators, np.ones((1, len(clusters))))[:, 0].tolist(), strict=True))
    return Draws(rows, clusters, points, dict(zip(keys, bootstrap(estimators, clusters, resamples, seed), strict=True)))


def correct(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons with p-values that allow for their number: the verdict's metrics are one family, set beforehand, all others another."""
    corrected: dict[int, float] = {}
    for is_verdicts in (True, False):
        family = [place for place, found in enumerate(comparisons) if found.p is not None and (found.metric in VERDICT_METRICS) == is_verdicts]
        corrected |= dict(zip(family, holm([comparisons[place].p or 0.0 for place in family]), strict=True))
    return [replace(comparison, p_holm=corrected.get(place)) for place, comparison in enumerate(comparisons)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) step-down correction: with these, any false alarm at all is as unlikely as one p-value says."""
    corrected, highest = [0.0] * len(p_values), 0.0
    for step, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        highest = max(highest, min(1.0, (len(p_values) - step) * p_values[place]))
        corrected[place] = highest
    return corrected


def paired_differences(a: Sequence[Row], b: Sequence[Row], metric: str) -> np.ndarray:
    """b − a over the rows that both define [pairs]; empty for metrics over all rows at once."""
    if metric in OVER_ALL_ROWS:
        return np.empty(0)
    differences = column(b, metric) - column(a, metric)
    defined: np.ndarray = differences[~np.isnan(differences)]
    return defined


def effect_size(a: Sequence[Row], b: Sequence[Row], metric: str) -> float | None:
    """Cohen's d of the paired differences: their mean ÷ their standard deviation, over the rows that both define.

    None for metrics over all rows at once, and where the differences do not vary.
    """
    differences = paired_differences(a, b, metric)
    deviation = float(differences.std(ddof=1)) if len(differences) > 1 else 0.0
    return float(differences.mean()) / deviation if deviation > 0 else None


def skewness(a: Sequence[Row], b: Sequence[Row], metric: str) -> float | None:
    """How lopsided the paired differences are, without its sign: what makes t intervals of few of them miss (Johnson 1978, Modified t Tests).

    None for metrics over all rows at once, and where the differences do not vary.
    """
    differences = paired_differences(a, b, metric)
    if not len(differences) or np.ptp(differences) == 0:
        return None
    around = differences - differences.mean()
    return float(abs((around**3).mean()) / (around**2).mean() ** 1.5)


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
    return column(rows, OVER_ALL_ROWS.get(metric, metric))
