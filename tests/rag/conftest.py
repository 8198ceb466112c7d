"""What the retrieval tests share: the real embedding model, loaded once, and corpora put straight into the store."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest

from rag.chunk import Chunker
from rag.embed import Embedder, Precision
from rag.reindex import Reindexed, reindex
from tests.conftest import EMBEDDER, MODELS
from understudy.models import model_path
from understudy.progress import show_progress
from understudy.records import Chunk, Document
from understudy.workspace import Workspace, open_workspace

FOLDER = (MODELS / EMBEDDER).resolve()


@lru_cache(maxsize=4)
def loaded(path: Path, precision: Precision) -> Embedder:
    return Embedder(path, precision)


cached_chunker = lru_cache(maxsize=8)(Chunker)


@pytest.fixture(autouse=True)
def shared_embedder(monkeypatch: pytest.MonkeyPatch) -> None:
    """One load of each real embedder for all tests."""

    def open_once(workspace: Workspace) -> Embedder:
        models = workspace.config.models
        return loaded(model_path(workspace, models.embedder).resolve(), models.embedder_precision)

    monkeypatch.setattr("rag.reindex.Chunker", cached_chunker)
    for module in ("rag.reindex", "rag.retrieve", "rag.ingest"):
        monkeypatch.setattr(f"{module}.open_embedder", open_once)


@pytest.fixture
def put(make_document: Callable[..., tuple[Document, list[Chunk]]]) -> Callable[..., Reindexed]:
    """Put documents {source: paragraphs} into a workspace's corpus, a chunk a paragraph; returns what indexing did."""

    def run(workspace: Workspace, documents: dict[str, list[str]], tenant: str = "default", **changes: object) -> Reindexed:
        for source, paragraphs in documents.items():
            document, chunks = make_document(source, paragraphs, tenant)
            workspace.store.add_document(document.model_copy(update=changes), chunks)
        return index(workspace, tenant)

    return run


def index(workspace: Workspace, tenant: str = "default", *settings: str) -> Reindexed:
    """Index the tenant's documents, under settings given as key=value."""
    import rag.reindex

    opened = configured(workspace, f"tenant={tenant}", *settings)
    return reindex(opened, rag.reindex.open_embedder(opened), show_progress)


def configured(workspace: Workspace, *settings: str) -> Workspace:
    """The same workspace under other settings."""
    return open_workspace(str(workspace.root), list(settings))
