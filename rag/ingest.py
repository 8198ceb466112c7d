"""Ingest: files → documents and chunks in the store → embeddings → an index generation, made live.

Every stage looks at what is already there, so a killed run is taken up where it stopped and a
second run of the same files adds nothing. No lock is held while parsing or embedding.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rag.embed import Embedder
from rag.load import find_files, load_document
from rag.reindex import make_chunker, open_embedder, reindex
from understudy.errors import DocumentError, NotFoundError
from understudy.progress import Progress, show_progress
from understudy.workspace import Workspace


def ingest(workspace: Workspace, paths: list[Path], progress: Callable[[str, int], Progress]) -> dict[str, Any]:
    """Ingest files and folders; the result is the command's JSON. Raises DocumentError when every file is quarantined."""
    began = time.monotonic()
    files = find_files(paths)
    if not files:
        raise NotFoundError("no documents found there", "name .pdf, .txt or .md files, or a folder that holds some")
    embedder = open_embedder(workspace)
    counts, quarantined = _load_files(workspace, files, embedder, progress)
    if len(quarantined) == len(files):
        raise DocumentError("; ".join(f"{q['source']}: {q['reason']}" for q in quarantined), "give files that hold text")
    indexed = reindex(workspace, embedder, progress)
    documents = {kind: counts[kind] for kind in ("added", "updated", "unchanged")}
    return {
        "documents": documents | {"quarantined": quarantined},
        "chunks": {"added": counts["chunks_added"], "removed": counts["chunks_removed"] + indexed.removed, "total": indexed.chunks},
        "pages": counts["pages"],
        "generation": indexed.generation,
        "seconds": round(time.monotonic() - began, 2),
    }


def remove_documents(workspace: Workspace, document_ids: list[str]) -> dict[str, Any]:
    """Remove documents with their chunks, and index what is left. Raises NotFoundError for an unknown id."""
    config = workspace.config
    known = {document.id for document in workspace.store.documents(config.tenant)}
    chosen = {next((k for k in known if k.startswith(wanted)), "") or wanted for wanted in document_ids}
    if chosen - known:
        raise NotFoundError(f"no document {', '.join(sorted(chosen - known))}", "`understudy documents ls` lists them")
    removed = sum(workspace.store.remove_document(document_id) for document_id in sorted(chosen))
    generation = reindex(workspace, open_embedder(workspace), show_progress).generation
    return {"documents": len(chosen), "chunks": removed, "generation": generation}


def _load_files(
    workspace: Workspace, files: list[Path], embedder: Embedder, progress: Callable[[str, int], Progress]
) -> tuple[dict[str, int], list[dict[str, str]]]:
    config, store = workspace.config, workspace.store
    chunker = make_chunker(workspace, embedder)
    known = {document.source_key: document for document in store.documents(config.tenant)}
    chunked = {chunk.id for chunk in store.chunks(config.tenant)}
    counts = dict.fromkeys(("added", "updated", "unchanged", "chunks_added", "chunks_removed", "pages"), 0)
    quarantined = []
    with progress("reading", len(files)) as bar:
        for file in files:
            try:
                document = load_document(file, config.tenant, config.ingest)
            except DocumentError as error:
                quarantined.append({"source": str(file), "reason": error.message})
                bar.advance()
                continue
            chunks = chunker.chunks(document)
            before = known.get(document.source_key)
            same = before is not None and before.id == document.id and all(chunk.id in chunked for chunk in chunks)
            if not same and before is not None:
                counts["chunks_removed"] += store.remove_document(before.id)
            store.add_document(document, chunks)
            counts["unchanged" if same else "updated" if before else "added"] += 1
            counts["chunks_added"] += 0 if same else len(chunks)
            counts["pages"] += document.pages
            bar.advance()
    return counts, quarantined
