"""What the tests of the hosted path share: a strict server, and an account that reaches it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.fireworks.api import Account, Api
from serve.fireworks.datasets import upload
from serve.fireworks.ledger import Ledger
from serve.fireworks.making import Hosted
from serve.fireworks.requests import DataFile, Training, data_files
from tests.serve.fireworks.server import ACCOUNT, BASE, KEY, FireworksServer, fireworks_server
from understudy.patience import Patience
from understudy.progress import SilentProgress
from understudy.workspace import Workspace, create_workspace

HASTY = Patience(seconds=5, attempts=4, first_pause=0.001)
ROW = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]}


@pytest.fixture
def server() -> Iterator[FireworksServer]:
    with fireworks_server() as made:
        made.files = {"adapter_config.json": b"{}", "adapter_model.safetensors": bytes(range(256)) * 400, "training_args.bin": b"\x80\x04."}
        yield made
        assert not made.leaks


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return create_workspace(str(tmp_path / "workspace"))


@pytest.fixture(autouse=True)
def _no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here ends between a write and its being durable; test_commands.py does."""
    monkeypatch.setattr("understudy.files.os.fsync", lambda _: None)


@pytest.fixture
def pauses() -> list[float]:
    """The seconds that were slept."""
    return []


@pytest.fixture
def hosted(server: FireworksServer, workspace: Workspace, pauses: list[float]) -> Iterator[Hosted]:
    with Api(Account(server.url, ACCOUNT, "FIREWORKS_API_KEY"), KEY, HASTY, pauses.append) as api:
        yield Hosted(api, Ledger(workspace, ACCOUNT), lambda _: None, SilentProgress, wait_seconds=5)


@pytest.fixture
def file(tmp_path: Path) -> DataFile:
    return rows_file(tmp_path, 5)


def rows_file(folder: Path, count: int) -> DataFile:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(ROW) + "\n" for _ in range(count)))
    return data_files(path)[0]


@pytest.fixture
def training(hosted: Hosted, file: DataFile) -> Training:
    """Of a dataset that is there."""
    upload(hosted, file, "d1")
    return Training(name="handbooks", dataset=file.id, base_model=BASE, epochs=2, rank=8, learning_rate=1e-4)
