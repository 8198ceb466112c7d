"""Write the README's table of figures from docs/example-report/report.json; --check fails where they differ."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rag.eval.compare import read_report
from rag.eval.wording import format_number
from understudy.files import write_text

ROOT = Path(__file__).parent.parent
README, REPORT = ROOT / "README.md", ROOT / "docs" / "example-report" / "report.json"
BEGIN, END = "<!-- headline: made by scripts/headline.py -->", "<!-- end -->"
COLUMNS = {
    "token_f1": "token-F1",
    "citation_precision": "citation precision",
    "citation_recall": "citation recall",
    "abstention_accuracy": "balanced abstention accuracy",
    "latency_p50": "latency, median",
}


def table(report: dict[str, Any]) -> str:
    """Every model's figures with their 95 % intervals, and in one line what they were measured on."""
    machine, bootstrap = report["provenance"]["machine"], report["provenance"]["bootstrap"]
    lines = [f"| | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for model in report["models"]:
        cells = [cell(metric, model["metrics"][metric], model["intervals"].get(metric)) for metric in COLUMNS]
        lines.append(f"| {model['name']} | {' | '.join(cells)} |")
    seen = "" if report["leaks"] else " that no adapter had seen"
    measured = (
        f"{report['questions']} questions about {bootstrap['clusters']} documents{seen}; 95 % intervals; {report['concurrency']} questions "
        f"at a time on {machine['processor']}, {machine['cores']} cores, {machine['memory']}. [The whole report](docs/example-report/report.html)."
    )
    return "\n".join([*lines, "", measured])


def cell(metric: str, value: float | None, interval: list[float | None] | None) -> str:
    """A figure with its interval."""
    low, high = interval or (None, None)
    ends = "" if low is None or high is None else f" [{format_number(low, metric)}, {format_number(high, metric)}]".replace(" s,", ",").replace(" s]", "]")
    return format_number(value, metric) + ends


if __name__ == "__main__":
    before, begin, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    old, end, after = rest.partition(END)
    if not (begin and end):
        sys.exit(f"README.md lacks the lines {BEGIN} and {END}")
    new = f"\n{table(read_report(REPORT))}\n"
    if "--check" not in sys.argv:
        write_text(README, before + begin + new + end + after)
    elif new != old:
        sys.exit("README.md does not say what docs/example-report/report.json says: run .venv/bin/python scripts/headline.py")
