"""Drift: planted shifts are found, none is found where there is none as often as stated, and too few runs are said to be too few."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag.drift import FEWEST, compare, corrected, energy_test, moved_down, newest_of, questions_moved, rate_rose, what_is_due
from understudy.cli import main
from understudy.digests import digest_of
from understudy.records import Step, Trace
from understudy.workspace import Workspace, open_workspace

DAY = 86_400.0


def embed(questions: list[str]) -> np.ndarray:
    """A question's vector, by the topic that it begins with and its own noise."""
    rows = []
    for question in questions:
        random = np.random.default_rng(int(digest_of(question)[:8], 16))
        rows.append(np.eye(8)[int(question[0])] + random.normal(0, 0.5, 8))
    vectors = np.array(rows)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def runs(count: int, seed: int, topics: int = 3, dense: float = 0.6, abstains: float = 0.2, score: float = 0.7, **changes: Any) -> list[Trace]:
    """Runs drawn from one distribution; `topics` different things are asked."""
    random = np.random.default_rng(seed)
    made = []
    for place in range(count):
        abstained = bool(random.random() < abstains)
        noted: dict[str, object] = {"dense": float(np.clip(random.normal(dense, 0.1), -1, 1))}
        values = {
            "id": f"{seed}-{place}", "question": f"{random.integers(topics)} asks {seed}-{place}", "steps": [Step(name="validate", parsed=noted)],
            "answer": "x", "abstained": abstained, "citations": [], "score": float(np.clip(random.normal(score, 0.15), 0, 1)), "source": "model",
            "model": "tiny@0123456789ab", "generation": "g", "prompt_version": "p", "created_at": 0.0,
        }  # fmt: skip
        made.append(Trace.model_validate(values | changes))
    return made


@pytest.mark.parametrize(
    ("changes", "changed", "worse", "due"),
    [
        ({}, set(), set(), []),
        ({"topics": 8}, {"questions"}, set(), []),
        ({"dense": 0.5}, {"retrieval"}, {"retrieval"}, ["re-embed"]),
        ({"dense": 0.7}, {"retrieval"}, set(), []),
        ({"abstains": 0.5}, {"abstentions"}, {"abstentions"}, ["retrain"]),
        ({"abstains": 0.02}, {"abstentions"}, set(), []),
        ({"score": 0.55}, {"scores"}, {"scores"}, ["retrain"]),
        ({"dense": 0.5, "score": 0.55}, {"retrieval", "scores"}, {"retrieval", "scores"}, ["re-embed", "retrain"]),
    ],
)
def test_a_planted_shift_is_found_and_nothing_else(changes: dict[str, float], changed: set[str], worse: set[str], due: list[str]) -> None:
    signals = compare(runs(200, 1), runs(150, 2, **changes), embed)  # type: ignore[arg-type]
    assert {signal.name for signal in signals if signal.is_changed} == changed
    assert {signal.name for signal in signals if signal.is_worse} == worse
    assert what_is_due(signals)[0] == due
    assert all(signal.n_reference <= 200 and signal.n_recent <= 150 and signal.effect is not None for signal in signals)


def test_false_alarms_are_as_rare_as_stated() -> None:
    """Of 400 comparisons without a change, all four signals together; the questions' test by its own p-values, which are exact."""
    random = np.random.default_rng(0)
    alarms, confidence = 0, 0.9
    for _ in range(400):
        dense, score = (random.normal(0.6, 0.1, (2, 60)).tolist() for _ in range(2))
        abstentions = (random.random((2, 60)) < 0.2).astype(float).tolist()
        p_values = [moved_down(*dense).p, moved_down(*score).p, rate_rose(*abstentions).p, float(random.integers(1, 1001)) / 1000]
        alarms += min(p_values) * 4 < 1 - confidence
    assert alarms / 400 <= 0.1 + 3 * np.sqrt(0.1 * 0.9 / 400)


def test_the_questions_p_values_are_uniform_without_a_change() -> None:
    random = np.random.default_rng(1)
    p_values = [energy_test(*random.normal(size=(2, 30, 4)), random, permutations=99)[1] for _ in range(300)]
    for level in (0.05, 0.2, 0.5):
        assert np.mean(np.array(p_values) <= level) == pytest.approx(level, abs=3 * np.sqrt(level * (1 - level) / 300))


def test_a_change_too_small_to_matter_is_none() -> None:
    """However significant."""
    random = np.random.default_rng(3)
    found = moved_down(random.normal(0.60, 0.1, 20_000).tolist(), random.normal(0.59, 0.1, 20_000).tolist())
    assert found.p < 1e-6
    assert not found.matters
    assert not rate_rose([0.0] * 970 + [1.0] * 30, [0.0] * 930 + [1.0] * 70).matters


def test_too_few_runs_are_said_to_be() -> None:
    signals = compare(runs(200, 1), runs(FEWEST - 1, 2, dense=0.1, score=0.1), embed)
    assert all(signal.p is None and signal.note.startswith("too few") and not signal.is_changed for signal in signals)
    due, advice = what_is_due(signals)
    assert due == []
    assert "too few runs for questions, retrieval, abstentions, scores" in advice[0]


