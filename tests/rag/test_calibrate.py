"""A calibration of made attempts: what it learns from them, what it leaves out, and that no row is judged by a fit that saw it."""

from __future__ import annotations

import asyncio
import random
import statistics
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag.calibrate import (
    WITH_COPIED_QUOTES,
    WITHOUT_PLAN,
    Tried,
    answering_threshold,
    attempts_of,
    calibrate,
    calibration_json,
    calibration_key,
    cross_fit,
    fit_calibration,
    fit_signals,
)
from rag.policy import WHOLE_GRAPH, Policy
from rag.prompts import ABSTENTION
from rag.retrieve import Retriever
from rag.validation import FREE_SIGNALS, SIGNALS, Calibration, read_calibration
from tests.rag.test_agent import QUESTION, RIGHT, ask, tools_of
from tests.scripted import Endpoint
from understudy.progress import show_progress
from understudy.records import Question
from understudy.settings.answers import Agent

SIGNALS_MADE = st.fixed_dictionaries(dict.fromkeys(SIGNALS, st.integers(-3, 3).map(float)))


def tried(number: int, answerable: bool, abstained: bool, right: bool, noise: float = 0.0, f1: float | None = None) -> Tried:
    """An attempt: right where much of the question was said, over passages that answer where the first token leant to a quote."""
    rng = random.Random(number)
    signals = {name: rng.gauss(0, 1) for name in SIGNALS}
    signals |= {"said_overlap": (0.8 if right else 0.2) + noise * rng.gauss(0, 1), "answer_odds": (2.0 if answerable else -2.0) + noise * rng.gauss(0, 1)}
    earned = (float(right) if f1 is None else f1) if answerable else None
    right = abstained if not answerable else right and not abstained
    return Tried(signals, abstained, {"answerable": float(answerable), "token_f1": earned, "citation_recall": None, "is_right": float(right)})


def fit(attempts: list[Tried], **ways: list[Tried]) -> Calibration:
    """A calibration of one-round runs through the whole graph, and of the same questions sent other ways."""
    named = {"without_plan": WITHOUT_PLAN, "copied": WITH_COPIED_QUOTES}
    return fit_calibration("key", "tiny@0123", {WHOLE_GRAPH: [[t] for t in attempts]} | {named[way]: [[t] for t in other] for way, other in ways.items()}, 1.0)


def test_a_calibration_learns_what_tells_right_from_wrong_and_answerable_from_not() -> None:
    attempts = [tried(i, answerable=i % 4 > 0, abstained=i % 8 == 0, right=i % 4 > 1, noise=0.1) for i in range(80)]
    fitted = fit(attempts)
    assert (fitted.key, fitted.model, fitted.questions) == ("key", "tiny@0123", 80)
    weights = calibration_json(fitted)["weights"]
    assert max(weights["right"], key=lambda name: abs(weights["right"][name])) == "said_overlap"
    assert max(weights["answerable"], key=lambda name: abs(weights["answerable"][name])) == "answer_odds"
    assert fitted.auroc is not None and fitted.auroc > 0.95
    assert fitted.abstention_accuracy is not None and fitted.abstention_accuracy > 0.95
    for t in attempts:
        assert fitted.abstains(t.signals) == (not t.row["answerable"])
    assert fitted.prior == pytest.approx(1.0986, abs=1e-3)  # three to one
    unsure = attempts[0].signals | {"answer_odds": 0.0}
    assert fitted.score(unsure, abstained=True) < 0.5 < 1 - fitted.score(unsure, abstained=True)  # most questions are answerable


def test_signals_that_say_nothing_score_near_chance() -> None:
    rng = random.Random(1)
    fitted = fit([tried(i, answerable=rng.random() < 0.8, abstained=False, right=rng.random() < 0.5, noise=1000.0) for i in range(200)])
    assert fitted.auroc is not None and 0.3 < fitted.auroc < 0.7
    assert fitted.abstention_accuracy is not None and 0.3 < fitted.abstention_accuracy < 0.7  # although most are answerable


def test_what_has_one_kind_only_gives_its_share() -> None:
    silent = fit([tried(i, answerable=i % 2 > 0, abstained=True, right=False) for i in range(20)])
    assert silent.right is None
    assert silent.answerable is not None
    perfect = fit([tried(i, answerable=True, abstained=False, right=True) for i in range(20)])
    assert (perfect.answerable, perfect.auroc, perfect.abstention_accuracy, perfect.prior) == (None, None, None, 0.0)
    assert perfect.score(dict.fromkeys(SIGNALS, 0.0), abstained=False) == pytest.approx(21 / 22)
    assert calibration_json(perfect)["weights"] == {"right": {}}


@pytest.mark.parametrize(
    ("without_plan", "copied", "policy"),
    [
        (1.0, 1.0, {"plans_first": False, "completes_quotes": True}),
        (1.0, 0.5, {"plans_first": False, "completes_quotes": False}),
        (0.5, 0.5, {"plans_first": True, "completes_quotes": False}),
    ],
)
def test_the_cheapest_way_that_answered_no_worse_is_the_policy(without_plan: float, copied: float, policy: dict[str, bool]) -> None:
    def sent(earned: float) -> list[Tried]:
        return [tried(i, answerable=i % 4 > 0, abstained=i % 4 == 0, right=i % 4 > 1, f1=0.9 * earned) for i in range(80)]

    fitted = fit(sent(1.0), without_plan=sent(without_plan), copied=sent(copied)).policy
    assert fitted == Policy(asks_verdict=False, **policy)  # a verdict of noise is not asked for
    few = [tried(i, answerable=i % 4 > 0, abstained=False, right=i % 4 > 1) for i in range(30)]
    assert fit(few, without_plan=few, copied=few).policy == WHOLE_GRAPH


