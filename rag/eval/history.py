"""Evaluations over time: a line for every model's name, a plot for every question file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rag.eval.charts import plot_history
from rag.eval.compare import read_report
from rag.eval.metrics import METRICS
from rag.eval.modes import without_digest
from rag.eval.page import HERE, templates
from understudy.files import write_text

SHOWN = ("token_f1", "citation_precision", "abstention_accuracy", "latency_p50")


def read_history(reports: Path) -> list[dict[str, Any]]:
    """Every evaluation of a workspace, oldest first: {report, finished_at, questions, n, verdict, models: [{name, metrics, intervals}]}."""
    runs = []
    for path in reports.glob("*/report.json"):
        report = read_report(path)
        models = [{key: model[key] for key in ("name", "metrics", "intervals")} for model in report["models"]]
        runs.append(
            {
                "report": path.parent.name,
                "finished_at": report.get("finished_at") or path.stat().st_mtime,
                "questions": str(report["provenance"].get("questions", "")),
                "n": report["models"][0]["n"],
                "verdict": report["verdict"],
                "models": models,
            }
        )
    return sorted(runs, key=lambda run: (run["finished_at"], run["report"]))


def write_history(runs: list[dict[str, Any]], path: Path) -> None:
    """One self-contained page with a plot of each metric for each question file: only the same questions are comparable."""
    from markupsafe import Markup

    groups = []
    for digest in dict.fromkeys(run["questions"] for run in runs):
        of_group = [run for run in runs if run["questions"] == digest]
        plots = [Markup(plot_history(series(of_group, metric), metric, f"{digest[:12]}-{metric}")) for metric in SHOWN if series(of_group, metric)]
        groups.append({"digest": digest[:12], "runs": of_group, "plots": plots})
    style = Markup((HERE / "report.css").read_text(encoding="utf-8"))
    write_text(path, templates().get_template("history.html.j2").render(style=style, groups=groups))


def series(runs: list[dict[str, Any]], metric: str) -> dict[str, list[tuple[float, float, float, float]]]:
    """{name without its digest: [(finished at, value, low, high)]} of a metric, oldest first; where it was not measured, nothing."""
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    for run in runs:
        for model in run["models"]:
            value = model["metrics"].get(metric)
            if value is not None:
                low, high = model["intervals"].get(metric, (None, None))
                point = (run["finished_at"], value, value if low is None else low, value if high is None else high)
                found.setdefault(without_digest(model["name"]), []).append(point)
    return found


def history_lines(runs: list[dict[str, Any]]) -> list[str]:
    """A line a model and run."""
    import time

    lines = []
    for run in runs:
        day = time.strftime("%Y-%m-%d %H:%M", time.gmtime(run["finished_at"]))
        for model in run["models"]:
            shown = ", ".join(f"{METRICS[name].label} {model['metrics'][name]:.2f}" for name in SHOWN if model["metrics"].get(name) is not None)
            lines.append(f"{day}  {run['report']}  {run['n']} questions {run['questions'][:8]}  {model['name']}: {shown}")
    return lines
