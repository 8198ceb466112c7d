"""Metrics against reference implementations on shared inputs, and the laws that each obeys."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from rag.eval.metrics import aggregate, exact_match, token_f1
from rag.eval.ranked import ndcg_at_k, precision_at_k, recall_at_k, reciprocal_rank
from rag.eval.reliability import BANDS, calibration_error, reliability_curve
from rag.eval.rouge import common_subsequence, rouge_l
from rag.eval.similarity import add_similarity

REFERENCES = json.loads((Path(__file__).parent / "data" / "references.json").read_text())  # by scripts/metric_references.py
TEXTS = st.text(alphabet="ab c.,é", max_size=30)
RANKINGS = st.lists(st.booleans(), max_size=12)
SCORED = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40)


def test_rouge_is_rouge_scores() -> None:
    assert len(REFERENCES["rouge"]) == 60
    for row in REFERENCES["rouge"]:
        assert rouge_l(row["prediction"], row["answer"]) == pytest.approx(row["rouge_l"])


def test_rankings_are_trec_evals() -> None:
    assert len(REFERENCES["ranking"]) > 50
    for row in REFERENCES["ranking"]:
        found, relevant = row["found"], row["relevant"]
        for k in (3, 8):
            assert precision_at_k(found, k) == pytest.approx(row[f"P_{k}"])
            assert recall_at_k(found, relevant, k) == pytest.approx(row[f"recall_{k}"])
            assert ndcg_at_k(found, relevant, k) == pytest.approx(row[f"ndcg_cut_{k}"])
        assert reciprocal_rank(found) == pytest.approx(row["recip_rank"])


def test_answers_are_squads() -> None:
    assert len(REFERENCES["squad"]) == 60
    for row in REFERENCES["squad"]:
        assert token_f1(row["prediction"], row["answer"]) == pytest.approx(row["f1"])
        assert exact_match(row["prediction"], row["answer"]) == row["exact"]


def test_quantiles_are_numpys_nearest_rank() -> None:
    seconds = np.random.default_rng(2).lognormal(size=137)
    found = aggregate([{"seconds": float(value)} for value in seconds])
    for name, share in (("latency_p50", 50), ("latency_p95", 95), ("latency_p99", 99)):
        assert found[name] == np.percentile(seconds, share, method="inverted_cdf")


def test_the_reliability_curve_is_that_of_scikit_learn() -> None:
    calibration = pytest.importorskip("sklearn.calibration")
    generator = np.random.default_rng(3)
    scores = generator.random(200)
    is_right = (generator.random(200) < scores**2).astype(float)
    share, mean = calibration.calibration_curve(is_right, scores, n_bins=BANDS)
    curve = reliability_curve(scores, is_right)
    assert [band.share_right for band in curve] == pytest.approx(share)
    assert [band.score for band in curve] == pytest.approx(mean)
    expected = sum(band.count * abs(band.share_right - band.score) for band in curve) / 200
    assert calibration_error(scores, is_right)(np.ones((1, 200)))[0] == pytest.approx(expected)


def test_auroc_is_scipys_mann_whitney() -> None:
    generator = np.random.default_rng(4)
    rows = [{"score": round(float(generator.random()), 1), "is_right": float(generator.random() < 0.4)} for _ in range(80)]
    right, wrong = ([row["score"] for row in rows if row["is_right"] == kind] for kind in (1.0, 0.0))
    u = scipy_stats.mannwhitneyu(right, wrong).statistic
    assert aggregate(rows)["validator_auroc"] == pytest.approx(u / (len(right) * len(wrong)))


@given(TEXTS, TEXTS)
def test_rouge_is_bounded_and_symmetric(left: str, right: str) -> None:
    value = rouge_l(left, right)
    assert 0 <= value <= 1 and value == pytest.approx(rouge_l(right, left))
    assert value == pytest.approx(rouge_l(left.upper(), f" {right}!"))
    assert rouge_l(left, left) in (0.0, 1.0)
    assert common_subsequence(left[::-1], right[::-1]) == common_subsequence(left, right)


@given(RANKINGS, st.integers(0, 5), st.integers(1, 12))
def test_rankings_are_bounded_and_better_when_a_relevant_passage_rises(found: list[bool], missed: int, k: int) -> None:
    relevant = sum(found) + missed
    before = (precision_at_k(found, k), recall_at_k(found, relevant, k), reciprocal_rank(found), ndcg_at_k(found, relevant, k))
    assert all(0 <= value <= 1 + 1e-12 for value in before)
    best = sorted(found, reverse=True)
    after = (precision_at_k(best, k), recall_at_k(best, relevant, k), reciprocal_rank(best), ndcg_at_k(best, relevant, k))
    assert all(new >= old - 1e-12 for new, old in zip(after, before, strict=True))
    if relevant and not missed:
        assert ndcg_at_k(best, relevant, k) == pytest.approx(1)


@given(SCORED, st.randoms())
def test_calibration_error_is_bounded_and_blind_to_order(items: list[tuple[float, bool]], random: random.Random) -> None:
    def error(of: list[tuple[float, bool]]) -> float | None:
        return aggregate([{"score": score, "is_right": float(is_right)} for score, is_right in of])["calibration_error"]

    value = error(items)
    assert value is not None and 0 <= value <= 1
    random.shuffle(items)
    assert error(items) == pytest.approx(value)
    assert error([(float(is_right), is_right) for _, is_right in items]) == 0


def test_abstention_precision_and_recall_are_those_of_the_confusion_table(ask, reply, abstain, corpus) -> None:
    from rag.eval.metrics import score_trace

    unanswerable = ask(answers=None, quotes=[])
    kinds = [(ask(), abstain())] * 2 + [(ask(), reply())] * 5 + [(unanswerable, abstain())] * 3 + [(unanswerable, reply())]
    found = aggregate([score_trace(trace, question, corpus) for question, trace in kinds])
    assert found["abstention_precision"] == pytest.approx(3 / 5) and found["abstention_recall"] == pytest.approx(3 / 4)
    only = aggregate([score_trace(reply(), ask(), corpus)])
    assert only["abstention_precision"] is only["abstention_recall"] is None


def test_similarity_takes_the_nearest_accepted_answer(ask, reply, abstain) -> None:
    vectors = {"one": [1.0, 0.0], "two": [0.6, 0.8], "against": [-1.0, 0.0]}

    def embed(texts: list[str]) -> np.ndarray:
        return np.array([vectors[text] for text in texts], dtype=np.float32)

    questions = [ask(answers=["against", "two"]), ask(answers=["against"]), ask(answers=["one"]), ask(answers=None), ask(answers=["one"])]
    traces = [reply(answer="one"), reply(answer="one"), reply(answer="one"), reply(answer="one"), abstain()]
    rows: list[dict[str, float | None]] = [{"semantic_similarity": None} for _ in questions]
    add_similarity(rows, traces, questions, embed)
    assert [row["semantic_similarity"] for row in rows] == [pytest.approx(0.6), 0.0, pytest.approx(1.0), None, 0.0]
    add_similarity(rows[3:], [*traces[3:4], abstain()], [questions[3], ask(answers=[" "])], embed)  # nothing to embed


def test_order_is_measured_where_the_trace_has_kept_it(ask, reply, corpus) -> None:
    from rag.eval.metrics import score_trace

    def ranked(*ranking: str) -> dict[str, float | None]:
        trace = reply(passages=sorted(ranking))
        steps = [step.model_copy(update={"parsed": {"ranking": list(ranking)}}) if step.name == "retrieve" else step for step in trace.steps]
        return score_trace(trace.model_copy(update={"steps": steps}), ask(), corpus)

    first, second = ranked("library.pdf-0", "library.pdf-80", "other.pdf-0"), ranked("other.pdf-0", "library.pdf-0")
    holding = [chunk.id for chunk in corpus.values() if "Visitors may borrow up to six books for three weeks." in chunk.text]
    assert holding == ["library.pdf-0"]
    assert (first["mrr"], first["precision_at_k"], first["ndcg_at_k"]) == (1.0, pytest.approx(1 / 3), 1.0)
    assert (second["mrr"], second["precision_at_k"], second["ndcg_at_k"]) == (0.5, 0.5, pytest.approx(1 / np.log2(3)))
    unranked = score_trace(reply(), ask(), corpus)
    assert unranked["mrr"] is unranked["ndcg_at_k"] is None and unranked["precision_at_k"] == 0.5
    failed = score_trace(reply(complete=False).model_copy(update={"steps": []}), ask(), corpus)
    assert failed["mrr"] == failed["ndcg_at_k"] == failed["precision_at_k"] == 0.0


def test_the_first_token_is_counted_from_the_start_of_the_run(ask, reply, corpus) -> None:
    from rag.eval.metrics import score_trace

    trace = reply()
    steps = [step.model_copy(update={"first_token_seconds": 0.125}) if step.name == "answer" else step for step in trace.steps]
    assert score_trace(trace.model_copy(update={"steps": steps}), ask(), corpus)["first_token_seconds"] == 0.875  # after 0.5 s and 0.25 s
    assert score_trace(trace, ask(), corpus)["first_token_seconds"] is None
