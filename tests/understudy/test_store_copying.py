"""Copies between stores and backups: everything arrives, whatever the two databases are, and whatever interrupts."""

from __future__ import annotations

import os
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.mongodb import fresh_database
from tests.understudy.test_store_cache import VECTOR, make_entry
from understudy.cli import main
from understudy.errors import NotFoundError, StorageError, UsageError
from understudy.progress import Progress
from understudy.records import Chunk, Document, Step, Trace
from understudy.store import Store, open_store
from understudy.store.archive import back_up, restore
from understudy.store.copying import COLLECTIONS, copy_store, digest_store

Maker = Callable[..., tuple[Document, list[Chunk]]]
TENANTS = ("a", "b")


@pytest.fixture
def fill(make_document: Maker, make_trace: Callable[..., Trace]) -> Callable[[Store], None]:
    """Puts something of everything into a store, for two tenants and two embedders."""

    def put(store: Store) -> None:
        for number, tenant in enumerate(TENANTS):
            for part in range(3):
                document, chunks = make_document(f"{part}.txt", [f"words {part} of {tenant}", f"ärger 💥 {part}", "the same words"], tenant=tenant)
                store.add_document(document, chunks)
                for embedder, windows in (("e1", 1), ("e2", 3)):
                    generator = np.random.default_rng(number * 10 + part)
                    store.put_embeddings(embedder, {c.id: generator.normal(size=(windows, 8)).astype(np.float32) for c in chunks[: 2 + part % 2]})
                step = Step(name="plan", parsed={"$where": {"a.b": [1, 2.5, None]}}, mean_logprob=-0.1)
                store.put_trace(make_trace(f"question {part} of {tenant}?", None, None, "", [], tenant=tenant, steps=[step], created_at=float(part)))
                entry = make_entry(chunks[0], f"cached {part} of {tenant}?", tenant=tenant)
                store.put_cache_entry(entry, "e1", VECTOR * np.float32(part + 0.1))
                store.observe_cache(entry.id, 0.9, part > 1)
                store.count_cache_hit(entry.id, 200.0)

    return put


@pytest.fixture
def source(tmp_path: Path, fill: Callable[[Store], None]) -> Store:
    store = open_store("sqlite:///source.db", tmp_path)
    fill(store)
    return store


def _copied_by_way_of(source: Store, url: str, root: Path) -> None:
    """There and back again: the records are the same, not only their digests."""
    middle, back = open_store(url, root), open_store("sqlite:///back.db", root)
    digests = copy_store(source, middle, Progress)
    assert copy_store(source, middle, Progress) == digests, "a second time changes nothing"
    assert copy_store(middle, back, Progress) == digests
    assert {name: digests[name]["count"] for name in COLLECTIONS} == {
        "documents": 6, "chunks": 18, "embeddings": 28, "traces": 6, "cache": 6, "cache totals": 2,
    }  # fmt: skip
    for tenant in TENANTS:
        assert back.documents(tenant) == source.documents(tenant) == middle.documents(tenant)
        assert back.chunks(tenant) == source.chunks(tenant) == middle.chunks(tenant)
        assert list(back.traces(tenant)) == list(source.traces(tenant)) == list(middle.traces(tenant))
        assert back.cache_entries(tenant) == source.cache_entries(tenant) == middle.cache_entries(tenant)
        assert back.cache_totals(tenant) == source.cache_totals(tenant) == middle.cache_totals(tenant)
    middle.close()
    back.close()


def test_everything_arrives(source: Store, store_url: str, tmp_path: Path) -> None:
    _copied_by_way_of(source, store_url, tmp_path)


@pytest.mark.slow
def test_a_copy_killed_anywhere_is_finished_by_the_next(source: Store, mongodb_server: str, tmp_path: Path) -> None:
    from pymongo import monitoring

    from tests.understudy.test_store_mongodb import Killer

    expected = digest_store(source, Progress)
    source.close()
    for number in (2, 13, 55, 144):
        with fresh_database(mongodb_server) as url:
            if (child := os.fork()) == 0:
                monitoring.register(Killer(number, applied=True))
                copy_store(open_store("sqlite:///source.db", tmp_path), open_store(url, tmp_path), Progress)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            again = open_store("sqlite:///source.db", tmp_path)
            target = open_store(url, tmp_path)
            assert copy_store(again, target, Progress) == expected
            target.close()
            again.close()
        if not os.WIFSIGNALED(status):
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert number > 50


def test_records_of_others_are_never_overwritten(source: Store, store_url: str, tmp_path: Path, make_document: Maker) -> None:
    target = open_store(store_url, tmp_path)
    target.add_document(*make_document("mine.txt", ["words of my own"], tenant="a"))
    with pytest.raises(UsageError, match="does not"):
        copy_store(source, target, Progress)
    assert len(target.documents("a")) == 1
    assert target.documents("b") == []
    target.close()


