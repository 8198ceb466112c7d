"""The embedded store: one SQLite file through apsw, whose SQLite is newer than Python's own.

Records are kept as JSON beside the columns that queries need. Every public write is one transaction.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import apsw
import numpy as np

from understudy.errors import StorageError
from understudy.files import locked
from understudy.records import Chunk, Document, Trace, TraceFilter
from understudy.store import ANY_TRACE
from understudy.store.sqlite_cache import SqliteCache, create_cache

BUSY_MILLISECONDS = 30_000
PAGE = 100  # traces read at a time
BATCH = 2000  # ids looked up at a time


def _create(connection: apsw.Connection) -> None:
    connection.execute(
        """
        CREATE TABLE documents(id TEXT PRIMARY KEY, tenant TEXT, source_key TEXT, source TEXT, record TEXT, UNIQUE(tenant, source_key));
        CREATE TABLE chunks(id TEXT PRIMARY KEY, document_id TEXT REFERENCES documents ON DELETE CASCADE, tenant TEXT, ordinal INTEGER, record TEXT);
        CREATE INDEX chunks_of ON chunks(document_id, ordinal);
        CREATE TABLE embeddings(chunk_id TEXT REFERENCES chunks ON DELETE CASCADE, fingerprint TEXT, windows INTEGER, vectors BLOB,
                                PRIMARY KEY(chunk_id, fingerprint));
        CREATE TABLE traces(id TEXT PRIMARY KEY, tenant TEXT, source TEXT, created_at REAL, record TEXT);
        CREATE INDEX traces_in_order ON traces(tenant, created_at, id);
        """
    )


MIGRATIONS: list[Callable[[apsw.Connection], None]] = [_create, create_cache]  # numbered by place, applied once, in order


class SqliteStore(SqliteCache):
    """A Store in one file; safe to share between threads, and between processes by SQLite's own locks."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.RLock()
        try:
            with locked(path.with_name(f".{path.name}.lock")):  # changing to WAL does not wait for others, it fails
                self._connection = apsw.Connection(str(path))
                self._connection.set_busy_timeout(BUSY_MILLISECONDS)
                self._connection.create_scalar_function("lower_case", _lower_case, 1, deterministic=True)  # SQLite's own knows ASCII only
                for pragma, value in (("journal_mode", "wal"), ("synchronous", "full"), ("foreign_keys", True)):
                    self._connection.pragma(pragma, value)
                self._migrate()
        except (apsw.Error, OSError) as error:
            raise StorageError(f"cannot open the store {path}: {error}", "check the path, its permissions and free space") from error

    def add_document(self, document: Document, chunks: list[Chunk]) -> bool:
        """See Store."""
        with self._transaction() as connection:
            if connection.execute("SELECT 1 FROM documents WHERE id=? AND source_key=?", (document.id, document.source_key)).fetchone():
                return False
            connection.execute("DELETE FROM documents WHERE id=? OR (tenant=? AND source_key=?)", (document.id, document.tenant, document.source_key))
            connection.execute(
                "INSERT INTO documents VALUES(?,?,?,?,?)",
                (document.id, document.tenant, document.source_key, document.source, document.model_dump_json()),
            )
            connection.executemany("INSERT INTO chunks VALUES(?,?,?,?,?)", [(c.id, c.document_id, c.tenant, c.ordinal, c.model_dump_json()) for c in chunks])
            return True

    def documents(self, tenant: str) -> list[Document]:
        """See Store."""
        rows = self._read("SELECT record FROM documents WHERE tenant=? ORDER BY source, id", (tenant,))
        return [Document.model_validate_json(row[0]) for row in rows]

    def document(self, document_id: str) -> tuple[Document, list[Chunk]] | None:
        """See Store."""
        rows = self._read(  # one statement, so that both are of one moment
            "SELECT record, (SELECT json_group_array(record) FROM (SELECT record FROM chunks WHERE document_id=?1 ORDER BY ordinal))"
            " FROM documents WHERE id=?1",
            (document_id,),
        )
        if not rows:
            return None
        return Document.model_validate_json(rows[0][0]), [Chunk.model_validate_json(record) for record in json.loads(rows[0][1])]

    def document_ids(self, tenant: str) -> list[str]:
        """See Store."""
        return [row[0] for row in self._read("SELECT id FROM documents WHERE tenant=? ORDER BY source, id", (tenant,))]

    def remove_document(self, document_id: str) -> int:
        """See Store."""
        with self._transaction() as connection:
            count = connection.execute("SELECT count(*) FROM chunks WHERE document_id=?", (document_id,)).fetchone()
            connection.execute("DELETE FROM documents WHERE id=?", (document_id,))
            return int(count[0]) if count else 0

    def add_chunks(self, chunks: list[Chunk]) -> None:
        """See Store."""
        with self._transaction() as connection:
            connection.executemany(
                "INSERT OR IGNORE INTO chunks SELECT ?1, id, tenant, ?3, ?4 FROM documents WHERE id=?2",
                [(c.id, c.document_id, c.ordinal, c.model_dump_json()) for c in chunks],
            )

    def remove_chunks(self, ids: Iterable[str]) -> int:
        """See Store."""
        with self._transaction() as connection:
            removed = 0
            for chunk_id in ids:
                connection.execute("DELETE FROM chunks WHERE id=?", (chunk_id,))
                removed += connection.changes()
            return removed

    def chunks(self, tenant: str | None = None) -> list[Chunk]:
        """See Store."""
        rows = self._read(
            "SELECT c.record FROM chunks c JOIN documents d ON d.id=c.document_id WHERE ?1 IS NULL OR c.tenant=?1 ORDER BY d.source, d.id, c.ordinal",
            (tenant,),
        )
        return [Chunk.model_validate_json(row[0]) for row in rows]

    def chunks_by_id(self, ids: Iterable[str]) -> dict[str, Chunk]:
        """See Store."""
        rows = self._read_among("SELECT chunks.id, record FROM json_each(?1) JOIN chunks ON chunks.id=value", ids)
        return {chunk_id: Chunk.model_validate_json(record) for chunk_id, record in rows}

    def put_embeddings(self, fingerprint: str, vectors: dict[str, np.ndarray]) -> None:
        """See Store. Chunks that were deleted meanwhile are passed over."""
        with self._transaction() as connection:
            connection.executemany(
                "INSERT OR REPLACE INTO embeddings SELECT id, ?2, ?3, ?4 FROM chunks WHERE id=?1",
                [(chunk_id, fingerprint, len(v), np.ascontiguousarray(v, dtype="<f4").tobytes()) for chunk_id, v in vectors.items()],
            )

    def embeddings(self, fingerprint: str, ids: Iterable[str]) -> dict[str, np.ndarray]:
        """See Store."""
        sql = "SELECT chunk_id, windows, vectors FROM json_each(?1) JOIN embeddings ON chunk_id=value AND fingerprint=?2"
        rows = self._read_among(sql, ids, fingerprint)
        return {chunk_id: np.frombuffer(blob, dtype="<f4").reshape(windows, -1) for chunk_id, windows, blob in rows}

    def fingerprints(self) -> list[str]:
        """See Store."""
        return [row[0] for row in self._read("SELECT fingerprint FROM embeddings UNION SELECT fingerprint FROM cache_vectors ORDER BY 1", ())]

    def tenants(self) -> list[str]:
        """See Store."""
        sql = "SELECT tenant FROM documents UNION SELECT tenant FROM traces UNION SELECT tenant FROM cache_entries ORDER BY 1"
        return [row[0] for row in self._read(sql, ())]

    def put_trace(self, trace: Trace) -> None:
        """See Store."""
        with self._transaction() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO traces VALUES(?,?,?,?,?)", (trace.id, trace.tenant, trace.source, trace.created_at, trace.model_dump_json())
            )

    def trace(self, trace_id: str) -> Trace | None:
        """See Store."""
        rows = self._read("SELECT record FROM traces WHERE id >= ?1 AND id < ?1 || 'g' LIMIT 2", (trace_id,))
        return Trace.model_validate_json(rows[0][0]) if len(rows) == 1 else None

    def traces(self, tenant: str, where: TraceFilter = ANY_TRACE) -> Iterator[Trace]:
        """See Store. Read a page at a time, so that no lock is held and memory stays small between traces."""
        conditions, bindings = _trace_conditions(where)
        after = (float("-inf"), "")
        while True:
            rows = self._read(
                "SELECT created_at, id, record FROM traces"
                f" WHERE {' AND '.join(['tenant=:tenant', '(created_at, id) > (:after, :id)', *conditions])} ORDER BY created_at, id LIMIT {PAGE}",
                {**bindings, "tenant": tenant, "after": after[0], "id": after[1]},
            )
            for row in rows:
                yield Trace.model_validate_json(row[2])
            if len(rows) < PAGE:
                return
            after = (rows[-1][0], rows[-1][1])

    def compact(self) -> None:
        """See Store. Raises StorageError while another process reads: its view may still need the old pages."""
        with self._lock:
            try:
                self._connection.execute("VACUUM")
                busy, *_ = next(iter(self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")))
            except apsw.Error as error:
                raise StorageError(f"the store's file could not be rewritten: {error}", "free space, end other commands, then run it again") from error
            if busy:
                raise StorageError("removed, but the store's files still hold the text: another process reads them", "end it, then run the command again")

    def close(self) -> None:
        """See Store."""
        self._connection.close()

    def _migrate(self) -> None:
        """Bring an older file up to date; refuse a newer one."""
        with self._transaction() as connection:
            version = int(connection.pragma("user_version") or 0)
            if version > len(MIGRATIONS):
                raise StorageError(f"the store is of version {version}, this program knows {len(MIGRATIONS)}", "upgrade understudy")
            for migration in MIGRATIONS[version:]:
                migration(connection)
            connection.pragma("user_version", len(MIGRATIONS))

    @contextmanager
    def _transaction(self) -> Iterator[apsw.Connection]:
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                try:
                    yield self._connection
                except BaseException:
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                    raise
                self._connection.execute("COMMIT")
            except apsw.FullError as error:
                raise StorageError("the disk is full; the store is as it was", "free space, then run the command again") from error
            except apsw.Error as error:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise StorageError(f"the store refused a write: {error}", "run the command again; `understudy doctor` checks the store") from error

    def _read(self, sql: str, bindings: tuple[Any, ...] | dict[str, Any]) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                return list(self._connection.execute(sql, bindings))
            except apsw.Error as error:
                raise StorageError(f"the store could not be read: {error}", "run `understudy doctor`") from error

    def _read_among(self, sql: str, ids: Iterable[str], *bindings: str) -> Iterator[tuple[Any, ...]]:
        """The rows of a query over many ids, given to it as JSON in ?1, a batch at a time so that the lock is let go in between."""
        rest = iter(dict.fromkeys(ids))
        while batch := list(islice(rest, BATCH)):
            yield from self._read(sql, (json.dumps(batch), *bindings))


def _lower_case(*texts: Any) -> str:
    return str(texts[0]).lower()


def _trace_conditions(where: TraceFilter) -> tuple[list[str], dict[str, Any]]:
    """SQL conditions and their bindings: every value is bound, none is written into the SQL."""
    score, complete, abstained = "json_extract(record, '$.score')", "json_extract(record, '$.complete')", "json_extract(record, '$.abstained')"
    model = "json_extract(record, '$.model')"
    outcomes = {"answered": f"{complete} AND NOT {abstained}", "abstained": f"{complete} AND {abstained}", "incomplete": f"NOT {complete}"}
    conditions = {
        "source": "source = :source",
        "model": f"({model} = :model OR substr({model}, 1, length(:model) + 1) = :model || '@')",
        "contains": "instr(lower_case(json_extract(record, '$.question')), lower_case(:contains)) > 0",
        "min_score": f"{score} >= :min_score",
        "max_score": f"{score} <= :max_score",
        "since": "created_at >= :since",
        "until": "created_at < :until",
        "complete": f"{complete} = :complete",
        "outcome": f"({outcomes[where.outcome]})" if where.outcome else "",
    }
    bindings = where.model_dump(exclude_none=True)
    return [conditions[name] for name in bindings], bindings
