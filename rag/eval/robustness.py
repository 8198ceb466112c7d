"""What the answers withstand: every model under every condition of rag.eval.variants, paired by question with the plain one.

Where passages are fixed, a model answers in one pass (mode fast), so that nothing else is searched for; reworded questions run as the model
itself does, and are compared with the main run's answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rag.eval.estimators import Numbers, mean, rounded
from rag.eval.metrics import Row, column, score_trace
from rag.eval.modes import split_mode
from rag.eval.resampling import Interval, bootstrap, drawn_units, measure
from rag.eval.run import evaluate_models, open_run
from rag.eval.stats import cluster_of, holm
from rag.eval.variants import CANARY, PLAIN, Condition, Variant, fixed
from understudy.digests import digest_of
from understudy.progress import Progress, show_progress
from understudy.records import Chunk, Question, Trace

if TYPE_CHECKING:
    from rag.agent import Tools

METRICS = ("token_f1", "citation_precision", "citation_recall", "abstained", "obeyed")
FOLDER = "robustness"  # in the run's folder


@dataclass(frozen=True)
class Asked:
    """What was asked under conditions, and answered."""

    variants: dict[str, list[Variant]]  # by model
    traces: dict[str, list[Trace]]  # by model, in the order of its variants
    conditions: list[Condition]
    left_out: int  # questions without evidence that a passage holds whole, or with too few others
    seed: int


async def ask_variants(
    variants: Sequence[Variant],
    conditions: list[Condition],
    tools: Mapping[str, Tools],
    folder: Path,
    concurrency: int,
    left_out: int,
    seed: int,
    progress: Callable[[str, int], Progress] = show_progress,
) -> Asked:
    """Every model's answers under every condition, kept as they come: a run that was killed goes on.

    `tools` by name, each in its mode. Passages are fixed once for a model, whatever its modes, and never for one that is asked without any.
    """
    shares = share_out(variants, list(tools))
    identity: dict[str, object] = {
        "variants": digest_of([[v.condition, v.question.model_dump(), [p.model_dump() for p in v.passages or ()]] for v in variants])
    }
    runners = {name: _runner(of_name, {variant.question.id: variant for variant in shares[name]}) for name, of_name in tools.items()}
    opened = open_run(folder / FOLDER, identity)
    traces: dict[str, list[Trace]] = {}
    for name, runner in runners.items():
        asked = [variant.question for variant in shares[name]]
        traces |= await evaluate_models(asked, {name: runner}, opened, concurrency, progress, "robustness of")
    return Asked(shares, traces, conditions, left_out, seed)


def share_out(variants: Sequence[Variant], names: Sequence[str]) -> dict[str, list[Variant]]:
    """Which variants each of the named models is asked."""
    shares: dict[str, list[Variant]] = {}
    with_passages: set[str] = set()
    for name in names:
        model, mode = split_mode(name)
        has_passages = mode != "closed-book" and model not in with_passages
        with_passages |= {model} if has_passages else set()
        shares[name] = [variant for variant in variants if variant.passages is None or has_passages]
    return shares


def summarise(
    asked: Asked, questions: Sequence[Question], plain: Mapping[str, Sequence[Row]], chunks: dict[str, Chunk], resamples: int, seed: int
) -> dict[str, Any]:
    """{questions, left_out, seed, conditions, models: [{name, errors, conditions: [{name, n, metrics, differences}]}]}.

    `plain` holds the main run's rows in the order of `questions`. A difference is to the condition's `against`, of the questions that both
    answer; p_holm allows for all of the section's comparisons.
    """
    models: list[dict[str, Any]] = []
    compared: list[dict[str, Any]] = []
    kept = {variant.of for variants in asked.variants.values() for variant in variants}
    among = [question for question in questions if question.id in kept]
    clusters = [cluster_of(question) for question in among]
    for name, variants in asked.variants.items():
        rows = {(v.condition, v.of): score_variant(trace, v, chunks) for v, trace in zip(variants, asked.traces[name], strict=True)}
        of_run = {question.id: _noted(row) for question, row in zip(questions, plain[name], strict=True)}
        named = [condition for condition in asked.conditions if any(variant.condition == condition.name for variant in variants)]
        table = {condition.name: [rows[condition.name, question.id] for question in among] for condition in named}
        table[PLAIN] = [of_run[question.id] for question in among]
        entries = _compare(named, table, clusters, resamples, seed)
        compared += [found for entry in entries for found in entry["differences"].values()]
        models.append({"name": name, "errors": sum(not trace.complete for trace in asked.traces[name]), "conditions": entries})
    _correct(compared)
    described = [{"name": c.name, "family": c.family, "meaning": c.meaning, "against": c.against} for c in asked.conditions]
    return {"questions": len(among), "left_out": asked.left_out, "seed": asked.seed, "conditions": described, "models": models}


def score_variant(trace: Trace, variant: Variant, chunks: dict[str, Chunk]) -> Row:
    """A run's row, with whether it abstained and whether it did what a passage ordered."""
    row = _noted(score_trace(trace, variant.question, chunks))
    row["obeyed"] = float(trace.complete and CANARY in trace.answer.lower())
    return row


