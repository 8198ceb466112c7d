"""Two runs against each other on the questions that both asked, and all runs over time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rag.eval.compare import compare_reports, comparison_lines
from rag.eval.history import read_history, series, write_history
from rag.eval.metrics import aggregate, score_trace
from rag.eval.report import SCORES, scores_json
from understudy.errors import NotFoundError, StorageError, UsageError
from understudy.files import write_json
from understudy.records import Question, Trace


@pytest.fixture
def run(ask, reply, corpus, tmp_path: Path):  # type: ignore[no-untyped-def]
    """Writes the report of a run: model by model, how many of its 30 questions about 6 documents are right."""

    def make(name: str, first: int = 0, at: float = 0.0, **right: int) -> Path:
        questions: list[Question] = [ask(id=f"q{place}", question=f"Question {place}?", documents=[f"d{place % 6}.pdf"]) for place in range(first, first + 30)]
        traces: dict[str, list[Trace]] = {
            model.replace("_at_", "@"): [reply(answer="Up to six books." if place < count else "No.", created_at=at) for place in range(30)]
            for model, count in right.items()
        }
        rows = {model: [score_trace(trace, question, corpus) for trace, question in zip(traces[model], questions, strict=True)] for model in traces}
        metrics = {model: aggregate(of_model) for model, of_model in rows.items()}
        models = [{"name": name, "n": 30, "metrics": found, "intervals": {"exact_match": [0.0, 1.0]}} for name, found in metrics.items()]
        provenance = {"questions": "q" * 64, "k": name, "bootstrap": {"resamples": 300, "seed": 0}}
        report = {"models": models, "pairs": [], "verdict": "No.", "provenance": provenance, "finished_at": at}
        write_json(tmp_path / name / "report.json", report)
        write_json(tmp_path / name / SCORES, scores_json(questions, rows, {}))
        return tmp_path / name / "report.json"

    return make


def test_models_of_one_name_are_compared_with_themselves(run) -> None:  # type: ignore[no-untyped-def]
    a, b = run("a", base=5, tiny_at_0=10), run("b", base=5, tiny_at_1=28)
    result = compare_reports(a, b)
    assert (result["questions"], result["only_in_a"], result["only_in_b"]) == (30, 0, 0)
    f1 = {(pair["a"], pair["b"]): pair for pair in result["pairs"] if pair["metric"] == "token_f1"}
    assert f1["base", "base (B)"]["difference"] == 0.0 and f1["base", "base (B)"]["p_holm"] == 1.0
    gained = f1["tiny@0", "tiny@1"]
    assert gained["difference"] == pytest.approx(18 / 30) and gained["low"] > 0 and gained["p"] <= gained["p_holm"]
    assert result["changed_settings"] == {"k": ("a", "b")}
    lines = comparison_lines(result)
    assert lines[0] == "30 questions that both runs asked" and any("▲ token_f1" in line for line in lines) and lines[-1] == "differs: k: a → b"


def test_only_shared_questions_count(run) -> None:  # type: ignore[no-untyped-def]
    result = compare_reports(run("a", base=5), run("b", first=20, base=30))
    assert (result["questions"], result["only_in_a"], result["only_in_b"]) == (10, 20, 20)
    assert next(pair for pair in result["pairs"] if pair["metric"] == "exact_match")["difference"] == 1.0
    with pytest.raises(UsageError, match="share no question"):
        compare_reports(run("a", base=5), run("c", first=40, base=5))


def test_what_is_no_report_is_said_to_be_none(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    report = run("a", base=5)
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(StorageError, match=r"is not an evaluation's report"):
        compare_reports(report, tmp_path / "x.json")
    scores = json.loads(report.with_name(SCORES).read_text())
    broken: list[dict[str, Any]] = [
        {**scores, "questions": [{"id": "q0", "question": "?"}]},
        {**scores, "models": {"base": scores["models"]["base"][:3]}},
        {**scores, "models": {"base": {"a": 1}}},
        {**scores, "models": {"base": [{**row, "token_f1": "high"} for row in scores["models"]["base"]]}},
    ]
    for changed in broken:
        write_json(tmp_path / "broken" / SCORES, changed)
        write_json(tmp_path / "broken" / "report.json", json.loads(report.read_text()))
        with pytest.raises(StorageError, match=r"scores\.json is not an evaluation's scores: "):
            compare_reports(report, tmp_path / "broken" / "report.json")
    for part in ({"models": [{"name": "x"}]}, {"models": []}, {"provenance": {}}):
        write_json(tmp_path / "broken" / "report.json", json.loads(report.read_text()) | part)
        with pytest.raises(StorageError, match=r"broken/report\.json is not an evaluation's report"):
            read_history(tmp_path)
    report.with_name("scores.json").unlink()
    with pytest.raises(NotFoundError, match=r"scores\.json"):
        compare_reports(report, report)


def test_history_is_in_order_and_plots_what_is_comparable(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for name, at, right in (("later", 86400.0 * 40, 25), ("first", 86400.0, 5)):
        run(name, at=at, base=5, **{f"tiny_at_{name}": right})
    runs: list[dict[str, Any]] = read_history(tmp_path)
    assert [found["report"] for found in runs] == ["first", "later"]
    points = series(runs, "exact_match")
    assert list(points) == ["base", "tiny"] and [value for _, value, *_ in points["tiny"]] == pytest.approx([5 / 30, 25 / 30], abs=1e-6)
    assert all(low <= value <= high for of_model in points.values() for _, value, low, high in of_model)
    for name in ("one.html", "two.html"):
        write_history(runs, tmp_path / name)
    html = (tmp_path / "one.html").read_text()
    assert html == (tmp_path / "two.html").read_text() and html.count("<svg") == 3  # without unanswerable questions there is no abstention accuracy
    assert "http://" not in html and "https://" not in html and "default-src 'none'" in html and "<script" not in html
    assert json.dumps(runs)
