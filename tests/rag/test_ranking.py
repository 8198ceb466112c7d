"""Fusion, diversity, and how many: laws over any rankings."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag.bounded import Bounded
from rag.ranking import Candidate, Finding, count_by_gap, diversify, fuse

RANKINGS = st.lists(st.lists(st.sampled_from("abcdef"), unique=True), max_size=4)


def ranked(rankings: list[list[str]]) -> list[Candidate]:
    return fuse([("q", "dense", [(item, 1.0) for item in ranking]) for ranking in rankings], 60)


@given(RANKINGS)
def test_fusion_ranks_what_all_rankings_agree_on_first(rankings: list[list[str]]) -> None:
    fused = ranked(rankings)
    assert {candidate.chunk_id for candidate in fused} == {item for ranking in rankings for item in ranking}
    assert [c.score for c in fused] == sorted((c.score for c in fused), reverse=True)
    if rankings and rankings[0] and all(r[:1] == rankings[0][:1] for r in rankings):
        assert fused[0].chunk_id == rankings[0][0]


def test_fusion_is_the_published_sum() -> None:
    fused = fuse([("q", "dense", [("a", 0.9), ("b", 0.8)]), ("q", "lexical", [("b", 7.0)])], 60)
    assert [(c.chunk_id, c.fused) for c in fused] == [("b", pytest.approx(1 / 62 + 1 / 61)), ("a", pytest.approx(1 / 61))]
    assert (fused[0].scores.dense, fused[0].scores.lexical, fused[1].scores.lexical) == (0.8, 7.0, None)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(1, 5), st.integers(0, 5))
def test_the_gap_decides_within_its_bounds(scores: list[float], least: int, more: int) -> None:
    scores = sorted(scores, reverse=True)
    count = count_by_gap(scores, least, least + more)
    assert min(least, len(scores)) <= count <= min(least + more, len(scores))


def test_the_widest_gap_wins() -> None:
    assert count_by_gap([0.9, 0.8, 0.2, 0.1], 1, 4) == 2
    assert count_by_gap([0.9, 0.8, 0.2, 0.1], 3, 4) == 3
    assert count_by_gap([0.5], 2, 4) == 1


def candidates(scores: dict[str, float]) -> list[Candidate]:
    return [Candidate(name, [Finding("q", "dense", 1, score, score)]) for name, score in scores.items()]


def test_diversity_passes_over_a_copy() -> None:
    near, other = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    found = diversify(candidates({"a": 1.0, "copy": 0.99, "b": 0.6}), {"a": near, "copy": near, "b": other}, 0.5, 2)
    assert [(c.chunk_id, c.novelty_penalty) for c in found] == [("a", 0.0), ("b", 0.0)]
    assert [c.chunk_id for c in diversify(candidates({"a": 1.0, "copy": 0.99, "b": 0.6}), {"a": near, "copy": near, "b": other}, 1.0, 2)] == ["a", "copy"]


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=8), st.integers(1, 10), st.integers(0, 99))
def test_diversity_with_all_weight_on_relevance_keeps_the_order(scores: list[float], count: int, seed: int) -> None:
    given_candidates = candidates({str(i): score for i, score in enumerate(sorted(scores, reverse=True))})
    vectors = {c.chunk_id: np.random.default_rng(seed).normal(size=(2, 4)) for c in given_candidates}
    assert [c.chunk_id for c in diversify(given_candidates, vectors, 1.0, count)] == [c.chunk_id for c in given_candidates[:count]]


def test_a_bounded_mapping_forgets_what_was_used_least_recently() -> None:
    kept: Bounded[str, int] = Bounded(2)
    kept.put("a", 1)
    kept.put("b", 2)
    assert kept.get("a") == 1
    kept.put("c", 3)
    assert (kept.get("a"), kept.get("b"), kept.get("c")) == (1, None, 3)
