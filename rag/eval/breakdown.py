"""The same metrics by document, by type of question and by step, to show where a model is weak."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rag.eval.estimators import rounded
from rag.eval.metrics import Row, aggregate
from rag.eval.stats import cluster_of
from understudy.records import Question, Trace

STEPS = ("plan", "retrieve", "answer", "validate")
ANSWERS = ("token_f1", "citation_precision", "abstention_recall", "false_abstention_rate")
RETRIEVAL = ("recall_at_k", "precision_at_k", "mrr", "ndcg_at_k")
GROUPINGS: dict[str, Callable[[Question], str]] = {
    "document": lambda question: cluster_of(question) if question.documents else "",
    "type": lambda question: question.type,
}


def break_down(questions: Sequence[Question], rows: dict[str, list[Row]]) -> list[dict[str, Any]]:
    """One entry a group with two or more questions: {by, value, n, models: {name: {metric: value}}}; questions without a document or type are left out."""
    entries = []
    for by, value_of in GROUPINGS.items():
        values = [value_of(question) for question in questions]
        for value in sorted({value for value in values if value and values.count(value) > 1}):
            places = [place for place, other in enumerate(values) if other == value]
            metrics = {name: aggregate([of_model[place] for place in places]) for name, of_model in rows.items()}
            models = {name: {metric: rounded(found[metric]) for metric in (*ANSWERS, *RETRIEVAL)} for name, found in metrics.items()}
            entries.append({"by": by, "value": value, "n": len(places), "models": models})
    return entries


def seconds_by_step(traces: Sequence[Trace]) -> dict[str, list[float]]:
    """Seconds of every single step, of every whole run, and until the first token of every answer that was streamed."""
    by_step = {step: [done.seconds for trace in traces for done in trace.steps if done.name == step] for step in STEPS}
    first = [done.first_token_seconds for trace in traces for done in trace.steps if done.name == "answer" and done.first_token_seconds is not None]
    whole = [sum(step.seconds for step in trace.steps) for trace in traces if trace.steps]
    return by_step | {"answer, first token": first, "whole run": whole}


def latency_by_step(traces: Sequence[Trace]) -> dict[str, dict[str, float]]:
    """{step: {n, p50, p95, p99}} in seconds, nearest rank, and {prompt_tokens, cached_tokens, completion_tokens}, means of one such step,
    where it asks a model; steps that never ran are left out."""
    found = {}
    for step, seconds in seconds_by_step(traces).items():
        if seconds:
            ranks = np.percentile(seconds, [50, 95, 99], method="inverted_cdf")
            found[step] = {"n": len(seconds), **{f"p{share}": round(float(rank), 4) for share, rank in zip((50, 95, 99), ranks, strict=True)}}
            done = [one for trace in traces for one in trace.steps if one.name == step and step != "retrieve"]
            for count in ("prompt_tokens", "cached_tokens", "completion_tokens") if done else ():
                found[step][count] = round(float(np.mean([getattr(one.usage, count) for one in done])), 1)
    return found