def test_signals_that_were_not_noted_are_left_out() -> None:
    bare = [trace.model_copy(update={"steps": [], "score": None}) for trace in runs(100, 1)]
    assert [signal.p is None for signal in compare(bare, bare, embed)] == [False, True, False, True]


@given(st.lists(st.floats(0, 1), min_size=30, max_size=60), st.lists(st.floats(0, 1), min_size=30, max_size=60))
@settings(max_examples=40, deadline=None)
def test_effects_turn_with_the_sides(a: list[float], b: list[float]) -> None:
    assert moved_down(a, b).effect == pytest.approx(-moved_down(b, a).effect)
    assert moved_down(a, b).p == pytest.approx(moved_down(b, a).p)
    assert moved_down(a, a).effect == pytest.approx(0)
    flags = [[float(value > 0.5) for value in side] for side in (a, b)]
    assert rate_rose(*flags).effect == pytest.approx(-rate_rose(*reversed(flags)).effect)


def test_the_energy_coefficient_does_not_grow_with_fewer_rows() -> None:
    random = np.random.default_rng(2)
    for n in (30, 200):
        found = [energy_test(*random.normal(size=(2, n, 8)), random, permutations=1)[0] for _ in range(40)]
        assert np.mean(found) == pytest.approx(0, abs=0.003)


def test_many_questions_are_drawn_from() -> None:
    asked: list[int] = []

    def counted(questions: list[str]) -> np.ndarray:
        asked.append(len(questions))
        return embed(questions)

    questions_moved(counted, [f"1 {i}" for i in range(900)], [f"1 {i}" for i in range(40)], np.random.default_rng(0))
    assert asked == [500, 40]


def test_holm_is_over_what_was_tested() -> None:
    signals = compare(runs(200, 1), runs(200, 2, dense=0.5), embed)
    tested = {signal.name: signal.p_holm for signal in corrected(signals, 0.99)}
    retrieval = next(signal for signal in signals if signal.name == "retrieval")
    assert retrieval.p is not None and tested["retrieval"] == pytest.approx(4 * retrieval.p)


def test_versions_are_not_mixed() -> None:
    old, new = runs(3, 1, created_at=1.0), runs(2, 2, created_at=2.0, model="tiny@ffffffffffff")
    assert newest_of([*old, *new], "tiny") == ("tiny@ffffffffffff", new)
    assert newest_of([*old, *new], "tiny@0123456789ab") == ("tiny@0123456789ab", old)
    released = runs(2, 3, created_at=3.0, release="handbooks@1234")
    assert newest_of([*old, *released], "handbooks") == ("handbooks@1234", released)
    assert newest_of(old, "other") == ("other", [])


@pytest.fixture
def workspace(notes_workspace: Workspace, tmp_path: Path) -> Workspace:
    """A copy, whose traces are the test's own."""
    shutil.copytree(notes_workspace.root, tmp_path / "copy", symlinks=True)
    return open_workspace(str(tmp_path / "copy"))


@pytest.fixture
def drift(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any]]:
    def call(*words: str) -> tuple[int, Any]:
        code = main(["--workspace", str(workspace.root), "drift", *words, "--json"])
        return code, json.loads(capsys.readouterr().out)

    return call


def keep(workspace: Workspace, traces: list[Trace], age_days: float) -> None:
    for trace in traces:
        workspace.store.put_trace(trace.model_copy(update={"created_at": time.time() - age_days * DAY, "model": "elsewhere"}))


def test_the_command_says_what_is_due(workspace: Workspace, drift: Callable[..., tuple[int, Any]]) -> None:
    keep(workspace, runs(60, 1), 20)
    keep(workspace, runs(60, 2, score=0.3), 1)
    keep(workspace, runs(60, 3, score=0.1, cache="exact"), 1)  # no runs of the model's
    code, found = drift("elsewhere")
    assert (code, found["due"], found["reference"]) == (0, ["retrain"], {"source": "traces", "n": 60})
    assert found["recent"] == {"days": 7.0, "n": 60}
    assert drift("elsewhere", "--gate")[0] == 3
    assert drift("elsewhere", "--gate", "--days", "0.5")[0] == 0  # nothing so recent
    assert drift("nobody")[1]["error"]["code"] == "not_found"
    assert drift("elsewhere", "--against", "evaluation")[1]["error"]["message"] == "no evaluation of elsewhere"
    assert drift("elsewhere", "--days", "-1")[0] == 2


def test_without_earlier_runs_the_newest_evaluation_is_the_reference(workspace: Workspace, drift: Callable[..., tuple[int, Any]]) -> None:
    folder = workspace.reports / "0123456789ab"
    folder.mkdir(parents=True)
    rows = [trace.model_dump(mode="json") for trace in runs(50, 4)]
    (folder / "traces-elsewhere.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keep(workspace, runs(50, 5), 1)
    code, found = drift("elsewhere", "--gate")
    assert (code, found["due"], found["reference"]) == (0, [], {"source": "evaluation reports/0123456789ab", "n": 50})
