"""What the gateway's tests share: a scripted model server, and a workspace without documents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.scripted import Endpoint, scripted
from understudy.workspace import Workspace, create_workspace


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    """It answers every prompt alike."""
    with scripted() as made:
        made.reply = lambda _step, _prompt: "It is Paris."
        yield made


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Its gateway takes requests of up to 0.1 MiB."""
    return create_workspace(str(tmp_path / "workspace"), "gateway: {max_body_mib: 0.1}\n")
