"""The proof's statistics, and what they say of right and wrong adapters."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.check import verdict_of
from serve.prove import SCORED_ROWS
from serve.weigh import SIGN_LIMIT, Distances, ratio_bound, sign_test, weigh

NAMES = ["nearer_to_trained", "within_engine_noise", "engine_noise", "changes_the_base"]
distances = st.floats(0, 3, allow_nan=False)


def passed(checks: list[Any]) -> dict[str, bool]:
    return {check.name: check.passed for check in checks}


def distances_of(to_adapter: Any, to_base: Any, noise: Any, change: Any, rows: int = SCORED_ROWS, seed: int = 0) -> Distances:
    """Rows that scatter by a fifth around each mean."""
    rng = np.random.default_rng(seed)
    return Distances(*(mean * rng.uniform(0.8, 1.2, rows) for mean in (to_adapter, to_base, noise, change)))


# ── statistics ──


@given(st.lists(st.tuples(distances, distances), min_size=1, max_size=60))
def test_sign_test_is_scipys_binomial_test_without_ties(pairs: list[tuple[float, float]]) -> None:
    first, second = (np.array(side) for side in zip(*pairs, strict=True))
    wins, trials = int((first < second).sum()), int((first != second).sum())
    expected = scipy.stats.binomtest(wins, trials, alternative="greater").pvalue if trials else 1.0
    assert sign_test(first, second) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(distances, distances), min_size=7, max_size=40), st.floats(0.1, 10))
def test_ratio_bound_has_no_unit_and_lies_among_the_rows_ratios(pairs: list[tuple[float, float]], scale: float) -> None:
    numerator, denominator = (np.array(side) + 0.01 for side in zip(*pairs, strict=True))
    bound = ratio_bound(numerator, denominator)
    assert bound == pytest.approx(ratio_bound(numerator * scale, denominator * scale))
    assert (numerator / denominator).min() - 1e-9 <= bound <= (numerator / denominator).max() + 1e-9
    assert ratio_bound(denominator, denominator) == pytest.approx(1.0)


def test_ratio_bound_agrees_with_scipys_bootstrap() -> None:
    rng = np.random.default_rng(3)
    numerator, denominator = rng.gamma(4, 0.01, 16), rng.gamma(4, 0.01, 16)

    def statistic(a: Any, b: Any, axis: int = -1) -> Any:
        return a.mean(axis=axis) / b.mean(axis=axis)

    theirs = scipy.stats.bootstrap(
        (numerator, denominator), statistic, paired=True, vectorized=True, confidence_level=0.95, alternative="less", method="percentile", rng=1
    )
    assert ratio_bound(numerator, denominator) == pytest.approx(theirs.confidence_interval.high, rel=0.02)


def test_ratio_bound_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    covered = sum(ratio_bound(rng.gamma(4, 0.01, SCORED_ROWS), rng.gamma(4, 0.01, SCORED_ROWS)) >= 1.0 for _ in range(100))
    assert covered >= 85


# ── what the figures mean: the first four are those measured with SmolLM2-135M on vLLM ──


@pytest.mark.parametrize(
    ("figures", "failing"),
    [
        ((0.024, 0.416, 0.025, 0.418), set()),  # the adapter as trained
        ((0.297, 0.223, 0.025, 0.226), {"nearer_to_trained", "within_engine_noise"}),  # another adapter under its name
        ((0.426, 0.025, 0.025, 0.0), {"nearer_to_trained", "within_engine_noise", "changes_the_base"}),  # accepted, not applied
        ((0.120, 0.416, 0.025, 0.300), {"within_engine_noise"}),  # applied in part
        ((0.640, 0.900, 0.640, 0.900), {"engine_noise"}),  # a base of another quantisation explains everything away
        ((0.0, 0.4, 0.0, 0.4), set()),  # an engine that computes exactly as PEFT does
    ],
)
def test_the_right_adapter_passes_and_each_wrong_one_fails_where_it_is_wrong(figures: tuple[float, ...], failing: set[str]) -> None:
    results = passed(weigh(distances_of(*figures)))
    assert {name for name, good in results.items() if not good} == failing
    assert list(results) == NAMES


def test_an_adapter_of_zeros_changes_nothing() -> None:
    same = distances_of(0.025, 0.025, 0.025, 0.0).noise
    results = passed(weigh(Distances(same, same, same, np.zeros_like(same))))
    assert not results["nearer_to_trained"]
    assert not results["changes_the_base"]


@pytest.mark.parametrize("rows", range(10))
def test_too_few_rows_decide_nothing(rows: int) -> None:
    checks = weigh(distances_of(0.024, 0.416, 0.025, 0.418, rows=rows))
    reachable = 0.5**rows <= SIGN_LIMIT
    assert [check.name for check in checks] == NAMES
    assert all(check.passed == reachable for check in checks)
    assert {check.to_json()["status"] for check in checks} == {"pass" if reachable else "undecided"}


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 30), st.data())
def test_checks_are_json_and_pass_only_below_their_limit(rows: int, data: st.DataObject) -> None:
    columns = [np.array(data.draw(st.lists(distances, min_size=rows, max_size=rows))) for _ in range(4)]
    for check in weigh(Distances(*columns)):
        shown = json.loads(json.dumps(check.to_json(), allow_nan=False))
        assert shown["passed"] == (check.value <= check.limit and not check.undecided)


def test_checks_say_undecided_apart_from_failed() -> None:
    [first, *_] = weigh(distances_of(0.4, 0.02, 0.02, 0.4))
    assert first.to_json()["status"] == "fail"
    assert replace(first, undecided=True).to_json()["status"] == "undecided"
    right, open_ = replace(first, value=0.0, limit=1.0), replace(first, undecided=True)
    assert [verdict_of(checks) for checks in ([right], [right, open_], [open_, first, right])] == ["pass", "undecided", "fail"]
