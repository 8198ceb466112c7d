"""The sequential test of a trial: what it may be wrong about, and how often, held by its law and by simulation."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.release.sequential import MeanAbove
from serve.release.trial import Line, Observation, Trial, keep_line, observe, read_trial
from understudy.records import Step, Trace
from understudy.settings.serving import Releases

SETTINGS = Releases()
RNG = np.random.default_rng(11)


def seen(score: float = 0.8, abstained: bool = False, failed: bool = False, seconds: float = 1.0) -> Observation:
    return Observation(score=score, abstained=abstained, failed=failed, seconds=seconds)


@given(
    low=st.floats(-1, 0),
    limit=st.floats(0.01, 0.6),
    above=st.floats(0.01, 1),
    below=st.floats(0.01, 1),
    past=st.lists(st.floats(0, 1), max_size=20),
)
def test_no_stake_gains_on_a_mean_at_the_limit(low: float, limit: float, above: float, below: float, past: list[float]) -> None:
    """The wealth is a martingale there: over a value above and one below, weighted to a mean at the limit, it stays as it is."""
    down, up = max(low, limit - below), limit + above
    share_up = (limit - down) / (up - down)
    after = []
    for value in (up, down):
        test = MeanAbove(low, limit)
        for earlier in [*past, value]:
            test.add(earlier)
        after.append(math.exp(test.log_wealth))
    before = MeanAbove(low, limit)
    for earlier in past:
        before.add(earlier)
    assert share_up * after[0] + (1 - share_up) * after[1] == pytest.approx(math.exp(before.log_wealth), rel=1e-6)


def simulate(draw: Callable[[], Line], lines: int) -> int | None:
    """After how many lines a trial stops; None where it does not."""
    trial = Trial(SETTINGS)
    for number in range(lines):
        trial.add(draw())
        if trial.verdict:
            return number + 1
    return None


def drawn(loss: float, more_abstentions: float, more_errors: float, slowdown: float) -> Line:
    """One answer of either side; the candidate's is worse by these, in expectation."""
    is_canary = RNG.random() < 0.3
    worse = float(is_canary)
    observation = seen(
        score=float(np.clip(RNG.beta(6, 2) - worse * loss, 0, 1)),
        abstained=bool(RNG.random() < 0.2 + worse * more_abstentions),
        failed=bool(RNG.random() < 0.03 + worse * more_errors),
        seconds=float(RNG.lognormal(0, 0.5) * slowdown**worse),
    )
    return Line(canary=observation) if is_canary else Line(live=observation)


def test_a_candidate_at_every_tolerance_is_stopped_no_more_often_than_promised() -> None:
    stops = [simulate(lambda: drawn(0.049, SETTINGS.max_abstention_rise, SETTINGS.max_error_rise, SETTINGS.max_slowdown), 150) for _ in range(60)]
    assert sum(stop is not None for stop in stops) <= 7  # 5 % of 60 is 3; above 7 with probability 0.01 were it exactly 5 %


@pytest.mark.parametrize(
    ("worse", "said"),
    [((0.5, 0, 0, 1), "score"), ((0, 0.75, 0, 1), "abstentions"), ((0, 0, 0.9, 1), "failed"), ((0, 0, 0, 6), "times as long")],
)
def test_a_candidate_that_is_clearly_worse_is_stopped_soon(worse: tuple[float, float, float, float], said: str) -> None:
    trial = Trial(SETTINGS)
    while not trial.verdict and trial.counts["canary"] < 100:
        trial.add(drawn(*worse))
    assert said in trial.verdict and trial.counts["canary"] < 60


def test_answers_meet_those_of_the_other_side_since_the_block_before() -> None:
    trial = Trial(SETTINGS)
    for line in (Line(live=seen(0.8)), Line(live=seen(0.6)), Line(canary=seen(0.5)), Line(canary=seen(0.4)), Line(live=seen(0.9)), Line(live=seen(0.1))):
        trial.add(line)
    test = trial.as_json()["tests"]["score"]
    assert (test["comparisons"], test["mean"]) == (2, pytest.approx(((0.3 + 0.1) / 2 + 0.5) / 2))
    trial.add(Line(live=seen(0.9), canary=seen(0.9, failed=True)))  # a pair of one question takes no waiting answer
    tests = trial.as_json()["tests"]
    assert tests["score"]["comparisons"] == 2 and tests["error"]["comparisons"] == 3 and trial.counts == {"live": 5, "canary": 3}
    assert trial.waiting == {"live": [seen(0.1)], "canary": []}


def test_a_trial_is_taken_up_from_its_file_whole_lines_only(tmp_path: Path) -> None:
    path, trial = tmp_path / "trial.jsonl", Trial(SETTINGS)
    for _ in range(20):
        line = drawn(0.2, 0, 0, 1)
        keep_line(path, line)
        trial.add(line)
    assert read_trial(path, SETTINGS).as_json() == trial.as_json()
    with path.open("ab") as file:
        file.write(b'{"live": {"sco')
    assert read_trial(path, SETTINGS).as_json() == trial.as_json()
    keep_line(path, Line(live=seen()))
    trial.add(Line(live=seen()))
    assert read_trial(path, SETTINGS).as_json() == trial.as_json()
    assert read_trial(tmp_path / "none", SETTINGS).counts == {"live": 0, "canary": 0}


def test_a_teachers_part_and_an_answer_from_the_cache_are_no_candidates_work(make_trace: Callable[..., Trace]) -> None:
    own = [Step(name="answer", model="a@1", seconds=2.0, parsed={"abstained": True}), Step(name="validate", model="a@1", seconds=1.0, parsed={"score": 0.2})]
    teachers = [Step(name="answer", model="frontier", seconds=9.0), Step(name="validate", model="frontier", seconds=9.0, parsed={"score": 0.9})]
    retrieved = Step(name="retrieve", seconds=0.5)
    trace = make_trace("Why?", "x", None, "", [], steps=[retrieved, *own, *teachers], model="frontier", score=0.9, metadata={"escalated": "true"})
    assert observe(trace) == seen(0.2, abstained=False, seconds=3.5)
    assert observe(trace.model_copy(update={"metadata": {}, "model": "a@1", "steps": [retrieved, *own], "complete": False})) == seen(
        0.9, failed=True, seconds=3.5
    )
    assert observe(trace.model_copy(update={"cache": "exact"})) is None
