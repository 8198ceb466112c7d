"""Hybrid retrieval over one tenant's live generation: filters, dense and lexical rankings, fusion, and what is chosen of it."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from threading import Lock

import numpy as np

from rag.bounded import Bounded
from rag.embed import Embedder
from rag.filters import Condition, Facts, matching
from rag.generations import live_generation, warm_file
from rag.index import REBUILD, Index, Searcher, open_index
from rag.ranking import STALE_WEIGHT, Candidate, Explained, Kind, by_score, count_by_gap, diversify, fuse
from rag.reindex import chunker_key, make_chunker, open_embedder
from rag.rerank import Reranker
from understudy.errors import StorageError
from understudy.models import model_path
from understudy.records import Chunk, Passage
from understudy.settings.corpus import Retrieval
from understudy.store import Store
from understudy.store.urls import resolve_url
from understudy.workspace import Workspace

_EMBEDDING = Lock()
VECTORS_KEPT, RANKINGS_KEPT, FILTERS_KEPT = 4096, 512, 64

Allowed = frozenset[str] | None  # the chunk ids that may be found; None: all


@dataclass(frozen=True, eq=False)
class Retriever:
    """One tenant's corpus of one generation, opened; shared by many runs. Its caches end with it, so none outlives a generation."""

    generation: str
    searcher: Searcher
    facts: Facts
    embedder: Embedder
    store: Store
    settings: Retrieval
    tenant: str
    reranker: Reranker | None = None
    clock: Callable[[], float] = time.time
    vectors: Bounded[str, np.ndarray] = field(default_factory=lambda: Bounded(VECTORS_KEPT))  # by query
    _rankings: Bounded[object, list[Candidate]] = field(default_factory=lambda: Bounded(RANKINGS_KEPT))
    _allowed: Bounded[object, Allowed] = field(default_factory=lambda: Bounded(FILTERS_KEPT))

    def embed(self, texts: list[str]) -> np.ndarray:
        """Unit vectors [n, dim], from the cache where they are in it; one thread at a time, because the model already uses every core."""
        found = {text: vector for text in texts if (vector := self.vectors.get(text)) is not None}
        if missing := [text for text in dict.fromkeys(texts) if text not in found]:
            with _EMBEDDING:
                made = self.embedder.encode(missing)
            for text, vector in zip(missing, made, strict=True):
                found[text] = vector
                self.vectors.put(text, vector)
        return np.stack([found[text] for text in texts])

    @cached_property
    def chunks(self) -> dict[str, Chunk]:
        """Every chunk of the tenant by id, read from the store when first asked for; search itself never asks."""
        return {chunk.id: chunk for chunk in self.store.chunks(self.tenant)}

    @cached_property
    def page_starts(self) -> dict[str, list[int]]:
        """Offsets at which pages start, by document id."""
        return {document.id: document.page_starts for document in self.facts.documents}

    def search(self, queries: list[str], k: int | None = None, exclude: Iterable[str] = (), where: Sequence[Condition] = ()) -> list[Passage]:
        """The best passages over all queries together, without the excluded chunk ids, among the chunks that meet the conditions.

        As many as `k` says, else as the settings say. A chunk whose document was removed meanwhile is never returned.
        """
        return [explained.passage for explained in self.explain(queries, k, exclude, where)]

    def explain(self, queries: list[str], k: int | None = None, exclude: Iterable[str] = (), where: Sequence[Condition] = ()) -> list[Explained]:
        """What `search` returns, with everything that made it so."""
        queries = [query for query in dict.fromkeys(queries) if query.strip()]
        if not queries:
            return []
        allowed, excluded = self._allow(tuple(where)), frozenset(exclude)
        ranked = [candidate for candidate in self._ranked(queries, allowed) if candidate.chunk_id not in excluded]
        least, most = (self.settings.k_min, self.settings.k_max) if k is None else (None, None)
        if least and most:
            chosen = self._choose(queries[0], ranked, most + 1)  # the gap after the last needs one more
            chosen = chosen[: count_by_gap([candidate.score for candidate, _ in chosen], least, most)]
        else:
            chosen = self._choose(queries[0], ranked, k or self.settings.k)
        return [
            Explained(Passage(chunk=chunk, scores=candidate.scores, rank=rank), candidate, len(ranked), None if allowed is None else len(allowed))
            for rank, (candidate, chunk) in enumerate(chosen, 1)
        ]

    def in_order(self, passages: Iterable[Passage]) -> list[Passage]:
        """Passages in the order in which a prompt shows them."""
        return sorted(passages, key=lambda passage: document_order(passage.chunk))

    def _choose(self, question: str, ranked: list[Candidate], count: int) -> list[tuple[Candidate, Chunk]]:
        """The best candidates with their chunks, re-ranked and diversified where the settings say so."""
        if self.reranker is None and self.settings.mmr is None:
            return self._existing(ranked, count)
        there = self._existing(ranked, len(ranked))
        chunks = {candidate.chunk_id: chunk for candidate, chunk in there}
        candidates = [candidate for candidate, _ in there]
        if self.reranker is not None and candidates:
            scores = self.reranker.score(question, [chunks[candidate.chunk_id].text for candidate in candidates])
            candidates = by_score([replace(candidate, reranked=score) for candidate, score in zip(candidates, scores, strict=True)])
        if self.settings.mmr is not None:
            vectors = self.store.embeddings(self.embedder.fingerprint, chunks)
            candidates = diversify(candidates, vectors, self.settings.mmr, count)
        return [(candidate, chunks[candidate.chunk_id]) for candidate in candidates[:count]]

    def _existing(self, ranked: list[Candidate], count: int) -> list[tuple[Candidate, Chunk]]:
        """The first `count` candidates that the store still has, of this tenant."""
        kept: list[tuple[Candidate, Chunk]] = []
        place = 0
        while len(kept) < count and place < len(ranked):
            batch = ranked[place : place + count - len(kept)]
            found = self.store.chunks_by_id([candidate.chunk_id for candidate in batch])
            kept += [(c, found[c.chunk_id]) for c in batch if c.chunk_id in found and found[c.chunk_id].tenant == self.tenant]
            place += len(batch)
        return kept

    def _ranked(self, queries: list[str], allowed: Allowed) -> list[Candidate]:
        """Every candidate of the queries, fused and weighted, best first."""
        key = (tuple(queries), allowed, self._epoch)
        ranked = self._rankings.get(key)
        if ranked is None:
            rankings: list[tuple[str, Kind, list[tuple[str, float]]]] = []
            for query, vector in zip(queries, self.embed(queries), strict=True):
                rankings.append((query, "dense", self._known(self.searcher.search_dense(vector, self.settings.candidates, allowed))))
                rankings.append((query, "lexical", self._known(self.searcher.search_lexical(query, self.settings.candidates, allowed))))
            ranked = by_score([self._weighted(candidate) for candidate in fuse(rankings, self.settings.rrf_k)])
            self._rankings.put(key, ranked)
        return ranked

    def _known(self, found: list[tuple[str, float]]) -> list[tuple[str, float]]:
        """Without chunks of another generation, which a database that is being written to may find."""
        return [(chunk_id, score) for chunk_id, score in found if chunk_id in self.facts.place]

    def _weighted(self, candidate: Candidate) -> Candidate:
        document = self.facts.document(candidate.chunk_id)
        is_stale = self.settings.stale == "downrank" and not document.is_valid(self.clock())
        if document.boost == 1.0 and not is_stale:
            return candidate
        return replace(candidate, boost=document.boost, stale_weight=STALE_WEIGHT if is_stale else 1.0)

    def _allow(self, where: tuple[Condition, ...]) -> Allowed:
        """The chunks that meet the conditions and, where stale documents are excluded, are valid now."""
        drops_stale = self.settings.stale == "exclude" and bool(self._changes)
        if not where and not drops_stale:
            return None
        key = (where, self._epoch)
        allowed = self._allowed.get(key)
        if allowed is None:
            mask = matching(self.facts, where)
            if drops_stale:
                now = self.clock()
                mask &= self.facts.in_documents(lambda document: document.is_valid(now))
            allowed = frozenset(self.facts.chunk_ids[place] for place in np.flatnonzero(mask).tolist())
            self._allowed.put(key, allowed)
        return allowed

    @cached_property
    def _changes(self) -> list[float]:
        """The moments at which some document becomes valid or stale, in order."""
        return sorted({at for document in self.facts.documents for at in (document.valid_from, document.valid_until) if at is not None})

    @property
    def _epoch(self) -> int:
        """How many of those moments have passed: between two, validity is constant and caches hold."""
        return bisect_right(self._changes, self.clock()) if self._changes else 0


