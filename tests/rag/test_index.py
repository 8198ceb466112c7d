"""The index against brute force: exact and quantised, with and without a filter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rag.index
from rag.index import Index, build_index, open_index
from understudy.records import Chunk, Document

COUNT, DIM = 300, 24


@pytest.fixture(params=[False, True], ids=["exact", "quantised"])
def opened(
    request: pytest.FixtureRequest, tmp_path: Path, make_document: Callable[..., tuple[Document, list[Chunk]]], monkeypatch: pytest.MonkeyPatch
) -> Index:
    """An index of 300 chunks of one to three windows."""
    monkeypatch.setattr(rag.index, "EXACT_UP_TO", 0 if request.param else 10_000)
    random = np.random.default_rng(3)
    document, chunks = make_document("d.txt", [f"passage number{i} of kind{i % 7}" for i in range(COUNT)])
    vectors = {chunk.id: random.normal(size=(1 + i % 3, DIM)).astype(np.float32) for i, chunk in enumerate(chunks)}
    vectors = {chunk_id: rows / np.linalg.norm(rows, axis=1, keepdims=True) for chunk_id, rows in vectors.items()}
    generation = build_index(tmp_path, [document], chunks, vectors, "embedder", "chunker")
    assert (tmp_path / generation / "dense.faiss").exists() == request.param
    return open_index(tmp_path, generation)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**16), count=st.integers(1, 20), kept=st.sampled_from([None, 1, 5, 150]))
def test_dense_search_is_brute_force_over_what_is_allowed(opened: Index, seed: int, count: int, kept: int | None) -> None:
    index = opened
    random = np.random.default_rng(seed)
    query = random.normal(size=DIM).astype(np.float32)
    query /= np.linalg.norm(query)
    ids = index.facts.chunk_ids
    allowed = None if kept is None else frozenset(random.choice(ids, size=kept, replace=False).tolist())
    best = {ids[owner]: -1.0 for owner in range(COUNT)}
    for row, owner in enumerate(index.owners):
        best[ids[owner]] = max(best[ids[owner]], float(index.vectors[row] @ query))
    expected = sorted((score for chunk_id, score in best.items() if allowed is None or chunk_id in allowed), reverse=True)[:count]
    found = index.search_dense(query, count, allowed)
    assert allowed is None or {chunk_id for chunk_id, _ in found} <= allowed
    assert [score for _, score in found] == pytest.approx(expected, abs=1e-5)


def test_lexical_search_looks_only_at_what_is_allowed(opened: Index) -> None:
    index = opened
    ids = index.facts.chunk_ids
    allowed = frozenset(ids[100:])
    found = index.search_lexical("kind3 number3", 20, allowed)
    assert len(found) == 20 and {chunk_id for chunk_id, _ in found} <= allowed
    assert index.search_lexical("kind3 number3", 1)[0][0] == ids[3]
    assert index.search_lexical("the of", 5) == index.search_lexical("unheard", 5) == index.search_lexical("kind3", 5, frozenset()) == []


def test_lexical_search_finds_what_bm25s_finds(opened: Index) -> None:
    for query in ("kind3 number3", "passage number7 kind5", "number1 number2 number4"):
        _, scores = opened.lexical.retrieve(rag.index.tokenize([query]), k=20, show_progress=False)
        found = opened.search_lexical(query, 20)
        assert [score for _, score in found] == [score for score in scores[0].tolist() if score > 0]
        assert len({chunk_id for chunk_id, _ in found}) == len(found)


def test_a_long_chunk_does_not_crowd_out_the_others(tmp_path: Path, make_document: Callable[..., tuple[Document, list[Chunk]]]) -> None:
    document, chunks = make_document("d.txt", ["long", "short", "other"])
    vectors = {chunk.id: np.eye(4, dtype=np.float32)[[i]] for i, chunk in enumerate(chunks)}
    vectors[chunks[0].id] = np.repeat(np.eye(4, dtype=np.float32)[[3]], 40, axis=0)
    index = open_index(tmp_path, build_index(tmp_path, [document], chunks, vectors, "e", "c"))
    assert {chunk_id for chunk_id, _ in index.search_dense(np.eye(4, dtype=np.float32)[3], 3)} == {chunk.id for chunk in chunks}


def test_a_corpus_of_stop_words_is_indexed(tmp_path: Path, make_document: Callable[..., tuple[Document, list[Chunk]]]) -> None:
    document, chunks = make_document("d.txt", ["The of and."])
    index = open_index(tmp_path, build_index(tmp_path, [document], chunks, {chunks[0].id: np.eye(2, dtype=np.float32)[[0]]}, "e", "c"))
    assert index.search_lexical("the committee", 3) == []
    assert len(index.search_dense(np.eye(2, dtype=np.float32)[0], 3)) == 1


def test_equal_corpora_are_one_generation_and_other_metadata_another(tmp_path: Path, make_document: Callable[..., tuple[Document, list[Chunk]]]) -> None:
    document, chunks = make_document("d.txt", ["one", "two"])
    vectors = {chunk.id: np.eye(2, dtype=np.float32)[[0]] for chunk in chunks}

    def build(given_document: Document, embedder: str = "e", chunker: str = "c") -> str:
        return build_index(tmp_path, [given_document], chunks, vectors, embedder, chunker)

    first = build(document)
    assert build(document.model_copy(update={"ingested_at": 5.0})) == first
    others = [build(document.model_copy(update={"tags": ["law"]})), build(document, embedder="f"), build(document, chunker="d")]
    assert len({first, *others}) == 4
