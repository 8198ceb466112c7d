"""The report: contract of its JSON, verdict, escaping, policy, order, marks; equal input gives equal bytes."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rag.eval.evidence import Span
from rag.eval.explorer import build_cases, mark_text, visible
from rag.eval.leaks import Leak
from rag.eval.metrics import score_trace
from rag.eval.report import build_report
from rag.eval.wording import format_difference, format_number
from understudy.records import Question, Trace
from understudy.settings.evaluating import Gate

KEYS = {"schema_version", "models", "k", "concurrency", "questions", "finished_at", "pairs", "gates", "verdict", "breakdown", "leaks", "notes"}
KEYS |= {"report", "provenance", "robustness"}
METRICS = {
    *("token_f1", "gold_recall", "exact_match", "citation_precision", "citation_recall", "abstention_accuracy", "false_abstention_rate"),
    *("unsupported_rate", "valid_score_rate", "validator_auroc", "recall_at_k", "latency_p50", "latency_p95"),
    *("prompt_tokens", "completion_tokens", "cost"),
}
HOSTILE = "<script>alert(1)</script> ![x](https://evil.example/p.png) <img src=x onerror=alert(2)> \x1b[31m red \u202egnp \x00"


class Page(HTMLParser):
    """Every element of a page, its attributes and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def questions(ask) -> list[Question]:
    """20 answerable and 10 unanswerable questions about 6 documents."""
    return [
        ask(id=f"q{place:02}", question=f"Question {place}?", documents=["library.pdf" if place % 6 == 0 else f"d{place % 6}.pdf"])
        if place % 3
        else ask(
            id=f"q{place:02}",
            question=f"Question {place}?",
            answers=None,
            quotes=[],
            documents=["library.pdf" if place % 6 == 0 else "d3.pdf"],
        )
        for place in range(30)
    ]


@pytest.fixture
def traces(questions, reply, abstain) -> dict[str, list[Trace]]:
    """A base that is nearly always wrong, and an adapter that is nearly always right."""
    base = [reply(answer="Dragons.", quotes=["no such words here"], score=0.1 * (place % 7)) for place, _ in enumerate(questions)]
    base[1] = reply(answer="Up to six books.")
    base[4] = reply(complete=False, metadata={"error": "timed out"}).model_copy(update={"steps": []})
    new = [reply(answer="Up to six books.", score=0.9) if question.answerable else abstain() for question in questions]
    new[1] = reply(answer=HOSTILE, quotes=[HOSTILE], score=0.3)
    new[2] = reply(answer="Fee of four euro.", score=0.4)
    return {"base": base, "new@0123456789ab": new}


