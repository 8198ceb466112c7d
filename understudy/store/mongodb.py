"""The MongoDB store, through pymongo, on a standalone server, a replica set, a sharded cluster or Atlas.

No transaction over several rows is needed. The row of a document is its commit point: it names the revision of its chunks that counts,
chunks are written before it under a revision of their own, and what belongs to a document (chunks, embeddings, cached answers) is seen
only while its row is there. What a killed writer leaves behind is never seen, and swept an hour later by the next one that writes.

Records are kept as JSON beside the fields that queries need, so that no key or value of a record is ever read as an operator.
"""

from __future__ import annotations

import json
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from pymongo.errors import DuplicateKeyError
from pymongo.operations import DeleteMany

from understudy.digests import digest_of
from understudy.errors import StorageError
from understudy.records import Chunk, Document
from understudy.store.mongodb_cache import REMEMBERED, MongoCache
from understudy.store.mongodb_connection import Connection, Row, batched, equal, packed, put, unpacked
from understudy.store.mongodb_traces import MongoTraces

ABANDONED_SECONDS = 3600.0  # an unfinished write older than this is no longer going on


class MongoStore(MongoTraces, MongoCache):
    """A Store in a MongoDB database; safe to share between threads, processes and machines."""

    def __init__(self, url: str) -> None:
        self.connection = Connection(url)
        self._swept = False

    def add_document(self, document: Document, chunks: list[Chunk]) -> bool:
        """See Store."""
        connection = self.connection
        key = digest_of([document.tenant, document.source_key])
        if connection.find("documents", equal(_id=key, id=document.id), ["_id"]):
            return False
        self._sweep()
        revision = self._write_chunks(document.id, chunks)
        row = {name: getattr(document, name) for name in ("id", "tenant", "source_key", "source")}
        self._commit({"_id": key, **row, "revision": revision, "chunks": len(chunks), "record": document.model_dump_json()})
        return True

    def documents(self, tenant: str) -> list[Document]:
        """See Store."""
        rows = self.connection.find("documents", equal(tenant=tenant), ["record"], sort=[("tenant", 1), ("source", 1), ("id", 1)])
        return [Document.model_validate_json(row["record"]) for row in rows]

    def document(self, document_id: str) -> tuple[Document, list[Chunk]] | None:
        """See Store."""
        for row, chunks in self._whole(equal(id=document_id), None):
            return Document.model_validate_json(row["record"]), [_chunk(chunk) for chunk in chunks]
        return None

    def document_ids(self, tenant: str) -> list[str]:
        """See Store."""
        return [row["id"] for row in self.connection.find("documents", equal(tenant=tenant), ["id"], sort=[("tenant", 1), ("source", 1), ("id", 1)])]

    def remove_document(self, document_id: str) -> int:
        """See Store."""
        self._sweep()
        removed = 0
        while rows := self.connection.find("documents", equal(id=document_id), ["id", "revision", "chunks"]):
            self.connection.delete("documents", equal(_id=rows[0]["_id"], revision=rows[0]["revision"]))
            self._discard(rows[0])
            removed = rows[0]["chunks"]
        return removed

    def add_chunks(self, chunks: list[Chunk]) -> None:
        """See Store."""
        for document_id, own in _by_document(chunks).items():
            self._rewrite(document_id, lambda there, own=own: _joined(there, own))  # type: ignore[misc]

    def remove_chunks(self, ids: Iterable[str]) -> int:
        """See Store."""
        there = self.chunks_by_id(ids)
        for document_id in _by_document(there.values()):
            self._rewrite(document_id, lambda chunks: [chunk for chunk in chunks if chunk.id not in there])
        for batch in batched(list(there)):
            self.connection.delete("embeddings", {"chunk_id": {"$in": batch}})
        return len(there)

    def chunks(self, tenant: str | None = None) -> list[Chunk]:
        """See Store."""
        where = equal(tenant=tenant) if tenant is not None else {}
        found = sorted(self._whole(where, where), key=lambda pair: (pair[0]["source"], pair[0]["id"]))
        return [_chunk(row) for _, rows in found for row in rows]

    def chunks_by_id(self, ids: Iterable[str]) -> dict[str, Chunk]:
        """See Store."""
        found: dict[str, Chunk] = {}
        wanted = list(dict.fromkeys(ids))
        for _ in range(2):  # a document replaced between the two readings is read once more
            rows = self.connection.find_among("chunks", "chunk_id", wanted)
            live = {row["revision"] for row in self.connection.find_among("documents", "revision", list({row["revision"] for row in rows}), None, ["revision"])}
            found |= {row["chunk_id"]: _chunk(row) for row in rows if row["revision"] in live}
            wanted = list({row["chunk_id"] for row in rows} - found.keys())
        return found

    def put_embeddings(self, fingerprint: str, vectors: dict[str, np.ndarray]) -> None:
        """See Store. Chunks that were deleted meanwhile are passed over."""
        chunks = self.chunks_by_id(vectors)
        requests: list[Any] = []
        for chunk_id, chunk in chunks.items():
            rows = _embedding_rows(fingerprint, chunk, vectors[chunk_id])
            requests += [put(row) for row in rows]
            requests.append(DeleteMany({"_id": {"$gt": rows[-1]["_id"], "$lt": f"{fingerprint}:{chunk_id};"}}))  # ";" follows ":"
        self.connection.write("embeddings", requests)
        owners = {chunk.document_id for chunk in chunks.values()}
        if gone := owners - self._live(owners):  # removed while we wrote
            self.connection.delete("embeddings", {"document_id": {"$in": sorted(gone)}})

    def embeddings(self, fingerprint: str, ids: Iterable[str]) -> dict[str, np.ndarray]:
        """See Store."""
        rows = self.connection.find_among("embeddings", "chunk_id", list(dict.fromkeys(ids)), equal(fingerprint=fingerprint))
        live = self._live({row["document_id"] for row in rows})
        windows: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
        counts = {}
        for row in rows:
            if row["document_id"] in live:
                windows[row["chunk_id"]][row["window"]] = unpacked(row["vector"])
                counts[row["chunk_id"]] = row["windows"]
        return {chunk_id: np.stack([found[n] for n in range(len(found))]) for chunk_id, found in windows.items() if len(found) == counts[chunk_id]}

    def fingerprints(self) -> list[str]:
        """See Store."""
        names = [self.connection.run(lambda c=c: self.connection[c].distinct("fingerprint")) for c in ("embeddings", "cache")]  # type: ignore[misc]
        return sorted({name for found in names for name in found})

    def tenants(self) -> list[str]:
        """See Store."""
        places = ("documents", "traces", "cache")
        return sorted({name for place in places for name in self.connection.run(lambda p=place: self.connection[p].distinct("tenant"))})  # type: ignore[misc]

    def compact(self) -> None:
        """See Store. The server's journal, replication log and backups keep what they hold until they roll over."""
        for name in ("documents", "chunks", "embeddings", "traces", "cache"):
            self.connection.run(lambda name=name: self.connection.database.command("compact", name, force=True))  # type: ignore[misc]

    def close(self) -> None:
        """See Store."""
        self.connection.close()

    def _write_chunks(self, document_id: str, chunks: list[Chunk], generations: dict[str, list[str]] | None = None) -> str:
        """Write chunks under a new revision, which nobody sees until a document's row names it; returns the revision.

        `generations` are marks to be kept, by chunk id (rag.vector_search).
        """
        began, revision = time.time(), secrets.token_hex(16)
        self.connection.write("revisions", [put({"_id": revision, "document_id": document_id, "since": began})])
        self.connection.write("chunks", [put(_chunk_row(chunk, revision) | _marks(generations or {}, chunk)) for chunk in chunks])
        if time.time() - began > ABANDONED_SECONDS / 2:
            raise StorageError("writing a document took too long to be sure of its parts", "run the command again")
        return revision

    def _rewrite(self, document_id: str, change: Callable[[list[Chunk]], list[Chunk]]) -> None:
        """Give a document other chunks, unless it is gone; if it is replaced meanwhile, once more from what it is then."""
        committed = False
        while not committed:
            found = next(self._whole(equal(id=document_id), None), None)
            if found is None:
                return
            row, rows = found
            before = [_chunk(each) for each in rows]
            after = change(before)
            if after == before:
                return
            revision = self._write_chunks(document_id, after, {each["chunk_id"]: each["generations"] for each in rows if "generations" in each})
            committed = self._commit({**row, "revision": revision, "chunks": len(after)}, over=row["revision"])

    def _commit(self, row: Row, over: str | None = None) -> bool:
        """Put the row of a document in its place at once, whoever else writes, and discard what it replaced.

        False, and the row's chunks discarded, where it was to replace the revision `over` and another had done so before.
        """
        replaced = self._swap(row, over)
        for old in replaced if replaced is not None else [row]:
            self._discard(old, keep=row["id"] if old["_id"] == row["_id"] else "")  # what a document was at another source goes
        return replaced is not None

    def _swap(self, row: Row, over: str | None) -> list[Row] | None:
        """The rows replaced; None where the row to be replaced was not there."""
        documents, replaced = self.connection["documents"], list[Row]()
        while True:
            here = {"_id": row["_id"]}
            previous = self.connection.find("documents", here, ["id", "revision", "past"])
            past = [revision for old in previous for revision in (*old["past"], old["revision"])]
            if row["revision"] in past:  # it was applied and the answer lost; others may have replaced it since
                return replaced
            if over is not None and [old["revision"] for old in previous] != [over]:
                return None
            replaced += previous
            try:
                if not previous:
                    self.connection.run(lambda: documents.insert_one({**row, "past": []}))
                    return replaced
                here["revision"] = previous[0]["revision"]
                new = {**row, "past": past[-REMEMBERED:]}
                if self.connection.run(lambda here=here, new=new: documents.replace_one(here, new)).matched_count:  # type: ignore[misc]
                    return replaced
            except DuplicateKeyError:  # the same bytes are there under another source: they move
                elsewhere = self.connection.find("documents", {"id": row["id"], "_id": {"$ne": row["_id"]}}, ["id", "revision"])
                for other in elsewhere:
                    self.connection.delete("documents", {"_id": other["_id"], "revision": other["revision"]})
                replaced += elsewhere

    def _discard(self, row: Row, keep: str = "") -> None:
        """Delete what belonged to a document's row that is gone, and with it, unless it is `keep`, what belonged to the document."""
        if row["id"] != keep:
            self.connection.delete("cache", {"document_ids": row["id"]})
            self.connection.delete("embeddings", {"document_id": row["id"]})
        self.connection.delete("chunks", {"revision": row["revision"]})
        self.connection.delete("revisions", {"_id": row["revision"]})

    def _sweep(self) -> None:
        """Once per opened store: discard what writers that were killed long ago have left."""
        if self._swept:
            return
        old = self.connection.find("revisions", {"since": {"$lt": time.time() - ABANDONED_SECONDS}})
        live = {row["revision"]: row["id"] for row in self.connection.find("documents", {}, ["id", "revision"])}
        kept = set(live.values())
        for row in old:
            if row["_id"] not in live:
                self._discard({"id": row["document_id"], "revision": row["_id"]}, keep=row["document_id"] if row["document_id"] in kept else "")
        self._swept = True

    def _live(self, document_ids: Iterable[str]) -> set[str]:
        return {row["id"] for row in self.connection.find_among("documents", "id", list(document_ids), None, ["id"])}

    def _whole(self, documents: Row, chunks: Row | None) -> Iterator[tuple[Row, list[Row]]]:
        """The documents that meet a query, each with all its chunk rows in order; `chunks` is a query that finds them all at once.

        A document that is replaced while it is read is read again. Raises StorageError where one has lost chunks.
        """
        fields = ["id", "source", "revision", "chunks"] if chunks is not None else None
        pending = self.connection.find("documents", documents, fields)
        seen: set[str] = set()
        while pending:
            found: dict[str, list[Row]] = defaultdict(list)
            rows = self.connection.find("chunks", chunks) if chunks is not None else self._chunk_rows(pending)
            for row in rows:
                found[row["revision"]].append(row)
            short = []
            for row in pending:
                if len(found[row["revision"]]) == row["chunks"]:
                    yield row, sorted(found[row["revision"]], key=lambda chunk: chunk["ordinal"])
                elif row["revision"] in seen:
                    raise StorageError(f"document {row['id'][:12]} has lost chunks", "remove it with `understudy documents rm` and ingest it again")
                else:
                    short.append(row["_id"])
                    seen.add(row["revision"])
            pending, chunks = self.connection.find_among("documents", "_id", short, None, fields), None

    def _chunk_rows(self, documents: list[Row]) -> list[Row]:
        return self.connection.find_among("chunks", "revision", [row["revision"] for row in documents])


