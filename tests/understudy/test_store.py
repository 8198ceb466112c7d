"""The conformance suite of stores; every implementation passes it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from understudy.errors import StorageError, UsageError
from understudy.records import Chunk, Document, Step, Trace, TraceFilter
from understudy.store import Store, open_store

Maker = Callable[..., tuple[Document, list[Chunk]]]


def test_a_document_added_twice_is_one_document(store: Store, make_document: Maker) -> None:
    document, chunks = make_document("a.txt", ["one two three", "four five six"])
    assert store.add_document(document, chunks) is True
    assert store.add_document(document, chunks) is False
    assert store.documents("default") == [document]
    assert store.chunks("default") == chunks


def test_an_update_replaces_the_document_of_the_same_source(store: Store, make_document: Maker) -> None:
    old, old_chunks = make_document("a.txt", ["old words here"])
    new, new_chunks = make_document("a.txt", ["new words here"])
    store.add_document(old, old_chunks)
    store.put_embeddings("e", {old_chunks[0].id: np.ones((1, 4), np.float32)})
    store.add_document(new, new_chunks)
    assert store.documents("default") == [new]
    assert store.chunks_by_id([old_chunks[0].id, new_chunks[0].id]) == {new_chunks[0].id: new_chunks[0]}
    assert store.embeddings("e", [old_chunks[0].id]) == {}


def test_removing_a_document_removes_all_that_is_its_own(store: Store, make_document: Maker) -> None:
    document, chunks = make_document("a.txt", ["one two three", "four five six"])
    store.add_document(document, chunks)
    assert store.remove_document(document.id) == 2
    assert store.remove_document(document.id) == 0
    assert store.chunks() == []


def test_tenants_do_not_see_each_other(store: Store, make_document: Maker) -> None:
    store.add_document(*make_document("a.txt", ["the same words"], tenant="a"))
    store.add_document(*make_document("a.txt", ["the same words"], tenant="b"))
    assert [c.tenant for c in store.chunks("a")] == ["a"]
    assert [d.tenant for d in store.documents("b")] == ["b"]


def test_embeddings_come_back_as_they_were_and_only_for_their_embedder(store: Store, make_document: Maker) -> None:
    document, chunks = make_document("a.txt", ["one two three"])
    store.add_document(document, chunks)
    vectors = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    store.put_embeddings("e1", {chunks[0].id: vectors, "gone": vectors})
    assert np.array_equal(store.embeddings("e1", [chunks[0].id, "gone"])[chunks[0].id], vectors)
    assert store.embeddings("e2", [chunks[0].id]) == {}


def test_traces_are_found_by_prefix_and_listed_in_order(store: Store, make_trace: Callable[..., Trace]) -> None:
    first = make_trace("first question?", None, None, "", [], created_at=1.0, id="aa11")
    second = make_trace("second question?", None, None, "", [], created_at=2.0, id="aa22", source="model")
    for trace in (second, first, first):
        store.put_trace(trace)
    assert [t.id for t in store.traces("default")] == ["aa11", "aa22"]
    assert [t.id for t in store.traces("default", TraceFilter(source="model"))] == ["aa22"]
    assert store.trace("aa1") == first
    assert store.trace("aa") is None
    assert store.trace("x") is None


FILTERS = [
    {},
    {"source": "expert"},
    {"source": "imported"},
    {"model": "tiny"},
    {"model": "tiny@0123456789ab"},
    {"model": "ti"},
    {"contains": "ÄRGER"},
    {"contains": "100% of_it"},
    {"contains": "' OR 1=1 --"},
    {"contains": "$where"},
    {"min_score": 0.5},
    {"max_score": 0.5},
    {"min_score": 0.4, "max_score": 0.6},
    {"since": 2.0},
    {"until": 2.0},
    {"since": 2.0, "until": 3.0},
    {"complete": True},
    {"complete": False},
    {"outcome": "answered"},
    {"outcome": "abstained"},
    {"outcome": "incomplete"},
    {"outcome": "answered", "source": "model", "min_score": 0.6},
]


def accepts(condition: TraceFilter, trace: Trace) -> bool:
    """What a store's query has to agree with."""
    score, model = trace.score, trace.model
    return (
        condition.source in (None, trace.source)
        and (condition.model is None or model == condition.model or model.startswith(f"{condition.model}@"))
        and (condition.contains is None or condition.contains.lower() in trace.question.lower())
        and (condition.min_score is None or (score is not None and score >= condition.min_score))
        and (condition.max_score is None or (score is not None and score <= condition.max_score))
        and (condition.since is None or trace.created_at >= condition.since)
        and (condition.until is None or trace.created_at < condition.until)
        and condition.complete in (None, trace.complete)
        and condition.outcome in (None, trace.outcome)
    )