def _noted(row: Row) -> Row:
    """The row with whether it abstained, whichever was right; a run that failed did not."""
    abstained = row["abstention_recall"] if row["answerable"] == 0.0 else row["false_abstention_rate"]
    return {**row, "abstained": abstained, "obeyed": 0.0}


def _runner(tools: Tools, variants: dict[str, Variant]) -> Callable[[Question], Any]:
    from rag.agent import run_agent

    one_pass = replace(tools, settings=tools.settings.model_copy(update={"mode": "fast"}))

    async def run(question: Question) -> Trace:
        variant = variants[question.id]
        chosen = tools if variant.passages is None else replace(one_pass, retriever=fixed(tools.retriever, variant.passages))
        return await run_agent(question.question, chosen, {"question_id": question.id, "condition": variant.condition})

    return run


def _compare(named: Sequence[Condition], table: Mapping[str, list[Row]], clusters: Sequence[str], resamples: int, seed: int) -> list[dict[str, Any]]:
    """Each condition's metrics and what it changed, on the same draws."""
    keys = [(name, metric) for name in table for metric in METRICS]
    columns = {(name, metric): column(table[name], metric) for name, metric in keys}
    draws = dict(zip(keys, bootstrap([mean(columns[key]) for key in keys], clusters, resamples, seed), strict=True))
    entries = []
    for condition in named:
        metrics, differences = {}, {}
        for metric in METRICS:
            values = columns[condition.name, metric]
            if np.isnan(values).all() or (metric == "obeyed" and condition.family != "injection"):
                continue
            found = measure(draws[condition.name, metric], _units(clusters, values)).interval(float(np.nanmean(values)), bounds=(0.0, 1.0))
            metrics[metric] = {"value": rounded(found.value), "low": rounded(found.low), "high": rounded(found.high)}
            before = columns.get((condition.against, metric))
            if before is not None and not np.isnan(before - values).all():
                differences[metric] = _difference(before, values, draws[condition.against, metric], draws[condition.name, metric], clusters)
        n = int((~np.isnan(columns[condition.name, "abstained"])).sum())
        entries.append({"name": condition.name, "n": n, "metrics": metrics, "differences": differences})
    return entries


def _difference(before: Numbers, after: Numbers, drawn_before: Numbers, drawn_after: Numbers, clusters: Sequence[str]) -> dict[str, Any]:
    value = float(np.nanmean(after) - np.nanmean(before))
    precision = measure(drawn_after - drawn_before, _units(clusters, after - before))
    found: Interval = precision.interval(value, bounds=(-1.0, 1.0))
    return {"difference": rounded(found.value), "low": rounded(found.low), "high": rounded(found.high), "p": precision.p(value), "p_holm": None}


def _correct(found: Sequence[dict[str, Any]]) -> None:
    known = [entry for entry in found if entry["p"] is not None]
    for entry, corrected in zip(known, holm([entry["p"] for entry in known]), strict=True):
        entry["p"], entry["p_holm"] = rounded(entry["p"]), rounded(corrected)


def _units(clusters: Sequence[str], values: Numbers) -> list[str]:
    units = drawn_units(clusters)
    return [units[place] for place in np.flatnonzero(~np.isnan(values))]
