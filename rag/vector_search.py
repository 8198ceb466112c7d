"""Search by MongoDB's own search nodes (Atlas, or Community with mongot) in place of the local index, where the server has them.

Each window's vector is a row of `embeddings`, each chunk's text a row of `chunks`; both carry the generations in which they are, and
tenant and generation are filter fields of the search indexes, so that a filter acts before the search. A query to an index that does
not exist is answered with nothing instead of an error, so existence is checked when a searcher is opened and whenever nothing is found.
Not run against live search nodes yet: the tests hold it to the documented protocol (docs/mongodb.md).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from pymongo.collection import Collection
from pymongo.errors import OperationFailure
from pymongo.operations import SearchIndexModel
from pymongo.read_concern import ReadConcern

from understudy.errors import StorageError
from understudy.store import Store
from understudy.store.mongodb import MongoStore
from understudy.store.mongodb_connection import Connection, Row, batched, packed

if TYPE_CHECKING:
    from rag.index import Index

TEXT_INDEX = "understudy_text"
GENERATIONS_KEPT = 4  # marks of a row: readers of an earlier generation go on until as many newer ones were published
MOST_CANDIDATES = 10_000  # what $vectorSearch allows
CANDIDATES_PER_RESULT = 20  # advised by its documentation
READY_SECONDS, POLL_SECONDS = 900.0, 1.0
PROBES = 8  # vectors that must find themselves before a generation is searched
NO_SEARCH_NODES = {59, 115, 31082, 40324}  # CommandNotFound, CommandNotSupported, SearchNotEnabled, unknown aggregation stage
NOT_ALLOWED = {13, 8000}  # Unauthorized, AtlasError


@dataclass(frozen=True)
class SearchSupport:
    """Whether a server searches itself, and why (not)."""

    available: bool
    reason: str


def support_of(store: Store) -> SearchSupport:
    """Ask the store's server whether it has search nodes. Raises StorageError where it does not answer."""
    if not isinstance(store, MongoStore):
        return SearchSupport(False, "the store is no MongoDB server")
    try:
        _search_indexes(store.connection, "embeddings")
    except StorageError as error:
        code = error.__cause__.code if isinstance(error.__cause__, OperationFailure) else None
        if code in NO_SEARCH_NODES:
            return SearchSupport(False, "the MongoDB server has no search nodes")
        if code in NOT_ALLOWED:
            return SearchSupport(False, "this MongoDB user may not use search indexes")
        raise
    return SearchSupport(True, "the MongoDB server has search nodes")


def vector_index(dimensions: int) -> tuple[str, Row]:
    """Name and definition of the index over vectors of so many dimensions."""
    filters = [{"type": "filter", "path": path} for path in ("tenant", "fingerprint", "generations", "chunk_id")]
    vector = {"type": "vector", "path": "vector", "numDimensions": dimensions, "similarity": "cosine"}
    return f"understudy_vectors_{dimensions}", {"fields": [vector, *filters]}


def text_index() -> tuple[str, Row]:
    """Name and definition of the index over the chunks' texts."""
    tokens = {path: {"type": "token"} for path in ("tenant", "generations", "chunk_id")}
    return TEXT_INDEX, {"mappings": {"dynamic": False, "fields": {"text": {"type": "string", "analyzer": "lucene.english"}, **tokens}}}


def dense_pipeline(index: str, vector: np.ndarray, limit: int, where: Mapping[str, str], allowed: Sequence[str] | None) -> list[Row]:
    """The nearest rows to a unit vector [dim]; exactly where `allowed` narrows the search, because a graph is poor at that."""
    conditions: list[Row] = [{field: {"$eq": value}} for field, value in where.items()]
    if allowed is not None:
        conditions.append({"chunk_id": {"$in": list(allowed)}})
    how: Row = {"exact": True} if allowed is not None else {"numCandidates": min(MOST_CANDIDATES, limit * CANDIDATES_PER_RESULT)}
    search = {"index": index, "path": "vector", "queryVector": packed(vector), "limit": limit, "filter": {"$and": conditions}, **how}
    return [{"$vectorSearch": search}, {"$project": {"_id": 0, "chunk_id": 1, "score": {"$meta": "vectorSearchScore"}}}]


def lexical_pipeline(index: str, query: str, limit: int, where: Mapping[str, str], allowed: Sequence[str] | None) -> list[Row]:
    """The rows whose text best matches a query's words."""
    conditions: list[Row] = [{"equals": {"path": field, "value": value}} for field, value in where.items()]
    if allowed is not None:
        conditions.append({"in": {"path": "chunk_id", "value": list(allowed)}})
    search = {"index": index, "compound": {"must": [{"text": {"query": query, "path": "text"}}], "filter": conditions}}
    return [{"$search": search}, {"$limit": limit}, {"$project": {"_id": 0, "chunk_id": 1, "score": {"$meta": "searchScore"}}}]


