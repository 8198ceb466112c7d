"""Documents into the store and out of it: parsing side by side, updates by source key, removal with its lineage."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rag.chunk import Chunker
from rag.load import ROW, file_digest, file_of, load_documents
from rag.metadata import Metadata, read_sidecar
from rag.parse import VERSION
from rag.parsers import Parsers
from understudy.adapters import manifests
from understudy.errors import DocumentError, NotFoundError
from understudy.files import read_json
from understudy.models import LEARNT
from understudy.progress import Progress
from understudy.records import Document, document_of
from understudy.workspace import Workspace

Load = Callable[[Path], list[Document]]
MOST_PROCESSES = 8  # of the default; parsing a batch is rarely what takes long


@dataclass
class Intake:
    """What became of the files of one ingest."""

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    quarantined: list[dict[str, str]] = field(default_factory=list)  # source, reason
    duplicates: list[dict[str, str]] = field(default_factory=list)  # source, of
    without_text: list[dict[str, Any]] = field(default_factory=list)  # source, pages: scans inside a document that has text elsewhere
    chunks_added: int = 0
    chunks_removed: int = 0
    pages: int = 0


def take_in(workspace: Workspace, files: list[Path], chunker: Chunker, fingerprint: str, given: Metadata, progress: Callable[[str, int], Progress]) -> Intake:
    """Bring files into the store as documents and chunks; what is there already, and as it should be, is not parsed again.

    `fingerprint` is the embedder's: chunks that stay keep their vectors when the document's metadata changes.
    """
    intake = Intake()
    shelf = Shelf(workspace, chunker, fingerprint, intake)
    limits = workspace.config.ingest
    count = min(limits.parse_processes or min(os.cpu_count() or 1, MOST_PROCESSES), max(1, len(files)))
    with progress("reading", len(files)) as bar, ThreadPoolExecutor(count) as pool, Parsers(limits, count) as parsers:

        def load(file: Path) -> list[Document]:
            document_id = file_digest(file, workspace.config.tenant)
            said = shelf.said(file, given)
            known = shelf.unparsed(file, document_id, said)
            return [known] if known else load_documents(file, workspace.config.tenant, parsers, said, document_id)

        for file, loaded in _in_order(files, load, pool, ahead=2 * count):
            try:
                documents = loaded.result()
            except DocumentError as error:
                intake.quarantined.append({"source": str(file), "reason": error.message})
            else:
                for document in documents:
                    shelf.put(document, file)
                shelf.drop_rows(file, documents)
            bar.advance()
    return intake


def _in_order(files: list[Path], load: Load, pool: ThreadPoolExecutor, ahead: int) -> Iterator[tuple[Path, Future[list[Document]]]]:
    """(file, finished future) in the order of the files, loading at most `ahead` of them at a time."""
    waiting: deque[tuple[Path, Future[list[Document]]]] = deque()
    for file in files:
        waiting.append((file, pool.submit(load, file)))
        if len(waiting) >= ahead:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


class Shelf:
    """The tenant's documents while an ingest changes them."""

    def __init__(self, workspace: Workspace, chunker: Chunker, fingerprint: str, intake: Intake) -> None:
        self._store, self._tenant = workspace.store, workspace.config.tenant
        self._chunker, self._fingerprint, self._intake = chunker, fingerprint, intake
        self._parser = VERSION if workspace.config.ingest.parser == "auto" else workspace.config.ingest.parser
        documents = self._store.documents(self._tenant)
        self._by_key = {document.source_key: document for document in documents}
        self._by_id = {document.id: document for document in documents}
        self._given = {str(file_of(document.source_key)): document.given for document in documents}
        self._chunk_ids = {chunk.id for chunk in self._store.chunks(self._tenant)}

    def said(self, file: Path, given: Metadata) -> Metadata:
        """What the command line says of a file: now, or when it last said anything."""
        return given if given != Metadata() else Metadata.model_validate(self._given.get(str(file.resolve()), {}))

    def unparsed(self, file: Path, document_id: str, said: Metadata) -> Document | None:
        """The document of a file that is in the store with the same bytes, metadata and parser."""
        known = self._by_key.get(str(file.resolve()))
        if known is None or known.id != document_id or known.parser != self._parser:
            return None
        metadata = read_sidecar(file).over(said)
        wanted = (
            metadata.tags,
            metadata.boost or 1.0,
            metadata.valid_from,
            metadata.valid_until,
            metadata.source or file.name,
            said.model_dump(exclude_defaults=True),
        )
        has = (known.tags, known.boost, known.valid_from, known.valid_until, known.source, known.given)
        return known if wanted == has and metadata.title in ("", known.title) else None

    def put(self, document: Document, file: Path) -> None:
        """Add a document, or replace what its source was."""
        document = document.model_copy(update={"parser": self._parser})
        before, twin = self._by_key.get(document.source_key), self._by_id.get(document.id)
        if twin is not None and twin.source_key != document.source_key:
            if _still_holds(twin):
                self._intake.duplicates.append({"source": str(file), "of": twin.source})
                self._intake.unchanged += 1
                if before is not None:
                    self._remove(before)
                return
            if before is not None:
                self._remove(twin)
            before = before or twin  # the file has moved
        chunks = self._chunker.chunks(document)
        same = before is not None and _content(before) == _content(document) and all(chunk.id in self._chunk_ids for chunk in chunks)
        self._intake.unchanged += same
        self._intake.updated += not same and before is not None
        self._intake.added += before is None
        self._intake.pages += document.pages
        if missing := _pages_without_text(document):
            self._intake.without_text.append({"source": document.source, "pages": missing})
        if same:
            return
        if before is not None:
            vectors = self._store.embeddings(self._fingerprint, (chunk.id for chunk in chunks)) if before.id == document.id else {}
            self._remove(before, forget=before.id == document.id)
            self._store.add_document(document, chunks)
            self._store.put_embeddings(self._fingerprint, vectors)
        else:
            self._store.add_document(document, chunks)
        self._by_key[document.source_key] = self._by_id[document.id] = document
        self._chunk_ids |= {chunk.id for chunk in chunks}
        self._intake.chunks_added += len(chunks)

    def drop_rows(self, file: Path, documents: list[Document]) -> None:
        """Remove rows that a JSONL file no longer has."""
        rows, kept = f"{file.resolve()}{ROW}", {document.source_key for document in documents}
        for key in [key for key in self._by_key if key.startswith(rows) and key not in kept]:
            self._remove(self._by_key[key])

    def _remove(self, document: Document, forget: bool = True) -> None:
        """Take a document out; with `forget` False only out of these books, because the store replaces it in one step."""
        if forget:
            self._intake.chunks_removed += self._store.remove_document(document.id)
        else:
            self._intake.chunks_removed += len(self._chunker.chunks(document))
        self._by_key.pop(document.source_key, None)
        self._by_id.pop(document.id, None)


