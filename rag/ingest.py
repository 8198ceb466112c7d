"""Ingest: files → documents and chunks in the store → embeddings → an index generation, made live.

Every stage looks at what is already there, so a killed run is taken up where it stopped and a
second run of the same files adds nothing. No lock is held while parsing or embedding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rag.documents import find_documents, learnt_from, take_in
from rag.embed import Embedder
from rag.load import find_files
from rag.metadata import Metadata
from rag.parse.docling import require_docling
from rag.parse.formats import SUFFIXES
from rag.reindex import make_chunker, open_embedder, reindex
from understudy.errors import DocumentError, NotFoundError
from understudy.progress import Progress, show_progress
from understudy.workspace import Workspace


def ingest(
    workspace: Workspace,
    inputs: Sequence[str | Path],
    progress: Callable[[str, int], Progress],
    given: Metadata | None = None,
    embedder: Embedder | None = None,
) -> dict[str, Any]:
    """Ingest files, folders, globs or a list on stdin (`-`), with metadata for all; the result is the command's JSON.

    Raises DocumentError when every file is quarantined, NotFoundError when there are none.
    """
    began = time.monotonic()
    config = workspace.config
    if config.ingest.parser == "docling":
        require_docling()
    files = find_files(inputs)
    if not files:
        raise NotFoundError("no documents found there", f"name files or folders that hold {', '.join(SUFFIXES)}")
    embedder = embedder or open_embedder(workspace)
    intake = take_in(workspace, files, make_chunker(workspace, embedder), embedder.fingerprint, given or Metadata(), progress)
    if len(intake.quarantined) == len(files):
        raise DocumentError("; ".join(f"{q['source']}: {q['reason']}" for q in intake.quarantined), "give files that hold text")
    indexed = reindex(workspace, embedder, progress)
    return {
        "documents": {name: getattr(intake, name) for name in ("added", "updated", "unchanged", "quarantined", "duplicates", "without_text")},
        "chunks": {"added": intake.chunks_added, "removed": intake.chunks_removed + indexed.removed, "total": indexed.chunks},
        "pages": intake.pages,
        "generation": indexed.generation,
        "seconds": round(time.monotonic() - began, 2),
    }


def remove_documents(workspace: Workspace, wanted: Iterable[str], purge: bool = False) -> dict[str, Any]:
    """Remove documents by id, beginning of an id, or source, with their chunks, and index what is left.

    The result lists what was learnt from them. `purge` also rewrites the store's files, so that no byte of them stays there.
    Raises NotFoundError for what is not there.
    """
    chosen = {document.id: document for name in wanted for document in find_documents(workspace, name)}
    learnt = learnt_from(workspace, set(chosen))
    removed = sum(workspace.store.remove_document(document_id) for document_id in sorted(chosen))
    result = {"documents": len(chosen), "sources": [d.source for d in chosen.values()], "chunks": removed, "learnt": learnt, "purged": purge}
    generation = reindex(workspace, open_embedder(workspace), show_progress).generation
    if purge:
        workspace.store.compact()
    return {**result, "generation": generation}
