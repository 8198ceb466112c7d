"""Weigh log-probabilities of the served adapter against those of PEFT.

The checks rest on rows, not tokens (a row's tokens are not independent), and put the burden of proof on the adapter: a bound
that the data cannot place below the limit does not pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serve.check import Check

SIGN_LIMIT = 0.01  # one-sided p
NOISE_LIMIT = 1.5  # the adapter's distance in units of the engine's noise
ENGINE_NOISE_LIMIT = 0.25  # nats a token; bf16 engines measured 0.05–0.14, weights of another quantisation 0.64 (135M)
EPSILON = 0.002  # nats a token: keeps ratios finite where an engine computes exactly as PEFT does
CONFIDENCE, RESAMPLES = 0.95, 10_000

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Distances:
    """Mean |difference| of log-probability per answer token, one value a row, in nats."""

    to_adapter: Floats  # served adapter and PEFT with the adapter
    to_base: Floats  # served adapter and PEFT without it
    noise: Floats  # served base and PEFT without the adapter: what the engine's arithmetic alone does
    change: Floats  # served adapter and served base

    def means(self) -> dict[str, float]:
        """Over the rows, for people."""
        return {name: round(float(getattr(self, name).mean()), 4) for name in ("to_adapter", "to_base", "noise", "change")}


def weigh(distances: Distances, seconds: float = 0.0) -> list[Check]:
    """The four checks over log-probabilities.

    nearer_to_trained    the served adapter is nearer to PEFT with the adapter than to PEFT without it, row by row: the
                         one-sided p of a paired sign test
    within_engine_noise  its distance from PEFT is at most 1.5 times that of the base, which is the engine's arithmetic alone
    engine_noise         that distance of the base is itself what rounding explains: otherwise it would excuse anything
    changes_the_base     served adapter and served base are further apart than that noise

    Values of the last three are 95 % upper bounds of a bootstrap that draws whole rows, both sides of a ratio together.
    Below seven rows the sign test could not reach its limit however right the adapter is, and a bootstrap means nothing.
    """
    rows = len(distances.noise)
    undecided = 0.5**rows > SIGN_LIMIT
    if rows == 0:
        return [Check(name, 1.0, 0.0, "no rows", 0.0, True) for name in ("nearer_to_trained", "within_engine_noise", "engine_noise", "changes_the_base")]
    mean = distances.means()
    nearer = int((distances.to_adapter < distances.to_base).sum())
    ones = np.ones(rows)
    findings = [
        (
            "nearer_to_trained",
            sign_test(distances.to_adapter, distances.to_base),
            SIGN_LIMIT,
            f"{nearer} of {rows} rows nearer to PEFT with the adapter than without",
        ),
        (
            "within_engine_noise",
            ratio_bound(distances.to_adapter + EPSILON, distances.noise + EPSILON),
            NOISE_LIMIT,
            f"{mean['to_adapter']} nats a token from PEFT; the base {mean['noise']}",
        ),
        ("engine_noise", ratio_bound(distances.noise, ones), ENGINE_NOISE_LIMIT, f"{mean['noise']} nats a token between the base served and by PEFT"),
        (
            "changes_the_base",
            ratio_bound(distances.noise + EPSILON, distances.change + EPSILON),
            1.0,
            f"{mean['change']} nats a token from the served base; the engine's noise is {mean['noise']}",
        ),
    ]
    return [Check(name, value, limit, detail, seconds / len(findings), undecided) for name, value, limit, detail in findings]


def sign_test(smaller: Floats, larger: Floats) -> float:
    """One-sided p of the paired sign test that the first is smaller: P(at least as many wins | heads and tails). Ties say nothing."""
    wins, losses = int((smaller < larger).sum()), int((smaller > larger).sum())
    trials = wins + losses
    return sum(math.comb(trials, k) for k in range(wins, trials + 1)) / (1 << trials)


def ratio_bound(numerator: Floats, denominator: Floats) -> float:
    """Upper bound of mean(numerator) ÷ mean(denominator) by a paired percentile bootstrap over rows; the same rows, the same bound."""
    picks = np.random.default_rng(0).integers(0, len(numerator), (RESAMPLES, len(numerator)))
    ratios = numerator[picks].sum(axis=1) / denominator[picks].sum(axis=1)
    return float(np.quantile(ratios, CONFIDENCE))
