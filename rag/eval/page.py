"""The report as one self-contained HTML page: it loads nothing, and runs no script but its own."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag.eval.breakdown import ANSWERS, RETRIEVAL, seconds_by_step
from rag.eval.charts import color_place, plot_forest, plot_frontier, plot_latency, plot_scores
from rag.eval.curves import plot_doses, plot_positions
from rag.eval.explorer import build_cases, visible
from rag.eval.gates import GateResult
from rag.eval.metrics import METRICS, Row
from rag.eval.resampling import Interval
from rag.eval.stats import LEAST_COVERAGE, VERDICT_METRICS, Statistics
from rag.eval.wording import format_difference, format_number, format_p
from understudy.records import Chunk, Question, Trace

if TYPE_CHECKING:
    from jinja2 import Environment

HERE = Path(__file__).parent
SUMMARY = (*VERDICT_METRICS, "latency_p50", "completion_tokens")  # of the table that stands for the tiles where there are many models
FILTERS = [
    ("all", "All"),
    ("worse", "Regressions"),
    ("better", "Improvements"),
    ("unanswerable", "Unanswerable"),
    ("wrong", "No model right"),
]


def templates() -> Environment:
    """This folder's templates: every text in them is escaped, with its control characters made visible; a missing name is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, finalize=lambda value: visible(value) if type(value) is str else value
    )


