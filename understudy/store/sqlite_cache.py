"""The part of the embedded store that keeps the semantic cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import apsw
import numpy as np

from understudy.cache_records import CacheEntry, CacheObservation, CacheTotals


def create_cache(connection: apsw.Connection) -> None:
    """The cache's tables. A trigger removes what cites a document with the document, whoever removes it and why."""
    connection.execute(
        """
        CREATE TABLE cache_entries(id TEXT PRIMARY KEY, tenant TEXT, scope TEXT, created_at REAL, expires_at REAL, used_at REAL, generation TEXT,
                                   hits INTEGER, wrong_hits INTEGER, record TEXT);
        CREATE INDEX cache_in_order ON cache_entries(tenant, scope, created_at);
        CREATE INDEX cache_by_use ON cache_entries(tenant, used_at);
        CREATE INDEX cache_by_expiry ON cache_entries(tenant, expires_at);
        CREATE TABLE cache_vectors(entry_id TEXT REFERENCES cache_entries ON DELETE CASCADE, fingerprint TEXT, vector BLOB,
                                   PRIMARY KEY(entry_id, fingerprint));
        CREATE TABLE cache_documents(entry_id TEXT REFERENCES cache_entries ON DELETE CASCADE, document_id TEXT, PRIMARY KEY(document_id, entry_id));
        CREATE INDEX cache_documents_of ON cache_documents(entry_id);
        CREATE TABLE cache_observations(number INTEGER PRIMARY KEY, entry_id TEXT REFERENCES cache_entries ON DELETE CASCADE, similarity REAL, correct INTEGER);
        CREATE INDEX cache_observations_of ON cache_observations(entry_id, number);
        CREATE TABLE cache_totals(tenant TEXT PRIMARY KEY, hits INTEGER, wrong_hits INTEGER, seconds_saved REAL);
        CREATE TRIGGER cache_follows_documents AFTER DELETE ON documents BEGIN
            DELETE FROM cache_entries WHERE id IN (SELECT entry_id FROM cache_documents WHERE document_id=OLD.id);
        END;
        """
    )


