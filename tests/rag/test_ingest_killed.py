"""An ingest that ends anywhere is taken up by the next: the same chunks, vectors and index as one that was not interrupted."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import understudy.files
from rag.embed import Embedder
from rag.ingest import ingest
from rag.retrieve import open_retriever
from tests.conftest import EMBEDDER, MODELS, SAMPLE
from understudy.progress import show_progress
from understudy.store.sqlite import SqliteStore
from understudy.workspace import Workspace, create_workspace, open_workspace

SETTINGS = "ingest: {parse_processes: 1}\n"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Several threads wait for each other where other work has the cores, and a sentence needs one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Killed(BaseException):
    """What nothing catches, as nothing catches a SIGKILL."""


@contextmanager
def killed_at(number: int, patch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Raise at the number-th point where something is about to be written, or has just been; the points passed are listed."""
    points: list[str] = []
    transaction, write_bytes, sync_folder = SqliteStore._transaction, understudy.files.write_bytes, understudy.files.sync_folder

    def point(name: str) -> None:
        points.append(name)
        if len(points) == number:
            raise Killed(name)

    @contextmanager
    def in_transaction(self: SqliteStore) -> Iterator[Any]:
        point("before a transaction")
        with transaction(self) as connection:
            yield connection
            point("before a commit")

    def write(path: Path, content: bytes) -> None:
        point(f"before writing {path.name}")
        write_bytes(path, content)

    def sync(folder: Path) -> None:
        point(f"after a rename in {folder.name}")
        sync_folder(folder)

    with patch.context() as inner:
        inner.setattr(SqliteStore, "_transaction", in_transaction)
        inner.setattr(understudy.files, "write_bytes", write)
        inner.setattr(understudy.files, "sync_folder", sync)
        yield points


def state(workspace: Workspace, embedder: Embedder) -> tuple[list[str], str, dict[str, np.ndarray]]:
    """Chunk ids, live generation, vectors."""
    ids = [chunk.id for chunk in workspace.store.chunks("default")]
    return ids, open_retriever(workspace).generation, workspace.store.embeddings(embedder.fingerprint, ids)


@pytest.mark.parametrize("step", [pytest.param(3, marks=pytest.mark.slow, id="every-third"), pytest.param(17, id="a-few")])
def test_killed_at_a_write_the_next_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    embedder = Embedder(MODELS / EMBEDDER)
    library, origin = tmp_path / "library", tmp_path / "origin"
    library.mkdir()
    for name, text in {"a.txt": "The kiln is fired on Tuesdays.", "b.txt": "The loom stands in the yellow room."}.items():
        (library / name).write_text(text)
    before = create_workspace(str(origin), SETTINGS)
    before.models.symlink_to(MODELS.resolve())
    ingest(before, [library], show_progress, embedder=embedder)
    before.store.close()
    (library / "a.txt").write_text("The kiln is fired on Fridays.")
    (library / "b.txt.meta.yaml").write_text("tags: [craft]")
    (library / "c.txt").write_text("The wheel is free on Sundays.")

    def run(name: str, kill: int) -> tuple[Workspace, list[str]]:
        shutil.copytree(origin, tmp_path / name, symlinks=True)
        workspace = open_workspace(str(tmp_path / name))
        with killed_at(kill, monkeypatch) as points:
            try:
                ingest(workspace, [library], show_progress, embedder=embedder)
            except Killed:
                workspace.store.close()
                workspace = open_workspace(str(tmp_path / name))
        return workspace, points

    whole, points = run("whole", kill=0)
    wanted_ids, wanted_generation, wanted = state(whole, embedder)
    assert len(points) > 10
    for number in range(len(points), 0, -step):
        workspace, _ = run(f"killed-{number}", number)
        assert workspace.store.documents("default")  # readable at once
        ingest(workspace, [library], show_progress, embedder=embedder)
        ids, generation, vectors = state(workspace, embedder)
        assert (ids, generation) == (wanted_ids, wanted_generation), points[number - 1]
        assert all(np.sum(vectors[i] * wanted[i], axis=1).min() >= 0.9999 for i in ids), points[number - 1]
        assert [d.tags for d in workspace.store.documents("default")] == [[], ["craft"], []]
        workspace.store.close()


@pytest.mark.slow
def test_a_killed_process_is_resumed(tmp_path: Path) -> None:
    def start(root: Path) -> subprocess.Popen[bytes]:
        create_workspace(str(root)).store.close()
        (root / "models").symlink_to(MODELS.resolve())
        return subprocess.Popen([sys.executable, "-m", "understudy.cli", "--workspace", str(root), "ingest", str(SAMPLE / "pdf")], stdout=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    embedder = Embedder(MODELS / EMBEDDER)
    wanted_ids, wanted_generation, wanted = state(open_workspace(str(tmp_path / "whole")), embedder)
    for attempt, part in enumerate(("documents", "embeddings", "embeddings")):
        root = tmp_path / f"killed-{attempt}"
        process = start(root)
        workspace = open_workspace(str(root))
        while process.poll() is None and not workspace.store._read(f"SELECT 1 FROM {part} LIMIT 1", ()):  # type: ignore[attr-defined]
            time.sleep(0.01)
        time.sleep(random.uniform(0, 2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        ingest(workspace, [SAMPLE / "pdf"], show_progress, embedder=embedder)
        ids, generation, vectors = state(workspace, embedder)
        assert (ids, generation) == (wanted_ids, wanted_generation)
        assert all(np.sum(vectors[i] * wanted[i], axis=1).min() >= 0.9999 for i in ids)
