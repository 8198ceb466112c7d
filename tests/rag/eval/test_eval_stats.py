"""The bootstrap: agreement with scipy, coverage, clusters, metrics that are no plain means; McNemar."""

from __future__ import annotations

import json
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from rag.eval.coverage import TABLE, simulated_coverage
from rag.eval.metrics import METRICS, aggregate
from rag.eval.resampling import Interval, Precision, draw_counts, measure, paired_bootstrap
from rag.eval.stats import LEAST_COVERAGE, Comparison, cluster_of, compute_statistics, effect_size, exact_p, holm, mcnemar, skewness
from scripts.bench_coverage import DOCS, tables
from understudy.records import Question


def test_the_interval_of_a_mean_is_students() -> None:
    generator = np.random.default_rng(1)
    a, b = generator.normal(0.3, 0.2, 80), generator.normal(0.4, 0.3, 80)
    ours = paired_bootstrap(a, b, resamples=10_000, seed=2)
    theirs = scipy_stats.ttest_rel(b, a).confidence_interval()
    assert ours.value == pytest.approx(float(np.mean(b - a)))
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.02 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.02 * width)


def test_the_interval_of_equal_documents_is_students_over_their_means() -> None:
    values = np.random.default_rng(3).random((6, 10)) + np.linspace(0, 1, 6)[:, None]
    ours = paired_bootstrap(np.zeros(60), values.ravel(), [f"d{place // 10}" for place in range(60)], resamples=20_000)
    theirs = scipy_stats.ttest_1samp(values.mean(axis=1), 0).confidence_interval()
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=0.02)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(4)
    hits = 0
    for round_number in range(300):
        b = generator.random(60) < 0.6
        found = paired_bootstrap(np.zeros(60), b, resamples=400, seed=round_number)
        assert found.low is not None and found.high is not None
        hits += found.low <= 0.6 <= found.high
    assert 0.90 <= hits / 300 <= 0.98


def test_clusters_widen_the_interval_when_documents_differ() -> None:
    clusters = [f"d{place // 20}" for place in range(160)]
    effects = np.repeat(np.linspace(-0.4, 0.6, 8), 20)
    clustered = paired_bootstrap(np.zeros(160), effects, clusters, resamples=2000)
    alone = paired_bootstrap(np.zeros(160), effects, resamples=2000)
    assert clustered.high - clustered.low > 2 * (alone.high - alone.low)
    assert clustered.value == alone.value == pytest.approx(0.1)


def test_draws_take_whole_documents() -> None:
    clusters = [*["a"] * 2, *["b"] * 3, *["c"] * 4, *["d"] * 5, *["e"] * 6]
    drawn = np.concatenate(list(draw_counts(clusters, 1500, seed=0)))
    assert drawn.shape == (1500, 20)
    members = [[place for place, name in enumerate(clusters) if name == letter] for letter in "abcde"]
    assert all((drawn[:, rows] == drawn[:, rows[:1]]).all() for rows in members)
    assert (sum(drawn[:, rows[0]] for rows in members) == 5).all() and drawn.mean() == pytest.approx(1, abs=0.05)


def test_unequal_documents_count_for_fewer() -> None:
    draws = np.random.default_rng(0).normal(0, 1, 2000)
    even, uneven = measure(draws, ["a"] * 5 + ["b"] * 5 + ["c"] * 5), measure(draws, ["a"] * 11 + ["b"] * 2 + ["c"] * 2)
    assert even.freedom == pytest.approx(2) and uneven.freedom == pytest.approx(15**2 / (121 + 8) - 1)
    assert even.error == uneven.error == pytest.approx(draws.std() * np.sqrt(3 / 2)) and uneven.interval(0.0).high > even.interval(0.0).high