class SqliteCache(ABC):
    """Cache entries in SQLite; the store that inherits this gives the connection."""

    @abstractmethod
    def _transaction(self) -> AbstractContextManager[apsw.Connection]: ...

    @abstractmethod
    def _read(self, sql: str, bindings: tuple[Any, ...]) -> list[tuple[Any, ...]]: ...

    def put_cache_entry(self, entry: CacheEntry, fingerprint: str, vector: np.ndarray) -> bool:
        """See Store."""
        with self._transaction() as connection:
            for document_id in entry.document_ids:
                if not connection.execute("SELECT 1 FROM documents WHERE id=?", (document_id,)).fetchone():
                    return False
            connection.execute("DELETE FROM cache_entries WHERE id=?", (entry.id,))
            connection.execute(
                "INSERT INTO cache_entries VALUES(?,?,?,?,?,?,?,?,?,?)",
                (entry.id, entry.tenant, entry.scope, entry.created_at, entry.expires_at, entry.used_at, entry.generation, entry.hits, entry.wrong_hits,
                 entry.model_dump_json(exclude={"observations"})),
            )  # fmt: skip
            connection.execute("INSERT INTO cache_vectors VALUES(?,?,?)", (entry.id, fingerprint, np.ascontiguousarray(vector, dtype="<f4").tobytes()))
            connection.executemany("INSERT OR IGNORE INTO cache_documents VALUES(?,?)", [(entry.id, document_id) for document_id in entry.document_ids])
            seen = [(entry.id, observation.similarity, observation.correct) for observation in entry.observations]
            connection.executemany("INSERT INTO cache_observations(entry_id, similarity, correct) VALUES(?,?,?)", seen)
            return True

    def cache_entry(self, entry_id: str) -> CacheEntry | None:
        """See Store."""
        rows = self._read("SELECT record, generation, used_at, hits, wrong_hits FROM cache_entries WHERE id=?", (entry_id,))
        return self._entry(entry_id, *rows[0]) if rows else None

    def cache_entries(self, tenant: str, scope: str | None = None) -> list[CacheEntry]:
        """See Store."""
        rows = self._read(
            "SELECT id, record, generation, used_at, hits, wrong_hits FROM cache_entries WHERE tenant=?1 AND (?2 IS NULL OR scope=?2) ORDER BY created_at, id",
            (tenant, scope),
        )
        return [self._entry(*row) for row in rows]

    def count_cache_entries(self, tenant: str, scope: str | None = None) -> int:
        """See Store."""
        return int(self._read("SELECT count(*) FROM cache_entries WHERE tenant=?1 AND (?2 IS NULL OR scope=?2)", (tenant, scope))[0][0])

    def cache_vectors(self, tenant: str, scope: str, fingerprint: str, since: float = 0.0) -> tuple[list[str], np.ndarray]:
        """See Store."""
        rows = self._read(
            "SELECT e.id, v.vector FROM cache_entries e JOIN cache_vectors v ON v.entry_id=e.id AND v.fingerprint=?3"
            " WHERE e.tenant=?1 AND e.scope=?2 AND e.created_at>=?4 ORDER BY e.created_at, e.id",
            (tenant, scope, fingerprint, since),
        )
        vectors = np.frombuffer(b"".join(row[1] for row in rows), dtype="<f4")
        return [row[0] for row in rows], vectors.reshape(len(rows), -1) if rows else vectors.reshape(0, 0)

    def keep_cache_entry(self, entry_id: str, generation: str) -> None:
        """See Store."""
        with self._transaction() as connection:
            connection.execute("UPDATE cache_entries SET generation=? WHERE id=?", (generation, entry_id))

    def observe_cache(self, entry_id: str, similarity: float, correct: bool) -> None:
        """See Store."""
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO cache_observations(entry_id, similarity, correct) SELECT id, ?2, ?3 FROM cache_entries WHERE id=?1",
                (entry_id, similarity, correct),
            )

    def count_cache_hit(self, entry_id: str, at: float) -> None:
        """See Store."""
        with self._transaction() as connection:
            connection.execute("UPDATE cache_entries SET hits=hits+1, used_at=max(used_at, ?) WHERE id=?", (at, entry_id))
            connection.execute(
                "INSERT INTO cache_totals SELECT tenant, 1, 0, json_extract(record, '$.seconds') FROM cache_entries WHERE id=?"
                " ON CONFLICT(tenant) DO UPDATE SET hits=hits+1, seconds_saved=seconds_saved+excluded.seconds_saved",
                (entry_id,),
            )

    def count_wrong_hit(self, entry_id: str) -> None:
        """See Store."""
        with self._transaction() as connection:
            connection.execute("UPDATE cache_entries SET wrong_hits=wrong_hits+1 WHERE id=?", (entry_id,))
            connection.execute(
                "INSERT INTO cache_totals SELECT tenant, 0, 1, 0.0 FROM cache_entries WHERE id=? ON CONFLICT(tenant) DO UPDATE SET wrong_hits=wrong_hits+1",
                (entry_id,),
            )

    def cache_totals(self, tenant: str) -> CacheTotals:
        """See Store."""
        rows = self._read("SELECT hits, wrong_hits, seconds_saved FROM cache_totals WHERE tenant=?", (tenant,))
        return CacheTotals(hits=rows[0][0], wrong_hits=rows[0][1], seconds_saved=rows[0][2]) if rows else CacheTotals()

    def put_cache_totals(self, tenant: str, totals: CacheTotals) -> None:
        """See Store."""
        with self._transaction() as connection:
            values = (tenant, totals.hits, totals.wrong_hits, totals.seconds_saved)
            connection.execute("INSERT OR REPLACE INTO cache_totals VALUES(?,?,?,?)", values)

    def remove_cache_entries(self, ids: Iterable[str]) -> int:
        """See Store."""
        with self._transaction() as connection:
            return sum(len(connection.execute("DELETE FROM cache_entries WHERE id=? RETURNING id", (entry_id,)).fetchall()) for entry_id in set(ids))

    def trim_cache(self, tenant: str, max_entries: int, now: float) -> int:
        """See Store."""
        with self._transaction() as connection:
            expired = connection.execute("DELETE FROM cache_entries WHERE tenant=? AND expires_at<=? RETURNING id", (tenant, now)).fetchall()
            excess = connection.execute(
                "DELETE FROM cache_entries WHERE id IN (SELECT id FROM cache_entries WHERE tenant=?1 ORDER BY used_at, id"
                " LIMIT max(0, (SELECT count(*) FROM cache_entries WHERE tenant=?1) - ?2)) RETURNING id",
                (tenant, max_entries),
            ).fetchall()
            return len(expired) + len(excess)

    def _entry(self, entry_id: str, record: str, generation: str, used_at: float, hits: int, wrong_hits: int) -> CacheEntry:
        seen = self._read("SELECT similarity, correct FROM cache_observations WHERE entry_id=? ORDER BY number", (entry_id,))
        observations = [CacheObservation(similarity=similarity, correct=bool(correct)) for similarity, correct in seen]
        changed = {"generation": generation, "used_at": used_at, "hits": hits, "wrong_hits": wrong_hits, "observations": observations}
        return CacheEntry.model_validate_json(record).model_copy(update=changed)
