"""A small corpus, opened once, and scripted endpoints."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rag.retrieve import Retriever, open_retriever
from tests.scripted import Endpoint, scripted
from understudy.workspace import Workspace


@pytest.fixture(scope="session")
def retriever(notes_workspace: Workspace) -> Retriever:
    """Over the four notes."""
    return open_retriever(notes_workspace)


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with scripted() as made:
        yield made