def test_with_fewer_than_five_documents_only_questions_are_drawn() -> None:
    rows = [{"token_f1": float(place % 2)} for place in range(40)]
    few = compute_statistics({"base": rows, "new": rows}, ["a", "b", "c", "d"] * 10, resamples=200)
    many = compute_statistics({"base": rows, "new": rows}, ["a", "b", "c", "d", "e"] * 8, resamples=200)
    alone = compute_statistics({"base": rows, "new": rows}, [str(place) for place in range(40)], resamples=200)
    assert few.resampled == alone.resampled == "questions alone"
    assert many.resampled == "documents" and many.clusters == 5
    assert (next(draw_counts(["a", "b"] * 5, 50, 0)).sum(axis=1) == 10).all()


def test_differences_are_those_of_the_table_for_every_metric() -> None:
    generator = np.random.default_rng(5)

    def make(skill: float) -> list[dict[str, float | None]]:
        rows: list[dict[str, float | None]] = []
        for place in range(120):
            answerable = float(place % 3 != 0)
            right = float(generator.random() < skill)
            rows.append(
                {
                    "answerable": answerable,
                    "abstention_accuracy": right,
                    "is_right": right,
                    "score": float(np.clip(generator.normal(0.3 + 0.4 * right, 0.2), 0, 1)),
                    "token_f1": right if answerable else None,
                    "unsupported_rate": float(generator.random()) if right else None,
                    "sentences": float(1 + place % 3) if right else 0.0,
                    "seconds": float(generator.random()),
                }
            )
        return rows

    rows = {"base": make(0.3), "new": make(0.8)}
    found = compute_statistics(rows, [f"d{place % 10}" for place in range(120)], resamples=500, seed=1)
    base, new = aggregate(rows["base"]), aggregate(rows["new"])
    assert [pair.metric for pair in found.comparisons] == list(METRICS)
    for pair in found.comparisons:
        before, after = base[pair.metric], new[pair.metric]
        if before is None or after is None:
            assert pair.difference is pair.low is pair.high is pair.detectable is None
            continue
        assert pair.difference == pytest.approx(after - before)
        assert pair.low is not None and pair.high is not None and pair.low <= pair.difference <= pair.high
        interval = found.intervals["new"][pair.metric]
        assert interval.low is not None and interval.high is not None and interval.low <= after <= interval.high
    by_metric = {pair.metric: pair for pair in found.comparisons}
    assert by_metric["token_f1"].n == 80 and by_metric["token_f1"].is_gain and not by_metric["token_f1"].is_loss
    assert by_metric["abstention_accuracy"].is_gain and by_metric["abstention_accuracy"].mcnemar is not None
    assert by_metric["validator_auroc"].low is not None and by_metric["token_f1"].mcnemar is None
    assert found == compute_statistics(rows, [f"d{place % 10}" for place in range(120)], resamples=500, seed=1)


def test_fewer_is_a_gain_where_lower_is_better() -> None:
    rows = {"base": [{"false_abstention_rate": 1.0}] * 20, "new": [{"false_abstention_rate": 0.0}] * 20}
    found = {pair.metric: pair for pair in compute_statistics(rows, ["d"] * 20, resamples=100).comparisons}["false_abstention_rate"]
    assert found.difference == -1.0 and found.is_gain and not found.is_loss


def test_detectable_difference_shrinks_with_the_number_of_questions() -> None:
    generator = np.random.default_rng(6)

    def detectable(n: int) -> float:
        rows = {name: [{"exact_match": float(generator.random() < 0.5)} for _ in range(n)] for name in ("base", "new")}
        found = {pair.metric: pair for pair in compute_statistics(rows, ["d"] * n, resamples=1000).comparisons}["exact_match"].detectable
        assert found is not None
        return found

    assert detectable(100) == pytest.approx(2.8 * np.sqrt(0.5 / 100), rel=0.25)
    assert detectable(400) == pytest.approx(detectable(100) / 2, rel=0.25)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (5, 0), (3, 9), (10, 10), (40, 12)])
def test_mcnemar_is_the_exact_binomial_test(gained: int, lost: int) -> None:
    expected = scipy_stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert exact_p(gained, lost) == pytest.approx(expected)


