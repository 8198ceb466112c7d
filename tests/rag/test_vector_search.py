"""Search by MongoDB's search nodes.

The refusal of a server without them is real. The rest is held to the documented protocol: between driver and server a proxy answers
the search commands as MongoDB's documentation says, over the rows that are really there, and refuses what it would refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pymongo
import pytest

from rag import vector_search
from rag.index import Index, build_index, open_index
from rag.vector_search import open_server_search, support_of
from tests.mongodb import Proxy, Server, fresh_database
from understudy.errors import StorageError
from understudy.records import Chunk, Document
from understudy.store import Store, open_store
from understudy.store.mongodb_connection import unpacked

Maker = Callable[..., tuple[Document, list[Chunk]]]
EMBEDDER, DIMENSIONS = "e", 16


class SearchNodes:
    """What a server with search nodes answers, after its documentation."""

    def __init__(self, url: str, name: str) -> None:
        self.database: Any = pymongo.MongoClient(url)[name]
        self.indexes: dict[str, dict[str, Any]] = {}
        self.polls_until_ready = 2
        self.behind = 1  # searches that see no rows yet
        self.searches: list[dict[str, Any]] = []

    def answer(self, request: dict[str, Any]) -> dict[str, Any] | None:
        if "createSearchIndexes" in request:
            for index in request["indexes"]:
                self.indexes[index["name"]] = {**index, "collection": request["createSearchIndexes"], "polls": 0}
            return {"ok": 1.0, "indexesCreated": [{"id": "1", "name": index["name"]} for index in request["indexes"]]}
        if "aggregate" not in request or not request["pipeline"]:
            return None
        stage, options = next(iter(request["pipeline"][0].items()))
        if stage == "$listSearchIndexes":
            return _cursor([self._state(index) for index in self.indexes.values() if index["collection"] == request["aggregate"]])
        if stage not in ("$vectorSearch", "$search"):
            return None
        assert request.get("readConcern", {"level": "local"}) == {"level": "local"}
        self.searches.append(options)
        index = self.indexes.get(options["index"])
        if index is None or index["collection"] != request["aggregate"]:
            return _cursor([])
        if self.behind > 0:
            self.behind -= 1
            return _cursor([])
        rows = self._nearest(options, index) if stage == "$vectorSearch" else self._matching(options, index)
        limit = options["limit"] if stage == "$vectorSearch" else request["pipeline"][1]["$limit"]
        return _cursor([{"chunk_id": row["chunk_id"], "score": score} for score, row in sorted(rows, key=lambda pair: -pair[0])[:limit]])

    def _state(self, index: dict[str, Any]) -> dict[str, Any]:
        index["polls"] += 1
        ready = index["polls"] > self.polls_until_ready
        return {"name": index["name"], "type": index["type"], "status": "READY" if ready else "PENDING", "queryable": ready}

    def _nearest(self, options: dict[str, Any], index: dict[str, Any]) -> list[tuple[float, dict[str, Any]]]:
        vector = next(field for field in index["definition"]["fields"] if field["type"] == "vector")
        filters = {field["path"] for field in index["definition"]["fields"] if field["type"] == "filter"}
        conditions = options["filter"]["$and"]
        assert {path for condition in conditions for path in condition} <= filters, "a filter's path has to be indexed as filter"
        assert options["path"] == vector["path"]
        assert ("exact" in options) != ("numCandidates" in options)
        assert options.get("exact") or options["limit"] <= options["numCandidates"] <= 10_000
        query = unpacked(options["queryVector"])
        assert len(query) == vector["numDimensions"]
        return [((1 + float(unpacked(row["vector"]) @ query)) / 2, row) for row in self.database[index["collection"]].find({"$and": conditions})]

    def _matching(self, options: dict[str, Any], index: dict[str, Any]) -> list[tuple[float, dict[str, Any]]]:
        fields = index["definition"]["mappings"]["fields"]
        where = {}
        for condition in options["compound"]["filter"]:
            operator, asked = next(iter(condition.items()))
            assert fields[asked["path"]]["type"] == "token", "equals and in read token fields"
            where[asked["path"]] = {"$in": asked["value"]} if operator == "in" else asked["value"]
        text = options["compound"]["must"][0]["text"]
        assert fields[text["path"]]["type"] == "string"
        words = set(text["query"].lower().split())
        rows = self.database[index["collection"]].find(where)
        return [(float(found), row) for row in rows if (found := len(words & set(row[text["path"]].lower().split())))]


def _cursor(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"ok": 1.0, "cursor": {"id": 0, "ns": "db.collection", "firstBatch": rows}}


@pytest.fixture
def corpus(tmp_path: Path, make_document: Maker) -> Callable[[Store], Index]:
    """Puts two tenants' chunks, of one and two windows, into a store; the first's local index."""

    def put(store: Store) -> Index:
        generator = np.random.default_rng(0)
        for tenant in ("other", "default"):
            document, chunks = make_document("a.txt", [f"the kiln is fired on day {n}" for n in range(6)], tenant=tenant)
            vectors = {}
            for number, chunk in enumerate(chunks):
                drawn = generator.normal(size=(1 + number % 2, DIMENSIONS)).astype(np.float32)
                vectors[chunk.id] = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
            store.add_document(document, chunks)
            store.put_embeddings(EMBEDDER, vectors)
        return open_index(tmp_path, build_index(tmp_path, [document], chunks, vectors, EMBEDDER, "c"))

    return put


@pytest.fixture
def nodes(local_mongodb: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[SearchNodes, Store]]:
    monkeypatch.setattr(vector_search, "POLL_SECONDS", 0.001)
    with fresh_database(local_mongodb.url) as url:
        name = url.rpartition("/")[2]
        proxy = Proxy(local_mongodb.port)
        searching = SearchNodes(local_mongodb.url, name)
        proxy.answer = searching.answer
        store = open_store(f"mongodb://127.0.0.1:{proxy.port}/{name}?directConnection=true", Path())
        yield searching, store
        store.close()
        searching.database.client.close()
        proxy.close()


def test_a_server_without_search_nodes_says_so_and_the_local_index_is_used(mongodb_url: str, tmp_path: Path, corpus: Callable[[Store], Index]) -> None:
    store = open_store(mongodb_url, tmp_path)
    support = support_of(store)
    assert not support.available
    assert "no search nodes" in support.reason
    assert open_server_search(store, corpus(store), "default") is None
    store.close()


def test_a_file_has_no_search_nodes(tmp_path: Path) -> None:
    assert not support_of(open_store("sqlite:///store.db", tmp_path)).available


def test_the_search_nodes_find_what_the_local_index_finds(nodes: tuple[SearchNodes, Store], corpus: Callable[[Store], Index]) -> None:
    searching, store = nodes
    index = corpus(store)
    searcher = open_server_search(store, index, "default")
    assert searcher is not None
    few = frozenset(index.facts.chunk_ids[1:4])
    for vector in index.vectors:
        for allowed in (None, few):
            expected = index.search_dense(vector, 3, allowed)
            found = searcher.search_dense(vector, 3, allowed)
            assert [chunk_id for chunk_id, _ in found] == [chunk_id for chunk_id, _ in expected]
            assert np.allclose([score for _, score in found], [score for _, score in expected], atol=1e-5)
    assert {chunk_id for chunk_id, _ in searcher.search_lexical("kiln fired", 10)} == set(index.facts.chunk_ids)
    assert {chunk_id for chunk_id, _ in searcher.search_lexical("kiln", 10, few)} == few
    assert searcher.search_dense(index.vectors[0], 3, frozenset()) == searcher.search_lexical("kiln", 3, frozenset()) == searcher.search_lexical(" ", 3) == []
    assert all(any(condition == {"tenant": {"$eq": "default"}} for condition in s["filter"]["$and"]) for s in searching.searches if "filter" in s)


def test_an_opened_generation_is_published_once(nodes: tuple[SearchNodes, Store], corpus: Callable[[Store], Index]) -> None:
    searching, store = nodes
    index = corpus(store)
    open_server_search(store, index, "default")
    rows = list(searching.database["embeddings"].find({}, {"tenant": 1, "generations": 1}))
    assert {tuple(row.get("generations", ())) for row in rows if row["tenant"] == "default"} == {(index.generation,)}
    assert all("generations" not in row for row in rows if row["tenant"] == "other")
    open_server_search(store, index, "default")
    assert list(searching.database["embeddings"].find({}, {"tenant": 1, "generations": 1})) == rows
    assert len(searching.indexes) == 2


def test_chunks_added_beside_a_generation_leave_it_searchable(nodes: tuple[SearchNodes, Store], corpus: Callable[[Store], Index]) -> None:
    _, store = nodes
    index = corpus(store)
    searcher = open_server_search(store, index, "default")
    assert searcher is not None
    first = store.chunks("default")[0]
    store.add_chunks([first.model_copy(update={"id": "added"})])
    assert {chunk_id for chunk_id, _ in searcher.search_lexical("kiln", 10)} == set(index.facts.chunk_ids)


def test_an_index_that_vanished_is_reported_and_not_an_empty_answer(nodes: tuple[SearchNodes, Store], corpus: Callable[[Store], Index]) -> None:
    searching, store = nodes
    index = corpus(store)
    searcher = open_server_search(store, index, "default")
    assert searcher is not None
    assert searcher.search_lexical("nowhere", 3) == []
    searching.indexes.clear()
    with pytest.raises(StorageError, match="missing or not ready"):
        searcher.search_lexical("kiln", 3)
    with pytest.raises(StorageError, match="missing or not ready"):
        searcher.search_dense(index.vectors[0], 3)


@pytest.mark.parametrize("fault", ["never ready", "never searchable"])
def test_waiting_ends(nodes: tuple[SearchNodes, Store], corpus: Callable[[Store], Index], monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    searching, store = nodes
    monkeypatch.setattr(vector_search, "READY_SECONDS", 0.05)
    if fault == "never ready":
        searching.polls_until_ready = 10**9
    else:
        searching.behind = 10**9
    with pytest.raises(StorageError, match=r"not ready|do not have") as caught:
        open_server_search(store, corpus(store), "default")
    assert "retrieval.server_search=false" in caught.value.remedy
