"""How far two raters agree beyond chance (Cohen 1960: A coefficient of agreement for nominal scales), and what raters prefer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from rag.eval.contest import PREFERENCES, Contest
from rag.eval.estimators import Estimator, Numbers, mean, ratio, rounded
from rag.eval.labels import Choice
from rag.eval.resampling import bootstrap, drawn_units, measure

CHOICES: tuple[Choice, ...] = ("a", "tie", "b")
RESAMPLES = 2_000
WORTH: Mapping[Choice | None, float] = {"a": -1.0, "tie": 0.0, "b": 1.0, None: np.nan}


def kappa_estimator(first: Sequence[Choice | None], second: Sequence[Choice | None]) -> Estimator:
    """Cohen's kappa, in [-1, 1], as a function of how often each item was drawn; NaN without any, and where chance alone would agree always."""
    cells = np.zeros((len(first), len(CHOICES) ** 2))  # [items, cells of the table]
    for place, (one, other) in enumerate(zip(first, second, strict=True)):
        if one and other:
            cells[place, CHOICES.index(one) * len(CHOICES) + CHOICES.index(other)] = 1.0

    def evaluate(drawn: Numbers) -> Numbers:
        table = (drawn @ cells).reshape(len(drawn), len(CHOICES), len(CHOICES))
        total = table.sum(axis=(1, 2))
        observed = ratio(np.trace(table, axis1=1, axis2=2), total)
        by_chance = ratio((table.sum(axis=1) * table.sum(axis=2)).sum(axis=1), total**2)
        possible = 1 - by_chance
        return ratio(observed - by_chance, np.where(possible > 1e-12, possible, 0.0))

    return evaluate


def agreement(first: Sequence[Choice | None], second: Sequence[Choice | None], clusters: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """{n, observed, kappa, low, high}: the share of equal ratings, and kappa with its 95 % interval, by the paired cluster bootstrap."""
    both = [(one, other) for one, other in zip(first, second, strict=True) if one and other]
    found = _interval(kappa_estimator(first, second), clusters, [bool(one and other) for one, other in zip(first, second, strict=True)], seed)
    observed = sum(one == other for one, other in both) / len(both) if both else None
    return {"n": len(both), "observed": rounded(observed), "kappa": found["value"], "low": found["low"], "high": found["high"]}


def summarise(contest: Contest, choices: Sequence[Choice | None], others: Mapping[str, Sequence[Choice | None]], seed: int = 0) -> dict[str, Any]:
    """What a rater prefers, and how far it agrees with the judge-free metrics and with `others`, by name.

    `preference` is the mean of −1 where it prefers a, 0 for a tie, 1 where it prefers b.
    """
    raters = {metric: contest.preferences(metric) for metric in PREFERENCES} | dict(others)
    return {
        "a": contest.a,
        "b": contest.b,
        "n": sum(choice is not None for choice in choices),
        "counts": {choice: sum(given == choice for given in choices) for choice in CHOICES},
        "preference": _interval(mean(np.array([WORTH[choice] for choice in choices])), contest.clusters, [choice is not None for choice in choices], seed),
        "agreement": {name: agreement(choices, of_other, contest.clusters, seed) for name, of_other in raters.items()},
    }


def share(flags: Sequence[bool | None], clusters: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """{value, low, high} of how often a flag is set; None is left out."""
    return _interval(
        mean(np.array([np.nan if flag is None else float(flag) for flag in flags])), clusters, [flag is not None for flag in flags], seed, least=0.0
    )


def _interval(estimate: Estimator, clusters: Sequence[str], rated: Sequence[bool], seed: int, least: float = -1.0) -> dict[str, Any]:
    """{value, low, high} of what lies between `least` and 1; `rated` says which items it is about."""
    value = float(estimate(np.ones((1, len(clusters))))[0])
    units = [unit for unit, is_rated in zip(drawn_units(clusters), rated, strict=True) if is_rated]
    found = measure(bootstrap([estimate], clusters, RESAMPLES, seed)[0], units).interval(value, bounds=(least, 1.0))
    return {key: rounded(of_key) for key, of_key in asdict(found).items()}
