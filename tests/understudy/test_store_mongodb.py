"""The MongoDB store when things go wrong: writers killed, answers lost, the server gone, logins refused."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pymongo import monitoring

from rag.vector_search import support_of
from tests.mongodb import Proxy, Server, fresh_database, nothing
from tests.understudy.test_store_cache import VECTOR, make_entry
from understudy.cache_records import CacheTotals
from understudy.errors import StorageError, UsageError
from understudy.records import Chunk, Document, Trace
from understudy.store import Store, mongodb, mongodb_traces, open_store
from understudy.store.mongodb import MongoStore
from understudy.store.mongodb_connection import MIGRATIONS

Maker = Callable[..., tuple[Document, list[Chunk]]]
Pair = tuple[Document, list[Chunk]]
WRITES = {"insert", "update", "delete", "findAndModify"}


@pytest.fixture(scope="module")
def standalone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of this module's own, without the write numbers by which a replica set recognises a repeated write."""
    server = Server(tmp_path_factory.mktemp("standalone"), "--standalone")
    yield server
    server.kill()


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[Callable[[str], Server]]:
    """A server of a test's own, with an option; it ends with the test, however that ends."""
    made: list[Server] = []

    def make(option: str) -> Server:
        made.append(Server(tmp_path, option))
        return made[-1]

    yield make
    for server in made:
        server.kill()


@pytest.fixture
def pair(make_document: Maker) -> tuple[Pair, Pair]:
    """A document of three chunks, and one of two that replaces it."""
    return make_document("a.txt", ["old one", "old two", "old three"]), make_document("a.txt", ["new one", "new two"])


def _state(store: Store) -> tuple[object, ...]:
    chunks = store.chunks()
    return store.documents("default"), chunks, sorted(store.embeddings("e", [c.id for c in chunks])), store.cache_entries("default")


def _prepare(store: Store, old: Pair) -> None:
    store.add_document(*old)
    store.put_embeddings("e", {chunk.id: np.ones((2, 4), np.float32) for chunk in old[1]})
    store.put_cache_entry(make_entry(old[1][0]), "e", VECTOR)


class Killer(monitoring.CommandListener):
    """Kills this process at its n-th write: before it is sent, or once it is answered."""

    def __init__(self, number: int, applied: bool) -> None:
        self.number, self.applied = number, applied

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        if event.command_name in WRITES:
            self.number -= 1
            if self.number == 0 and not self.applied:
                os.kill(os.getpid(), signal.SIGKILL)

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        if event.command_name in WRITES and self.number == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def failed(self, event: monitoring.CommandFailedEvent) -> None:
        pass