def _content(document: Document) -> dict[str, Any]:
    return document.model_dump(exclude={"ingested_at"})


def _pages_without_text(document: Document) -> list[int]:
    ends = [*document.page_starts[1:], len(document.text)]
    return [number for number, (start, end) in enumerate(zip(document.page_starts, ends, strict=True), 1) if not document.text[start:end].strip()]


def _still_holds(document: Document) -> bool:
    """Whether a document's source file is there with the same bytes."""
    if ROW in document.source_key:
        return file_of(document.source_key).is_file()
    try:
        return file_digest(Path(document.source_key), document.tenant) == document.id
    except DocumentError:
        return False


def find_documents(workspace: Workspace, wanted: str) -> list[Document]:
    """The tenant's documents with this id (or the beginning of it, 6 digits at least), source or source key; raises NotFoundError."""
    documents = workspace.store.documents(workspace.config.tenant)
    found = [d for d in documents if wanted in (d.id, d.source, d.source_key, str(file_of(d.source_key)))]
    found = found or [d for d in documents if len(wanted) >= 6 and d.id.startswith(wanted)]
    if not found:
        raise NotFoundError(f"no document {wanted}", "`understudy documents ls` lists ids and sources")
    return found


def learnt_from(workspace: Workspace, document_ids: set[str]) -> dict[str, Any]:
    """What holds these documents' content beyond the corpus: adapters, tuned embedders and datasets by name, and how many traces cite
    them; `unknown` are imported adapters of which nobody knows."""
    known = [manifest for manifest, _ in manifests(workspace)]
    adapters = [manifest.served_name for manifest in known if _touches(manifest.group_ids, document_ids)]
    unknown = [manifest.served_name for manifest in known if manifest.lineage == "unknown"]
    tuned = sorted(workspace.models.glob(f"*/{LEARNT}"))
    embedders = [file.parent.name for file in tuned if _touches(read_json(file).get("group_ids", []), document_ids)]
    datasets = [f.parent.name for f in sorted(workspace.datasets.glob("*/dataset.json")) if document_ids & set(read_json(f).get("document_ids", []))]
    traces = sum(any(c.document_id in document_ids for c in trace.citations) for trace in workspace.store.traces(workspace.config.tenant))
    return {"adapters": adapters, "embedders": embedders, "unknown": unknown, "datasets": datasets, "traces": traces}


def _touches(group_ids: list[str], document_ids: set[str]) -> bool:
    return not document_ids.isdisjoint(document_of(group) for group in group_ids)
