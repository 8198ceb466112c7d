"""From traces to a decision: `report.json` for programs (DESIGN.md, `evaluate`), `scores.json` with every question's numbers, and
one self-contained `report.html` for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rag.eval.breakdown import break_down, latency_by_step
from rag.eval.entailment import Entailment, add_entailment
from rag.eval.estimators import rounded
from rag.eval.evidence import Corpus
from rag.eval.gates import GateResult, judge, state_gates
from rag.eval.leaks import Leak
from rag.eval.metrics import Row, aggregate, score_trace
from rag.eval.page import render_html
from rag.eval.robustness import Asked, summarise
from rag.eval.similarity import Embed, add_similarity
from rag.eval.stats import VERDICT_METRICS, Comparison, Statistics, cluster_of, compute_statistics
from rag.eval.wording import verdicts
from understudy.files import write_json, write_text
from understudy.records import SCHEMA_VERSION, Chunk, Question, Trace
from understudy.settings.evaluating import Gate

SCORES = "scores.json"


def build_report(
    questions: Sequence[Question],
    traces: dict[str, list[Trace]],
    chunks: dict[str, Chunk],
    folder: Path,
    *,
    k: int,
    concurrency: int,
    provenance: dict[str, Any],
    prices: dict[str, tuple[float, float]] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
    relative: Callable[[Path], str] = str,
    embed: Embed | None = None,
    entailment: Entailment | None = None,
    energy: Mapping[str, dict[str, Any]] | None = None,
    robustness: Asked | None = None,
    gates: Mapping[str, Gate] | None = None,
    candidates: Sequence[str] | None = None,
    leaks: Sequence[Leak] = (),
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Score the traces (by model, in the order of the questions, the baseline first), write the reports and return the JSON.

    `chunks` holds the corpus that the passages came from, `prices` money per million prompt and completion tokens; `relative` shows a
    path as it is stored; `embed` measures semantic similarity, `entailment` support by NLI; `energy` is by model, `robustness` what was asked
    under other conditions. `gates` are put to the `candidates`, all but the first by default, of which alone the verdict speaks;
    without gates each of them has to beat the first in the verdict's metrics. `leaks` are questions that take no part, or notable ones
    that do; `notes` what else the reader must know. The same input gives the same bytes.
    """
    chunks = Corpus.of(chunks)
    rows = {
        name: [score_trace(trace, question, chunks, (prices or {}).get(name)) for trace, question in zip(of_model, questions, strict=True)]
        for name, of_model in traces.items()
    }
    if embed is not None:
        for name, of_model in traces.items():
            add_similarity(rows[name], of_model, questions, embed)
    if entailment is not None:
        for name, of_model in traces.items():
            add_entailment(rows[name], of_model, chunks, entailment)
    statistics = compute_statistics(rows, [cluster_of(question) for question in questions], resamples, seed)
    baseline, *rivals = rows
    judged = judge(statistics.draws, gates or dict.fromkeys(VERDICT_METRICS, Gate(against=baseline, min_gain=0.0)), candidates or rivals)
    stated = state_gates(judged) if gates else verdicts(statistics.comparisons, [baseline, *(candidates or rivals)])
    bootstrap = {
        "resamples": resamples,
        "seed": seed,
        "resampled": statistics.resampled,
        "clusters": statistics.clusters,
        "interval": "Student's t on the bootstrap's standard error, 95 %",
        "correction": "Holm, over the pairs of the verdict's metrics, and over all others",
    }
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "models": [{**_model_json(name, rows[name], traces[name], statistics), "energy": (energy or {}).get(name)} for name in rows],
        "k": k,
        "concurrency": concurrency,
        "questions": len(questions),
        "finished_at": max((trace.created_at for of_model in traces.values() for trace in of_model), default=0.0),
        "pairs": [_pair_json(comparison) for comparison in statistics.comparisons],
        "gates": [result.as_json() for result in judged],
        "verdict": " ".join(sentence for sentence, _ in stated),
        "breakdown": break_down(questions, rows),
        "robustness": summarise(robustness, questions, rows, chunks, resamples, seed) if robustness else None,
        "leaks": [asdict(leak) for leak in leaks],
        "notes": list(notes),
        "report": relative(folder / "report.html"),
        "provenance": {**provenance, "bootstrap": bootstrap},
    }
    shown_gates: list[GateResult] = judged if gates else []
    write_text(folder / "report.html", render_html(report, stated, shown_gates, questions, traces, rows, chunks, statistics))
    write_json(folder / SCORES, scores_json(questions, rows, traces))
    write_json(folder / "report.json", report)
    return report


def scores_json(questions: Sequence[Question], rows: dict[str, list[Row]], traces: Mapping[str, Sequence[Trace]]) -> dict[str, Any]:
    """Every question's numbers, from which two runs are compared pair by pair, and the ids of the runs behind them."""
    asked = [{"id": q.id, "question": q.question, "document": cluster_of(q), "type": q.type, "answerable": q.answerable} for q in questions]
    return {
        "schema_version": SCHEMA_VERSION,
        "questions": asked,
        "models": rows,
        "traces": {name: [trace.id for trace in of_model] for name, of_model in traces.items()},
    }


def _model_json(name: str, rows: list[Row], traces: Sequence[Trace], statistics: Statistics) -> dict[str, Any]:
    intervals = statistics.intervals[name]
    return {
        "name": name,
        "n": len(rows),
        "errors": sum(row["complete"] == 0.0 for row in rows),
        "metrics": {metric: rounded(value) for metric, value in aggregate(rows).items()},
        "intervals": {metric: [rounded(found.low), rounded(found.high)] for metric, found in intervals.items() if found.value is not None},
        "latency": latency_by_step([trace for trace in traces if trace.source == "model"]),
    }


def _pair_json(pair: Comparison) -> dict[str, Any]:
    found = {key: rounded(value) if isinstance(value, float) else value for key, value in asdict(pair).items()}
    return {**found, "too_small": pair.is_too_small}
