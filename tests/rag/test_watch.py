"""`ingest --watch` on a real folder: new, changed and deleted files, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import rag.watch
from rag.metadata import Metadata
from rag.watch import touched, watch
from tests.conftest import MODELS
from understudy.errors import UsageError
from understudy.progress import show_progress
from understudy.workspace import Workspace


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rag.watch, "SETTLED_MILLISECONDS", 60)
    monkeypatch.setattr(rag.watch, "IDLE_MILLISECONDS", 60)


@pytest.mark.parametrize("mirror", [False, True])
def test_changes_become_rounds(corpus_workspace: Workspace, tmp_path: Path, mirror: bool) -> None:
    folder, stop = tmp_path / "library", threading.Event()
    folder.mkdir()
    (folder / "a.txt").write_text("The kiln is fired on Tuesdays.")
    rounds: Iterator[dict[str, Any]] = watch(corpus_workspace, folder, Metadata(tags=["w"]), mirror, show_progress, stop)
    assert next(rounds)["documents"]["added"] == 1
    (folder / "deep").mkdir()
    (folder / "deep" / "b.txt").write_text("The loom stands in the yellow room.")
    assert next(rounds)["documents"]["added"] == 1
    (folder / "bad.pdf").write_bytes(b"%PDF-1.7 broken")
    assert "damaged" in next(rounds)["error"]["message"]
    (folder / "a.txt.meta.yaml").write_text("boost: 2")
    assert next(rounds)["documents"]["updated"] == 1
    (folder / "deep" / "b.txt").unlink()
    last = next(rounds)
    sources = [(d.source, d.boost, d.tags) for d in corpus_workspace.store.documents("default")]
    if mirror:
        assert (last["removed"]["sources"], last["gone"], sources) == (["b.txt"], [], [("a.txt", 2.0, ["w"])])
    else:
        assert (last["removed"], last["gone"], len(sources)) == (None, [str(folder / "deep" / "b.txt")], 2)
    for file in folder.iterdir():
        file.unlink() if file.is_file() else file.rmdir()
    last = next(rounds)
    assert last["removed"] is None  # an empty folder may be a disk that is not mounted
    assert str(folder / "a.txt") in last["gone"]
    stop.set()
    assert list(rounds) == []


def test_only_documents_of_the_folder_count(tmp_path: Path) -> None:
    folder = tmp_path / "library"
    (folder / "new").mkdir(parents=True)
    for name in ("a.txt", ".hidden.txt", "b.png", "new/c.md"):
        (folder / name).write_text("x")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    (tmp_path / "secret.txt").write_text("x")
    names = ("a.txt.meta.yaml", ".hidden.txt", "b.png", "new", "link.txt", "gone.txt")
    assert touched(folder, {folder / name for name in names}) == [folder / "a.txt", folder / "new" / "c.md"]


def test_a_file_cannot_be_watched(corpus_workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UsageError, match="not a folder"):
        next(watch(corpus_workspace, tmp_path / "a.txt", Metadata(), False, show_progress))


@pytest.mark.slow
def test_ctrl_c_ends_it_with_130(corpus_workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("The kiln is fired on Tuesdays.")
    command = [sys.executable, "-m", "understudy.cli", "--workspace", str(corpus_workspace.root), "ingest", "--watch", str(tmp_path / "in")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ | {"UNDERSTUDY_TEST_MODELS": str(MODELS)}, text=True)
    deadline = time.monotonic() + 120
    while not corpus_workspace.index.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in complaint
    assert "Traceback" not in complaint