def make(questions, traces, corpus, folder: Path, **settings: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {"k": 3, "concurrency": 8, "provenance": {"machine": {"cores": "2"}, "note": HOSTILE}, "resamples": 300}
    return build_report(questions, traces, corpus, folder, **(defaults | settings))


def test_json_has_the_contracts_keys(tmp_path: Path, questions, traces, corpus) -> None:
    report = make(questions, traces, corpus, tmp_path, relative=lambda path: f"reports/{path.name}", prices={"base": (1.0, 2.0)})
    assert set(report) == KEYS and report == json.loads((tmp_path / "report.json").read_text())
    assert [model["name"] for model in report["models"]] == ["base", "new@0123456789ab"]
    for model in report["models"]:
        assert set(model["metrics"]) >= METRICS and model["n"] == 30
    assert report["models"][0]["errors"] == 1 and report["models"][1]["metrics"]["cost"] is None
    assert report["k"] == 3 and report["concurrency"] == 8 and report["report"] == "reports/report.html"
    lows = {pair["metric"]: pair["low"] for pair in report["pairs"]}
    assert {gate["metric"]: gate["passed"] for gate in report["gates"]} == {
        metric: lows[metric] > 0 for metric in ("token_f1", "citation_precision", "citation_recall", "abstention_accuracy")
    }
    for pair in report["pairs"]:
        assert {"a", "b", "metric", "n", "difference", "low", "high"} <= set(pair) and (pair["a"], pair["b"]) == (
            "base",
            "new@0123456789ab",
        )
        values = [model["metrics"][pair["metric"]] for model in report["models"]]
        assert pair["difference"] is None if None in values else pair["difference"] == pytest.approx(values[1] - values[0], abs=2e-6)
    assert {pair["metric"] for pair in report["pairs"]} >= METRICS
    assert report["provenance"]["bootstrap"]["resampled"] == "documents"


def test_equal_input_gives_equal_bytes(tmp_path: Path, questions, traces, corpus) -> None:
    for name in ("one", "two"):
        make(questions, traces, corpus, tmp_path / name, relative=lambda path: path.name)
    for name in ("report.html", "report.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_verdict_says_yes_no_or_not_measured(tmp_path: Path, questions, traces, corpus) -> None:
    yes = make(questions, traces, corpus, tmp_path)["verdict"]
    assert yes.startswith("new@0123456789ab may take over from base on these questions: token-F1, citation precision")
    no = make(questions, {"new": traces["new@0123456789ab"], "base": traces["base"]}, corpus, tmp_path)["verdict"]
    assert no.startswith("base may not take over from new yet: it is worse in token-F1 (−")
    same = make(questions, {"a": traces["base"], "b": traces["base"]}, corpus, tmp_path)["verdict"]
    assert same.startswith("b may not take over from a yet: it is not shown to be better in token-F1 (0.00, 95 % interval 0.00 to 0.00)")
    answerable = [place for place, question in enumerate(questions) if question.answerable]
    part = {name: [rows[place] for place in answerable] for name, rows in traces.items()}
    unmeasured = make([questions[place] for place in answerable], part, corpus, tmp_path)["verdict"]
    assert unmeasured.endswith("yet: these questions do not measure abstention accuracy.")
    single = make(questions[2:3], {name: rows[2:3] for name, rows in traces.items()}, corpus, tmp_path)["verdict"]
    assert "citation recall (+1.00, too few questions for an interval)" in single and "– to –" not in single


def test_gates_leaks_and_notes_stand_in_the_page_and_in_the_json(tmp_path: Path, questions, traces, corpus) -> None:
    gates = {"token_f1": Gate(against="base", min_gain=0.1), "abstention_accuracy": Gate(against="base", max_loss=0.0)}
    leak = Leak("q77", f"Seen {HOSTILE}", "new@0123456789ab", "near-duplicate", "Seen in training?")
    report = make(questions, traces, corpus, tmp_path, gates=gates, leaks=[leak], notes=["One question was set apart."])
    assert [(gate["metric"], gate["status"], gate["passed"]) for gate in report["gates"]] == [("token_f1", "pass", True), ("abstention_accuracy", "pass", True)]
    assert report["gates"][1]["max_loss"] == 0.0 and "min_gain" not in report["gates"][1]
    assert report["verdict"] == "new@0123456789ab may take over: it passes every gate (Token-F1, Abstention accuracy)."
    assert report["leaks"][0]["kind"] == "near-duplicate" and report["notes"] == ["One question was set apart."]
    page = Page((tmp_path / "report.html").read_text())
    assert all(text in page.text for text in ("Gates", "✓ pass", "Not new to a model", "Seen in training?", "One question was set apart.", "By document"))
    assert "<script>alert" not in (tmp_path / "report.html").read_text()


def test_scores_hold_every_questions_numbers(tmp_path: Path, questions, traces, corpus) -> None:
    report = make(questions, traces, corpus, tmp_path)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert [row["id"] for row in scores["questions"]] == [question.id for question in questions]
    for model in report["models"]:
        known = [row["exact_match"] for row in scores["models"][model["name"]] if row["exact_match"] is not None]
        assert model["metrics"]["exact_match"] == pytest.approx(sum(known) / len(known), abs=1e-6)
    assert (
        scores["traces"] == {name: [trace.id for trace in of_model] for name, of_model in traces.items()}
        and "<br>trace t1</p>" in (tmp_path / "report.html").read_text()
    )
    by_document = [entry for entry in report["breakdown"] if entry["by"] == "document"]
    assert sum(entry["n"] for entry in by_document) == len(questions)
    pair = next(pair for pair in report["pairs"] if pair["metric"] == "exact_match")
    assert pair["p"] <= pair["p_holm"] <= 1 and pair["effect_size"] > 0 and pair["coverage"] is None and pair["too_small"]  # on four documents


def test_one_model_alone_and_three_models(tmp_path: Path, questions, traces, corpus) -> None:
    alone = make(questions, {"base": traces["base"]}, corpus, tmp_path)
    assert alone["pairs"] == [] and "measured alone" in alone["verdict"]
    page = Page((tmp_path / "report.html").read_text())
    assert not any(attributes.get("value") == "worse" for _, attributes in page.elements)
    three = make(questions, traces | {"frontier": traces["new@0123456789ab"]}, corpus, tmp_path)
    assert three["verdict"].count("may take over from base") == 2
    spoken = make(questions, traces | {"frontier": traces["new@0123456789ab"]}, corpus, tmp_path / "one", candidates=["new@0123456789ab"], resamples=50)
    assert "frontier" not in spoken["verdict"] and "new@0123456789ab" in spoken["verdict"]  # nobody asked whether a yardstick may take over
    html = (tmp_path / "report.html").read_text()
    assert Counter(re.findall(r'\bid="([^"]+)"', html)).most_common(1)[0][1] == 1  # three models' plots, no id twice


def test_the_page_is_closed_to_what_models_write(tmp_path: Path, questions, traces, corpus) -> None:
    hostile_questions = [question.model_copy(update={"question": f"{question.question} {HOSTILE}"}) for question in questions]
    renamed = {"base": traces["base"], "<b>$x$": traces["new@0123456789ab"]}
    make(hostile_questions, renamed, corpus, tmp_path)
    html = (tmp_path / "report.html").read_text()
    page = Page(html)
    assert "<script>alert" not in html and "<img" not in html and "<b>$" not in html
    assert "<script>alert(1)</script> ![x](https://evil.example/p.png)" in page.text  # shown, as text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", html) and "␛[31m" in html and "⟨U+202E⟩" in html
    names = Counter(tag for tag, _ in page.elements)
    assert names["script"] == 1 and not names.keys() & {
        "img",
        "iframe",
        "object",
        "embed",
        "link",
        "base",
        "audio",
        "video",
        "image",
        "foreignobject",
    }
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes), tag
        assert all((attributes.get(name) or "#").startswith("#") for name in ("src", "href", "xlink:href", "action", "srcset")), tag


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path, questions, traces, corpus) -> None:
    clean = {
        name: [trace if trace.answer != HOSTILE else trace.model_copy(update={"answer": "No.", "quotes": []}) for trace in rows]
        for name, rows in traces.items()
    }
    make(questions, clean, corpus, tmp_path, provenance={})
    html = (tmp_path / "report.html").read_text()
    assert "http://" not in html and "https://" not in html and "@import" not in html
    assert not re.findall(r'\b(?:src|href)="(?!#)', html) and not re.findall(r"url\((?!#)", html)
    policy = next(attributes["content"] for _, attributes in Page(html).elements if attributes.get("http-equiv") == "Content-Security-Policy")
    script = re.search(r"(?s)<script>(.*)</script>", html)
    assert script and policy and policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()}'" in policy


