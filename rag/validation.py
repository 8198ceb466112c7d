"""The validation score: signals that tell right answers from wrong ones, weighed on a calibration split.

One-token verdicts of a small model are near chance, while the likelihood it gave its own answer is
informative and free; a logistic regression over both, fitted on questions of their own, makes the score.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from rag.prompts import Answer, parse_score
from understudy.client import Completion
from understudy.files import read_json, write_json

FILE = "calibration.json"
SIGNALS = ("verdict", "answer_logprob", "lowest_logprob", "verbatim", "abstained", "abstained_logprob")
RIDGE = 1.0  # L2 penalty: a calibration split is small


class Calibration(BaseModel):
    """Weights of the standardised signals; the score is a logistic function of their sum."""

    model_config = ConfigDict(frozen=True)

    key: str  # digest of what it was fitted on: questions, corpus, prompts, retrieval
    model: str
    means: list[float]
    scales: list[float]
    weights: list[float]
    bias: float
    questions: int
    auroc: float | None

    def score(self, signals: dict[str, float]) -> float:
        """Probability in [0, 1] that the answer is right."""
        x = (np.array([signals[name] for name in SIGNALS]) - self.means) / self.scales
        return float(1 / (1 + math.exp(-float(x @ np.array(self.weights) + self.bias))))


def signals_of(answer: Answer, verbatim: float, written: Completion | None, verdict: float | None) -> dict[str, float]:
    """The signals of one answer; `verbatim` is the share of its quotes that stand in the passages shown."""
    mean = (written.mean_logprob if written else None) or 0.0
    lowest = min(written.logprobs) if written and written.logprobs else 0.0
    return {
        "verdict": 0.5 if verdict is None else verdict,
        "answer_logprob": mean,
        "lowest_logprob": lowest,
        "verbatim": verbatim,
        "abstained": float(answer.abstained),
        "abstained_logprob": mean if answer.abstained else 0.0,
    }


def read_verdict(completion: Completion) -> float | None:
    """The validator's probability of "right": from the first token's log-probabilities, else from its text."""
    likely = {token.strip(): math.exp(logprob) for token, logprob in completion.first_alternatives.items()}
    right, wrong = likely.get("1", 0.0), likely.get("0", 0.0)
    if right + wrong > 0:
        return right / (right + wrong)
    return parse_score(completion.text)


def plain_score(signals: dict[str, float]) -> float:
    """The score of a model without a calibration: its verdict, halved for each quote's share that is not verbatim."""
    return signals["verdict"] * (1.0 if signals["abstained"] else 0.5 + 0.5 * signals["verbatim"])


def fit_calibration(key: str, model: str, rows: list[dict[str, float]], right: list[bool], auroc: float | None) -> Calibration | None:
    """Ridge logistic regression by Newton's method; None where all answers are right, or all wrong."""
    if len(set(right)) < 2:
        return None
    x = np.array([[row[name] for name in SIGNALS] for row in rows])
    means, scales = x.mean(axis=0), np.where(x.std(axis=0) > 1e-9, x.std(axis=0), 1.0)
    design = np.column_stack([(x - means) / scales, np.ones(len(x))])
    y = np.array(right, dtype=float)
    penalty = np.diag([RIDGE] * len(SIGNALS) + [0.0])
    beta = np.zeros(design.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-design @ beta))
        step = np.linalg.solve(design.T @ (design * (p * (1 - p))[:, None]) + penalty + 1e-9 * np.eye(len(beta)), design.T @ (y - p) - penalty @ beta)
        beta += step
        if np.abs(step).max() < 1e-8:
            break
    return Calibration(
        key=key, model=model, means=means.tolist(), scales=scales.tolist(), weights=beta[:-1].tolist(), bias=float(beta[-1]), questions=len(rows), auroc=auroc
    )


def read_calibration(folder: Path) -> Calibration | None:
    """The calibration kept beside an adapter, or None."""
    path = folder / FILE
    return Calibration.model_validate(read_json(path)) if path.exists() else None


def write_calibration(folder: Path, calibration: Calibration) -> None:
    """Keep a calibration beside an adapter."""
    write_json(folder / FILE, calibration.model_dump())
