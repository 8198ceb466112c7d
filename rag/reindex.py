"""From the store to a live index: chunk what another chunker cut, embed what has no vector, build beside the live generation, switch.

Queries go on against the live generation until the switch. Every stage looks at what is there, so a killed run is
taken up where it stopped. No lock is held while embedding or building.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

from rag.chunk import Chunker
from rag.embed import BATCH, Embedder
from rag.generations import live_generation, make_live, replace_snapshot, snapshots
from rag.index import Index, build_index, indexed_chunks, open_index, read_meta, vectors_by_chunk
from understudy.digests import digest_of_file
from understudy.errors import NotFoundError, StorageError
from understudy.models import model_path
from understudy.progress import Progress
from understudy.records import Chunk, Document
from understudy.workspace import Workspace

AT_ONCE = 32 * BATCH  # chunks embedded between two writes


@dataclass(frozen=True)
class Reindexed:
    """What reindexing did; `generation` is None where the tenant has no chunks left."""

    generation: str | None
    chunks: int
    embedded: int
    removed: int  # chunks of another chunker


def open_embedder(workspace: Workspace) -> Embedder:
    """The configured embedding model. Raises NotFoundError."""
    models = workspace.config.models
    return Embedder(model_path(workspace, models.embedder), models.embedder_precision)


def make_chunker(workspace: Workspace, embedder: Embedder) -> Chunker:
    """The configured chunker, which counts in the embedder's tokens."""
    return Chunker(embedder.tokenizer_file, workspace.config.ingest.chunk_tokens, workspace.config.ingest.overlap_tokens)


def chunker_key(chunker: Chunker, embedder: Embedder) -> str:
    """What decides where a text is cut: algorithm, settings, tokenizer."""
    return f"{chunker.name}/{digest_of_file(embedder.tokenizer_file)[:12]}"


def reindex(workspace: Workspace, embedder: Embedder, progress: Callable[[str, int], Progress]) -> Reindexed:
    """Make the live index hold exactly the tenant's documents, as configured now. Raises StorageError."""
    store, tenant, root = workspace.store, workspace.config.tenant, workspace.index
    chunker = make_chunker(workspace, embedder)
    key, embedded = chunker_key(chunker, embedder), 0
    while True:
        chunks = store.chunks(tenant)
        obsolete = _rechunk(workspace, chunks, chunker, key, progress)
        if obsolete:
            chunks = [chunk for chunk in store.chunks(tenant) if chunk.id not in obsolete]
        embedded += embed_missing(workspace, embedder, chunks, progress)
        vectors = store.embeddings(embedder.fingerprint, (chunk.id for chunk in chunks))
        documents = store.documents(tenant)
        there = {document.id for document in documents}
        chunks = [chunk for chunk in chunks if chunk.id in vectors and chunk.document_id in there]  # a document removed meanwhile is gone
        indexed = {chunk.id for chunk in chunks}
        prune_snapshots(workspace, progress)
        generation = build_index(root, documents, chunks, vectors, embedder.fingerprint, key) if chunks else None

        def unchanged(indexed: set[str] = indexed, obsolete: set[str] = obsolete) -> bool:
            return {chunk.id for chunk in store.chunks(tenant)} - obsolete == indexed

        if make_live(root, tenant, generation, unchanged):
            removed = store.remove_chunks(obsolete)
            return Reindexed(generation, len(chunks), embedded, removed)


def embed_missing(workspace: Workspace, embedder: Embedder, chunks: list[Chunk], progress: Callable[[str, int], Progress]) -> int:
    """Embed the chunks that have no vectors of this embedder, longest first; a text that is there already is not embedded again.

    Returns how many texts were embedded.
    """
    store, fingerprint = workspace.store, embedder.fingerprint
    present = store.embeddings(fingerprint, (chunk.id for chunk in chunks)).keys()
    missing: dict[str, list[str]] = {}  # text → ids of its chunks
    for chunk in chunks:
        if chunk.id not in present:
            missing.setdefault(chunk.text, []).append(chunk.id)
    known = {chunk.text: chunk.id for chunk in chunks if chunk.id in present and chunk.text in missing}
    if known:
        vectors = store.embeddings(fingerprint, known.values())
        copies = {chunk_id: vectors[there] for text, there in known.items() if there in vectors for chunk_id in missing.pop(text)}
        store.put_embeddings(fingerprint, copies)
    texts = sorted(missing, key=len, reverse=True)
    with progress("embedding", len(texts)) as bar:
        for start in range(0, len(texts), AT_ONCE):
            batch = texts[start : start + AT_ONCE]
            embedded = zip(batch, embedder.encode_windows(batch), strict=True)
            store.put_embeddings(fingerprint, {chunk_id: vectors for text, vectors in embedded for chunk_id in missing[text]})
            bar.advance(len(batch))
    return len(texts)


