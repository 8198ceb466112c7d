"""Moving every record from one store to another, and proof that all of them arrived.

A copy that was interrupted goes on where it stopped: what the target has already is not written again. At the end each store is
read once more and digested: equal digests mean equal records, whatever the two databases are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import numpy as np

from understudy.digests import canonical_json
from understudy.errors import StorageError, UsageError
from understudy.progress import Progress
from understudy.records import Chunk, Record
from understudy.store import Store

BATCH = 500  # chunks whose vectors are moved at a time
COLLECTIONS = ("documents", "chunks", "embeddings", "traces", "cache", "cache totals")


class Digest:
    """A digest over a set of records that does not depend on their order."""

    def __init__(self) -> None:
        self._each: list[bytes] = []

    def add(self, *parts: str | bytes) -> None:
        """Count one record in, given as its canonical parts."""
        digest = hashlib.sha256()
        for part in parts:
            content = part.encode() if isinstance(part, str) else part
            digest.update(len(content).to_bytes(8, "big") + content)
        self._each.append(digest.digest())

    def result(self) -> dict[str, object]:
        """{count, sha256 (64 hex digits)}."""
        return {"count": len(self._each), "sha256": hashlib.sha256(b"".join(sorted(self._each))).hexdigest()}


def copy_store(source: Store, target: Store, progress: Callable[[str, int], Progress]) -> dict[str, dict[str, object]]:
    """Copy all records of all tenants; {collection: {count, sha256}} of what both stores then hold.

    The target is empty, or holds an earlier, perhaps unfinished copy of the same source: UsageError, and nothing written, where it holds
    a document or trace that the source does not. StorageError where the stores differ at the end.
    """
    _refuse_others(source, target)
    for tenant in source.tenants():
        _copy_documents(source, target, tenant, progress)
        _copy_traces(source, target, tenant)
        _copy_cache(source, target, tenant, progress)
    expected, found = digest_store(source, progress), digest_store(target, progress)
    if differing := [name for name in COLLECTIONS if expected[name] != found[name]]:
        raise StorageError(
            f"the stores differ in {', '.join(differing)} after the copy", "end whatever writes to them and run the command again; it goes on where it stopped"
        )
    return found


def digest_store(store: Store, progress: Callable[[str, int], Progress]) -> dict[str, dict[str, object]]:
    """{collection: {count, sha256}} over the canonical form of every record of every tenant."""
    digests = {name: Digest() for name in COLLECTIONS}
    fingerprints = store.fingerprints()
    for tenant in store.tenants():
        ids = store.document_ids(tenant)
        with progress(f"checking {tenant}", len(ids)) as bar:
            for document_id in ids:
                found = store.document(document_id)
                if found is None:
                    continue  # removed meanwhile: the counts tell
                document, chunks = found
                digests["documents"].add(_canonical(document))
                for chunk in chunks:
                    digests["chunks"].add(_canonical(chunk))
                for fingerprint in fingerprints:
                    for chunk_id, vectors in store.embeddings(fingerprint, [chunk.id for chunk in chunks]).items():
                        digests["embeddings"].add(fingerprint, chunk_id, str(vectors.shape), np.ascontiguousarray(vectors, "<f4").tobytes())
                bar.advance()
        for trace in store.traces(tenant):
            digests["traces"].add(_canonical(trace))
        vectors_of = _cache_vectors(store, tenant, fingerprints)
        for entry in store.cache_entries(tenant):
            if entry.id in vectors_of:
                fingerprint, vector = vectors_of[entry.id]
                digests["cache"].add(_canonical(entry), fingerprint, np.ascontiguousarray(vector, "<f4").tobytes())
        digests["cache totals"].add(tenant, _canonical(store.cache_totals(tenant)))
    return {name: digest.result() for name, digest in digests.items()}


def _refuse_others(source: Store, target: Store) -> None:
    for tenant in target.tenants():
        documents = set(target.document_ids(tenant)) - set(source.document_ids(tenant))
        if documents or {trace.id for trace in target.traces(tenant)} - {trace.id for trace in source.traces(tenant)}:
            raise UsageError("the target holds records that the source does not", "copy into an empty store, or remove them there first")


def _copy_documents(source: Store, target: Store, tenant: str, progress: Callable[[str, int], Progress]) -> None:
    ids = source.document_ids(tenant)
    fingerprints = source.fingerprints()
    with progress(f"copying {tenant}", len(ids)) as bar:
        for document_id in ids:
            found = source.document(document_id)
            if found is not None:
                document, chunks = found
                there = target.document(document_id)
                if there is not None and (there[0] != document or _by_id(there[1]) != _by_id(chunks)):
                    target.remove_document(document_id)
                target.add_document(document, chunks)
                for fingerprint in fingerprints:
                    for batch in _batches([chunk.id for chunk in chunks]):
                        _copy_embeddings(source, target, fingerprint, batch)
            bar.advance()


def _copy_embeddings(source: Store, target: Store, fingerprint: str, ids: list[str]) -> None:
    there = target.embeddings(fingerprint, ids)
    wanted = source.embeddings(fingerprint, ids)
    missing = {chunk_id: vectors for chunk_id, vectors in wanted.items() if chunk_id not in there or not np.array_equal(vectors, there[chunk_id])}
    if missing:
        target.put_embeddings(fingerprint, missing)


def _copy_traces(source: Store, target: Store, tenant: str) -> None:
    present = {trace.id: _digest(trace) for trace in target.traces(tenant)}
    for trace in source.traces(tenant):
        if present.get(trace.id) != _digest(trace):
            target.put_trace(trace)


def _copy_cache(source: Store, target: Store, tenant: str, progress: Callable[[str, int], Progress]) -> None:
    entries = source.cache_entries(tenant)
    vectors_of = _cache_vectors(source, tenant, source.fingerprints())
    present = {entry.id: entry for entry in target.cache_entries(tenant)}
    target.remove_cache_entries(present.keys() - {entry.id for entry in entries})
    with progress(f"copying cached answers of {tenant}", len(entries)) as bar:
        for entry in entries:
            if present.get(entry.id) != entry and entry.id in vectors_of:
                target.put_cache_entry(entry, *vectors_of[entry.id])
            bar.advance()
    target.put_cache_totals(tenant, source.cache_totals(tenant))


def _cache_vectors(store: Store, tenant: str, fingerprints: Iterable[str]) -> dict[str, tuple[str, np.ndarray]]:
    """(embedder, vector) of every cache entry of a tenant."""
    found: dict[str, tuple[str, np.ndarray]] = {}
    for scope in sorted({entry.scope for entry in store.cache_entries(tenant)}):
        for fingerprint in fingerprints:
            ids, vectors = store.cache_vectors(tenant, scope, fingerprint)
            found |= {entry_id: (fingerprint, vector) for entry_id, vector in zip(ids, vectors, strict=True)}
    return found


def _canonical(record: Record) -> str:
    return canonical_json(record.model_dump(mode="json"))


def _digest(record: Record) -> bytes:
    return hashlib.sha256(_canonical(record).encode()).digest()


def _by_id(chunks: Iterable[Chunk]) -> dict[str, Chunk]:
    return {chunk.id: chunk for chunk in chunks}


def _batches(items: list[str]) -> Iterator[list[str]]:
    rest = iter(items)
    while batch := list(islice(rest, BATCH)):
        yield batch
