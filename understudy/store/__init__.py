"""The store protocol: records in, records out. One conformance suite holds every implementation to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from understudy.cache_records import CacheEntry, CacheTotals
from understudy.errors import UsageError
from understudy.records import Chunk, Document, Trace, TraceFilter
from understudy.store.urls import resolve_url, shown_url

if TYPE_CHECKING:
    import numpy as np

ANY_TRACE = TraceFilter()


class Store(Protocol):
    """Every write is atomic and idempotent: the same record twice is one record."""

    def add_document(self, document: Document, chunks: list[Chunk]) -> bool:
        """Add a document with its chunks, replacing the one of the same tenant and source key. False if it was there."""

    def documents(self, tenant: str) -> list[Document]:
        """All documents of a tenant, in source order."""

    def document_ids(self, tenant: str) -> list[str]:
        """The ids of a tenant's documents, in source order."""

    def document(self, document_id: str) -> tuple[Document, list[Chunk]] | None:
        """One document with its chunks in order."""

    def remove_document(self, document_id: str) -> int:
        """Remove a document, its chunks and their embeddings, and the cache entries that cite it; returns the number of chunks removed.

        `add_document` that replaces a document removes as much, in its own transaction.
        """

    def add_chunks(self, chunks: list[Chunk]) -> None:
        """Add chunks to documents that exist, beside those they have; chunks of other documents are passed over."""

    def remove_chunks(self, ids: Iterable[str]) -> int:
        """Remove chunks and their embeddings; returns how many there were."""

    def chunks(self, tenant: str | None = None) -> list[Chunk]:
        """All chunks (of a tenant), ordered by document source and ordinal."""

    def chunks_by_id(self, ids: Iterable[str]) -> dict[str, Chunk]:
        """The named chunks that exist."""

    def put_embeddings(self, fingerprint: str, vectors: dict[str, np.ndarray]) -> None:
        """Keep float32 unit vectors [windows, dim] by chunk id, for one embedder."""

    def embeddings(self, fingerprint: str, ids: Iterable[str]) -> dict[str, np.ndarray]:
        """The embeddings that exist, [windows, dim] each, for one embedder."""

    def fingerprints(self) -> list[str]:
        """The embedders of which the store holds vectors of chunks or cache entries."""

    def tenants(self) -> list[str]:
        """Whose documents, traces and cache entries the store holds."""

    def put_trace(self, trace: Trace) -> None:
        """Write a trace whole."""

    def trace(self, trace_id: str) -> Trace | None:
        """One trace, by its id or a unique prefix of it."""

    def traces(self, tenant: str, where: TraceFilter = ANY_TRACE) -> Iterator[Trace]:
        """Traces of a tenant that meet a filter, oldest first; filtered by the store and read as they are asked for."""

    def put_cache_entry(self, entry: CacheEntry, fingerprint: str, vector: np.ndarray) -> bool:
        """Write an entry, replacing the one of the same id, with its question's float32 unit vector [dim] for one embedder.

        False, and nothing written, where a document that it cites is gone: it may have been removed while the answer was made.
        """

    def cache_entry(self, entry_id: str) -> CacheEntry | None:
        """One entry, its observations oldest first; expired ones too."""

    def cache_entries(self, tenant: str, scope: str | None = None) -> list[CacheEntry]:
        """The entries of a tenant (and scope), oldest first."""

    def count_cache_entries(self, tenant: str, scope: str | None = None) -> int:
        """How many entries a tenant (and scope) has, expired ones too."""

    def cache_vectors(self, tenant: str, scope: str, fingerprint: str, since: float = 0.0) -> tuple[list[str], np.ndarray]:
        """Entry ids and float32 vectors [n, dim] of one embedder, of entries whose `created_at` is `since` or later, oldest first."""

    def keep_cache_entry(self, entry_id: str, generation: str) -> None:
        """Note that the entry holds for this corpus generation."""

    def observe_cache(self, entry_id: str, similarity: float, correct: bool) -> None:
        """Append an observation; atomic, and nothing where the entry is gone."""

    def count_cache_hit(self, entry_id: str, at: float) -> None:
        """Count a hit on the entry and in its tenant's totals with the seconds it saved; `at` becomes its `used_at`."""

    def count_wrong_hit(self, entry_id: str) -> None:
        """Count, on the entry and in its tenant's totals, that a hit was wrong."""

    def cache_totals(self, tenant: str) -> CacheTotals:
        """What the tenant's cache has done."""

    def put_cache_totals(self, tenant: str, totals: CacheTotals) -> None:
        """Set what the tenant's cache has done, as a copy of a store does."""

    def remove_cache_entries(self, ids: Iterable[str]) -> int:
        """Remove entries with their vectors and observations; returns how many there were. Totals stay."""

    def trim_cache(self, tenant: str, max_entries: int, now: float) -> int:
        """Remove the tenant's entries that expired by `now`, then the least recently used beyond `max_entries`; returns how many."""

    def compact(self) -> None:
        """Rewrite the store's files without what was removed, so that no byte of it is left in them."""

    def close(self) -> None:
        """Release the connection."""


def open_store(url: str, root: Path) -> Store:
    """The store behind a URL: `sqlite:///PATH` (a relative path is inside `root`), `mongodb://…`, `mongodb+srv://…`, or `env:NAME` for the URL
    in an environment variable. Raises UsageError for another scheme, StorageError where the store cannot be opened.
    """
    url = resolve_url(url)
    scheme, _, rest = url.partition("://")
    if scheme == "sqlite" and rest.startswith("/") and len(rest) > 1:
        from understudy.store.sqlite import SqliteStore

        return SqliteStore(root / rest[1:])
    if scheme in ("mongodb", "mongodb+srv"):
        from understudy.store.mongodb import MongoStore

        return MongoStore(url)
    raise UsageError(f"store {shown_url(url)!r} is not supported", "use sqlite:///store.db or mongodb://host:27017/database")
