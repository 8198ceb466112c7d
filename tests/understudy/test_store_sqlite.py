"""The SQLite store: versions, and a disk that fails at any write."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import apsw
import numpy as np
import pytest

from tests.understudy.test_store_cache import VECTOR, make_entry
from understudy.errors import StorageError
from understudy.records import Chunk, Document
from understudy.store import Store, open_store
from understudy.store.sqlite import BATCH, MIGRATIONS, SqliteStore

Maker = Callable[..., tuple[Document, list[Chunk]]]


class FaultyDisk(apsw.VFS):
    """A disk on which the n-th write, truncation or sync meets a fault; the default of SQLite while it is there."""

    def __init__(self) -> None:
        self.left, self.seen, self.fault = -1, 0, self.fail
        super().__init__("faulty", "unix", makedefault=True)

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> apsw.VFSFile:
        return FaultyFile(self, name, flags)

    def arm(self, number: int) -> None:
        """Let the fault come at the n-th operation from now on; -1: never."""
        self.left, self.seen = number, 0

    def count(self) -> None:
        self.seen += 1
        self.left -= 1
        if self.left == 0:
            self.fault()

    def fail(self) -> None:
        raise (apsw.FullError, apsw.IOError)[self.seen % 2]("injected")

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class FaultyFile(apsw.VFSFile):
    def __init__(self, disk: FaultyDisk, name: str | apsw.URIFilename | None, flags: list[int]) -> None:
        self.disk = disk
        super().__init__("unix", name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:
        self.disk.count()
        super().xWrite(data, offset)

    def xTruncate(self, newsize: int) -> None:
        self.disk.count()
        super().xTruncate(newsize)

    def xSync(self, flags: int) -> None:  # noqa: ARG002 - SQLite's signature
        self.disk.count()  # and no more: the machine stays up


@pytest.fixture
def disk() -> Iterator[FaultyDisk]:
    faulty = FaultyDisk()
    yield faulty
    faulty.unregister()


@pytest.fixture
def update(make_document: Maker) -> tuple[tuple[Document, list[Chunk]], tuple[Document, list[Chunk]]]:
    """A document, and what replaces it: several pages of the database each."""
    old = make_document("a.txt", [f"old words {n} " * 100 for n in range(3)])
    return old, make_document("a.txt", [f"new words {n} " * 100 for n in range(4)])


def _state(store: Store) -> tuple[object, ...]:
    chunks = store.chunks()
    return store.documents("default"), chunks, sorted(store.embeddings("e", [c.id for c in chunks])), store.cache_entries("default")


def _prepare(root: Path, old: tuple[Document, list[Chunk]]) -> None:
    store = open_store("sqlite:///store.db", root)
    store.add_document(*old)
    store.put_embeddings("e", {chunk.id: np.ones((1, 64), np.float32) for chunk in old[1]})
    store.put_cache_entry(make_entry(old[1][0]), "e", VECTOR)
    store.close()


def _added(store: Store, new: tuple[Document, list[Chunk]]) -> bool:
    try:
        return store.add_document(*new)
    except StorageError:
        return False


def test_a_write_that_fails_leaves_the_state_before_whichever_it_is(tmp_path: Path, disk: FaultyDisk, update: tuple) -> None:  # type: ignore[type-arg]
    old, new = update
    _prepare(tmp_path, old)
    failed = 0
    for number in range(1, 200):
        root = tmp_path / str(number)
        root.mkdir()
        shutil.copy(tmp_path / "store.db", root)
        store = open_store("sqlite:///store.db", root)
        before = _state(store)
        disk.arm(number)
        added = _added(store, new)
        disk.arm(-1)
        if not added:
            failed += 1
            assert _state(store) == before
            assert _state(open_store("sqlite:///store.db", root)) == before
            assert store.add_document(*new)  # and the disk has room again
        assert _state(store) == ([new[0]], new[1], [], [])
        store.close()
        if failed < number:
            break
    assert failed >= 5


@pytest.mark.slow
def test_a_process_killed_at_any_write_leaves_one_state_or_the_other(tmp_path: Path, disk: FaultyDisk, update: tuple) -> None:  # type: ignore[type-arg]
    old, new = update
    disk.fault = disk.kill
    _prepare(tmp_path, old)
    outcomes = []
    for number in range(1, 200):
        root = tmp_path / str(number)
        root.mkdir()
        shutil.copy(tmp_path / "store.db", root)
        if (child := os.fork()) == 0:
            store = open_store("sqlite:///store.db", root)
            disk.arm(number)
            store.add_document(*new)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        store = open_store("sqlite:///store.db", root)
        assert store.documents("default") in ([old[0]], [new[0]])
        assert store.chunks() in (old[1], new[1])
        assert store.documents("default")[0].id == store.chunks()[0].document_id
        store.add_document(*new)
        assert _state(store) == ([new[0]], new[1], [], [])
        store.close()
        outcomes.append(os.WIFSIGNALED(status))
        if not outcomes[-1]:
            break
    assert sum(outcomes) >= 5


def test_a_full_disk_is_named(tmp_path: Path, make_document: Maker) -> None:
    store = open_store("sqlite:///store.db", tmp_path)
    store.add_document(*make_document("a.txt", ["small"]))
    assert isinstance(store, SqliteStore)
    store._connection.pragma("max_page_count", store._connection.pragma("page_count"))  # SQLite's own way to run out of room
    with pytest.raises(StorageError, match="disk is full"):
        store.add_document(*make_document("b.txt", ["x" * 500_000]))
    assert [d.source for d in store.documents("default")] == ["a.txt"]
    store.close()


def test_many_ids_are_looked_up_together(tmp_path: Path, make_document: Maker) -> None:
    store = open_store("sqlite:///store.db", tmp_path)
    document, chunks = make_document("a.txt", [f"words {n}" for n in range(BATCH + 1)])
    store.add_document(document, chunks)
    store.put_embeddings("e", {chunk.id: np.full((1, 2), n, np.float32) for n, chunk in enumerate(chunks)})
    statements: list[str] = []
    assert isinstance(store, SqliteStore)
    store._connection.trace_v2(apsw.SQLITE_TRACE_STMT, lambda event: statements.append(event["sql"]))
    ids = [chunk.id for chunk in chunks]
    assert store.chunks_by_id(ids) == {chunk.id: chunk for chunk in chunks}
    assert {chunk_id: vector[0, 0] for chunk_id, vector in store.embeddings("e", ids).items()} == {c.id: n for n, c in enumerate(chunks)}
    assert len(statements) == 4
    store.close()


def test_threads_with_stores_of_their_own_lose_nothing(tmp_path: Path, make_document: Maker) -> None:
    def write(number: int) -> None:
        mine = open_store("sqlite:///store.db", tmp_path)
        for part in range(5):
            mine.add_document(*make_document(f"{number}-{part}.txt", [f"words of {number} and {part}"]))
        mine.close()

    threads = [threading.Thread(target=write, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(open_store("sqlite:///store.db", tmp_path).documents("default")) == 30


def test_a_store_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    open_store("sqlite:///store.db", tmp_path).close()
    connection = apsw.Connection(str(tmp_path / "store.db"))
    connection.pragma("user_version", len(MIGRATIONS) + 1)
    connection.close()
    with pytest.raises(StorageError, match="version"):
        open_store("sqlite:///store.db", tmp_path)


def test_a_store_from_before_the_cache_is_brought_up_to_date(tmp_path: Path, make_document: Maker) -> None:
    connection = apsw.Connection(str(tmp_path / "store.db"))
    MIGRATIONS[0](connection)
    connection.pragma("user_version", 1)
    connection.close()
    store = open_store("sqlite:///store.db", tmp_path)
    document, chunks = make_document("kiln.txt", ["the kiln is fired on Tuesdays"])
    store.add_document(document, chunks)
    assert store.put_cache_entry(make_entry(chunks[0]), "e", VECTOR)
    store.close()
