"""Whether scores mean what they say: the reliability curve, and the expected calibration error over its bands."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rag.eval.estimators import Estimator, Numbers, ratio

BANDS = 10  # equal ones of [0, 1], as in Guo et al. 2017, On Calibration of Modern Neural Networks


@dataclass(frozen=True)
class Band:
    """The answers whose score lies in one band."""

    score: float  # mean
    share_right: float
    count: int


def reliability_curve(scores: Numbers, is_right: Numbers) -> list[Band]:
    """The bands that hold answers, lowest score first."""
    bands = _bands(scores)
    held = [bands == band for band in range(BANDS)]
    return [Band(float(scores[h].mean()), float(is_right[h].mean()), int(h.sum())) for h in held if h.any()]


def calibration_error(scores: Numbers, is_right: Numbers) -> Estimator:
    """Expected calibration error, in [0, 1], as a function of how often each answer was drawn, [resamples, answers] → [resamples]:
    the mean over the answers of |share right − mean score| of the band they are in. NaN where none was drawn.
    """
    inside = (_bands(scores)[:, None] == np.arange(BANDS)[None, :]).astype(np.float64)  # [answers, bands]
    gaps = inside * (is_right - scores)[:, None]

    def evaluate(drawn: Numbers) -> Numbers:
        total = drawn.sum(axis=1)
        distance = np.abs(drawn @ gaps).sum(axis=1)
        return ratio(distance, total)

    return evaluate


def _bands(scores: Numbers) -> NDArray[np.int64]:
    """Each score's band; a score on an edge belongs to the upper one, 1.0 to the last."""
    return np.clip((scores * BANDS).astype(np.int64), 0, BANDS - 1)
