"""The part of the MongoDB store that keeps the semantic cache: an entry, its vector and observations are one row."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterable
from datetime import UTC, datetime

import numpy as np

from understudy.cache_records import CacheEntry, CacheObservation, CacheTotals
from understudy.store.mongodb_connection import Connection, Row, equal, packed, put, unpacked

REMEMBERED = 32  # latest updates of a row whose repetition is recognised


class MongoCache(ABC):
    """Cache entries in MongoDB; the store that inherits this gives the connection."""

    connection: Connection

    @abstractmethod
    def _live(self, document_ids: Iterable[str]) -> set[str]: ...

    def put_cache_entry(self, entry: CacheEntry, fingerprint: str, vector: np.ndarray) -> bool:
        """See Store."""
        cited = set(entry.document_ids)
        if self._live(cited) != cited:
            return False
        self.connection.write("cache", [put(_row(entry, fingerprint, vector))])
        if self._live(cited) != cited:  # removed while we wrote
            self.connection.delete("cache", equal(_id=entry.id))
            return False
        return True

    def cache_entry(self, entry_id: str) -> CacheEntry | None:
        """See Store."""
        found = self._entries(equal(_id=entry_id))
        return found[0] if found else None

    def cache_entries(self, tenant: str, scope: str | None = None) -> list[CacheEntry]:
        """See Store."""
        return self._entries(equal(tenant=tenant) | (equal(scope=scope) if scope is not None else {}))

    def count_cache_entries(self, tenant: str, scope: str | None = None) -> int:
        """See Store. An entry whose document goes at this moment may still count."""
        where = equal(tenant=tenant) | (equal(scope=scope) if scope is not None else {})
        return self.connection.run(lambda: self.connection["cache"].count_documents(where))

    def cache_vectors(self, tenant: str, scope: str, fingerprint: str, since: float = 0.0) -> tuple[list[str], np.ndarray]:
        """See Store."""
        where = equal(tenant=tenant, scope=scope, fingerprint=fingerprint) | {"created_at": {"$gte": since}}
        rows = self._visible(where, ["vector", "document_ids"])
        vectors = [unpacked(row["vector"]) for row in rows]
        return [row["_id"] for row in rows], np.stack(vectors) if vectors else np.zeros((0, 0), np.float32)

    def keep_cache_entry(self, entry_id: str, generation: str) -> None:
        """See Store."""
        self.connection.run(lambda: self.connection["cache"].update_one(equal(_id=entry_id), {"$set": {"generation": generation}}))

    def observe_cache(self, entry_id: str, similarity: float, correct: bool) -> None:
        """See Store."""
        self._update_once("cache", entry_id, {"$push": {"observations": {"similarity": similarity, "correct": correct}}})

    def count_cache_hit(self, entry_id: str, at: float) -> None:
        """See Store. A process killed between the entry and the totals has counted the entry only."""
        if row := self._update_once("cache", entry_id, {"$inc": {"hits": 1}, "$max": {"used_at": at}}):
            self._count(row["tenant"], {"hits": 1, "seconds_saved": row["seconds"]})

    def count_wrong_hit(self, entry_id: str) -> None:
        """See Store."""
        if row := self._update_once("cache", entry_id, {"$inc": {"wrong_hits": 1}}):
            self._count(row["tenant"], {"wrong_hits": 1})

    def cache_totals(self, tenant: str) -> CacheTotals:
        """See Store."""
        rows = self.connection.find("cache_totals", equal(_id=tenant))
        return CacheTotals(**{name: rows[0].get(name, 0) for name in CacheTotals.model_fields}) if rows else CacheTotals()

    def put_cache_totals(self, tenant: str, totals: CacheTotals) -> None:
        """See Store."""
        self.connection.write("cache_totals", [put({"_id": tenant, **totals.model_dump()})])

    def remove_cache_entries(self, ids: Iterable[str]) -> int:
        """See Store."""
        return self.connection.delete("cache", {"_id": {"$in": sorted(set(ids))}})

    def trim_cache(self, tenant: str, max_entries: int, now: float) -> int:
        """See Store."""
        expired = self.connection.delete("cache", equal(tenant=tenant) | {"expires": {"$lte": _date(now)}})
        count = self.connection.run(lambda: self.connection["cache"].count_documents(equal(tenant=tenant)))
        if count <= max_entries:
            return expired
        excess = self.connection.find("cache", equal(tenant=tenant), ["_id"], sort=[("used_at", 1), ("_id", 1)], limit=count - max_entries)
        return expired + self.connection.delete("cache", {"_id": {"$in": [row["_id"] for row in excess]}})

    def _entries(self, where: Row) -> list[CacheEntry]:
        return [_entry(row) for row in self._visible(where)]

    def _visible(self, where: Row, fields: list[str] | None = None) -> list[Row]:
        """Rows, oldest first, all of whose cited documents are there."""
        rows = self.connection.find("cache", where, fields, sort=[("created_at", 1), ("_id", 1)])
        live = self._live({document_id for row in rows for document_id in row["document_ids"]})
        return [row for row in rows if live.issuperset(row["document_ids"])]

    def _update_once(self, collection: str, key: str, update: Row) -> Row | None:
        """Update a row with one effect even where the request is repeated because its answer was lost; the row, None where it is gone."""
        token = secrets.token_hex(8)
        applied = {"applied": {"$each": [token], "$slice": -REMEMBERED}}
        marked = update | {"$push": update.get("$push", {}) | applied}
        rows = self.connection[collection]
        self.connection.run(lambda: rows.update_one({"_id": {"$eq": key}, "applied": {"$ne": token}}, marked))
        found = self.connection.find(collection, equal(_id=key, applied=token), ["tenant", "seconds"])
        return found[0] if found else None

    def _count(self, tenant: str, counts: Row) -> None:
        empty = {"_id": tenant, **CacheTotals().model_dump()}
        self.connection.run(lambda: self.connection["cache_totals"].update_one({"_id": {"$eq": tenant}}, {"$setOnInsert": empty}, upsert=True))
        self._update_once("cache_totals", tenant, {"$inc": counts})


def _row(entry: CacheEntry, fingerprint: str, vector: np.ndarray) -> Row:
    fields = ("tenant", "scope", "document_ids", "generation", "created_at", "used_at", "hits", "wrong_hits", "seconds")
    return {
        "_id": entry.id,
        **{name: getattr(entry, name) for name in fields},
        "expires": None if entry.expires_at is None else _date(entry.expires_at),
        "fingerprint": fingerprint,
        "vector": packed(vector),
        "observations": [observation.model_dump() for observation in entry.observations],
        "applied": [],
        "record": entry.model_dump_json(exclude={"observations"}),
    }


def _entry(row: Row) -> CacheEntry:
    changed = {name: row[name] for name in ("generation", "used_at", "hits", "wrong_hits")}
    observations = [CacheObservation.model_validate(observation) for observation in row["observations"]]
    return CacheEntry.model_validate_json(row["record"]).model_copy(update=changed | {"observations": observations})


def _date(seconds: float) -> datetime:
    """What a TTL index understands; whole milliseconds."""
    return datetime.fromtimestamp(seconds, UTC)