@settings(max_examples=20, deadline=None)
@given(limit=st.floats(0, 1), own=st.integers(0, 20), seed=st.integers(0, 99))
def test_the_threshold_abstains_no_more_than_its_limit_allows(limit: float, own: int, seed: int) -> None:
    made = [tried(1000 * seed + i, answerable=i % 4 > 0, abstained=i < own, right=True, noise=3.0) for i in range(60)]
    threshold, strictest = answering_threshold(made, limit), answering_threshold(made, 0.0)
    assert strictest <= threshold <= answering_threshold(made, 1.0) == 0.5
    by_itself = sum(t.abstained for t in made if t.row["answerable"])
    assert threshold == strictest or limit * 46 >= by_itself + 2  # 45 are answerable; one more than were lost is reckoned with


@pytest.mark.parametrize("limit", [0.1, 0.3])
def test_false_abstentions_on_new_questions_stay_within_their_limit(limit: float) -> None:
    shares, untouched = [], []
    for seed in range(60):
        made = [tried(1000 * seed + i, answerable=i % 4 > 0, abstained=False, right=True, noise=4.0) for i in range(260)]
        fitted = fit_signals(made[:60], FREE_SIGNALS, limit)
        new = [t for t in made[60:] if t.row["answerable"]]
        shares.append(sum(fitted.abstains(t.signals) for t in new) / len(new))
        untouched.append(fitted.threshold == 0.5)
    standard_error = statistics.stdev(shares) / len(shares) ** 0.5
    assert sum(untouched) < 30
    assert limit / 2 < statistics.mean(shares) < limit + 2 * standard_error


@pytest.mark.parametrize("helps", [True, False])
def test_further_rounds_are_begun_only_where_they_helped(helps: bool) -> None:
    rounds = []
    for i in range(80):
        first = tried(i, answerable=True, abstained=False, right=i % 2 > 0, noise=0.1)
        second = tried(i + 100, answerable=True, abstained=False, right=helps or i % 2 > 0, noise=0.1)
        rounds.append([first, second])
    fitted = fit_calibration("key", "tiny@0123", {WHOLE_GRAPH: rounds}, 1.0)
    assert (fitted.policy.goes_on_below > 0) == helps
    if helps:
        assert fitted.score(rounds[0][0].signals, False) < fitted.policy.goes_on_below < fitted.score(rounds[1][0].signals, False)


@settings(max_examples=20, deadline=None)
@given(rows=st.lists(st.tuples(SIGNALS_MADE, st.booleans()), min_size=12, max_size=25), place=st.integers(0, 11))
def test_a_row_is_judged_without_its_own_label(rows: list[tuple[dict[str, float], bool]], place: int) -> None:
    def judged(labels: list[bool]) -> Calibration:
        made = [Tried(signals, False, {"answerable": float(label), "is_right": float(label)}) for (signals, _), label in zip(rows, labels, strict=True)]
        return cross_fit(made, FREE_SIGNALS, 0.1)[place]

    labels = [label for _, label in rows]
    assert judged(labels) == judged([label != (i == place) for i, label in enumerate(labels)])


def test_every_attempt_of_a_run_is_scored_by_itself(endpoint: Endpoint, retriever: Retriever) -> None:
    def reply(step: str, _: str) -> str:
        return {"plan": "kiln", "answer": RIGHT["answer"] if endpoint.asked.count("answer") == 1 else ABSTENTION, "validate": "0"}[step]

    endpoint.reply = reply
    question = Question(id="1", question=QUESTION, answers=["On Tuesdays at seven"], has_answer_key=True)
    first, second = attempts_of(ask(endpoint, retriever, max_rounds=2), question, retriever.chunks)
    assert (first.abstained, first.is_right, first.points(False), first.points(True)) == (False, True, 1.0, 0.0)
    assert (second.abstained, second.is_right, second.points(True)) == (True, False, 0.0)
    assert set(SIGNALS) <= first.signals.keys()


def test_calibrating_sends_each_question_every_way_and_keeps_what_it_learnt(endpoint: Endpoint, retriever: Retriever, tmp_path: Path) -> None:
    endpoint.reply = lambda step, _: {**RIGHT, "validate": "0"}[step]
    questions = [Question(id=str(i), question=f"{QUESTION} {i}", answers=["On Tuesdays"] if i % 2 else None, has_answer_key=i < 4) for i in range(5)]
    result = asyncio.run(calibrate(questions, "key", tools_of(endpoint, retriever), tmp_path, 2, show_progress))
    assert endpoint.asked.count("answer") == 4 * 2 + 4  # both rounds of the graph, and once without a plan; this endpoint does not continue
    kept = read_calibration(tmp_path)
    assert kept is not None
    assert (result["questions"], result["policy"]) == (4, WHOLE_GRAPH.model_dump())
    (tmp_path / "calibration.json").write_text(kept.model_copy(update={"version": 1}).model_dump_json())
    assert read_calibration(tmp_path) is None  # it knows other signals


def test_a_calibration_is_kept_for_what_it_rests_on_alone(retriever: Retriever) -> None:
    agent = Agent()
    others = [agent.model_copy(update={"max_rounds": 1}), agent.model_copy(update={"max_false_abstentions": 0.5})]
    keys = {calibration_key("questions", retriever, "weights", each) for each in [agent, *others]}
    assert len(keys) == 3
    assert calibration_key("questions", retriever, "weights", agent.model_copy(update={"max_seconds": 3.0})) in keys
