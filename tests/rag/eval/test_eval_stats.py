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
from rag.eval.resampling import Interval, detectable_sds, draw_counts, make_interval, paired_bootstrap, two_sided_p
from rag.eval.stats import Comparison, cluster_of, compute_statistics, effect_size, exact_p, holm, mcnemar
from scripts.bench_coverage import DOCS, tables
from understudy.records import Question


def test_unclustered_interval_agrees_with_scipy() -> None:
    generator = np.random.default_rng(1)
    a, b = generator.normal(0.3, 0.2, 80), generator.normal(0.4, 0.3, 80)
    ours = paired_bootstrap(a, b, resamples=10_000, seed=2)
    theirs = scipy_stats.bootstrap((b - a,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(3)).confidence_interval
    assert ours.value == pytest.approx(float(np.mean(b - a)))
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.04 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.04 * width)


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


def test_draws_take_whole_documents_then_questions_inside() -> None:
    clusters = [*["a"] * 2, *["b"] * 3, *["c"] * 4, *["d"] * 5, *["e"] * 6]
    drawn = np.concatenate(list(draw_counts(clusters, 1500, seed=0)))
    assert drawn.shape == (1500, 20)
    sizes = np.array([drawn[:, [place for place, name in enumerate(clusters) if name == letter]].sum(axis=1) for letter in "abcde"])
    assert all(set(np.unique(size / count)) <= set(range(6)) for size, count in zip(sizes, (2, 3, 4, 5, 6), strict=True))
    assert (sum(size / count for size, count in zip(sizes, (2, 3, 4, 5, 6), strict=True)) == 5).all()
    assert drawn.mean() == pytest.approx(1, abs=0.05)


def test_with_fewer_than_five_documents_only_questions_are_drawn() -> None:
    rows = [{"token_f1": float(place % 2)} for place in range(40)]
    few = compute_statistics({"base": rows, "new": rows}, ["a", "b", "c", "d"] * 10, resamples=200)
    many = compute_statistics({"base": rows, "new": rows}, ["a", "b", "c", "d", "e"] * 8, resamples=200)
    alone = compute_statistics({"base": rows, "new": rows}, [str(place) for place in range(40)], resamples=200)
    assert few.resampled == alone.resampled == "questions only"
    assert many.resampled == "documents, then questions inside" and many.clusters == 5
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


def test_an_interval_holds_its_share_of_the_draws() -> None:
    draws = np.random.default_rng(7).normal(0.2, 0.1, 100_000)
    wide, narrow = make_interval(0.2, draws), make_interval(0.2, draws, 0.5)
    assert wide.high == pytest.approx(0.2 + 0.1 * 1.96, abs=0.002) and narrow.high == pytest.approx(0.2 + 0.1 * 0.6745, abs=0.002)
    assert make_interval(float("nan"), draws) == make_interval(0.2, np.full(9, np.nan)) == Interval(None, None, None)
    assert detectable_sds() == pytest.approx(1.96 + 0.8416, abs=1e-3) and detectable_sds() < detectable_sds(0.99)


@pytest.mark.parametrize("shift", [-0.5, -0.21, -0.1, 0.0, 0.1, 0.19, 0.22, 0.4])
def test_the_p_value_is_below_a_twentieth_where_the_interval_leaves_out_zero(shift: float) -> None:
    draws = np.random.default_rng(8).normal(shift, 0.1, 10_001)
    found, p = make_interval(shift, draws), two_sided_p(shift, draws)
    assert p is not None and 0 < p <= 1
    assert (p < 0.05) == (found.low > 0 or found.high < 0)
    assert two_sided_p(-shift, -draws) == pytest.approx(p) and two_sided_p(0.0, np.zeros(100)) == 1.0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.randoms())
def test_holm_never_lowers_a_p_value_and_keeps_their_order(p_values: list[float], random: Random) -> None:
    found = holm(p_values)
    assert all(p <= corrected <= 1 for p, corrected in zip(p_values, found, strict=True))
    assert [found[i] for i in np.argsort(p_values, kind="stable")] == sorted(found)
    order = list(range(len(p_values)))
    random.shuffle(order)
    assert holm([p_values[place] for place in order]) == [found[place] for place in order]
    assert min(found) == min(1, len(p_values) * min(p_values))


def test_a_p_value_is_not_bounded_by_the_number_of_resamples() -> None:
    draws = np.random.default_rng(11).normal(0.5, 0.1, 1000)
    assert two_sided_p(0.5, draws) == pytest.approx(2 * scipy_stats.norm.sf(5), rel=1)


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
    at = {(row["documents"], row["questions_per_document"]) for row in rows}
    worst = {size: min(row["coverage"] for row in rows if (row["documents"], row["questions_per_document"]) == size) for size in at}
    for (documents, each), coverage in worst.items():
        assert simulated_coverage(max(1, documents) * each, documents) == coverage
    assert simulated_coverage(12 * 20, 12) == min(worst[12, 12], worst[12, 40]) == simulated_coverage(15 * 20, 15)  # between two sizes: the worse
    assert simulated_coverage(40 * 500, 400) == worst[40, 40] and simulated_coverage(5000, 0) == worst[0, 400]
    assert simulated_coverage(1000, 3) is None and simulated_coverage(5, 0) is None  # smaller than any


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
        intervals = [make_interval(float(differences[:, i].mean()), means[:, i]) for i in range(200)]
        shares[planted] = np.mean([interval.low > 0 or interval.high < 0 for interval in intervals])
    assert shares[0.0] <= 0.06 and shares[0.2] > 0.95


def test_the_published_table_is_the_one_that_the_report_reads() -> None:
    assert tables() in DOCS.read_text(encoding="utf-8")
