"""Fit a model's validation score and its decision to abstain, on questions that are neither trained on nor evaluated."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rag.agent import Tools, run_agent
from rag.eval.metrics import score_trace, validator_auroc
from rag.prompts import PROMPT_VERSION
from rag.retrieve import Retriever
from rag.validation import ANSWERABLE_SIGNALS, RIGHT_SIGNALS, SIGNALS, Calibration, fit_logistic, write_calibration
from understudy.digests import digest_of
from understudy.errors import EndpointError
from understudy.progress import Progress
from understudy.records import Question, Trace

FOLDS = 5


def calibration_key(questions_digest: str, retriever: Retriever, weights: str) -> str:
    """Digest of everything a calibration rests on; `weights` is the digest of the model's."""
    return digest_of([questions_digest, retriever.generation, retriever.settings.model_dump(), PROMPT_VERSION, weights])


async def calibrate(
    questions: list[Question], key: str, tools: Tools, folder: Path, concurrency: int, progress: Callable[[str, int], Progress]
) -> dict[str, Any]:
    """Run the agent once over the questions, fit, keep the calibration in the folder; returns the command's JSON. Raises EndpointError."""
    once = replace(tools, settings=tools.settings.model_copy(update={"max_rounds": 1, "mode": "agentic"}), calibration=None, teacher=None)
    gate = asyncio.Semaphore(concurrency)
    with progress("calibrating", len(questions)) as bar:

        async def ask(question: Question) -> Trace:
            async with gate:
                trace = await run_agent(question.question, once)
                bar.advance()
                return trace

        async with tools:
            traces = await asyncio.gather(*(ask(question) for question in questions))
    whole = [(trace, question) for trace, question in zip(traces, questions, strict=True) if trace.complete and question.has_answer_key]
    if not whole:
        raise EndpointError("no calibration question was answered", traces[0].metadata.get("error", "see the engine's log"))
    calibration = fit_calibration(key, tools, whole)
    write_calibration(folder, calibration)
    return calibration_json(calibration)


def fit_calibration(key: str, tools: Tools, answered: list[tuple[Trace, Question]]) -> Calibration:
    """The calibration of whole runs over questions with an answer key."""
    rows = [{name: float(str(trace.steps[-1].parsed[name])) for name in SIGNALS} for trace, _ in answered]
    given = [i for i, (trace, _) in enumerate(answered) if not trace.abstained]
    right = [bool(score_trace(answered[i][0], answered[i][1], tools.retriever.chunks)["is_right"]) for i in given]
    answerable = [question.answerable for _, question in answered]
    scores = cross_validated(RIGHT_SIGNALS, [rows[i] for i in given], right)
    odds = cross_validated(ANSWERABLE_SIGNALS, rows, answerable, balanced=True)
    kinds = [[(p >= 0.5) == kind for p, is_kind in zip(odds, answerable, strict=True) if is_kind == kind] for kind in (True, False)] if odds else []
    return Calibration(
        key=key,
        model=tools.client.model.name,
        questions=len(answered),
        right=fit_logistic(RIGHT_SIGNALS, [rows[i] for i in given], right),
        answerable=fit_logistic(ANSWERABLE_SIGNALS, rows, answerable, balanced=True),
        auroc=validator_auroc(scores, right) if scores else None,
        abstention_accuracy=sum(sum(kind) / len(kind) for kind in kinds) / 2 if kinds else None,
    )


def calibration_json(calibration: Calibration) -> dict[str, Any]:
    """The `calibrate` command's JSON."""
    fits = {"right": calibration.right, "answerable": calibration.answerable}
    return {
        "model": calibration.model,
        "questions": calibration.questions,
        "auroc": calibration.auroc,
        "abstention_accuracy": calibration.abstention_accuracy,
        "weights": {name: dict(zip(fit.signals, fit.weights, strict=True)) for name, fit in fits.items() if fit},
    }


def cross_validated(signals: tuple[str, ...], rows: list[dict[str, float]], labels: list[bool], balanced: bool = False) -> list[float] | None:
    """A probability for each row by a fit without its own fold; None where a fold's rest has one label."""
    order = np.random.default_rng(0).permutation(len(rows))
    scores = [0.0] * len(rows)
    for fold in range(FOLDS):
        held = set(order[fold::FOLDS].tolist())
        rest = [i for i in range(len(rows)) if i not in held]
        fitted = fit_logistic(signals, [rows[i] for i in rest], [labels[i] for i in rest], balanced)
        if fitted is None:
            return None
        for i in held:
            scores[i] = fitted.probability(rows[i])
    return scores