def document_order(chunk: Chunk) -> tuple[str, str, int]:
    """The order in which a prompt shows passages: equal sets of passages give equal prompt prefixes."""
    return (chunk.document, chunk.document_id, chunk.start)


def open_retriever(workspace: Workspace, embedder: Embedder | None = None) -> Retriever:
    """The live corpus of the workspace's tenant, with an embedder that is loaded already or its own.

    Raises NotFoundError while it is empty, StorageError where the index is damaged or was made with another embedder or chunker than the
    configuration's.
    """
    config = workspace.config
    index = _open_live(workspace)
    embedder = embedder or open_embedder(workspace)
    if index.embedder != embedder.fingerprint:
        raise StorageError("the index was made with another embedding model", "run `understudy index rebuild`: it re-embeds the corpus")
    if index.chunker != chunker_key(make_chunker(workspace, embedder), embedder):
        raise StorageError("the index was made with other chunk settings", "run `understudy index rebuild`, or set ingest.* back")
    reranker = Reranker(model_path(workspace, config.retrieval.reranker)) if config.retrieval.reranker else None
    retriever = Retriever(index.generation, open_searcher(workspace, index), index.facts, embedder, workspace.store, config.retrieval, config.tenant, reranker)
    _load_warm_set(workspace, retriever)
    return retriever