def restore_snapshot(workspace: Workspace, embedder: Embedder, name: str, progress: Callable[[str, int], Progress]) -> dict[str, object]:
    """Make a snapshot live, without documents that were removed since. The next ingest indexes every document again, as configured.

    Raises NotFoundError, or StorageError where it was made with another embedder or chunker.
    """
    store, root, tenant = workspace.store, workspace.index, workspace.config.tenant
    prune_snapshots(workspace, progress)
    kept = snapshots(root, tenant)
    if name not in kept:
        raise NotFoundError(f"no snapshot {name}", "`understudy index ls` lists them; one whose documents are all gone is gone too")
    generation = str(kept[name]["generation"])
    index = open_index(root, generation)
    if index.embedder != embedder.fingerprint:
        raise StorageError(f"the snapshot {name} was made with another embedding model", "set models.embedder to that one, or run `understudy index rebuild`")
    if index.chunker != chunker_key(make_chunker(workspace, embedder), embedder):
        raise StorageError(f"the snapshot {name} was made with other chunk settings ({index.chunker})", "set ingest.* back to those first")
    chunks = indexed_chunks(root, generation, {document.id: document for document in store.documents(tenant)})
    store.add_chunks(chunks)
    store.put_embeddings(embedder.fingerprint, vectors_by_chunk(index))
    make_live(root, tenant, generation)
    return {"snapshot": name, "generation": generation, "chunks": len(chunks)}


def _rechunk(workspace: Workspace, there: list[Chunk], chunker: Chunker, key: str, progress: Callable[[str, int], Progress]) -> set[str]:
    """Add this chunker's chunks of documents that another cut; returns the ids of the other's, to be removed after the switch.

    Another chunker is known by the live index, or by two chunks in one place, which an interrupted run leaves.
    """
    store, tenant = workspace.store, workspace.config.tenant
    chunks = {document_id: list(group) for document_id, group in groupby(there, key=lambda chunk: chunk.document_id)}
    everything = _live_chunker(workspace) not in (None, key)
    suspects = {document_id for document_id, own in chunks.items() if everything or len({chunk.ordinal for chunk in own}) < len(own)}
    obsolete: set[str] = set()
    with progress("chunking", len(suspects)) as bar:
        for document in store.documents(tenant) if suspects else []:
            if document.id in suspects:
                wanted = {chunk.id: chunk for chunk in chunker.chunks(document)}
                present = {chunk.id for chunk in chunks[document.id]}
                store.add_chunks([chunk for chunk_id, chunk in wanted.items() if chunk_id not in present])
                obsolete |= present - wanted.keys()
                bar.advance()
    return obsolete


def _live_chunker(workspace: Workspace) -> str | None:
    """The live index's chunker; None where nothing is indexed yet, "" where the index cannot say."""
    try:
        return str(read_meta(workspace.index, live_generation(workspace.index, workspace.config.tenant))["chunker"])
    except NotFoundError:
        return None
    except StorageError:
        return ""


def prune_snapshots(workspace: Workspace, progress: Callable[[str, int], Progress]) -> None:
    """Rebuild snapshots that hold documents which are gone, without them; drop those that are damaged or left empty."""
    tenant, root = workspace.config.tenant, workspace.index
    kept = snapshots(root, tenant)
    documents = {document.id: document for document in workspace.store.documents(tenant)} if kept else {}
    with progress("checking snapshots", len(kept)) as bar:
        for name, entry in kept.items():
            try:
                index = open_index(root, entry["generation"])
                if any(document.id not in documents for document in index.facts.documents):
                    replace_snapshot(root, tenant, name, _without_missing(workspace, index, documents))
            except StorageError:
                replace_snapshot(root, tenant, name, None)
            bar.advance()


def _without_missing(workspace: Workspace, index: Index, documents: dict[str, Document]) -> str | None:
    """A generation like this index with these documents alone; None where none of its own is left."""
    chunks = indexed_chunks(workspace.index, index.generation, documents)
    return build_index(workspace.index, list(documents.values()), chunks, vectors_by_chunk(index), index.embedder, index.chunker) if chunks else None