def _killed_at(number: int, applied: bool, url: str, work: Callable[[Store], object]) -> bool:
    """Do some work in a child process that is killed at its n-th write; whether it got that far."""
    if (child := os.fork()) == 0:
        killer = Killer(10**9, applied)
        monitoring.register(killer)
        store = open_store(url, Path())
        killer.number = number
        work(store)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("applied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_writer_killed_at_any_write_leaves_one_state_or_the_other(
    mongodb_server: str, pair: tuple[Pair, Pair], applied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = pair
    for number in range(1, 50):
        with fresh_database(mongodb_server) as url:
            store = open_store(url, Path())
            assert isinstance(store, MongoStore)
            _prepare(store, old)
            before = _state(store)
            killed = _killed_at(number, applied, url, lambda child: child.add_document(*new))
            assert _state(store) in (before, ([new[0]], new[1], [], []))
            store.add_document(*new)
            assert _state(store) == ([new[0]], new[1], [], [])
            assert store.embeddings("e", [chunk.id for chunk in old[1]]) == {}
            with monkeypatch.context() as later:
                later.setattr(mongodb, "ABANDONED_SECONDS", -1.0)
                store._swept = False
                store._sweep()
            rows = {name: store.connection[name].count_documents({}) for name in ("documents", "chunks", "embeddings", "cache", "revisions")}
            assert rows == {"documents": 1, "chunks": 2, "embeddings": 0, "cache": 0, "revisions": 1}
            store.close()
        if not killed:
            break
    assert number > 6


def test_a_removal_killed_at_any_write_is_done_or_not(mongodb_server: str, pair: tuple[Pair, Pair]) -> None:
    old, _ = pair
    for number in range(1, 50):
        with fresh_database(mongodb_server) as url:
            store = open_store(url, Path())
            _prepare(store, old)
            before = _state(store)
            killed = _killed_at(number, True, url, lambda child: child.remove_document(old[0].id))
            assert _state(store) == ([], [], [], [])
            assert before[0] == [old[0]]
            assert store.embeddings("e", [chunk.id for chunk in old[1]]) == {}
            assert store.cache_vectors("default", "s", "e")[0] == []
            assert store.add_document(*old)
            assert store.chunks() == old[1]
            store.close()
        if not killed:
            break
    assert number > 4


class Refusing:
    """Refuses the n-th write with a server's error, as the answer to the command or to the one write in it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, request: dict[str, Any]) -> dict[str, Any] | None:
        self.number -= next(iter(request), "") in WRITES
        if self.number != 0 or next(iter(request), "") not in WRITES:
            return None
        self.number -= 1
        fault = {"code": 14031, "errmsg": "no space left on device"}
        return {"ok": 0.0, **fault} if self.number % 2 else {"ok": 1.0, "n": 0, "writeErrors": [{"index": 0, **fault}]}


def test_a_full_disk_of_the_server_leaves_one_state_or_the_other_whichever_write_meets_it(local_mongodb: Server, pair: tuple[Pair, Pair]) -> None:
    old, new = pair
    proxy = Proxy(local_mongodb.port)
    failed = 0
    for number in range(1, 50):
        with fresh_database(local_mongodb.url) as url:
            store = open_store(url.replace(str(local_mongodb.port), str(proxy.port)) + "?directConnection=true", Path())
            _prepare(store, old)
            before = _state(store)
            proxy.answer = refusing = Refusing(number)
            try:
                store.add_document(*new)
            except StorageError as error:
                failed += "is full" in error.message
            proxy.answer = lambda _request: None
            assert _state(store) in (before, ([new[0]], new[1], [], []))
            store.add_document(*new)
            assert _state(store) == ([new[0]], new[1], [], [])
            store.close()
        if refusing.number > 0:
            break
    proxy.close()
    assert failed >= 6


class Losing:
    """Loses the answer to the n-th write, after `meanwhile`."""

    def __init__(self, number: int, meanwhile: Callable[[], object] = lambda: None) -> None:
        self.number, self.meanwhile = number, meanwhile

    def __call__(self, command: str) -> bool:
        self.number -= command in WRITES
        if command not in WRITES or self.number != 0:
            return False
        self.meanwhile()
        return True


def test_a_write_whose_answer_is_lost_has_one_effect(standalone: Server, pair: tuple[Pair, Pair], make_trace: Callable[..., Trace]) -> None:
    old, new = pair

    def work(store: Store) -> tuple[object, ...]:
        store.add_document(*old)
        store.put_embeddings("e", {chunk.id: np.ones((2, 4), np.float32) for chunk in old[1]})
        entry = make_entry(old[1][0])
        store.put_cache_entry(entry, "e", VECTOR)
        store.observe_cache(entry.id, 0.9, True)
        store.count_cache_hit(entry.id, 300.0)
        store.count_wrong_hit(entry.id)
        store.put_trace(make_trace("a question?", None, None, "", [], created_at=1.0))
        before = (*_state(store), list(store.traces("default")), store.cache_totals("default"))
        added, removed = store.add_document(*new), store.remove_document(new[0].id)
        return (*before, added, removed, *_state(store))

    def work_losing(number: int) -> tuple[tuple[object, ...], bool]:
        proxy = Proxy(standalone.port)
        with fresh_database(f"mongodb://127.0.0.1:{proxy.port}/?directConnection=true") as url:
            store = open_store(url, Path())
            proxy.lose = losing = Losing(number)
            outcome = work(store)
            proxy.lose = nothing
            store.close()
        proxy.close()
        return outcome, losing.number <= 0

    expected, _ = work_losing(0)
    assert CacheTotals(hits=1, wrong_hits=1, seconds_saved=2.5) in expected
    with ThreadPoolExecutor(8) as threads:  # a driver waits half a second before it looks for a lost server
        outcomes = list(threads.map(work_losing, range(1, 33)))
    assert [outcome for outcome, _ in outcomes] == [expected] * len(outcomes)
    assert sum(lost for _, lost in outcomes) in range(20, len(outcomes)), "every write was reached"


def test_a_commit_whose_answer_is_lost_does_not_undo_the_one_after_it(standalone: Server, pair: tuple[Pair, Pair], make_document: Maker) -> None:
    """Once two writers at the same document had left it without chunks: the first repeated a commit that the second had replaced."""
    old, new = pair
    third = make_document("a.txt", ["third one", "third two"])
    proxy = Proxy(standalone.port)
    with fresh_database(standalone.url) as url:
        other = open_store(url, Path())
        other.add_document(*old)
        store = open_store(url.replace(str(standalone.port), str(proxy.port)) + "?directConnection=true", Path())
        proxy.lose = Losing(3, lambda: other.add_document(*third))  # after the revision and its chunks: the commit
        store.add_document(*new)
        proxy.lose = nothing
        assert _state(other)[:2] == ([third[0]], third[1])
        store.close()
        other.close()
    proxy.close()


@pytest.mark.slow
def test_the_server_may_be_killed_and_come_back(
    make_server: Callable[[str], Server], tmp_path: Path, pair: tuple[Pair, Pair], make_trace: Callable[..., Trace], monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = pair
    monkeypatch.setattr(mongodb_traces, "PAGE", 3)
    server = make_server("--sync-on-commit")
    store = open_store(f"{server.url}/db?serverSelectionTimeoutMS=3000", tmp_path)  # longer than the half second between a driver's looks
    _prepare(store, old)
    for number in range(8):
        store.put_trace(make_trace(f"question {number}?", None, None, "", [], id=f"{number:04x}", created_at=1.0))
    reading = store.traces("default")
    next(reading)
    before = _state(store)
    server.kill()
    with pytest.raises(StorageError, match="no answer from") as caught:
        store.add_document(*new)
    assert "server runs" in caught.value.remedy
    with pytest.raises(StorageError, match="no answer from"):  # and not: no search nodes
        support_of(store)
    server.start()
    assert _state(store) == before
    assert len(list(reading)) == 7
    assert store.add_document(*new)
    assert store.chunks() == new[1]
    store.close()


def test_no_password_is_ever_shown(make_server: Callable[[str], Server], tmp_path: Path) -> None:
    server = make_server("--auth")
    with pytest.raises(StorageError) as caught:
        open_store(f"mongodb://someone:hunter2@127.0.0.1:{server.port}/db", tmp_path)
    server.kill()
    assert "refused the login" in caught.value.message
    assert "hunter2" not in caught.value.message + caught.value.remedy
    with pytest.raises(StorageError) as unreachable:
        open_store(f"mongodb://someone:hunter2@127.0.0.1:{server.port}/db?serverSelectionTimeoutMS=50", tmp_path)
    assert "hunter2" not in unreachable.value.message
    for malformed in ("mongodb://someone:hunter2@:x/db", "mongodb://u:hunter2@h:1/db?tls=perhaps", "mongodb://[hunter2"):
        with pytest.raises(UsageError) as wrong:
            open_store(malformed, tmp_path)
        assert "hunter2" not in wrong.value.message


def test_a_database_of_a_newer_version_is_refused(mongodb_url: str, tmp_path: Path) -> None:
    store = open_store(mongodb_url, tmp_path)
    assert isinstance(store, MongoStore)
    store.connection["meta"].update_one({"_id": "schema"}, {"$set": {"version": len(MIGRATIONS) + 1}})
    store.close()
    with pytest.raises(StorageError, match="version"):
        open_store(mongodb_url, tmp_path)


def test_what_is_durable_unique_and_expires_is_so_on_the_server(mongodb_url: str, tmp_path: Path) -> None:
    store = open_store(f"{mongodb_url}?w=0&readPreference=nearest", tmp_path)
    assert isinstance(store, MongoStore)
    assert store.connection["documents"].write_concern.document == {"w": "majority"}
    assert store.connection["documents"].read_preference.mongos_mode == "primary"
    indexes = store.connection["documents"].index_information()
    assert {tuple(key for key, _ in index["key"]) for index in indexes.values() if index.get("unique")} == {("id",), ("tenant", "source_key")}
    expiring = [index for index in store.connection["cache"].index_information().values() if "expireAfterSeconds" in index]
    assert [(index["key"], index["expireAfterSeconds"]) for index in expiring] == [([("expires", 1)], 0)]
    store.close()


def test_two_writers_of_a_documents_chunks_both_have_their_way(standalone: Server, pair: tuple[Pair, Pair]) -> None:
    (document, chunks), _ = pair
    proxy = Proxy(standalone.port)
    with fresh_database(standalone.url) as url:
        other = open_store(url, Path())
        other.add_document(document, chunks)
        added = [chunks[0].model_copy(update={"id": f"added {n}", "ordinal": 10 + n}) for n in range(2)]
        store = open_store(url.replace(str(standalone.port), str(proxy.port)) + "?directConnection=true", Path())
        proxy.lose = Losing(2, lambda: other.add_chunks([added[1]]))  # after the revision and its chunks, before the commit
        store.add_chunks([added[0]])
        proxy.lose = nothing
        assert other.chunks() == [*chunks, *added]
        store.close()
        other.close()
    proxy.close()


def test_compacting_changes_no_record_whether_the_server_can_or_not(mongodb_url: str, tmp_path: Path, pair: tuple[Pair, Pair]) -> None:
    store = open_store(mongodb_url, tmp_path)
    assert isinstance(store, MongoStore)
    _prepare(store, pair[0])
    before = _state(store)
    with suppress(StorageError):  # secantusdb cannot
        store.compact()
    assert _state(store) == before
    store.close()


def test_a_record_that_is_too_large_is_refused(mongodb_url: str, tmp_path: Path, make_document: Maker) -> None:
    store = open_store(mongodb_url, tmp_path)
    document, chunks = make_document("a.txt", ["words"])
    with pytest.raises(StorageError, match="16 MiB"):
        store.add_document(document.model_copy(update={"text": "x" * (17 << 20)}), chunks)
    assert store.documents("default") == store.chunks() == []
    store.close()


def test_a_document_that_lost_chunks_is_named(mongodb_url: str, tmp_path: Path, pair: tuple[Pair, Pair]) -> None:
    store = open_store(mongodb_url, tmp_path)
    assert isinstance(store, MongoStore)
    store.add_document(*pair[0])
    store.connection["chunks"].delete_one({"ordinal": 1})
    with pytest.raises(StorageError, match="lost chunks"):
        store.chunks()
    store.close()
