"""Ingest: files → documents and chunks in the store → embeddings → an index generation, made live.

Every stage looks at what is already there, so a killed run is taken up where it stopped and a
second run of the same files adds nothing. No lock is held while parsing or embedding.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rag.chunk import Chunker
from rag.embed import BATCH, Embedder
from rag.index import build_index, make_live
from rag.load import find_files, load_document
from understudy.errors import DocumentError, NotFoundError
from understudy.models import model_path
from understudy.progress import Progress
from understudy.records import Chunk
from understudy.workspace import Workspace


def ingest(workspace: Workspace, paths: list[Path], progress: Callable[[str, int], Progress]) -> dict[str, Any]:
    """Ingest files and folders; the result is the command's JSON. Raises DocumentError when every file is quarantined."""
    began = time.monotonic()
    config = workspace.config
    files = find_files(paths)
    if not files:
        raise NotFoundError("no documents found there", "name .pdf, .txt or .md files, or a folder that holds some")
    embedder = Embedder(model_path(workspace, config.models.embedder))
    counts, quarantined = _load_files(workspace, files, embedder, progress)
    if len(quarantined) == len(files):
        raise DocumentError("; ".join(f"{q['source']}: {q['reason']}" for q in quarantined), "give files that hold text")
    chunks = workspace.store.chunks(config.tenant)
    _embed_missing(workspace, embedder, chunks, progress)
    vectors = workspace.store.embeddings(embedder.fingerprint, (chunk.id for chunk in chunks))
    chunks = [chunk for chunk in chunks if chunk.id in vectors]  # a document removed meanwhile is gone
    generation = build_index(workspace.index, chunks, vectors, embedder.fingerprint)
    make_live(workspace.index, config.tenant, generation)
    documents = {kind: counts[kind] for kind in ("added", "updated", "unchanged")}
    return {
        "documents": documents | {"quarantined": quarantined},
        "chunks": {"added": counts["chunks_added"], "removed": counts["chunks_removed"], "total": len(chunks)},
        "pages": counts["pages"],
        "generation": generation,
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
    chunks = workspace.store.chunks(config.tenant)
    if not chunks:
        make_live(workspace.index, config.tenant, None)
        return {"documents": len(chosen), "chunks": removed, "generation": None}
    embedder = Embedder(model_path(workspace, config.models.embedder))
    vectors = workspace.store.embeddings(embedder.fingerprint, (chunk.id for chunk in chunks))
    generation = build_index(workspace.index, chunks, vectors, embedder.fingerprint)
    make_live(workspace.index, config.tenant, generation)
    return {"documents": len(chosen), "chunks": removed, "generation": generation}


def _load_files(
    workspace: Workspace, files: list[Path], embedder: Embedder, progress: Callable[[str, int], Progress]
) -> tuple[dict[str, int], list[dict[str, str]]]:
    config, store = workspace.config, workspace.store
    chunker = Chunker(embedder.tokenizer_file, config.ingest.chunk_tokens, config.ingest.overlap_tokens)
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


def _embed_missing(workspace: Workspace, embedder: Embedder, chunks: list[Chunk], progress: Callable[[str, int], Progress]) -> None:
    present = workspace.store.embeddings(embedder.fingerprint, (chunk.id for chunk in chunks))
    missing = [chunk for chunk in chunks if chunk.id not in present]
    with progress("embedding", len(missing)) as bar:
        for start in range(0, len(missing), 4 * BATCH):
            batch = missing[start : start + 4 * BATCH]
            vectors = embedder.encode_windows([chunk.text for chunk in batch])
            workspace.store.put_embeddings(embedder.fingerprint, {chunk.id: v for chunk, v in zip(batch, vectors, strict=True)})
            bar.advance(len(batch))
