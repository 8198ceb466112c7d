"""A calibration of made runs: what it learns from them, and that no row is judged by a fit that saw it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag.agent import Tools
from rag.calibrate import calibration_json, cross_validated, fit_calibration
from rag.retrieve import Retriever
from rag.validation import SIGNALS
from understudy.client import Model, ModelClient
from understudy.config import Agent, Retrieval
from understudy.records import Question, Step, Trace
from understudy.store.sqlite import SqliteStore

Run = tuple[Trace, Question]
SIGNALS_MADE = st.fixed_dictionaries(dict.fromkeys(SIGNALS, st.integers(-3, 3).map(float)))


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    """An agent's tools, of which a fit reads only the model's name and the chunks."""
    retriever = Retriever("g", None, None, None, SqliteStore(tmp_path / "store.db"), Retrieval(), "default")  # type: ignore[arg-type]
    return Tools(ModelClient(Model("tiny@0123", "m", "http://127.0.0.1:1/v1")), retriever, Agent())


@pytest.fixture
def make_run(make_trace: Callable[..., Trace]) -> Callable[..., Run]:
    """A run with its signals: right where the verdict is high, over passages that answer where the first token leant to a quote."""

    def make(number: int, answerable: bool, abstained: bool, right: bool, noise: float = 0.0) -> Run:
        rng = random.Random(number)
        signals = {name: rng.gauss(0, 1) for name in SIGNALS}
        signals |= {"verdict": (0.8 if right else 0.2) + noise * rng.gauss(0, 1), "answer_odds": (2.0 if answerable else -2.0) + noise * rng.gauss(0, 1)}
        steps = [Step(name="retrieve"), Step(name="validate", text="1", parsed={"score": 0.5, "abstained": abstained, **signals})]
        text = None if abstained else "six books" if right else "four euro"
        trace = make_trace(f"How many, asked {number}?", text, None, "", [], steps=steps)
        return trace, Question(id=str(number), question=trace.question, answers=["six books"] if answerable else None, has_answer_key=True)

    return make


def test_a_calibration_learns_what_tells_right_from_wrong_and_answerable_from_not(make_run: Callable[..., Run], tools: Tools) -> None:
    runs = [make_run(i, answerable=i % 4 > 0, abstained=i % 8 == 0, right=i % 4 > 1, noise=0.1) for i in range(80)]
    fitted = fit_calibration("key", tools, runs)
    assert (fitted.key, fitted.model, fitted.questions) == ("key", "tiny@0123", 80)
    weights = calibration_json(fitted)["weights"]
    assert max(weights["right"], key=lambda name: abs(weights["right"][name])) == "verdict"
    assert max(weights["answerable"], key=lambda name: abs(weights["answerable"][name])) == "answer_odds"
    assert fitted.auroc is not None and fitted.auroc > 0.95
    assert fitted.abstention_accuracy is not None and fitted.abstention_accuracy > 0.95
    for trace, question in runs:
        assert fitted.abstains({name: float(str(trace.steps[-1].parsed[name])) for name in SIGNALS}) == (not question.answerable)


def test_signals_that_say_nothing_score_near_chance(make_run: Callable[..., Run], tools: Tools) -> None:
    rng = random.Random(1)
    runs = [make_run(i, answerable=rng.random() < 0.8, abstained=False, right=rng.random() < 0.5, noise=1000.0) for i in range(200)]
    fitted = fit_calibration("key", tools, runs)
    assert fitted.auroc is not None and 0.3 < fitted.auroc < 0.7
    assert fitted.abstention_accuracy is not None and 0.3 < fitted.abstention_accuracy < 0.7  # although most are answerable


def test_what_has_one_kind_only_is_not_fitted(make_run: Callable[..., Run], tools: Tools) -> None:
    silent = fit_calibration("key", tools, [make_run(i, answerable=i % 2 > 0, abstained=True, right=False) for i in range(20)])
    assert (silent.right, silent.auroc) == (None, None)
    assert silent.answerable is not None
    perfect = fit_calibration("key", tools, [make_run(i, answerable=True, abstained=False, right=True) for i in range(20)])
    assert (perfect.right, perfect.answerable, perfect.auroc, perfect.abstention_accuracy) == (None, None, None, None)
    assert calibration_json(perfect)["weights"] == {}
    one_wrong = fit_calibration("key", tools, [make_run(i, answerable=True, abstained=False, right=i > 0) for i in range(20)])
    assert one_wrong.right is not None
    assert one_wrong.auroc is None  # the fold that holds the wrong one out has no other


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.tuples(SIGNALS_MADE, st.booleans()), min_size=12, max_size=25), place=st.integers(0, 11), balanced=st.booleans())
def test_a_row_is_judged_without_its_own_label(rows: list[tuple[dict[str, float], bool]], place: int, balanced: bool) -> None:
    signals, labels = [row for row, _ in rows], [label for _, label in rows]
    flipped = [label != (i == place) for i, label in enumerate(labels)]
    first, second = (cross_validated(SIGNALS, signals, asked, balanced) for asked in (labels, flipped))
    if first is None or second is None:
        assert min(labels.count(True), labels.count(False), flipped.count(True), flipped.count(False)) <= len(rows) // 5 + 1  # all in one fold
        return
    assert first[place] == second[place]
    assert all(0 <= p <= 1 for p in first)


def test_nothing_to_judge_is_no_judgement() -> None:
    assert cross_validated(SIGNALS, [], []) is None
