"""Fixtures shared by all tiers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from understudy.digests import digest_of
from understudy.records import Chunk, Citation, Document, Step, Trace
from understudy.workspace import Workspace, create_workspace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
SAMPLE = Path(__file__).parent.parent / "samples" / "ai-governance"


@pytest.fixture()
def workspace(tmp_path: Path) -> Workspace:
    return create_workspace(str(tmp_path / "workspace"))


@pytest.fixture()
def make_document() -> Callable[..., tuple[Document, list[Chunk]]]:
    """A document of paragraphs, one chunk each."""

    def make(source: str, paragraphs: list[str], tenant: str = "default") -> tuple[Document, list[Chunk]]:
        text = "\n\n".join(paragraphs)
        document = Document(
            id=Document.make_id(tenant, text.encode()),
            source_key=f"/{source}",
            source=source,
            title=source,
            media_type="text/plain",
            pages=1,
            text=text,
            page_starts=[0],
            ingested_at=0.0,
            tenant=tenant,
        )
        chunks, start = [], 0
        for ordinal, paragraph in enumerate(paragraphs):
            end = start + len(paragraph)
            chunk_id = Chunk.make_id(document.id, "test", start, end)
            chunks.append(
                Chunk(id=chunk_id, document_id=document.id, document=source, text=paragraph, start=start, end=end, pages=[1], ordinal=ordinal, tenant=tenant)
            )
            start = end + 2
        return document, chunks

    return make


@pytest.fixture()
def make_trace() -> Callable[..., Trace]:
    """An expert's trace: a quote in one chunk, with what was retrieved."""

    def make(question: str, answer: str | None, cited: Chunk | None, quote: str, retrieved: list[Chunk], **changes: object) -> Trace:
        citations = []
        if cited is not None:
            start = cited.start + cited.text.index(quote)
            citations = [
                Citation(
                    chunk_id=cited.id, document_id=cited.document_id, document=cited.document, quote=quote, page=1, start=start, end=start + len(quote)
                )
            ]
        values: dict[str, object] = {
            "id": digest_of(question)[:32],
            "question": question,
            "steps": [Step(name="plan", text="query words"), Step(name="retrieve", passage_ids=[c.id for c in retrieved])],
            "answer": answer or "The documents do not answer this question.",
            "abstained": answer is None,
            "citations": citations,
            "quotes": [quote] if cited else [],
            "score": 1.0,
            "source": "expert",
            "generation": "g",
            "prompt_version": "p",
            "created_at": time.time(),
        }
        return Trace.model_validate(values | changes)

    return make


MODELS = Path(__file__).parent.parent / "workspace" / "models"  # scripts/setup puts the packaged weights there


@pytest.fixture()
def model_workspace(tmp_path: Path) -> Workspace:
    """An empty workspace with the packaged models."""
    made = create_workspace(str(tmp_path / "workspace"))
    made.models.symlink_to(MODELS)
    return made
