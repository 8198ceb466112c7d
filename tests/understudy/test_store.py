"""The conformance suite of stores; every implementation passes it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import apsw
import numpy as np
import pytest

from understudy.errors import StorageError, UsageError
from understudy.records import Chunk, Document, Trace, TraceFilter
from understudy.store import Store, open_store
from understudy.store.sqlite import MIGRATIONS

Maker = Callable[..., tuple[Document, list[Chunk]]]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store("sqlite:///store.db", tmp_path)
    yield opened
    opened.close()


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
    assert list(store.traces("default", condition)) == [trace for trace in traces if condition.accepts(trace)]


def test_many_traces_are_read_as_they_are_asked_for(store: Store, make_trace: Callable[..., Trace]) -> None:
    for number in range(230):  # many at one moment: pages must not lose or double any
        store.put_trace(make_trace(f"question {number}?", None, None, "", [], id=f"{number:04x}", created_at=float(number // 150)))
    found = store.traces("default")
    assert next(found).id == "0000"
    store.put_trace(make_trace("later?", None, None, "", [], id="ffff", created_at=9.0))  # not blocked by the open reading
    assert [trace.id for trace in found] == [f"{number:04x}" for number in range(1, 230)] + ["ffff"]


def test_many_writers_lose_nothing(tmp_path: Path, make_document: Maker) -> None:
    def write(number: int) -> None:
        mine = open_store("sqlite:///store.db", tmp_path)
        for part in range(5):
            mine.add_document(*make_document(f"{number}-{part}.txt", [f"words of {number} and {part}"]))
        mine.close()

    threads = [threading.Thread(target=write, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(open_store("sqlite:///store.db", tmp_path).documents("default")) == 30


def test_a_full_disk_leaves_the_state_before(tmp_path: Path, make_document: Maker) -> None:
    store = open_store("sqlite:///store.db", tmp_path)
    store.add_document(*make_document("a.txt", ["small"]))
    connection: apsw.Connection = store._connection  # type: ignore[attr-defined]
    pages = connection.pragma("page_count")
    connection.pragma("max_page_count", pages)  # SQLite's own way to run out of room
    with pytest.raises(StorageError, match="disk is full"):
        store.add_document(*make_document("b.txt", ["x" * 500_000]))
    assert [d.source for d in store.documents("default")] == ["a.txt"]
    store.close()


def test_a_store_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    open_store("sqlite:///store.db", tmp_path).close()
    connection = apsw.Connection(str(tmp_path / "store.db"))
    connection.pragma("user_version", len(MIGRATIONS) + 1)
    connection.close()
    with pytest.raises(StorageError, match="version"):
        open_store("sqlite:///store.db", tmp_path)


def test_an_unknown_scheme_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        open_store("postgres://x", tmp_path)
