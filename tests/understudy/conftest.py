"""The stores that the conformance suite runs on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from understudy.store import Store, open_store


@pytest.fixture(params=["sqlite", "mongodb"])
def store_url(request: pytest.FixtureRequest) -> str:
    """An empty store of each kind."""
    return "sqlite:///store.db" if request.param == "sqlite" else str(request.getfixturevalue("mongodb_url"))


@pytest.fixture
def store(store_url: str, tmp_path: Path) -> Iterator[Store]:
    """An empty store, opened."""
    opened = open_store(store_url, tmp_path)
    yield opened
    opened.close()
