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
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from pymongo import ReplaceOne
from pymongo.errors import DuplicateKeyError
from pymongo.operations import DeleteMany

from understudy.digests import digest_of
from understudy.errors import StorageError
from understudy.records import Chunk, Document, Trace, TraceFilter
from understudy.store import ANY_TRACE
from understudy.store.mongodb_cache import REMEMBERED, MongoCache
from understudy.store.mongodb_connection import Connection, Row, equal, packed, unpacked

ABANDONED_SECONDS = 3600.0  # an unfinished write older than this is no longer going on
PAGE = 100  # traces read at a time


class MongoStore(MongoCache):
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
        began, revision = time.time(), secrets.token_hex(16)
        connection.write("revisions", [_put({"_id": revision, "document_id": document.id, "since": began})])
        connection.write("chunks", [_put(_chunk_row(chunk, revision)) for chunk in chunks])
        if time.time() - began > ABANDONED_SECONDS / 2:
            raise StorageError("writing a document took too long to be sure of its parts", "run the command again")
        row = {name: getattr(document, name) for name in ("id", "tenant", "source_key", "source")}
        for replaced in self._commit({"_id": key, **row, "revision": revision, "chunks": len(chunks), "record": document.model_dump_json()}):
            self._discard(replaced, keep=document.id)
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
            requests += [_put(row) for row in rows]
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

    def put_trace(self, trace: Trace) -> None:
        """See Store."""
        fields = {name: getattr(trace, name) for name in ("tenant", "source", "model", "score", "complete", "outcome", "created_at")}
        self.connection.write("traces", [_put({"_id": trace.id, **fields, "question": trace.question.lower(), "record": trace.model_dump_json()})])

    def trace(self, trace_id: str) -> Trace | None:
        """See Store."""
        rows = self.connection.find("traces", {"_id": {"$gte": trace_id, "$lt": trace_id + "g"}}, ["record"], limit=2)
        return Trace.model_validate_json(rows[0]["record"]) if len(rows) == 1 else None

    def traces(self, tenant: str, where: TraceFilter = ANY_TRACE) -> Iterator[Trace]:
        """See Store. Read a page at a time, so that a connection that breaks between traces does no harm."""
        conditions: list[Row] = [equal(tenant=tenant), *_trace_conditions(where)]
        after: list[Row] = []
        while True:
            rows = self.connection.find(
                "traces", {"$and": conditions + after}, ["created_at", "record"], sort=[("tenant", 1), ("created_at", 1), ("_id", 1)], limit=PAGE
            )
            yield from (Trace.model_validate_json(row["record"]) for row in rows)
            if len(rows) < PAGE:
                return
            moment, last = rows[-1]["created_at"], rows[-1]["_id"]
            after = [{"$or": [{"created_at": {"$gt": moment}}, {"created_at": moment, "_id": {"$gt": last}}]}]

    def close(self) -> None:
        """See Store."""
        self.connection.close()

    def _commit(self, row: Row) -> list[Row]:
        """Put the row of a document in its place at once, whoever else writes; returns the rows that it replaced."""
        documents, replaced = self.connection["documents"], list[Row]()
        while True:
            here = {"_id": row["_id"]}
            previous = self.connection.find("documents", here, ["id", "revision", "past"])
            past = [revision for old in previous for revision in (*old["past"], old["revision"])]
            if row["revision"] in past:  # it was applied and the answer lost; others may have replaced it since
                return replaced
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


def _put(row: Row) -> ReplaceOne[Row]:
    return ReplaceOne({"_id": row["_id"]}, row, upsert=True)


def _chunk_row(chunk: Chunk, revision: str) -> Row:
    """The text stands outside the record, where a search index can read it."""
    fields = {"chunk_id": chunk.id, "document_id": chunk.document_id, "tenant": chunk.tenant, "ordinal": chunk.ordinal, "text": chunk.text}
    return {"_id": f"{revision}:{chunk.id}", "revision": revision, **fields, "record": chunk.model_dump_json(exclude={"text"})}


def _chunk(row: Row) -> Chunk:
    return Chunk.model_validate({**json.loads(row["record"]), "text": row["text"]})


def _embedding_rows(fingerprint: str, chunk: Chunk, vectors: np.ndarray) -> list[Row]:
    """One row a window, because a vector index wants one vector a row."""
    owner = {"chunk_id": chunk.id, "document_id": chunk.document_id, "tenant": chunk.tenant, "fingerprint": fingerprint, "windows": len(vectors)}
    return [{"_id": f"{fingerprint}:{chunk.id}:{n:06d}", **owner, "window": n, "vector": packed(vector)} for n, vector in enumerate(vectors)]


def _trace_conditions(where: TraceFilter) -> list[Row]:
    """Queries that compare values: none is read as an operator or a pattern."""
    model, contains = where.model or "", (where.contains or "").lower()
    conditions: dict[str, Row] = {
        "source": equal(source=where.source),
        "model": {"$or": [equal(model=model), {"model": {"$gte": f"{model}@", "$lt": f"{model}A"}}]},  # "A" follows "@"
        "contains": {"$expr": {"$gte": [{"$indexOfCP": ["$question", {"$literal": contains}]}, 0]}},
        "min_score": {"score": {"$gte": where.min_score}},
        "max_score": {"score": {"$lte": where.max_score}},
        "since": {"created_at": {"$gte": where.since}},
        "until": {"created_at": {"$lt": where.until}},
        "complete": equal(complete=where.complete),
        "outcome": equal(outcome=where.outcome),
    }
    return [conditions[name] for name in where.model_dump(exclude_none=True)]