def test_a_changed_record_changes_its_digest_alone(source: Store) -> None:
    before = digest_store(source, Progress)
    chunk = source.chunks("a")[0]
    source.put_embeddings("e1", {chunk.id: source.embeddings("e1", [chunk.id])[chunk.id] * np.float32(1 + 2**-20)})
    after = digest_store(source, Progress)
    assert [name for name in COLLECTIONS if before[name] != after[name]] == ["embeddings"]


def test_a_backup_restores_everything_into_either_store(source: Store, store_url: str, tmp_path: Path) -> None:
    digests = back_up(source, tmp_path / "b.zip", Progress)
    (tmp_path / "other").mkdir()
    with pytest.raises(UsageError, match="there already"):
        back_up(source, tmp_path / "b.zip", Progress)
    assert restore(tmp_path / "b.zip", store_url, tmp_path / "other", Progress) == digests == digest_store(source, Progress)
    restored = open_store(store_url, tmp_path / "other")
    assert digest_store(restored, Progress) == digests
    restored.close()
    assert not [path for path in tmp_path.rglob(".*") if path.is_dir()], "no scratch is left"


def test_a_store_that_holds_records_is_not_restored_over(source: Store, tmp_path: Path, make_document: Maker) -> None:
    back_up(source, tmp_path / "b.zip", Progress)
    held = open_store("sqlite:///held.db", tmp_path)
    held.add_document(*make_document("mine.txt", ["words of my own"]))
    held.close()
    with pytest.raises(UsageError):
        restore(tmp_path / "b.zip", "sqlite:///held.db", tmp_path, Progress)
    assert open_store("sqlite:///held.db", tmp_path).tenants() == ["default"]


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-200]),
        lambda path: path.write_bytes(b""),
        *(lambda path, part=part: _flip(path, int(path.stat().st_size * part)) for part in (0.2, 0.4, 0.6, 0.8)),
        lambda path: _rewrite(path, "manifest.json", lambda text: text.replace(b'"count": 6', b'"count": 7')),
        lambda path: _rewrite(path, "store.db", lambda text: text[:-4096]),
    ],
)
def test_a_damaged_backup_is_refused_and_nothing_restored(source: Store, tmp_path: Path, damage: Callable[[Path], object]) -> None:
    back_up(source, tmp_path / "b.zip", Progress)
    damage(tmp_path / "b.zip")
    with pytest.raises(StorageError):
        restore(tmp_path / "b.zip", "sqlite:///new.db", tmp_path, Progress)
    assert not (tmp_path / "new.db").exists() or open_store("sqlite:///new.db", tmp_path).tenants() == []


def _rewrite(path: Path, member: str, change: Callable[[bytes], bytes]) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, change(content) if name == member else content)


def test_a_missing_backup_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        restore(tmp_path / "none.zip", "sqlite:///new.db", tmp_path, Progress)


def test_the_commands_copy_and_never_show_a_password(
    source: Store, mongodb_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source.close()
    (tmp_path / "understudy.yaml").write_text("store: sqlite:///source.db\n")

    def understudy(*arguments: str) -> tuple[int, str]:
        code = main(["--workspace", str(tmp_path), "--json", *arguments])
        return code, "".join(capsys.readouterr())

    monkeypatch.setenv("TARGET", mongodb_url)
    code, shown = understudy("store", "copy", "sqlite:///source.db", "env:TARGET")
    assert code == 0, shown
    assert '"source": "sqlite:///source.db"' in shown
    assert '"target": "env:TARGET"' in shown
    code, shown = understudy("store", "copy", "sqlite:///source.db", "mongodb://me:hunter2@localhost/db")
    assert code == 2
    assert "hunter2" not in shown
    assert understudy("store", "copy", "sqlite:///none.db", "sqlite:///new.db")[0] == 1
    assert understudy("store", "copy", "sqlite:///source.db", "sqlite:///source.db")[0] == 2
    assert sorted(path.name for path in tmp_path.glob("*.db")) == ["source.db"]
    assert understudy("store", "backup", str(tmp_path / "b.zip"))[0] == 0
    assert understudy("store", "restore", str(tmp_path / "b.zip"))[0] == 2
    assert understudy("store", "restore", str(tmp_path / "b.zip"), "--set", "store=sqlite:///new.db")[0] == 0
    monkeypatch.setenv("UNDERSTUDY_STORE", mongodb_url.replace("mongodb://", "mongodb://me:hunter2@", 1))
    code, shown = understudy("config", "show")
    assert code == 0
    assert "mongodb://***@" in shown
    assert "hunter2" not in shown
