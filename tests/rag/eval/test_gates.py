"""Gates: pass, fail or undecided, in the direction in which a metric is better, and how many more questions would tell."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag.eval.gates import check_gates, judge, questions_needed, state_gates
from rag.eval.stats import draw
from understudy.config import Config
from understudy.errors import UsageError
from understudy.settings.evaluating import Gate


def measured(n: int = 200, **shares: float):  # type: ignore[no-untyped-def]
    """Models whose token-F1 and false abstentions are right that often, on n questions about ten documents; the same luck for all."""
    luck = np.random.default_rng(0).random(n)
    rows = {
        name: [{"token_f1": float(value < share), "false_abstention_rate": float(value >= share), "seconds": 1.0 + (1 - share)} for value in luck]
        for name, share in shares.items()
    }
    return draw(rows, [str(place % 10) for place in range(n)], 1000, 0)


def statuses(draws, **gates: Gate):  # type: ignore[no-untyped-def]
    return {(result.metric, result.model): result.status for result in judge(draws, gates, ["new"])}


def test_a_gate_passes_fails_or_stays_undecided() -> None:
    gate = {"token_f1": Gate(against="teacher", max_loss=0.02)}
    assert statuses(measured(teacher=0.5, new=0.8), **gate) == {("token_f1", "new"): "pass"}
    assert statuses(measured(teacher=0.8, new=0.5), **gate) == {("token_f1", "new"): "fail"}
    assert statuses(measured(teacher=0.5, new=0.49), **gate) == {("token_f1", "new"): "undecided"}
    assert statuses(measured(teacher=0.5, new=0.5), **gate) == {("token_f1", "new"): "pass"}  # equal answers lose nothing
    assert statuses(measured(teacher=0.5, new=0.5), token_f1=Gate(against="teacher", max_loss=0.0)) == {("token_f1", "new"): "pass"}
    assert statuses(measured(teacher=0.5, new=0.5), token_f1=Gate(against="teacher", min_gain=0.0)) != {("token_f1", "new"): "pass"}


def test_where_less_is_better_a_rise_is_the_loss() -> None:
    gates = {"false_abstention_rate": Gate(against="teacher", min_gain=0.1), "latency_p50": Gate(against="teacher", max_loss=0.05)}
    found = judge(measured(teacher=0.5, new=0.8), gates, ["teacher", "new"])
    assert [(result.model, result.status) for result in found] == [("new", "pass"), ("new", "pass")]
    assert found[0].difference == pytest.approx(0.3, abs=0.06) and found[0].as_json()["min_gain"] == 0.1
    worse = judge(measured(teacher=0.8, new=0.5), gates, ["new"])
    assert {result.status for result in worse} == {"fail"} and worse[1].as_json()["max_loss"] == 0.05


def test_an_undecided_gate_says_how_many_more_questions_would_tell() -> None:
    gate = {"token_f1": Gate(against="teacher", min_gain=0.01)}
    few, many = (judge(measured(n, teacher=0.5, new=0.58), gate, ["new"])[0] for n in (40, 1500))
    assert few.status == "undecided" and few.more_questions is not None and many.status == "pass" and many.more_questions is None
    [(sentence, standing)] = state_gates([few])
    assert standing == "no" and f"about {few.more_questions:,} more questions would tell" in sentence
    assert state_gates([many])[0] == ("new may take over: it passes every gate (Token-F1).", "yes")


@given(st.floats(0.001, 1), st.floats(0.001, 1), st.integers(5, 500))
def test_a_nearer_limit_needs_more_questions(distance: float, spread: float, n: int) -> None:
    needed = questions_needed(distance, spread, n)
    assert needed is not None and needed >= 1
    assert needed == questions_needed(-distance, spread, n)
    assert (questions_needed(distance / 2, spread, n) or 0) >= needed
    assert questions_needed(0.0, spread, n) is None


def test_a_metric_that_is_not_measured_decides_nothing() -> None:
    result = judge(measured(teacher=0.5, new=0.8), {"citation_recall": Gate(against="teacher", max_loss=0.1)}, ["new"])[0]
    assert (result.status, result.low, result.more_questions) == ("undecided", None, None)
    assert "do not measure" in state_gates([result])[0][0]


def test_gates_are_checked_before_anything_is_asked() -> None:
    with pytest.raises(UsageError, match="token_f2 is no metric"):
        check_gates({"token_f2": Gate(min_gain=0.0)}, ["base"])
    with pytest.raises(UsageError, match="no metric"):
        check_gates({"cached_tokens": Gate(min_gain=0.0)}, ["base"])  # neither more nor less of it is better
    with pytest.raises(UsageError, match="against teacher, which is not among"):
        check_gates({"token_f1": Gate(against="teacher", min_gain=0.0)}, ["base", "new"])


def test_gates_are_read_from_the_configuration() -> None:
    config = Config.model_validate({"evaluate": {"gates": {"token_f1": {"against": "teacher", "max_loss": 0.02, "confidence": 0.95}}}})
    assert config.evaluate.gates["token_f1"] == Gate(against="teacher", max_loss=0.02)
    for wrong in ({}, {"min_gain": 0, "max_loss": 0}, {"min_gain": -1}, {"max_loss": 0.1, "confidence": 1}):
        with pytest.raises(ValueError, match="token_f1"):
            Config.model_validate({"evaluate": {"gates": {"token_f1": wrong}}})
