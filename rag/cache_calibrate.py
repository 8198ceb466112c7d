"""Labelled pairs of questions, for the cache's decision: read, fitted, and measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rag.cache_decision import Features, Parameters, believe, features, fit_parameters, prior_probability
from rag.cache_guard import Comparison, compare
from understudy.errors import UsageError
from understudy.files import numbered_rows

FEWEST = 50  # pairs that pass the guard, and of each label among them FEWEST_OF_A_KIND
FEWEST_OF_A_KIND = 10


@dataclass(frozen=True)
class Pair:
    """Two questions, and whether one answer is right for both."""

    a: str
    b: str
    same: bool
    kind: str = ""


@dataclass(frozen=True)
class Measured:
    """A pair as the cache sees it."""

    pair: Pair
    cosine: float
    comparison: Comparison

    @property
    def features(self) -> Features:
        """What the prior weighs."""
        return features(self.cosine, self.comparison)


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a JSONL file of {a, b, same}; raises UsageError naming the line."""
    pairs = []
    for number, row in numbered_rows(path):
        a, b, same = row.get("a"), row.get("b"), row.get("same")
        if not isinstance(a, str) or not isinstance(b, str) or not isinstance(same, bool):
            raise UsageError(f"{path} line {number} is no labelled pair", 'write {"a": question, "b": question, "same": true or false}')
        pairs.append(Pair(a, b, same, str(row.get("kind", ""))))
    return pairs


def measure_pairs(pairs: Sequence[Pair], embed: Callable[[list[str]], np.ndarray]) -> list[Measured]:
    """Every pair with its cosine and the guard's comparison; each question is embedded once."""
    questions = list(dict.fromkeys(question for pair in pairs for question in (pair.a, pair.b)))
    vectors = dict(zip(questions, embed(questions), strict=True)) if questions else {}
    return [Measured(pair, float(vectors[pair.a] @ vectors[pair.b]), compare(pair.a, pair.b)) for pair in pairs]


def calibrate(measured: Sequence[Measured], entry_sd: float) -> Parameters:
    """The prior that the pairs which pass the guard support; raises UsageError where they are too few."""
    passing = [one for one in measured if not one.comparison.findings]
    same = sum(one.pair.same for one in passing)
    if len(passing) < FEWEST or min(same, len(passing) - same) < FEWEST_OF_A_KIND:
        raise UsageError(
            f"{len(passing)} pairs pass the guard, {same} of them the same: too few to fit",
            f"label {FEWEST} pairs or more that differ in no number, name or negation, {FEWEST_OF_A_KIND} of each label",
        )
    return fit_parameters([one.features for one in passing], [one.pair.same for one in passing], entry_sd)


def hits_among(measured: Sequence[Measured], parameters: Parameters, error_bound: float) -> list[Measured]:
    """The pairs that would be hits of an entry of which nothing has been observed."""
    return [
        one
        for one in measured
        if not one.comparison.findings and believe(parameters, prior_probability(parameters, one.cosine, one.comparison), []).lower >= 1 - error_bound
    ]


def wilson(count: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (1927); (0, 1) of nothing."""
    if not total:
        return 0.0, 1.0
    share, square = count / total, z * z
    middle = (share + square / (2 * total)) / (1 + square / total)
    half = z * math.sqrt(share * (1 - share) / total + square / (4 * total * total)) / (1 + square / total)
    return max(0.0, middle - half), min(1.0, middle + half)