class VectorSearch:
    """A Searcher (rag.index) of one generation, by the server's search nodes."""

    def __init__(self, connection: Connection, tenant: str, generation: str, fingerprint: str, dimensions: int) -> None:
        self._connection = connection
        self._dense = vector_index(dimensions)[0]
        self._where = {"tenant": tenant, "generations": generation}
        self._fingerprint = fingerprint

    def search_dense(self, vector: np.ndarray, count: int, allowed: frozenset[str] | None = None) -> list[tuple[str, float]]:
        """See Searcher; a chunk counts by its best window. The server's score is (1 + cosine) / 2."""
        if allowed is not None and not allowed:
            return []
        where = {**self._where, "fingerprint": self._fingerprint}
        limit = count
        while True:
            limit = min(MOST_CANDIDATES, limit * 3)
            rows = self._aggregate("embeddings", self._dense, dense_pipeline(self._dense, vector, limit, where, None if allowed is None else sorted(allowed)))
            best = _best(rows)
            if len(best) >= count or len(rows) < limit or limit == MOST_CANDIDATES:
                return [(chunk_id, 2 * score - 1) for chunk_id, score in best[:count]]

    def search_lexical(self, query: str, count: int, allowed: frozenset[str] | None = None) -> list[tuple[str, float]]:
        """See Searcher; the score is the server's BM25."""
        if not query.strip() or (allowed is not None and not allowed):
            return []
        pipeline = lexical_pipeline(TEXT_INDEX, query, 2 * count, self._where, None if allowed is None else sorted(allowed))
        return _best(self._aggregate("chunks", TEXT_INDEX, pipeline))[:count]

    def _aggregate(self, collection: str, index: str, pipeline: list[Row]) -> list[Row]:
        rows = self._connection.run(lambda: list(_local(self._connection[collection]).aggregate(pipeline)))
        if not rows:
            require_ready(self._connection, collection, index)
        return rows


def open_server_search(store: Store, index: Index, tenant: str) -> VectorSearch | None:
    """The server's searcher of a local index's generation, published first where it is not yet; None where the server has no search nodes.

    Raises StorageError where the search nodes are not ready in time.
    """
    if not isinstance(store, MongoStore) or not support_of(store).available:
        return None
    connection = store.connection
    dimensions = int(index.vectors.shape[1])
    ensure_index(connection, "embeddings", *vector_index(dimensions), kind="vectorSearch")
    ensure_index(connection, "chunks", *text_index(), kind="search")
    _publish(connection, index, tenant)
    searcher = VectorSearch(connection, tenant, index.generation, index.embedder, dimensions)
    _await_searchable(searcher, index)
    return searcher


def ensure_index(connection: Connection, collection: str, name: str, definition: Row, kind: str) -> None:
    """Create a search index unless it is there, and wait until it answers. Raises StorageError after READY_SECONDS."""
    if name not in _search_indexes(connection, collection):
        connection.run(lambda: connection[collection].create_search_index(SearchIndexModel(definition, name=name, type=kind)))
    deadline = time.monotonic() + READY_SECONDS
    while True:
        state = _search_indexes(connection, collection).get(name, {})
        if _is_ready(state):
            return
        if state.get("status") == "FAILED":
            raise StorageError(f"the server could not build the search index {name}", "see the index's page on the server, drop it, run the command again")
        if time.monotonic() > deadline:
            raise StorageError(
                f"the search index {name} is not ready after {READY_SECONDS:.0f} s ({state.get('status', 'missing')})",
                "wait and run the command again, or set retrieval.server_search=false",
            )
        time.sleep(POLL_SECONDS)


def require_ready(connection: Connection, collection: str, name: str) -> None:
    """Raise StorageError unless the search index exists and answers: to the server, a query to an unknown index is one that finds nothing."""
    if not _is_ready(_search_indexes(connection, collection).get(name, {})):
        raise StorageError(f"the search index {name} is missing or not ready", "open the corpus again, which makes it; or set retrieval.server_search=false")


def _publish(connection: Connection, index: Index, tenant: str) -> None:
    """Mark the rows of a generation, unless all of them are."""
    marked = {"tenant": {"$eq": tenant}, "generations": index.generation}
    windows = connection.run(lambda: connection["embeddings"].count_documents({**marked, "fingerprint": index.embedder}))
    chunks = connection.run(lambda: connection["chunks"].count_documents(marked))
    if windows >= len(index.owners) and chunks >= len(index.facts.chunk_ids):
        return
    mark = {"$push": {"generations": {"$each": [index.generation], "$slice": -GENERATIONS_KEPT}}}
    for batch in batched(index.facts.chunk_ids):
        where = {"chunk_id": {"$in": batch}, "generations": {"$ne": index.generation}}
        for collection, condition in (("chunks", where), ("embeddings", {**where, "fingerprint": index.embedder})):
            connection.run(lambda c=collection, w=condition: connection[c].update_many(w, mark))  # type: ignore[misc]


def _await_searchable(searcher: VectorSearch, index: Index) -> None:
    """Search nodes follow the database with a delay: wait until sampled vectors of the generation find themselves."""
    sample = np.linspace(0, len(index.owners) - 1, min(PROBES, len(index.owners)), dtype=int)
    deadline = time.monotonic() + READY_SECONDS
    for row in sample.tolist():
        owner = index.facts.chunk_ids[index.owners[row]]
        while not searcher.search_dense(index.vectors[row], 1, frozenset([owner])):
            if time.monotonic() > deadline:
                raise StorageError("the search nodes do not have the corpus yet", "wait and run the command again, or set retrieval.server_search=false")
            time.sleep(POLL_SECONDS)


def _search_indexes(connection: Connection, collection: str) -> dict[str, Mapping[str, Any]]:
    """The search indexes of a collection by name, as $listSearchIndexes tells them."""
    return connection.run(lambda: {index["name"]: index for index in connection[collection].list_search_indexes()})


def _is_ready(state: Mapping[str, Any]) -> bool:
    return bool(state.get("queryable")) and state.get("status", "READY") == "READY"


def _local(collection: Collection[Row]) -> Collection[Row]:
    """Search stages know no majority reads."""
    return collection.with_options(read_concern=ReadConcern("local"))


def _best(rows: list[Row]) -> list[tuple[str, float]]:
    """(chunk id, best score) of rows that come best first."""
    best: dict[str, float] = {}
    for row in rows:
        best.setdefault(row["chunk_id"], float(row["score"]))
    return list(best.items())