def source_hash(text: str) -> str:
    """A script or style as a content security policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def render_html(
    report: dict[str, Any],
    verdicts: Sequence[tuple[str, str]],
    gates: Sequence[GateResult],
    questions: Sequence[Question],
    traces: dict[str, list[Trace]],
    rows: dict[str, list[Row]],
    chunks: dict[str, Chunk],
    statistics: Statistics,
) -> str:
    """The whole page; every text in it is escaped, and its policy allows no script but its own."""
    from markupsafe import Markup

    environment = templates()
    environment.filters |= {"number": format_number, "difference": format_difference, "p": format_p}
    script = (HERE / "report.js").read_text(encoding="utf-8")
    names = list(traces)
    return environment.get_template("report.html.j2").render(
        style=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=source_hash(script),
        verdicts=verdicts,
        gates=gates,
        leaks=report["leaks"],
        notes=report["notes"],
        smallest=_smallest(statistics),
        k=report["k"],
        concurrency=report["concurrency"],
        resamples=f"{report['provenance']['bootstrap']['resamples']:,}",
        resampled=statistics.resampled,
        seed=report["provenance"]["bootstrap"]["seed"],
        caution=_caution(statistics),
        n=len(questions),
        n_unanswerable=sum(question.has_answer_key and not question.answerable for question in questions),
        documents=sorted({document for question in questions for document in question.documents[:1]}),
        metrics=METRICS,
        groups=_groups(statistics),
        columns=len(names) + 6,
        models=[_model_view(name, place, report, rows[name], statistics) for place, name in enumerate(names)],
        rivals=[_rival_view(name, place, report, statistics) for place, name in enumerate(names) if place],
        tests=[pair for pair in statistics.comparisons if pair.mcnemar],
        latency=Markup(plot_latency({name: seconds_by_step([trace for trace in traces[name] if trace.source == "model"]) for name in names})),
        steps=list(dict.fromkeys(step for model in report["models"] for step in model["latency"])),
        frontier=Markup(plot_frontier([_frontier_point(name, statistics) for name in names])),
        breakdown=[(by, [entry for entry in report["breakdown"] if entry["by"] == by]) for by in dict.fromkeys(e["by"] for e in report["breakdown"])],
        breakdown_metrics=[*ANSWERS, *(metric for metric in RETRIEVAL if metric != "precision_at_k")],
        robustness=_robustness_view(report["robustness"], names),
        summary=SUMMARY,
        pairs_of={name: {pair.metric: pair for pair in statistics.comparisons if pair.b == name} for name in names[1:]},
        filters=FILTERS if len(names) > 1 else [item for item in FILTERS if item[0] not in ("worse", "better")],
        cases=build_cases(questions, traces, rows, chunks),
        facts=list(_flatten(report["provenance"])),
    )


def _model_view(name: str, place: int, report: dict[str, Any], rows: list[Row], statistics: Statistics) -> dict[str, Any]:
    from markupsafe import Markup

    has_scores = any(row["score"] is not None and row["is_right"] is not None for row in rows)
    scores = Markup(plot_scores(name, rows, place)) if has_scores else ""
    return {**report["models"][place], "intervals": statistics.intervals[name], "color": color_place(place), "scores": scores}


def _rival_view(name: str, place: int, report: dict[str, Any], statistics: Statistics) -> dict[str, Any]:
    from markupsafe import Markup

    pairs = {pair.metric: pair for pair in statistics.comparisons if pair.b == name}
    return {
        **report["models"][place],
        "pairs": pairs,
        "headline": [pairs[m] for m in VERDICT_METRICS],
        "forest": Markup(plot_forest(list(pairs.values()), name)),
    }


def _robustness_view(section: dict[str, Any] | None, names: list[str]) -> dict[str, Any] | None:
    """The section with its curves and its two tables, of the models that were asked what they are about."""
    from markupsafe import Markup

    if section is None:
        return None
    places = {name: place for place, name in enumerate(names)}
    models = [{**model, "color": color_place(places[model["name"]]), "found": {c["name"]: c for c in model["conditions"]}} for model in section["models"]]
    plots = [Markup(plot_doses(section, places)), Markup(plot_positions(section, places))]
    tables = []
    for is_wording, title in ((False, "Passages fixed"), (True, "Question reworded")):
        of_table = [condition for condition in section["conditions"] if (condition["family"] == "wording") == is_wording]
        asked = [model for model in models if any(condition["name"] in model["found"] for condition in of_table)]
        tables.append({"title": title, "conditions": of_table, "models": asked})
    return {**section, "tables": [table for table in tables if table["models"]], "plots": plots}


def _groups(statistics: Statistics) -> list[tuple[str, list[str]]]:
    """(group, its metrics that some model has, and the verdict's)."""
    groups: dict[str, list[str]] = {}
    for name, metric in METRICS.items():
        if name not in VERDICT_METRICS and all(of_model[name].value is None for of_model in statistics.intervals.values()):
            continue
        groups.setdefault(metric.group, []).append(name)
    return list(groups.items())


def _caution(statistics: Statistics) -> str:
    """What the reader of the intervals must know."""
    if statistics.resampled == "questions alone":
        return "Too few documents to resample them: the intervals say nothing about other documents."
    small = [pair for pair in statistics.comparisons if pair.is_too_small and pair.metric in VERDICT_METRICS]
    if small:
        named = ", ".join(dict.fromkeys(METRICS[pair.metric].label for pair in small))
        return f"Too small for {named}: in simulations of this size such intervals hold the truth in less than {100 * LEAST_COVERAGE:g} % of cases."
    return ""


def _smallest(statistics: Statistics) -> list[tuple[str, float]]:
    """(metric, difference) that these questions would find four times in five, of the verdict's metrics; the worst over the rivals."""
    found: dict[str, float] = {}
    for pair in statistics.comparisons:
        if pair.metric in VERDICT_METRICS and pair.detectable is not None:
            found[pair.metric] = max(found.get(pair.metric, 0.0), pair.detectable)
    return list(found.items())


def _frontier_point(name: str, statistics: Statistics) -> tuple[str, float | None, Interval]:
    """(name, seconds, quality) of a model."""
    of_model = statistics.intervals[name]
    return name, of_model["latency_p50"].value, of_model["token_f1"]


def _flatten(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested facts as (dotted name, text) rows."""
    rows: list[tuple[str, str]] = []
    for name, value in facts.items():
        if isinstance(value, dict):
            rows += _flatten(value, f"{prefix}{name}.")
        else:
            rows.append((prefix + str(name), ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return rows
