"""The store protocol: records in, records out. One conformance suite holds every implementation to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from understudy.errors import UsageError
from understudy.records import Chunk, Document, Trace

if TYPE_CHECKING:
    import numpy as np


class Store(Protocol):
    """Every write is atomic and idempotent: the same record twice is one record."""

    def add_document(self, document: Document, chunks: list[Chunk]) -> bool:
        """Add a document with its chunks, replacing the one of the same tenant and source key. False if it was there."""

    def documents(self, tenant: str) -> list[Document]:
        """All documents of a tenant, in source order."""

    def remove_document(self, document_id: str) -> int:
        """Remove a document, its chunks and their embeddings; returns the number of chunks removed."""

    def chunks(self, tenant: str | None = None) -> list[Chunk]:
        """All chunks (of a tenant), ordered by document source and ordinal."""

    def chunks_by_id(self, ids: Iterable[str]) -> dict[str, Chunk]:
        """The named chunks that exist."""

    def put_embeddings(self, fingerprint: str, vectors: dict[str, np.ndarray]) -> None:
        """Keep float32 unit vectors [windows, dim] by chunk id, for one embedder."""

    def embeddings(self, fingerprint: str, ids: Iterable[str]) -> dict[str, np.ndarray]:
        """The embeddings that exist, [windows, dim] each, for one embedder."""

    def put_trace(self, trace: Trace) -> None:
        """Write a trace whole."""

    def trace(self, trace_id: str) -> Trace | None:
        """One trace, by its id or a unique prefix of it."""

    def traces(self, tenant: str, source: str | None = None) -> Iterator[Trace]:
        """Traces of a tenant, oldest first."""

    def compact(self) -> None:
        """Rewrite the store's files without what was removed, so that no byte of it is left in them."""

    def close(self) -> None:
        """Release the connection."""


def open_store(url: str, root: Path) -> Store:
    """The store behind a URL: `sqlite:///relative-or-absolute-path`. Raises UsageError for another scheme."""
    scheme, _, rest = url.partition("://")
    if scheme == "sqlite" and rest.startswith("/"):
        from understudy.store.sqlite import SqliteStore

        return SqliteStore(root / rest[1:])
    raise UsageError(f"store {url!r} is not supported", "use sqlite:///store.db")
