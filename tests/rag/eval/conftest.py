"""A tiny corpus and builders of real records, for every test of rag.eval."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rag.prompts import ABSTENTION
from understudy.records import Chunk, Question, Step, Trace, Usage

TEXT = (
    "The reading room opens at nine on weekdays. Visitors may borrow up to six books for three weeks. "
    "Lost cards are replaced at the front desk for a fee of four euro. A member pays 1,200 crowns a year."
)


def cut(document: str, text: str, size: int, step: int) -> dict[str, Chunk]:
    """Overlapping chunks of a text, by id."""
    chunks = [
        Chunk(
            id=f"{document}-{start}",
            document_id=f"id of {document}",
            document=document,
            text=text[start : start + size],
            start=start,
            end=min(len(text), start + size),
            pages=[1],
            ordinal=place,
        )
        for place, start in enumerate(range(0, len(text), step))
    ]
    return {chunk.id: chunk for chunk in chunks}


@pytest.fixture
def corpus() -> dict[str, Chunk]:
    """library.pdf in three chunks that overlap by 20 characters, and other.pdf in one."""
    return cut("library.pdf", TEXT, 100, 80) | cut("other.pdf", "Nothing of interest stands in this file.", 100, 100)


@pytest.fixture
def ask() -> Callable[..., Question]:
    """An answerable question with its quote; every field can be replaced."""

    def build(**fields: Any) -> Question:
        defaults: dict[str, Any] = {
            "id": "q1",
            "question": "How many books may a visitor borrow?",
            "answers": ["Up to six books."],
            "has_answer_key": True,
            "quotes": ["Visitors may borrow up to six books for three weeks."],
            "documents": ["library.pdf"],
            "pages": [1],
        }
        return Question(**(defaults | fields))

    return build


@pytest.fixture
def reply() -> Callable[..., Trace]:
    """A whole run that answers rightly over the library's chunks; every field can be replaced."""

    def build(passages: list[str] | None = None, validation: str = "0.9", **fields: Any) -> Trace:
        shown = ["library.pdf-0", "library.pdf-80"] if passages is None else passages
        usage = Usage(prompt_tokens=100, cached_tokens=40, completion_tokens=10)
        steps = [
            Step(name="plan", text="borrow books", seconds=0.5, usage=usage),
            Step(name="retrieve", passage_ids=shown, seconds=0.25),
            Step(name="answer", text="…", passage_ids=shown, seconds=1.0, usage=usage),
            Step(name="validate", text=validation, passage_ids=shown, seconds=0.25, usage=usage),
        ]
        defaults: dict[str, Any] = {
            "id": "t1",
            "question": "How many books may a visitor borrow?",
            "steps": steps,
            "answer": "A visitor may borrow up to six books.",
            "abstained": False,
            "citations": [],
            "quotes": ["Visitors may borrow up to six books"],
            "score": 0.9,
            "source": "model",
            "model": "base",
            "generation": "g1",
            "prompt_version": "p1",
            "created_at": 0.0,
        }
        return Trace(**(defaults | fields))

    return build


@pytest.fixture
def abstain(reply: Callable[..., Trace]) -> Callable[..., Trace]:
    """A whole run that abstains."""

    def build(**fields: Any) -> Trace:
        return reply(**({"answer": ABSTENTION, "abstained": True, "quotes": [], "score": 0.8} | fields))

    return build
