"""The conformance suite of stores, semantic cache."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from understudy.cache_records import CacheEntry, CacheObservation, CacheTotals
from understudy.digests import digest_of
from understudy.records import Chunk, Citation, Document
from understudy.store import Store

Maker = Callable[..., tuple[Document, list[Chunk]]]
VECTOR = np.array([0.6, 0.8, 0.0], np.float32)


def make_entry(chunk: Chunk, question: str = "when is the kiln fired?", scope: str = "s", **changes: object) -> CacheEntry:
    digest = digest_of(question)
    citation = Citation(chunk_id=chunk.id, document_id=chunk.document_id, document=chunk.document, quote=chunk.text, page=1, start=chunk.start, end=chunk.end)
    entry = CacheEntry(
        id=CacheEntry.make_id(scope, digest), scope=scope, question=question, question_digest=digest, answer="On Tuesdays.", citations=[citation], score=0.9,
        document_ids=[chunk.document_id], chunk_ids=[chunk.id], generation="g1", trace_id="t", seconds=2.5, created_at=100.0, used_at=100.0,
    )  # fmt: skip
    return entry.model_copy(update=changes)


@pytest.fixture
def chunk(store: Store, make_document: Maker) -> Chunk:
    document, chunks = make_document("kiln.txt", ["the kiln is fired on Tuesdays", "the glaze cools for nine hours"])
    store.add_document(document, chunks)
    return chunks[0]


def test_an_entry_comes_back_as_it_was(store: Store, chunk: Chunk) -> None:
    entry = make_entry(chunk, observations=[CacheObservation(similarity=0.9, correct=True)])
    assert store.put_cache_entry(entry, "e", VECTOR)
    assert store.put_cache_entry(entry, "e", VECTOR)
    assert store.cache_entry(entry.id) == entry
    assert store.cache_entries("default") == store.cache_entries("default", "s") == [entry]
    assert store.cache_entries("default", "other") == store.cache_entries("other") == []
    assert store.cache_entry("none") is None


def test_vectors_are_of_one_tenant_scope_and_embedder(store: Store, chunk: Chunk) -> None:
    first, second = make_entry(chunk), make_entry(chunk, "how long does the glaze cool?", created_at=200.0)
    other = make_entry(chunk, scope="s2")
    for entry in (second, first, other):
        store.put_cache_entry(entry, "e", VECTOR)
    ids, vectors = store.cache_vectors("default", "s", "e")
    assert ids == [first.id, second.id]
    assert vectors.dtype == np.float32
    assert np.array_equal(vectors, np.stack([VECTOR, VECTOR]))
    assert store.cache_vectors("default", "s", "e", since=200.0)[0] == [second.id]
    assert store.cache_vectors("default", "s", "another")[0] == store.cache_vectors("tenant b", "s", "e")[0] == []


def test_removing_a_document_removes_every_entry_that_cites_it(store: Store, chunk: Chunk, make_document: Maker) -> None:
    other, other_chunks = make_document("barn.txt", ["the barn is green"])
    store.add_document(other, other_chunks)
    entry, kept = make_entry(chunk), make_entry(other_chunks[0], "which colour has the barn?")
    both = make_entry(chunk, "both?", document_ids=[chunk.document_id, other.id])
    for each in (entry, kept, both):
        store.put_cache_entry(each, "e", VECTOR)
        store.observe_cache(each.id, 0.9, True)
    store.remove_document(chunk.document_id)
    assert [e.id for e in store.cache_entries("default")] == [kept.id]
    assert store.cache_vectors("default", "s", "e")[0] == [kept.id]


def test_replacing_a_document_removes_the_entries_that_cite_the_old_one(store: Store, chunk: Chunk, make_document: Maker) -> None:
    entry = make_entry(chunk)
    store.put_cache_entry(entry, "e", VECTOR)
    store.add_document(*make_document("kiln.txt", ["the kiln is fired on Mondays"]))
    assert store.cache_entry(entry.id) is None


def test_an_answer_that_cites_a_document_gone_meanwhile_is_not_kept(store: Store, chunk: Chunk) -> None:
    store.remove_document(chunk.document_id)
    assert not store.put_cache_entry(make_entry(chunk), "e", VECTOR)
    assert store.cache_entries("default") == []


def test_a_generation_is_noted_and_observations_stay(store: Store, chunk: Chunk) -> None:
    entry = make_entry(chunk)
    store.put_cache_entry(entry, "e", VECTOR)
    store.observe_cache(entry.id, 0.8, False)
    store.observe_cache("none", 0.8, False)
    store.keep_cache_entry(entry.id, "g2")
    assert store.cache_entry(entry.id) == entry.model_copy(update={"generation": "g2", "observations": [CacheObservation(similarity=0.8, correct=False)]})


def test_hits_are_counted_and_outlive_their_entries(store: Store, chunk: Chunk) -> None:
    entry = make_entry(chunk)
    store.put_cache_entry(entry, "e", VECTOR)
    store.count_cache_hit(entry.id, 300.0)
    store.count_cache_hit(entry.id, 200.0)
    store.count_wrong_hit(entry.id)
    store.count_cache_hit("none", 1.0)
    found = store.cache_entry(entry.id)
    assert found is not None
    assert (found.hits, found.wrong_hits, found.used_at) == (2, 1, 300.0)
    assert store.remove_cache_entries([entry.id, "none"]) == 1
    assert store.cache_totals("default") == CacheTotals(hits=2, wrong_hits=1, seconds_saved=5.0)
    assert store.cache_totals("other") == CacheTotals()


def test_what_expired_goes_first_then_the_least_recently_used(store: Store, chunk: Chunk) -> None:
    entries = [make_entry(chunk, f"question {n}?", used_at=float(n)) for n in range(5)]
    expired = make_entry(chunk, "expired?", used_at=99.0, expires_at=50.0)
    for entry in (*entries, expired):
        store.put_cache_entry(entry, "e", VECTOR)
    assert store.trim_cache("default", 3, 50.0) == 3
    assert {e.question for e in store.cache_entries("default")} == {"question 2?", "question 3?", "question 4?"}
    assert [store.count_cache_entries(*which) for which in (("default",), ("default", "s"), ("default", "t"), ("other",))] == [3, 3, 0, 0]
    assert store.trim_cache("default", 3, 51.0) == 0


def test_observations_of_many_threads_are_all_kept(store: Store, chunk: Chunk) -> None:
    entry = make_entry(chunk)
    store.put_cache_entry(entry, "e", VECTOR)
    threads = [threading.Thread(target=lambda: [store.observe_cache(entry.id, 0.9, True) for _ in range(5)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = store.cache_entry(entry.id)
    assert found is not None
    assert len(found.observations) == 20
