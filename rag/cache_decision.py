"""When a cached answer may be given: a threshold for each entry, learnt online under an error bound that the user sets.

After vCache (Schroeder et al., "vCache: Verified Semantic Prompt Caching", ICLR 2026, arXiv 2502.03771): an entry has its own
logistic model of P(correct | similarity), fitted on what was observed of it, and answers only where a confidence bound on that
probability, minimised over a grid of confidence levels ε as there, allows it. Four departures:

- vCache starts each entry with nothing and explores until six observations are there. Here the logistic has a prior, fitted on
  labelled pairs, over more than the cosine: what the guard found the wordings not to share. An entry's threshold departs from it
  as observations come.
- vCache bounds wrong answers per request, and so answers at random with probability δ / (1 - α) where the bound α is too low.
  Here the bound is per hit: below 1 - δ nothing is ever served, so δ holds among the answers people see.
- An entry that was wrong for a question never answers one that is no nearer: a person's correction holds at once.
- Where it would answer, a small share of questions (`audit`) runs anyway: an entry that turned wrong is found out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
from pydantic import BaseModel, ConfigDict

from rag.cache_guard import Comparison
from understudy.cache_records import CacheObservation
from understudy.files import read_json, write_json

FILE = "cache.json"
SURE = 1e-6  # probabilities are kept this far from 0 and 1
ROUNDING = 0.01  # log-odds: embeddings of one text differ in their last bits from batch to batch
EPSILONS = np.geomspace(1e-5, 0.5, 40)  # confidence levels of the grid: the threshold lies higher with probability ε
QUANTILES = np.array([NormalDist().inv_cdf(1 - epsilon) for epsilon in EPSILONS])
PRIOR_WEIGHTS = (-1.0, -1.0, -1.0, -1.0)  # what is believed of the features before any pair: distance and every word cost
PRIOR_PRECISION = 0.1
Features = tuple[float, float, float, float]


class Parameters(BaseModel):
    """The prior of every entry: log-odds that the cached answer is right = bias + weights · features."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: Features
    bias: float
    entry_sd: float  # standard deviation of an entry's threshold around the prior's, log-odds
    pairs: int  # that it was fitted on


@dataclass(frozen=True)
class Belief:
    """What is believed of one entry for one question."""

    prior: float  # probability that the answer is right, by the prior alone
    probability: float  # with what was observed of the entry
    lower: float  # confidence bound; 0 where the entry was wrong for a question as near as this one
    threshold: float  # of the entry, log-odds; 0 is the prior's
    observations: int


def features(cosine: float, comparison: Comparison) -> Features:
    """Distance in tenths of cosine; whether any content word differs; how many were exchanged; how many only one question has."""
    missing, added = len(comparison.missing), len(comparison.added)
    return (10.0 * (1.0 - cosine), float(missing + added > 0), float(min(missing, added)), float(abs(missing - added)))


def prior_probability(parameters: Parameters, cosine: float, comparison: Comparison) -> float:
    """Probability in (0, 1) that an answer is right for a question, before anything is known of its entry."""
    return _logistic(parameters.bias + float(np.dot(parameters.weights, features(cosine, comparison))))


def believe(parameters: Parameters, prior: float, observations: Sequence[CacheObservation]) -> Belief:
    """The entry's threshold by its observations (maximum a posteriori, Laplace's variance), and the bound for this question.

    An observation's similarity is the prior probability that the question had.
    """
    x = np.array([_log_odds(seen.similarity) for seen in observations])
    y = np.array([seen.correct for seen in observations], dtype=float)
    threshold, precision = 0.0, 1.0 / parameters.entry_sd**2
    for _ in range(30):
        p = 1.0 / (1.0 + np.exp(np.clip(threshold - x, -30, 30)))
        curvature = precision + float(np.sum(p * (1 - p)))
        step = (float(np.sum(p - y)) - precision * threshold) / curvature
        threshold += max(-1.0, min(1.0, step))
        if abs(step) < 1e-6:
            break
    here = _log_odds(prior) - threshold
    bounds = (1 - EPSILONS) / (1 + np.exp(np.clip(QUANTILES / math.sqrt(curvature) - here, -30, 30)))
    is_barred = bool(np.any((y == 0) & (x >= _log_odds(prior) - ROUNDING)))
    return Belief(prior, _logistic(here), 0.0 if is_barred else float(bounds.max()), threshold, len(observations))


def fit_parameters(rows: Sequence[Features], labels: Sequence[bool], entry_sd: float) -> Parameters:
    """Logistic regression of the labels, by Newton's method with halved steps, shrunk towards PRIOR_WEIGHTS; the bias is free."""
    design = np.column_stack([np.array(rows, dtype=float).reshape(len(rows), -1), np.ones(len(rows))])
    y, believed = np.array(labels, dtype=float), np.array([*PRIOR_WEIGHTS, 0.0])
    penalty = np.diag([PRIOR_PRECISION] * len(PRIOR_WEIGHTS) + [1e-3])

    def loss(beta: np.ndarray) -> float:
        z = design @ beta
        return float(np.sum(np.logaddexp(0.0, z) - y * z) + 0.5 * (beta - believed) @ penalty @ (beta - believed))

    beta = believed.copy()
    for _ in range(100):
        p = 1.0 / (1.0 + np.exp(np.clip(-design @ beta, -30, 30)))
        curvature = design.T @ (design * (p * (1 - p))[:, None]) + penalty
        step = np.linalg.solve(curvature, design.T @ (y - p) - penalty @ (beta - believed))
        while np.abs(step).max() > 1e-9 and loss(beta + step) > loss(beta):
            step = step / 2
        beta = beta + step
        if np.abs(step).max() < 1e-8:
            break
    *weights, bias = (float(value) for value in beta)
    first, second, third, fourth = (min(weight, 0.0) for weight in weights)  # nearer is never worse
    return Parameters(weights=(first, second, third, fourth), bias=bias, entry_sd=entry_sd, pairs=len(rows))


def read_parameters(folder: Path) -> Parameters:
    """What `cache calibrate` kept in the folder, else DEFAULT."""
    path = folder / FILE
    return Parameters.model_validate(read_json(path)) if path.exists() else DEFAULT


def write_parameters(folder: Path, parameters: Parameters) -> None:
    """Keep parameters."""
    write_json(folder / FILE, parameters.model_dump())


def _logistic(log_odds: float) -> float:
    return 0.5 + 0.5 * math.tanh(0.5 * log_odds)


def _log_odds(probability: float) -> float:
    kept = min(1 - SURE, max(SURE, probability))
    return math.log(kept / (1 - kept))


# Fitted on samples/cache-pairs/calibration.jsonl with EMBEDDER (`scripts/bench cache` fits it again).
EMBEDDER = "all-minilm-l6-v2"
DEFAULT = Parameters(weights=(-3.0, -4.9, -1.37, 0.0), bias=7.98, entry_sd=0.5, pairs=193)
