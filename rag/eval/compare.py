"""Two evaluations against each other, and all of them over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError, model_validator

from rag.eval.metrics import METRICS, Row
from rag.eval.report import SCORES
from rag.eval.stats import Comparison, correct, draw
from understudy.errors import StorageError, UsageError
from understudy.files import read_json

LATER = " (B)"  # marks the second run's model where both runs have one of that name


class _Measured(BaseModel):
    name: str
    n: int
    metrics: dict[str, float | None]
    intervals: dict[str, tuple[float | None, float | None]]


class _Bootstrap(BaseModel):
    resamples: int
    seed: int


class _Provenance(BaseModel):
    bootstrap: _Bootstrap


class _Report(BaseModel):
    """What is read of a report.json."""

    models: list[_Measured] = Field(min_length=1)
    pairs: list[dict[str, Any]]
    verdict: str
    finished_at: float | None = None
    provenance: _Provenance


class _Asked(BaseModel):
    id: str
    question: str
    document: str


class _Scores(BaseModel):
    """What is read of a scores.json."""

    questions: list[_Asked]
    models: dict[str, list[dict[str, float | None]]] = Field(min_length=1)

    @model_validator(mode="after")
    def _has_every_row(self) -> _Scores:
        short = [name for name, rows in self.models.items() if len(rows) != len(self.questions)]
        if short:
            raise ValueError(f"{len(self.models[short[0]])} rows of {short[0]} for {len(self.questions)} questions")
        return self


def read_report(path: Path) -> dict[str, Any]:
    """A `report.json`; raises NotFoundError or StorageError."""
    return _checked(_Report, path, "an evaluation's report.json", "name the report.json of a folder in reports/, or repeat that evaluation")


def read_scores(report: Path) -> dict[str, Any]:
    """Every question's numbers of an evaluation, which lie beside its report; raises NotFoundError or StorageError."""
    return _checked(_Scores, report.with_name(SCORES), "an evaluation's scores", "repeat the evaluation: what was answered is not asked again")


def _checked(kind: type[BaseModel], path: Path, what: str, remedy: str) -> dict[str, Any]:
    content: dict[str, Any] = read_json(path)
    try:
        kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise StorageError(f"{path} is not {what}: {'.'.join(map(str, first['loc']))}: {first['msg']}", remedy) from error
    return content


def compare_reports(a: Path, b: Path) -> dict[str, Any]:
    """The models of two runs on the questions that both asked, pair by pair: each of B against that of the same name in A, else against
    A's of the same place; resampled as A was. Raises UsageError where the runs share no question.
    """
    before, after = read_report(a)["provenance"], read_report(b)["provenance"]
    first, second = read_scores(a), read_scores(b)
    asked = [{row["id"]: (place, row) for place, row in enumerate(scores["questions"])} for scores in (first, second)]
    shared = [key for key, (_, row) in asked[0].items() if key in asked[1] and asked[1][key][1]["question"] == row["question"]]
    if not shared:
        raise UsageError(f"{a} and {b} share no question", "compare two evaluations of one question file")
    rows: dict[str, list[Row]] = {}
    for place, scores in enumerate((first, second)):
        for name, of_model in scores["models"].items():
            rows[name + LATER * (place and name in first["models"])] = [of_model[asked[place][key][0]] for key in shared]
    draws = draw(rows, [asked[0][key][1]["document"] for key in shared], before["bootstrap"]["resamples"], before["bootstrap"]["seed"])
    comparisons = [draws.compare(x, y, metric) for x, y in _pairs(list(first["models"]), list(second["models"])) for metric in METRICS]
    return {
        "questions": len(shared),
        "only_in_a": len(asked[0]) - len(shared),
        "only_in_b": len(asked[1]) - len(shared),
        "pairs": [{**_rounded(asdict(pair)), "too_small": pair.is_too_small} for pair in correct(comparisons) if pair.difference is not None],
        "changed_settings": changed(before, after),
    }


def comparison_lines(result: dict[str, Any]) -> list[str]:
    """What differs, a line a metric; ▲ better, ▼ worse, by intervals that leave out zero."""
    only = f" ({result['only_in_a']} only in A, {result['only_in_b']} only in B)" if result["only_in_a"] or result["only_in_b"] else ""
    lines = [f"{result['questions']} questions that both runs asked{only}"]
    for x, y in dict.fromkeys((pair["a"], pair["b"]) for pair in result["pairs"]):
        lines += ["", f"{y} − {x}"]
        for pair in (pair for pair in result["pairs"] if (pair["a"], pair["b"]) == (x, y)):
            known = {field: pair[field] for field in ("a", "b", "metric", "n", "difference", "low", "high", "detectable")}
            made = Comparison(**known, mcnemar=None)
            sign = "▲" if made.is_gain else "▼" if made.is_loss else " "
            interval = "" if pair["low"] is None else f"[{pair['low']:+.3f}, {pair['high']:+.3f}]"
            p = "" if pair["p_holm"] is None else f"  p {pair['p_holm']:.3f}"
            lines.append(f"  {sign} {pair['metric']:24} {pair['difference']:+10.3f} {interval:24}{p}{'  too small' if pair['too_small'] else ''}")
    return [*lines, *(f"differs: {name}: {before} → {after}" for name, (before, after) in result["changed_settings"].items())]


def changed(before: Any, after: Any, prefix: str = "") -> dict[str, tuple[str, str]]:
    """{dotted name: (before, after)} of the facts that differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        found: dict[str, tuple[str, str]] = {}
        for name in dict.fromkeys([*before, *after]):
            found |= changed(before.get(name), after.get(name), f"{prefix}{name}.")
        return found
    return {} if before == after else {prefix.removesuffix("."): (str(before), str(after))}


def _pairs(first: Sequence[str], second: Sequence[str]) -> list[tuple[str, str]]:
    """Each model of B with its counterpart in A, by the names of `compare_reports`."""
    pairs = []
    for place, name in enumerate(second):
        if name in first:
            pairs.append((name, name + LATER))
        elif place < len(first):
            pairs.append((first[place], name))
    return pairs


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {key: round(value, 6) if isinstance(value, float) else value for key, value in values.items()}
