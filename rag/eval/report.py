"""From traces to a decision: `report.json` for programs (DESIGN.md, `evaluate`) and one self-contained `report.html` for people."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rag.eval.charts import STEPS, plot_forest, plot_latency, plot_scores
from rag.eval.explorer import build_cases, visible
from rag.eval.metrics import METRICS, Row, aggregate, score_trace
from rag.eval.stats import Comparison, Statistics, cluster_of, compute_statistics
from understudy.files import write_json, write_text
from understudy.records import SCHEMA_VERSION, Chunk, Question, Trace

VERDICT_METRICS = ("token_f1", "citation_precision", "citation_recall", "abstention_accuracy")
FEW_DOCUMENTS = 15  # below this, an interval over documents is itself uncertain
FILTERS = [
    ("all", "All"),
    ("worse", "Regressions"),
    ("better", "Improvements"),
    ("unanswerable", "Unanswerable"),
    ("wrong", "No model right"),
]


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
) -> dict[str, Any]:
    """Score the traces (by model, in the order of the questions, the baseline first), write both reports and return the JSON.

    `chunks` holds the corpus that the passages came from, `prices` money per million prompt and completion tokens;
    `relative` shows a path as it is stored. The same input gives the same bytes.
    """
    rows = {
        name: [score_trace(trace, question, chunks, (prices or {}).get(name)) for trace, question in zip(of_model, questions, strict=True)]
        for name, of_model in traces.items()
    }
    statistics = compute_statistics(rows, [cluster_of(question) for question in questions], resamples, seed)
    bootstrap = {
        "resamples": resamples,
        "seed": seed,
        "resampled": statistics.resampled,
        "clusters": statistics.clusters,
        "interval": "percentile, 95 %",
    }
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "models": [_model_json(name, rows[name], statistics) for name in rows],
        "k": k,
        "concurrency": concurrency,
        "pairs": [_pair_json(comparison) for comparison in statistics.comparisons],
        "gates": [_gate_json(comparison) for name in list(rows)[1:] for comparison in _verdict_pairs(statistics.comparisons, name)],
        "verdict": state_verdict(statistics.comparisons, list(rows)),
        "report": relative(folder / "report.html"),
        "provenance": {**provenance, "bootstrap": bootstrap},
    }
    write_text(folder / "report.html", render_html(report, questions, traces, rows, chunks, statistics))
    write_json(folder / "report.json", report)
    return report


def _gate_json(comparison: Comparison) -> dict[str, Any]:
    """A gate of the verdict: the whole interval on the better side of zero."""
    return {
        "metric": comparison.metric,
        "model": comparison.b,
        "against": comparison.a,
        "min_gain": 0.0,
        "confidence": 0.95,
        "passed": comparison.is_gain,
    }


def takes_over(comparisons: Sequence[Comparison], name: str) -> bool:
    """Whether a model beats the baseline on every metric of the verdict, with the interval on the better side of zero."""
    return all(comparison.is_gain for comparison in _verdict_pairs(comparisons, name))


def state_verdict(comparisons: Sequence[Comparison], names: Sequence[str]) -> str:
    """One sentence for every model that stands against the first."""
    return " ".join(sentence for sentence, _ in _verdicts(comparisons, names))


def _verdicts(comparisons: Sequence[Comparison], names: Sequence[str]) -> list[tuple[str, str]]:
    """(sentence, yes or no) for every rival."""
    baseline, *rivals = names
    if not rivals:
        return [(f"{baseline} was measured alone; name a second model to compare it with.", "")]
    sentences = [_verdict_sentence(_verdict_pairs(comparisons, name), name, baseline) for name in rivals]
    return [(text, "yes" if takes_over(comparisons, name) else "no") for text, name in zip(sentences, rivals, strict=True)]


def _verdict_sentence(pairs: Sequence[Comparison], name: str, baseline: str) -> str:
    if all(pair.is_gain for pair in pairs):
        better = _listed([_in_sentence(pair) for pair in pairs])
        return f"{name} may take over from {baseline} on these questions: {better} are all better, each with its 95 % interval above zero."
    lacking = [_spoken(pair) for pair in pairs if not pair.is_gain and not pair.is_loss and pair.difference is not None]
    worse = [_spoken(pair) for pair in pairs if pair.is_loss]
    unmeasured = [_in_sentence(pair) for pair in pairs if pair.difference is None]
    reasons = [f"it is worse in {_listed(worse)}"] if worse else []
    reasons += [f"it is not shown to be better in {_listed(lacking)}"] if lacking else []
    reasons += [f"these questions do not measure {_listed(unmeasured)}"] if unmeasured else []
    return f"{name} may not take over from {baseline} yet: {'; '.join(reasons)}."


def _verdict_pairs(comparisons: Sequence[Comparison], name: str) -> list[Comparison]:
    return [pair for metric in VERDICT_METRICS for pair in comparisons if pair.b == name and pair.metric == metric]


def _spoken(pair: Comparison) -> str:
    """The metric with its difference and interval."""
    difference, low, high = (format_difference(value, pair.metric) for value in (pair.difference, pair.low, pair.high))
    return f"{_in_sentence(pair)} ({difference}, 95 % interval {low} to {high})"


def _in_sentence(pair: Comparison) -> str:
    label = METRICS[pair.metric].label
    return label[0].lower() + label[1:]


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def render_html(
    report: dict[str, Any],
    questions: Sequence[Question],
    traces: dict[str, list[Trace]],
    rows: dict[str, list[Row]],
    chunks: dict[str, Chunk],
    statistics: Statistics,
) -> str:
    """The whole page; every text in it is escaped, and its policy allows no script but its own."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.filters |= {"number": format_number, "difference": format_difference}
    script = (here / "report.js").read_text(encoding="utf-8")
    names = list(traces)
    return environment.get_template("report.html.j2").render(
        style=Markup((here / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        verdicts=_verdicts(statistics.comparisons, names),
        k=report["k"],
        concurrency=report["concurrency"],
        resamples=f"{report['provenance']['bootstrap']['resamples']:,}",
        resampled=statistics.resampled,
        caution=_caution(statistics),
        n=len(questions),
        n_unanswerable=sum(question.has_answer_key and not question.answerable for question in questions),
        documents=sorted({document for question in questions for document in question.documents[:1]}),
        metrics=METRICS,
        groups=_groups(),
        columns=len(names) + 4,
        models=[_model_view(name, place, report, rows[name], statistics) for place, name in enumerate(names)],
        rivals=[_rival_view(name, place, report, statistics) for place, name in enumerate(names) if place],
        tests=[pair for pair in statistics.comparisons if pair.mcnemar],
        latency=Markup(plot_latency({name: _seconds_by_step(traces[name]) for name in names})),
        filters=FILTERS if len(names) > 1 else [item for item in FILTERS if item[0] not in ("worse", "better")],
        cases=build_cases(questions, traces, rows, chunks),
        facts=list(_flatten(report["provenance"])),
    )


def format_number(value: float | None, metric: str) -> str:
    """A metric's value as people read it; an undefined one is a dash."""
    if value is None:
        return "–"
    unit = METRICS[metric].unit
    if unit == "seconds":
        return f"{value:.2f} s"
    return f"{value:,.0f}" if unit == "tokens" else f"{value:.3g}" if unit == "money" else f"{value:.2f}"


def format_difference(value: float | None, metric: str) -> str:
    """A signed difference, with a real minus sign."""
    if value is None:
        return "–"
    text = format_number(abs(value), metric)
    return text if not text.strip("0., s") else ("+" if value > 0 else "−") + text


def _model_json(name: str, rows: list[Row], statistics: Statistics) -> dict[str, Any]:
    intervals = statistics.intervals[name]
    return {
        "name": name,
        "n": len(rows),
        "errors": sum(row["complete"] == 0.0 for row in rows),
        "metrics": {metric: _rounded(value) for metric, value in aggregate(rows).items()},
        "intervals": {metric: [_rounded(found.low), _rounded(found.high)] for metric, found in intervals.items() if found.value is not None},
    }


def _pair_json(pair: Comparison) -> dict[str, Any]:
    return {key: _rounded(value) if isinstance(value, float) else value for key, value in asdict(pair).items()}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _model_view(name: str, place: int, report: dict[str, Any], rows: list[Row], statistics: Statistics) -> dict[str, Any]:
    from markupsafe import Markup

    has_scores = any(row["score"] is not None and row["is_right"] is not None for row in rows)
    scores = Markup(plot_scores(name, rows, place)) if has_scores else ""
    color = 0 if place == 0 else 1 + (place - 1) % 5
    return {**report["models"][place], "intervals": statistics.intervals[name], "color": color, "scores": scores}


def _rival_view(name: str, place: int, report: dict[str, Any], statistics: Statistics) -> dict[str, Any]:
    from markupsafe import Markup

    pairs = {pair.metric: pair for pair in statistics.comparisons if pair.b == name}
    return {
        **report["models"][place],
        "pairs": pairs,
        "headline": [pairs[m] for m in VERDICT_METRICS],
        "forest": Markup(plot_forest(list(pairs.values()), name)),
    }


def _groups() -> list[tuple[str, list[str]]]:
    groups: dict[str, list[str]] = {}
    for name, metric in METRICS.items():
        groups.setdefault(metric.group, []).append(name)
    return list(groups.items())


def _seconds_by_step(traces: Sequence[Trace]) -> dict[str, list[float]]:
    """Seconds of every single step, and of every whole run."""
    by_step = {step: [done.seconds for trace in traces for done in trace.steps if done.name == step] for step in STEPS}
    return by_step | {"whole run": [sum(step.seconds for step in trace.steps) for trace in traces if trace.steps]}


def _caution(statistics: Statistics) -> str:
    """What the reader of the intervals must know."""
    if statistics.resampled == "questions only":
        return "Too few documents to resample them: the intervals say nothing about other documents."
    if statistics.clusters < FEW_DOCUMENTS:
        return f"{statistics.clusters} documents are few: how the models do on other documents is known only roughly."
    return ""


def _flatten(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested facts as (dotted name, text) rows."""
    rows: list[tuple[str, str]] = []
    for name, value in facts.items():
        if isinstance(value, dict):
            rows += _flatten(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + str(name), ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return rows
