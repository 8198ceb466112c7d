"""Hybrid retrieval: dense and lexical rankings of one or more queries, fused by reciprocal rank.

Reciprocal rank fusion after Cormack, Clarke and Büttcher (SIGIR 2009): score = Σ 1 / (k + rank).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from threading import Lock

import numpy as np

from rag.embed import Embedder
from rag.index import Index, live_generation, open_index
from understudy.config import Retrieval
from understudy.errors import StorageError
from understudy.models import model_path
from understudy.records import Chunk, Passage, Scores
from understudy.workspace import Workspace

_EMBEDDING = Lock()


@dataclass(frozen=True)
class Retriever:
    """One tenant's live corpus, opened: immutable, so many runs share it."""

    index: Index
    embedder: Embedder
    chunks: dict[str, Chunk]
    page_starts: dict[str, list[int]]  # by document id
    settings: Retrieval
    tenant: str

    def embed(self, texts: list[str]) -> np.ndarray:
        """Unit vectors [n, dim]; one thread at a time, because the model already uses every core."""
        with _EMBEDDING:
            return self.embedder.encode(texts)

    @property
    def generation(self) -> str:
        """The corpus generation retrieved from."""
        return self.index.generation

    def search(self, queries: list[str], k: int | None = None, exclude: Iterable[str] = ()) -> list[Passage]:
        """The best k passages over all queries together, without the excluded chunk ids."""
        queries = [query for query in dict.fromkeys(queries) if query.strip()]
        if not queries:
            return []
        dense: dict[str, float] = {}
        lexical: dict[str, float] = {}
        rankings = []
        for query, vector in zip(queries, self.embed(queries), strict=True):
            near = self.index.search_dense(vector, self.settings.candidates)
            matching = self.index.search_lexical(query, self.settings.candidates)
            rankings += [[chunk_id for chunk_id, _ in near], [chunk_id for chunk_id, _ in matching]]
            for kept, found in ((dense, near), (lexical, matching)):
                for chunk_id, score in found:
                    kept[chunk_id] = max(score, kept.get(chunk_id, score))
        fused = fuse(rankings, self.settings.rrf_k)
        excluded = set(exclude)
        best = [chunk_id for chunk_id in fused if chunk_id not in excluded][: k or self.settings.k]
        return [
            Passage(chunk=self.chunks[chunk_id], scores=Scores(dense=dense.get(chunk_id), lexical=lexical.get(chunk_id), fused=fused[chunk_id]), rank=rank)
            for rank, chunk_id in enumerate(best, 1)
        ]


def document_order(chunk: Chunk) -> tuple[str, str, int]:
    """The order in which a prompt shows passages: equal sets of passages give equal prompt prefixes."""
    return (chunk.document, chunk.document_id, chunk.start)


def fuse(rankings: list[list[str]], rrf_k: int) -> dict[str, float]:
    """Fused scores, best first; ties keep the order of first appearance."""
    scores: dict[str, float] = defaultdict(float)
    for ranking in rankings:
        for rank, item in enumerate(ranking, 1):
            scores[item] += 1.0 / (rrf_k + rank)
    return dict(sorted(scores.items(), key=lambda pair: -pair[1]))


def open_retriever(workspace: Workspace) -> Retriever:
    """The live corpus of the workspace's tenant; raises NotFoundError while it is empty, StorageError where models changed."""
    config = workspace.config
    index = open_index(workspace.index, live_generation(workspace.index, config.tenant))
    embedder = Embedder(model_path(workspace, config.models.embedder))
    if index.embedder != embedder.fingerprint:
        raise StorageError("the index was made with another embedding model", "run `understudy ingest` on any file: it re-embeds the corpus")
    chunks = {chunk.id: chunk for chunk in workspace.store.chunks(config.tenant)}
    if missing := [chunk_id for chunk_id in index.chunk_ids if chunk_id not in chunks]:
        raise StorageError(f"the index names {len(missing)} chunks that the store no longer has", "run `understudy ingest` on any file: it rebuilds the index")
    page_starts = {document.id: document.page_starts for document in workspace.store.documents(config.tenant)}
    return Retriever(index, embedder, chunks, page_starts, config.retrieval, config.tenant)
