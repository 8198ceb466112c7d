"""Fit a model's validation score on questions that are neither trained on nor evaluated."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rag.agent import Tools, run_agent
from rag.eval.metrics import score_trace, validator_auroc
from rag.prompts import PROMPT_VERSION
from rag.retrieve import Retriever
from rag.validation import SIGNALS, Calibration, fit_calibration, write_calibration
from understudy.digests import digest_of
from understudy.errors import EndpointError
from understudy.progress import Progress
from understudy.records import Question, Trace

FOLDS = 5


def calibration_key(questions_digest: str, retriever: Retriever) -> str:
    """Digest of everything a calibration rests on, besides its adapter."""
    return digest_of([questions_digest, retriever.generation, retriever.settings.model_dump(), PROMPT_VERSION])


async def calibrate(
    questions: list[Question], key: str, tools: Tools, folder: Path, concurrency: int, progress: Callable[[str, int], Progress]
) -> dict[str, Any]:
    """Run the agent once over the questions, fit the score, keep it beside the adapter; returns the command's JSON."""
    once = Tools(tools.client, tools.retriever, tools.settings.model_copy(update={"max_rounds": 1}))
    gate = asyncio.Semaphore(concurrency)
    with progress("calibrating", len(questions)) as bar:

        async def ask(question: Question) -> Trace:
            async with gate:
                trace = await run_agent(question.question, once)
                bar.advance()
                return trace

        async with tools.client:
            traces = await asyncio.gather(*(ask(question) for question in questions))
    whole = [(trace, question) for trace, question in zip(traces, questions, strict=True) if trace.complete and question.has_answer_key]
    if not whole:
        raise EndpointError("no calibration question was answered", traces[0].metadata.get("error", "see the engine's log"))
    rows = [{name: float(str(trace.steps[-1].parsed[name])) for name in SIGNALS} for trace, _ in whole]
    right = [bool(score_trace(trace, question, tools.retriever.chunks)["is_right"]) for trace, question in whole]
    calibration = fit_calibration(key, tools.client.model.name, rows, right, cross_validated_auroc(rows, right))
    if calibration:
        write_calibration(folder, calibration)
    return calibration_json(tools.client.model.name, len(whole), calibration)


def calibration_json(model: str, questions: int, calibration: Calibration | None) -> dict[str, Any]:
    """The `calibrate` command's JSON."""
    return {
        "model": model,
        "questions": questions,
        "auroc": calibration.auroc if calibration else None,
        "weights": dict(zip(SIGNALS, calibration.weights, strict=True)) if calibration else {},
    }


def cross_validated_auroc(rows: list[dict[str, float]], right: list[bool]) -> float | None:
    """AUROC of scores that each come from a fit without their own fold; None where a fold's rest has one class."""
    order = np.random.default_rng(0).permutation(len(rows))
    scores = [0.0] * len(rows)
    for fold in range(FOLDS):
        held = set(order[fold::FOLDS].tolist())
        rest = [i for i in range(len(rows)) if i not in held]
        fitted: Calibration | None = fit_calibration("", "fold", [rows[i] for i in rest], [right[i] for i in rest], None)
        if fitted is None:
            return None
        for i in held:
            scores[i] = fitted.score(rows[i])
    return validator_auroc(scores, right)