@pytest.mark.parametrize("where", FILTERS, ids=str)
def test_a_filter_means_the_same_to_every_store(store: Store, make_trace: Callable[..., Trace], where: dict[str, object]) -> None:
    traces = [
        make_trace("Wer hat Ärger?", "Alle.", None, "", [], id="a", created_at=1.0, score=None),
        make_trace("Is 100% of_it there?", None, None, "", [], id="b", created_at=2.0, score=0.5, source="model", model="tiny@0123456789ab"),
        make_trace("Is it 1000 of xit?", "Yes.", None, "", [], id="c", created_at=2.0, score=0.9, source="model", model="tiny"),
        make_trace("ärger again?", "", None, "", [], id="d", created_at=3.0, score=None, source="model", model="base", complete=False),
        make_trace("what is $where?", "A key.", None, "", [], id="e", created_at=4.0, score=0.4, source="imported", model="tinyer"),
    ]
    for trace in [*reversed(traces), traces[0].model_copy(update={"id": "other", "tenant": "other"})]:
        store.put_trace(trace)
    condition = TraceFilter.model_validate(where)
    assert list(store.traces("default", condition)) == [trace for trace in traces if accepts(condition, trace)]


def test_many_traces_are_read_as_they_are_asked_for(store: Store, make_trace: Callable[..., Trace]) -> None:
    for number in range(230):  # many at one moment: pages must not lose or double any
        store.put_trace(make_trace(f"question {number}?", None, None, "", [], id=f"{number:04x}", created_at=float(number // 150)))
    found = store.traces("default")
    assert next(found).id == "0000"
    store.put_trace(make_trace("later?", None, None, "", [], id="ffff", created_at=9.0))  # not blocked by the open reading
    assert [trace.id for trace in found] == [f"{number:04x}" for number in range(1, 230)] + ["ffff"]


def test_everything_that_a_store_holds_can_be_listed(store: Store, make_document: Maker, make_trace: Callable[..., Trace]) -> None:
    later, earlier = make_document("b.txt", ["one two", "three four"], tenant="b"), make_document("a.txt", ["five six"], tenant="b")
    for document, chunks in (later, earlier):
        store.add_document(document, chunks)
        store.put_embeddings("e1", {chunks[0].id: np.ones((1, 4), np.float32)})
    store.put_trace(make_trace("a question?", None, None, "", [], tenant="a"))
    assert store.tenants() == ["a", "b"]
    assert store.fingerprints() == ["e1"]
    assert store.document_ids("b") == [earlier[0].id, later[0].id]
    assert store.document_ids("a") == []
    assert store.document(later[0].id) == later
    assert store.document("none") is None


def test_a_file_that_moved_is_one_document_at_its_new_place(store: Store, make_document: Maker) -> None:
    document, chunks = make_document("a.txt", ["one two three"])
    replaced, replaced_chunks = make_document("b.txt", ["four five six"])
    store.add_document(document, chunks)
    store.add_document(replaced, replaced_chunks)
    moved = document.model_copy(update={"source_key": "/b.txt", "source": "b.txt"})
    assert store.add_document(moved, chunks) is True
    assert store.documents("default") == [moved]
    assert store.chunks() == chunks
    assert store.chunks_by_id([c.id for c in replaced_chunks]) == {}


def test_vectors_of_a_chunk_embedded_again_are_the_later_ones(store: Store, make_document: Maker) -> None:
    document, chunks = make_document("a.txt", ["one two three"])
    store.add_document(document, chunks)
    for windows in (3, 1, 2):
        vectors = np.full((windows, 4), windows, np.float32)
        store.put_embeddings("e", {chunks[0].id: vectors})
        assert np.array_equal(store.embeddings("e", [chunks[0].id])[chunks[0].id], vectors)


def test_chunks_are_added_beside_those_there_and_removed_with_their_vectors(store: Store, make_document: Maker) -> None:
    document, chunks = make_document("a.txt", ["one two", "three four"])
    store.add_document(document, chunks)
    store.put_embeddings("e", {chunk.id: np.ones((1, 4), np.float32) for chunk in chunks})
    whole = Chunk(id="c", document_id=document.id, document="a.txt", text=document.text, start=0, end=len(document.text), pages=[1], ordinal=0)
    foreign = whole.model_copy(update={"id": "d", "document_id": "gone"})
    for _ in range(2):
        store.add_chunks([chunks[0], whole, foreign])
    assert sorted(chunk.id for chunk in store.chunks("default")) == sorted([whole.id, *(c.id for c in chunks)])
    assert store.chunks_by_id(["c", "d"]) == {"c": whole}
    ids = [chunk.id for chunk in chunks]
    assert set(store.embeddings("e", ids)) == set(ids)
    assert store.remove_chunks([*ids, "d"]) == 2
    assert store.remove_chunks(ids) == 0
    assert store.chunks() == [whole]
    assert store.embeddings("e", ids) == {}
    assert store.document(document.id) == (document, [whole])


HOSTILE = ["$where", "$ne", "a.b", "'; DROP TABLE documents; --", "{'$gt': ''}", ".*", "\x00", "‮", "💥"]


def test_operators_and_sql_in_keys_and_values_are_data(store: Store, make_document: Maker, make_trace: Callable[..., Trace]) -> None:
    for hostile in HOSTILE:
        store.add_document(*make_document(f"{hostile}.txt", [f"words {hostile}"], tenant=hostile))
        parsed = {name: {name: 2**70} for name in HOSTILE}
        step = Step(name="plan", text=hostile, parsed=parsed)
        trace = make_trace(hostile, None, None, "", [], id="ab", tenant=hostile, steps=[step], metadata={hostile: hostile})
        store.put_trace(trace)
        assert [c.text for c in store.chunks(hostile)] == [f"words {hostile}"]
        assert list(store.traces(hostile, TraceFilter(contains=hostile))) == [trace]
        assert store.trace(hostile) is None
        assert store.document(hostile) is None
        assert store.remove_document(hostile) == 0
        assert store.remove_cache_entries([hostile]) == 0
    assert set(store.tenants()) == set(HOSTILE)


def test_a_query_that_is_no_text_finds_nothing(store: Store, make_document: Maker) -> None:
    store.add_document(*make_document("a.txt", ["one two three"]))
    operator: Any = {"$ne": None}
    for find in (store.documents, store.chunks, store.remove_document, store.cache_entry):
        with suppress(StorageError, TypeError):  # refused, or data
            assert not find(operator)
    assert len(store.documents("default")) == 1


def _write(url: str, root: Path, made: list[tuple[Document, list[Chunk]]]) -> None:
    mine = open_store(url, root)
    for document, chunks in made:
        mine.add_document(document, chunks)
        mine.put_embeddings("e", {chunk.id: np.ones((1, 4), np.float32) for chunk in chunks})
    mine.close()


def test_several_processes_at_once_lose_and_double_nothing(store_url: str, tmp_path: Path, make_document: Maker) -> None:
    """Four processes write documents of their own and, all of them, the same ones, while this one reads."""
    shared = [make_document(f"shared-{n}.txt", [f"shared words {n}", f"more of {n}"]) for n in range(4)]
    own = [[make_document(f"{p}-{n}.txt", [f"words of {p} and {n}"]) for n in range(4)] for p in range(4)]
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(store_url, tmp_path, [*shared, *mine])) for mine in own]
    for writer in writers:
        writer.start()
    store = open_store(store_url, tmp_path)
    expected = {document.id: chunks for document, chunks in [*shared, *(pair for mine in own for pair in mine)]}
    while any(writer.is_alive() for writer in writers):
        found: dict[str, list[Chunk]] = {}
        for chunk in store.chunks():
            found.setdefault(chunk.document_id, []).append(chunk)
        assert all(chunks == expected[document_id] for document_id, chunks in found.items())
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert {d.id for d in store.documents("default")} == expected.keys()
    ids = [chunk.id for chunks in expected.values() for chunk in chunks]
    assert sorted(chunk.id for chunk in store.chunks()) == sorted(ids)
    assert store.embeddings("e", ids).keys() == set(ids)
    store.close()


def test_an_unknown_scheme_is_refused_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        open_store("postgres://me:hunter2@host/db", tmp_path)
    assert "hunter2" not in caught.value.message + caught.value.remedy
