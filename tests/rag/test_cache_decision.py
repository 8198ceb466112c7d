"""Thresholds learnt online, and laws of the bound; the index against computing every cosine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag.cache_calibrate import Measured, Pair, calibrate, read_pairs, wilson
from rag.cache_decision import DEFAULT, believe, features, fit_parameters, prior_probability, read_parameters, write_parameters
from rag.cache_guard import compare
from rag.cache_index import EXACT_BELOW, VectorIndex
from understudy.cache_records import CacheObservation
from understudy.errors import UsageError

PAIRS = Path(__file__).parents[2] / "samples" / "cache-pairs"


def seen(prior: float, correct: bool) -> CacheObservation:
    return CacheObservation(similarity=prior, correct=correct)


def test_a_new_entry_answers_only_the_same_words_close_by() -> None:
    same, other = compare("Who approves a model?", "A model is approved by whom?"), compare("Who approves a model?", "Who approves a budget?")
    assert believe(DEFAULT, prior_probability(DEFAULT, 0.97, same), []).lower >= 0.99
    assert believe(DEFAULT, prior_probability(DEFAULT, 0.80, same), []).lower < 0.99
    assert believe(DEFAULT, prior_probability(DEFAULT, 0.97, other), []).lower < 0.9


def test_an_entry_that_was_wrong_asks_for_more_and_one_that_was_right_for_less() -> None:
    start = believe(DEFAULT, 0.9, [])
    assert believe(DEFAULT, 0.9, [seen(0.99, False)]).lower < start.lower < believe(DEFAULT, 0.9, [seen(0.8, True)] * 8).lower


def test_enough_right_answers_open_a_threshold_that_one_wrong_answer_closes() -> None:
    right = [seen(0.9, True)] * 30
    assert believe(DEFAULT, 0.996, []).lower < 0.99 < believe(DEFAULT, 0.996, right).lower
    assert believe(DEFAULT, 0.996, [*right, seen(0.996, False)]).lower == 0
    assert believe(DEFAULT, 0.9999, [*right, seen(0.996, False)]).lower > 0.99


@settings(max_examples=80, deadline=None)
@given(st.floats(0.001, 0.999), st.lists(st.tuples(st.floats(0.0, 1.0), st.booleans()), max_size=30))
def test_the_bound_lies_below_the_probability_and_grows_with_the_prior(prior: float, observed: list[tuple[float, bool]]) -> None:
    observations = [seen(p, correct) for p, correct in observed]
    belief, nearer = believe(DEFAULT, prior, observations), believe(DEFAULT, min(0.9999, prior + 0.0005), observations)
    assert 0 <= belief.lower <= belief.probability <= 1
    assert belief.lower <= nearer.lower


def test_the_bound_holds_where_entries_are_as_the_model_says() -> None:
    """Entries drawn from the prior, asked and observed online: of the hits, no more are wrong than the bound allows."""
    drawn = np.random.default_rng(0)
    hits = wrong = 0
    for _ in range(150):
        threshold = drawn.normal(0, DEFAULT.entry_sd)
        observations: list[CacheObservation] = []
        for log_odds in drawn.normal(3.5, 2.0, 40):
            prior, is_right = 1 / (1 + np.exp(-log_odds)), drawn.random() < 1 / (1 + np.exp(threshold - log_odds))
            if believe(DEFAULT, float(prior), observations).lower >= 0.98:
                hits, wrong = hits + 1, wrong + int(not is_right)
            else:
                observations.append(seen(float(prior), bool(is_right)))
    assert hits > 300
    assert wilson(wrong, hits)[0] <= 0.02


def test_fitting_finds_what_pairs_say_and_nearer_is_never_worse() -> None:
    drawn = np.random.default_rng(1)
    comparison = compare("Who approves a model?", "Who approves a budget?")
    rows = [features(float(cosine), comparison) for cosine in drawn.uniform(0.6, 1.0, 400)]
    labels = [bool(drawn.random() < 1 / (1 + np.exp(-(4 - 3 * row[0])))) for row in rows]
    fitted = fit_parameters(rows, labels, 0.5)
    assert all(weight <= 0 for weight in fitted.weights)
    assert fitted.weights[0] == pytest.approx(-3, abs=0.9)


def test_too_few_pairs_are_refused() -> None:
    few = [Measured(Pair("Who approves a model?", "A model is approved by whom?", True), 0.9, compare("a b", "a b"))] * 60
    with pytest.raises(UsageError, match="too few"):
        calibrate(few, 0.5)


def test_parameters_are_kept_and_the_shipped_pairs_can_be_read(tmp_path: Path) -> None:
    assert read_parameters(tmp_path) == DEFAULT
    changed = DEFAULT.model_copy(update={"bias": 1.0})
    write_parameters(tmp_path, changed)
    assert read_parameters(tmp_path) == changed
    counts = {split: len(read_pairs(PAIRS / f"{split}.jsonl")) for split in ("calibration", "development", "test")}
    assert sum(counts.values()) >= 900
    assert min(counts.values()) > 300


def test_a_row_that_is_no_pair_is_named(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"a": "x", "b": "y", "same": true}\n{"a": "x", "b": "y", "same": "yes"}\n')
    with pytest.raises(UsageError, match="line 2"):
        read_pairs(tmp_path / "pairs.jsonl")


def test_the_index_finds_the_nearest_below_and_beyond_its_size_for_exact_search() -> None:
    drawn = np.random.default_rng(0)
    vectors = drawn.normal(size=(EXACT_BELOW + 200, 64)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = [str(row) for row in range(len(vectors))]
    index = VectorIndex()
    for start in range(0, len(ids), 700):
        index.add(ids[start : start + 700], vectors[start : start + 700])
        index.add(ids[start : start + 10], vectors[start : start + 10])  # again: nothing changes
        near = vectors[start] + drawn.normal(scale=0.02, size=64).astype(np.float32)
        assert index.nearest(near / np.linalg.norm(near), 3)[0][0] == ids[start]
    assert len(index) == len(ids)
    index.discard("5")
    assert "5" not in [entry_id for entry_id, _ in index.nearest(vectors[5], 8)]
    index.add(["5"], vectors[5:6])
    assert index.nearest(vectors[5], 1)[0][0] == "5"
    assert VectorIndex().nearest(vectors[0], 3) == []
