"""The judge: both orders, position bias, resumption, cost, agreement; never asked where it may not be."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from rag.eval.agreement import CHOICES, agreement, kappa_estimator
from rag.eval.judge import Verdict, judge_messages, parse_verdict
from rag.eval.labels import Label, add_label
from rag.eval.opinions import add_opinions
from tests.rag.eval.conftest import RUN_MODELS
from tests.scripted import Endpoint, status
from understudy.cli import main
from understudy.commands.reviewing import judge_lines, review_lines
from understudy.files import write_json
from understudy.workspace import Workspace

ratings = st.lists(st.tuples(st.sampled_from(CHOICES), st.sampled_from(CHOICES)), min_size=1, max_size=40)


def prefers_books(_: str, prompt: str) -> str:
    """A judge that knows: the six books are right."""
    first = prompt[prompt.index("<answer 1>") : prompt.index("</answer 1>")]
    return f"It is borne out.\nVerdict: {1 if 'six books' in first else 2}"


@pytest.fixture
def judge(finished_run: Workspace, endpoint: Endpoint, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[dict[str, Any], int]]:
    """`evaluate judge` as typed, the scripted server as the remote `critic`."""

    def typed(*arguments: str) -> tuple[dict[str, Any], int]:
        remote = f"remotes.critic={{base_url: '{endpoint.model.base_url}', model: m, price_in: 1.0, price_out: 2.0}}"
        capsys.readouterr()
        code = main(["--workspace", str(finished_run.root), "evaluate", "judge", "abc", "--json", "--set", remote, *arguments])
        return json.loads(capsys.readouterr().out), code

    return typed


def test_a_judge_that_knows_is_consistent_and_is_asked_once(judge, endpoint: Endpoint, finished_run: Workspace) -> None:  # type: ignore[no-untyped-def]
    folder = finished_run.reports / "abc123"
    for number, choice in ((0, "b"), (1, "b"), (2, "neither")):
        label = Label(
            question_id=f"q{number:02}",
            question="?",
            tenant="default",
            a=RUN_MODELS[0],
            b=RUN_MODELS[1],
            shown_first=RUN_MODELS[0],
            choice=choice,
            created_at=0.0,
        )  # type: ignore[arg-type]
        add_label(folder, label)
    endpoint.reply = prefers_books
    endpoint.faults = [
        lambda handler: handler.answer(prefers_books("", handler.endpoint.bodies[-1]["messages"][-1]["content"]), handler.endpoint.bodies[-1])
    ] * 6
    endpoint.faults += [status(400)] * 30
    broken, code = judge("--model", "critic", "--set", "evaluate.concurrency=1")
    assert code == 1 and broken["error"]["code"] == "endpoint"
    endpoint.faults.clear()
    asked = len(endpoint.bodies)
    found, code = judge("--model", "critic")
    assert code == 0 and len(endpoint.bodies) - asked == 14 and found["calls"] == 20  # ten pairs differ, six calls were answered before
    assert found["counts"] == {"a": 0, "tie": 0, "b": 10} and found["preference"] == {"value": 1.0, "low": 1.0, "high": 1.0} and found["same"] == 2
    assert found["position_bias"]["value"] == 0.0 and found["first_place_share"] == 0.5 and found["unreadable"] == 0
    assert found["cost"] == pytest.approx((found["prompt_tokens"] + 2 * found["completion_tokens"]) / 1e6)
    assert found["agreement"]["people"]["n"] == 3 and found["agreement"]["people"]["observed"] == pytest.approx(2 / 3, abs=1e-5)
    asked = len(endpoint.bodies)
    assert judge("--model", "critic")[0] == found and len(endpoint.bodies) == asked
    report = json.loads((folder / "report.json").read_text())
    assert [opinion["rater"] for opinion in report["opinions"]] == ["people", "judge"] and report["opinions"][1]["judge"] == "critic"
    page = (folder / "report.html").read_text()
    assert "Position bias" in page and "critic" in page and page.count("What people and judges prefer</h2>") == 1


def test_a_judge_that_prefers_a_place_is_found_out(judge, endpoint: Endpoint) -> None:  # type: ignore[no-untyped-def]
    endpoint.reply = lambda _step, _prompt: "Verdict: 1"
    found, code = judge("--model", "critic")
    assert code == 0 and found["counts"]["tie"] == 10 and found["position_bias"]["value"] == 1.0 and found["first_place_share"] == 1.0
    assert found["agreement"]["quality"]["kappa"] is None or found["agreement"]["quality"]["kappa"] <= 0


def test_a_judge_without_a_verdict_counts_for_nothing(judge, endpoint: Endpoint) -> None:  # type: ignore[no-untyped-def]
    endpoint.reply = lambda _step, _prompt: "Both have their merits."
    found, _ = judge("--model", "critic")
    assert found["n"] == 0 and found["unreadable"] == 10 and found["preference"]["value"] is None and found["position_bias"]["value"] is None


def test_nobody_is_asked_who_may_not_be(judge, endpoint: Endpoint) -> None:  # type: ignore[no-untyped-def]
    offline, code = judge("--model", "critic", "--set", "offline=true")
    assert code == 2 and "offline" in offline["error"]["message"]
    own, code = judge("--model", "weak-model", "--set", f"remotes.weak-model={{base_url: '{endpoint.model.base_url}', model: m}}")
    assert code == 2 and own["error"]["message"] == "weak-model would judge its own answers"
    assert not endpoint.bodies


def test_what_a_single_pair_says_has_no_interval_and_is_shown_all_the_same(finished_run: Workspace) -> None:
    folder, (a, b) = finished_run.reports / "abc123", RUN_MODELS
    add_label(folder, Label(question_id="q00", question="?", tenant="default", a=a, b=b, shown_first=a, choice="b", created_at=0.0))
    verdicts = [{"question_id": "q00", "a_first": "1", "b_first": "1"}]
    known = {"judge": "critic", "model": "m", "version": "v", "same": 0, "calls": 2, "prompt_tokens": 1, "completion_tokens": 1, "cost": 0.0}
    write_json(folder / "judge-0123456789ab.json", {**known, "a": a, "b": b, "verdicts": verdicts})
    people, judged = add_opinions(folder)["opinions"]
    assert people["preference"] == {"value": 1.0, "low": None, "high": None} and judged["position_bias"] == {"value": 1.0, "low": None, "high": None}
    assert "1 pairs labelled" in review_lines({**people, "waiting": 0, "same": 0})[0] and "place alone decided 1.00 of" in judge_lines(judged)[0]


def test_verdicts_are_read_however_they_are_written() -> None:
    readings = {
        "Good.\nVerdict: 2": "2",
        "**Verdict:** tie": "tie",
        "verdict: Answer 1.": "1",
        "<think>Verdict: 1</think>\nVerdict: 2": "2",
        " 1 ": "1",
        "Tie.": "tie",
    }
    assert {text: parse_verdict(text) for text in readings} == readings
    assert parse_verdict("Verdict: 12 books") is None and parse_verdict("I prefer 1") is None
    [_, prompt] = judge_messages("Who?", ["One.", "Two."], ["A {x}", "B"])
    assert "[2] Two." in prompt.content and "<answer 1>\nA {x}\n</answer 1>" in prompt.content


def test_only_what_both_orders_say_counts() -> None:
    choices = {("1", "2"): "a", ("2", "1"): "b", ("tie", "tie"): "tie", ("1", "1"): "tie", ("1", "tie"): "tie", (None, "1"): None}
    assert {key: Verdict("q", *key).choice for key in choices} == choices  # type: ignore[arg-type]
    assert [Verdict("q", "1", "1").is_by_place, Verdict("q", "1", "2").is_by_place, Verdict("q", "tie", "tie").is_by_place] == [True, False, False]


@given(ratings)
@settings(max_examples=60, deadline=None)
def test_kappa_is_scikit_learns(pairs: Sequence[tuple[str, str]]) -> None:
    first, second = zip(*pairs, strict=True)
    once = np.ones((1, len(first)))
    [kappa] = kappa_estimator(first, second)(once)  # type: ignore[arg-type]
    if np.isnan(kappa):
        assert len(set(first) | set(second)) == 1
    else:
        assert kappa == pytest.approx(cohen_kappa_score(first, second)) and -1 <= kappa <= 1
        assert kappa == pytest.approx(kappa_estimator(second, first)(once)[0])  # type: ignore[arg-type]


def test_agreement_has_an_interval_and_leaves_out_what_one_did_not_rate() -> None:
    first = ["a", "b", "tie", None] * 30
    second = ["a", "b", "b", "a"] * 30
    found = agreement(first, second, [f"d{n % 10}" for n in range(120)])  # type: ignore[arg-type]
    assert found["n"] == 90 and found["observed"] == pytest.approx(2 / 3, abs=1e-5) and found["low"] < found["kappa"] < found["high"]
    assert agreement([None], ["a"], ["d"]) == {"n": 0, "observed": None, "kappa": None, "low": None, "high": None}