def _joined(there: list[Chunk], more: list[Chunk]) -> list[Chunk]:
    known = {chunk.id for chunk in there}
    return there + [chunk for chunk in more if chunk.id not in known]


def _by_document(chunks: Iterable[Chunk]) -> dict[str, list[Chunk]]:
    found: dict[str, list[Chunk]] = defaultdict(list)
    for chunk in chunks:
        found[chunk.document_id].append(chunk)
    return found


def _chunk_row(chunk: Chunk, revision: str) -> Row:
    """The text stands outside the record, where a search index can read it."""
    fields = {"chunk_id": chunk.id, "document_id": chunk.document_id, "tenant": chunk.tenant, "ordinal": chunk.ordinal, "text": chunk.text}
    return {"_id": f"{revision}:{chunk.id}", "revision": revision, **fields, "record": chunk.model_dump_json(exclude={"text"})}


def _marks(generations: dict[str, list[str]], chunk: Chunk) -> Row:
    return {"generations": generations[chunk.id]} if chunk.id in generations else {}


def _chunk(row: Row) -> Chunk:
    return Chunk.model_validate({**json.loads(row["record"]), "text": row["text"]})


def _embedding_rows(fingerprint: str, chunk: Chunk, vectors: np.ndarray) -> list[Row]:
    """One row a window, because a vector index wants one vector a row."""
    owner = {"chunk_id": chunk.id, "document_id": chunk.document_id, "tenant": chunk.tenant, "fingerprint": fingerprint, "windows": len(vectors)}
    return [{"_id": f"{fingerprint}:{chunk.id}:{n:06d}", **owner, "window": n, "vector": packed(vector)} for n, vector in enumerate(vectors)]
