"""Which steps of the graph a model goes through, decided by what they brought on its calibration questions.

Without a calibration every step of the graph is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

FEWEST = 40  # questions on which a step may be left out


class Policy(BaseModel):
    """The steps that are taken."""

    model_config = ConfigDict(frozen=True)

    plans_first: bool = True  # a search query is written before the first retrieval, not only before later ones
    completes_quotes: bool = False  # a quote whose beginning stands in one place only is copied from the passage, not written to its end
    asks_verdict: bool = True  # the model is asked for a verdict on its answer
    goes_on_below: float = 1.0  # the score below which another round is begun; never above agent.accept_score


WHOLE_GRAPH = Policy()


def surplus(gains: Sequence[float]) -> float:
    """By how much gains, one a question, add up to more than a standard error of their sum (the one-standard-error rule: Breiman et al.,
    Classification and Regression Trees, 1984)."""
    return sum(gains) - math.sqrt(sum(gain * gain for gain in gains))


def is_worth_taking(gains: Sequence[float]) -> bool:
    """Whether a step brought more than a standard error; too few questions leave nothing out."""
    return len(gains) < FEWEST or surplus(gains) > 0


def worth_going_on_below(scores: Sequence[float], gains: Sequence[float]) -> float:
    """The score below which further rounds brought most beyond a standard error, 0 where they never did; too few questions leave it at 1.

    `scores` are of first rounds, `gains` what the later ones changed.
    """
    if len(scores) < FEWEST:
        return 1.0
    ranked = sorted(zip(scores, gains, strict=True))
    thresholds = [score for score, _ in ranked[1:]] + [1.0]
    worth = [(surplus([gain for score, gain in ranked if score < threshold]), -threshold) for threshold in thresholds]
    most, threshold = max(worth)
    return -threshold if most > 0 else 0.0