def test_mcnemar_counts_questions_that_both_define() -> None:
    a = [{"exact_match": value} for value in (0.0, 0.0, 1.0, 1.0, None)]
    b = [{"exact_match": value} for value in (1.0, 1.0, 0.0, None, 1.0)]
    found = mcnemar(a, b, "exact_match")
    assert (found.gained, found.lost, found.p) == (2, 1, 1.0)


def test_a_question_belongs_to_its_first_document() -> None:
    assert cluster_of(Question(id="1", question="?", documents=["a.pdf", "b.pdf"])) == "a.pdf"
    assert cluster_of(Question(id="1", question="?")) != cluster_of(Question(id="2", question="?"))


def test_an_interval_ends_where_it_can_and_is_none_without_a_value() -> None:
    known = Precision(error=0.1, freedom=9, units=10)
    t = scipy_stats.t.ppf([0.975, 0.75, 0.8], 9)
    assert known.interval(0.2) == Interval(0.2, pytest.approx(0.2 - 0.1 * t[0]), pytest.approx(0.2 + 0.1 * t[0]))
    assert known.interval(0.2, 0.5).high == pytest.approx(0.2 + 0.1 * t[1]) and known.interval(0.9, bounds=(0, 1)).high == 1
    assert known.interval(float("nan")) == Interval(None, None, None) and known.detectable() == pytest.approx(0.1 * (t[0] + t[2]))
    lone = measure(np.full(9, 0.3), ["a"] * 4)
    assert lone.interval(0.3) == Interval(0.3, None, None) and lone.detectable() is lone.p(0.3) is None
    undefined = measure(np.full(9, np.nan), ["a", "b"])
    assert undefined.interval(0.3) == Interval(0.3, None, None)


@given(st.floats(-2, 2), st.floats(0.01, 1), st.floats(0.5, 50))
def test_the_p_value_is_below_a_twentieth_where_the_interval_leaves_out_zero(value: float, error: float, freedom: float) -> None:
    known = Precision(error, freedom, 9)
    found, p = known.interval(value), known.p(value)
    assert p is not None and 0 <= p <= 1 and found.low is not None and found.high is not None
    if abs(p - 0.05) > 1e-9:
        assert (p < 0.05) == (found.low > 0 or found.high < 0)
    assert known.p(-value) == pytest.approx(p)


def test_a_difference_that_never_varies_has_the_p_value_of_the_sign_test() -> None:
    assert Precision(0.0, 7, 8).p(0.0) == 1.0 and Precision(0.0, 7, 8).p(0.5) == scipy_stats.binomtest(8, 8).pvalue


@given(st.lists(st.floats(-1, 1), min_size=4, max_size=30), st.integers(0, 99))
def test_swapping_the_models_turns_the_interval_round(values: list[float], seed: int) -> None:
    names = [f"d{place % 5}" for place in range(len(values))]
    forth, back = (paired_bootstrap(*pair, names, 200, seed) for pair in ((np.zeros(len(values)), values), (values, np.zeros(len(values)))))
    assert forth.value == pytest.approx(-back.value, abs=1e-12)
    if forth.low is not None:
        assert (forth.low, forth.high) == pytest.approx((-back.high, -back.low), abs=1e-9) and forth.low <= forth.value <= forth.high


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.randoms())
def test_holm_never_lowers_a_p_value_and_keeps_their_order(p_values: list[float], random: Random) -> None:
    found = holm(p_values)
    assert all(p <= corrected <= 1 for p, corrected in zip(p_values, found, strict=True))
    assert [found[i] for i in np.argsort(p_values, kind="stable")] == sorted(found)
    order = list(range(len(p_values)))
    random.shuffle(order)
    assert holm([p_values[place] for place in order]) == [found[place] for place in order]
    assert min(found) == min(1, len(p_values) * min(p_values))


def test_holm_is_that_of_the_paper() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_the_effect_size_is_the_paired_t_statistic_over_the_root_of_n() -> None:
    generator = np.random.default_rng(9)
    a, b = ([{"token_f1": float(value)} for value in generator.random(50)] for _ in range(2))
    t = scipy_stats.ttest_rel([row["token_f1"] for row in b], [row["token_f1"] for row in a]).statistic
    assert effect_size(a, b, "token_f1") == pytest.approx(t / np.sqrt(50))
    assert effect_size(a, a, "token_f1") is effect_size(a, b, "validator_auroc") is None


