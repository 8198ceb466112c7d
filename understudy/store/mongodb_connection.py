"""The connection to MongoDB: one client, its errors translated, its indexes made once."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from bson.binary import Binary, BinaryVectorDtype
from bson.errors import BSONError
from pymongo import ASCENDING, MongoClient, ReplaceOne, uri_parser
from pymongo.collection import Collection
from pymongo.database import Database
from pymongo.errors import (
    AutoReconnect,
    BulkWriteError,
    ConfigurationError,
    DocumentTooLarge,
    DuplicateKeyError,
    InvalidURI,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
)

from understudy.errors import StorageError, UsageError
from understudy.store.urls import shown_url

T = TypeVar("T")
Row = dict[str, Any]
Mongo = Database[Row]

DEFAULT_DATABASE = "understudy"
BATCH = 1000  # rows of one request
TRIES = 5  # of one request whose connection breaks
OPTIONS: dict[str, Any] = {"serverSelectionTimeoutMS": 10_000, "connectTimeoutMS": 10_000, "socketTimeoutMS": 120_000, "appname": "understudy"}
DUPLICATE_KEY, AUTHENTICATION_FAILED, UNAUTHORIZED, OUT_OF_DISK = 11000, 18, 13, 14031


def _create(database: Mongo) -> None:
    def index(collection: str, *keys: str, **options: Any) -> None:
        database[collection].create_index([(key, ASCENDING) for key in keys], **options)

    index("documents", "id", unique=True)
    index("documents", "tenant", "source_key", unique=True)
    index("documents", "tenant", "source", "id")
    index("documents", "revision")
    index("chunks", "revision", "ordinal")
    index("chunks", "chunk_id")
    index("chunks", "tenant")
    index("embeddings", "fingerprint", "chunk_id")
    index("embeddings", "document_id")
    index("chunks", "generations", sparse=True)  # marked only where the server's search nodes are used
    index("embeddings", "generations", sparse=True)
    index("traces", "tenant", "created_at", "_id")
    index("cache", "tenant", "scope", "created_at", "_id")
    index("cache", "tenant", "used_at", "_id")
    index("cache", "document_ids")
    index("cache", "expires", expireAfterSeconds=0)


MIGRATIONS: list[Callable[[Mongo], None]] = [_create]  # numbered by place, applied once, in order; each may be repeated


class Connection:
    """A database, and requests to it that outlive a broken connection."""

    def __init__(self, url: str) -> None:
        """Connect and bring the database up to date. Raises UsageError for a malformed URL, StorageError where there is no server."""
        self.url = url
        try:
            parsed = uri_parser.parse_uri(url, connect_timeout=10)
            options = {name: value for name, value in OPTIONS.items() if name.lower() not in {key.lower() for key in parsed["options"]}}
            # acknowledged by a majority and read from the primary, whatever the URL says: nothing acknowledged is lost or read stale
            self.client: MongoClient[Row] = MongoClient(url, w="majority", readConcernLevel="majority", readPreference="primary", **options)
        except (InvalidURI, ConfigurationError, ValueError) as error:
            fault = "is malformed, or DNS does not know the host" if url.startswith("mongodb+srv") else "is malformed"
            raise UsageError(
                f"the store's URL {shown_url(url)} {fault}", "write for example mongodb://host:27017/database; escape a password as %XX"
            ) from error
        self.database: Mongo = self.client[parsed["database"] or DEFAULT_DATABASE]
        self._migrate()

    def __getitem__(self, name: str) -> Collection[Row]:
        return self.database[name]

    def run(self, request: Callable[[], T]) -> T:
        """The outcome of a request that may be repeated: a connection that breaks is tried anew. Raises StorageError."""
        for attempt in range(1, TRIES + 1):
            try:
                return request()
            except ServerSelectionTimeoutError as error:  # has waited long enough
                raise self._translated(error) from error
            except (AutoReconnect, BulkWriteError, DuplicateKeyError) as error:
                if isinstance(error, DuplicateKeyError) and not isinstance(error, BulkWriteError):
                    raise  # the caller's to resolve
                if attempt == TRIES or not _passing(error):
                    raise self._translated(error) from error
                time.sleep(random.uniform(0, 0.1 * 2**attempt))
            except (PyMongoError, BSONError, OverflowError) as error:
                raise self._translated(error) from error
        raise AssertionError("unreachable")

    def find(self, collection: str, where: Row, fields: Sequence[str] | None = None, **options: Any) -> list[Row]:
        """The rows that meet a query, whole or only some fields of them."""
        projection = dict.fromkeys(fields, True) if fields else None
        return self.run(lambda: list(self[collection].find(where, projection, **options)))

    def find_among(self, collection: str, key: str, values: Sequence[str], where: Row | None = None, fields: Sequence[str] | None = None) -> list[Row]:
        """The rows whose `key` is one of many values, asked for in batches."""
        return [row for batch in batched(values) for row in self.find(collection, {**(where or {}), key: {"$in": batch}}, fields)]

    def write(self, collection: str, requests: Sequence[Any]) -> None:
        """Bulk writes that may be repeated, in no order."""
        for batch in batched(requests):
            self.run(lambda batch=batch: self[collection].bulk_write(batch, ordered=False))  # type: ignore[misc]

    def delete(self, collection: str, where: Row) -> int:
        """Delete the rows that meet a query; returns how many the last try deleted."""
        return self.run(lambda: self[collection].delete_many(where).deleted_count)

    def close(self) -> None:
        """Let the sockets go."""
        self.client.close()

    def _migrate(self) -> None:
        row = self.run(lambda: self["meta"].find_one({"_id": "schema"}))
        version = int(row["version"]) if row else 0
        if version > len(MIGRATIONS):
            raise StorageError(f"the store is of version {version}, this program knows {len(MIGRATIONS)}", "upgrade understudy")
        for number, migration in enumerate(MIGRATIONS[version:], version + 1):
            self.run(lambda migration=migration: migration(self.database))  # type: ignore[misc]
            with contextlib.suppress(DuplicateKeyError):  # another process was faster
                self.run(lambda number=number: self["meta"].update_one({"_id": "schema"}, {"$max": {"version": number}}, upsert=True))  # type: ignore[misc]

    def _translated(self, error: Exception) -> StorageError:
        """A driver's error as ours; the driver's texts name hosts and fields, never credentials."""
        shown = shown_url(self.url)
        code, said = _cause(error)
        if isinstance(error, AutoReconnect):
            return StorageError(f"no answer from {shown}: {said}", "check that the MongoDB server runs and can be reached, then run the command again")
        if code in (AUTHENTICATION_FAILED, UNAUTHORIZED):
            return StorageError(
                f"{shown} refused the login or the right to do this", "check user, password and roles in UNDERSTUDY_STORE (add ?authSource=… if needed)"
            )
        if code == OUT_OF_DISK:
            return StorageError(f"the disk of {shown} is full", "free space on the server, then run the command again")
        if isinstance(error, DocumentTooLarge):
            return StorageError("a record is larger than the 16 MiB that MongoDB keeps in one", "split the document, or use a sqlite:/// store")
        return StorageError(f"{shown} refused: {said}", "run the command again; `understudy doctor` checks the store")


def equal(**values: Any) -> Row:
    """A query for equality: a value is compared, never read as operators."""
    return {name: {"$eq": value} for name, value in values.items()}


def put(row: Row) -> ReplaceOne[Row]:
    """The write that leaves exactly this row under its id, however often it is repeated."""
    return ReplaceOne({"_id": row["_id"]}, row, upsert=True)


def packed(vector: np.ndarray) -> Binary:
    """A vector [dim] as BSON keeps it: float32, subtype 9."""
    return Binary.from_vector(np.ascontiguousarray(vector, dtype="<f4"), BinaryVectorDtype.FLOAT32)


def unpacked(vector: Binary) -> np.ndarray:
    """The float32 vector [dim] of `packed`."""
    return np.asarray(vector.as_vector(return_numpy=True).data)


def batched(items: Sequence[T], size: int = BATCH) -> Iterator[list[T]]:
    """Lists of up to `size` items."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def _passing(error: Exception) -> bool:
    """Whether trying again may help: the connection broke, or two upserts of one row met."""
    if not isinstance(error, BulkWriteError):
        return isinstance(error, AutoReconnect)
    return all(fault.get("code") == DUPLICATE_KEY for fault in error.details.get("writeErrors", [{}]))


def _cause(error: Exception) -> tuple[int | None, str]:
    """The server's error code, where it gave one, and what happened in one line."""
    said, code = str(error), error.code if isinstance(error, OperationFailure) else None
    if isinstance(error, BulkWriteError) and (faults := [*error.details.get("writeErrors", []), *error.details.get("writeConcernErrors", [])]):
        said, code = str(faults[0].get("errmsg")), faults[0].get("code")
    return code, said.partition(", full error")[0].partition(", Timeout:")[0].split("\n")[0][:300]