def open_searcher(workspace: Workspace, index: Index) -> Searcher:
    """What searches a generation: the database's search nodes where the store's server has them, the local index otherwise."""
    if not workspace.config.retrieval.server_search or not resolve_url(workspace.config.store).startswith("mongodb"):
        return index
    from rag.vector_search import open_server_search

    return open_server_search(workspace.store, index, workspace.config.tenant) or index


def warm(workspace: Workspace, queries: list[str]) -> int:
    """Embed common queries and keep them beside the live generation, for every retriever opened on it; returns how many are kept."""
    import io

    from understudy.files import write_bytes

    retriever = open_retriever(workspace)
    texts = list(dict.fromkeys(query for query in queries if query.strip()))[:VECTORS_KEPT]
    file = io.BytesIO()
    np.savez(file, texts=np.array(texts), vectors=retriever.embed(texts))
    write_bytes(warm_file(workspace.index, retriever.generation), file.getvalue())
    return len(texts)


def _load_warm_set(workspace: Workspace, retriever: Retriever) -> None:
    file = warm_file(workspace.index, retriever.generation)
    if file.exists():
        try:
            with np.load(file, allow_pickle=False) as kept:
                for text, vector in zip(kept["texts"].tolist(), kept["vectors"], strict=True):
                    retriever.vectors.put(text, vector)
        except (OSError, ValueError, KeyError) as error:
            raise StorageError(f"{file} is damaged", "remove it, or run `understudy index warm` again") from error


def _open_live(workspace: Workspace) -> Index:
    """The live index; once more where another process switched and deleted it between the look-up and the opening."""
    tenant = workspace.config.tenant
    generation = live_generation(workspace.index, tenant)
    while True:
        try:
            return open_index(workspace.index, generation)
        except (StorageError, OSError) as error:
            if (now := live_generation(workspace.index, tenant)) == generation:
                raise error if isinstance(error, StorageError) else StorageError(f"the index {generation} cannot be read", REBUILD) from error
            generation = now