def test_coverage_is_the_worst_simulated_at_a_size_that_is_not_larger() -> None:
    rows = json.loads(TABLE.read_text())["coverage"]
    assert len(rows) > 10 and all(0.5 < row["coverage"] <= 1 for row in rows)

    def worst(documents: int, each: int, most: float = 9.0) -> float:
        of_size = [row for row in rows if (row["documents"], row["questions_per_document"]) == (documents, each) and row["skewness"] <= most]
        return min(row["coverage"] for row in of_size)

    for documents, each in {(row["documents"], row["questions_per_document"]) for row in rows}:
        assert simulated_coverage(max(1, documents) * each, documents) == worst(documents, each)
    assert simulated_coverage(12 * 20, 12) == min(worst(12, 12), worst(12, 40)) == simulated_coverage(15 * 20, 15)  # between two sizes: the worse
    assert simulated_coverage(40 * 500, 400) == worst(40, 40) and simulated_coverage(5000, 0) == worst(0, 400)
    assert simulated_coverage(1000, 3) is None and simulated_coverage(5, 0) is None  # smaller than any
    shapes = sorted({row["skewness"] for row in rows})
    at, beyond = worst(5, 12, shapes[1]), worst(5, 12, shapes[2])
    assert simulated_coverage(60, 5, shapes[1]) == at and simulated_coverage(60, 5, (shapes[1] + shapes[2]) / 2) == pytest.approx((at + beyond) / 2)
    assert simulated_coverage(60, 5, shapes[-1] + 0.01) is None  # more lopsided than any


def test_five_documents_are_enough_for_differences_that_are_not_lopsided() -> None:
    """They were not with percentile intervals, whose worst coverage was 0.859 there."""
    assert simulated_coverage(200, 5, 0.1) >= LEAST_COVERAGE and simulated_coverage(60, 5, 0.1) >= LEAST_COVERAGE > simulated_coverage(60, 5, 0.9)


def test_skewness_is_scipys_without_its_sign() -> None:
    values = np.random.default_rng(12).random(40) ** 3
    a, b = [{"token_f1": 0.0}] * 40, [{"token_f1": float(value)} for value in values]
    assert skewness(a, b, "token_f1") == skewness(b, a, "token_f1") == pytest.approx(scipy_stats.skew(values))
    assert skewness(a, a, "token_f1") is skewness(a, b, "latency_p50") is None


def test_what_is_too_small_is_said() -> None:
    pair = Comparison("a", "b", "token_f1", 9, 0.1, 0.0, 0.2, 0.1, None, coverage=0.92)
    assert pair.is_too_small and not replace(pair, coverage=0.93).is_too_small
    assert replace(pair, coverage=None).is_too_small and not replace(pair, difference=None).is_too_small  # smaller than any that was simulated; undefined


def test_a_planted_difference_is_found_and_none_is_not() -> None:
    """Forty questions each about twelve documents, 200 times: false alarms are rare, and 20 points are nearly always seen."""
    generator = np.random.default_rng(10)
    clusters = [str(place // 40) for place in range(480)]
    drawn = np.concatenate(list(draw_counts(clusters, 600, 0)))
    shares = {}
    for planted in (0.0, 0.2):
        before, after = generator.random((480, 200)) < 0.4, generator.random((480, 200)) < 0.4 + planted
        differences = after.astype(float) - before
        means = drawn @ differences / 480
        found = [measure(means[:, i], clusters).interval(float(differences[:, i].mean())) for i in range(200)]
        shares[planted] = np.mean([interval.low > 0 or interval.high < 0 for interval in found])
    assert shares[0.0] <= 0.08 and shares[0.2] > 0.95


def test_the_published_table_is_the_one_that_the_report_reads() -> None:
    assert tables() in DOCS.read_text(encoding="utf-8")