def test_the_page_has_what_readers_with_a_keyboard_or_a_screen_reader_need(tmp_path: Path, questions, traces, corpus) -> None:
    make(questions, traces, corpus, tmp_path)
    html = (tmp_path / "report.html").read_text()
    page = Page(html)
    assert '<html lang="en">' in html and "prefers-color-scheme: dark" in html and "@media print" in html and "focus-visible" in html
    svgs = [attributes for tag, attributes in page.elements if tag == "svg"]
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert len(svgs) == 5  # forest, latency, frontier, and two models' scores
    assert all(svg["role"] == "img" and set((svg["aria-labelledby"] or "").split()) <= ids for svg in svgs)
    assert "aria-live" in html and "LoRA tax" in html and "Provenance" in html


def test_worst_regressions_come_first(questions, traces, corpus) -> None:
    rows = {name: [score_trace(trace, question, corpus) for trace, question in zip(traces[name], questions, strict=True)] for name in traces}
    cases = build_cases(questions, traces, rows, corpus)
    assert cases[0].question.id == "q01" and cases[0].change == -1.0 and cases[0].outcome == "worse"
    assert [case.change for case in cases] == sorted(case.change for case in cases)
    assert cases[-1].change == 1.0 and cases[-1].outcome == "better"
    assert {case.kind for case in cases} == {"answerable", "unanswerable"}
    failed = next(case for case in cases if case.question.id == "q04").answers[0]
    assert failed.failure == "timed out"
    assert [quote.state for quote in cases[0].answers[0].quotes] == ["right"] and [quote.state for quote in cases[0].answers[1].quotes] == ["not found"]


def test_marks_cut_the_text_without_changing_it(corpus) -> None:
    chunk = corpus["library.pdf-80"]  # code points 80 to 180
    spans = {"gold": Span("id of library.pdf", 60, 98), "a": Span("id of library.pdf", 90, 110), "b": Span("another document", 90, 110)}
    marks = mark_text(chunk, [spans["gold"]], [[spans["a"]], [spans["b"]]])
    assert "".join(mark.text for mark in marks) == chunk.text
    assert [(len(mark.text), mark.is_gold, mark.cited_by) for mark in marks] == [
        (10, True, []),
        (8, True, [0]),
        (12, False, [0]),
        (70, False, []),
    ]


def test_control_characters_are_shown() -> None:
    assert visible("a\x00b\x1b\x7f\x85\u2066\ud800c") == "a␀b␛␡⟨U+0085⟩⟨U+2066⟩⟨U+D800⟩c"
    assert visible("tab\tline\nsoft\u00adhyphen é 漢 👩\u200d🔬") == "tab\tline\nsoft\u00adhyphen é 漢 👩\u200d🔬"


def test_numbers_as_people_read_them() -> None:
    assert (format_number(None, "token_f1"), format_number(0.256, "token_f1"), format_number(1.5, "latency_p50")) == ("–", "0.26", "1.50 s")
    assert (format_number(1234.4, "prompt_tokens"), format_number(0.00123, "cost")) == ("1,234", "0.00123")
    assert (format_difference(0.25, "token_f1"), format_difference(-0.25, "token_f1"), format_difference(-0.001, "token_f1")) == (
        "+0.25",
        "−0.25",
        "0.00",
    )
    assert format_difference(-1.0, "latency_p50") == "−1.00 s" and format_difference(None, "cost") == "–"
