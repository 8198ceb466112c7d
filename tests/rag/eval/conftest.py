"""A tiny corpus and builders of real records, for every test of rag.eval."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rag.prompts import ABSTENTION
from understudy.files import write_json, write_jsonl
from understudy.records import Chunk, Document, Question, Step, Trace, Usage
from understudy.workspace import Workspace, create_workspace, open_workspace

RUN_MODELS = ("weak-model", "strong@0123456789ab")

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


@pytest.fixture(scope="session")
def made_once() -> list[Path]:
    """Where the session's finished run lies, once it was made."""
    return []


@pytest.fixture
def finished_run(
    made_once: list[Path],
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    ask: Callable[..., Question],
    reply: Callable[..., Trace],
    abstain: Callable[..., Trace],
    corpus: dict[str, Chunk],
) -> Workspace:
    """A workspace with a finished run of RUN_MODELS, `abc123`, on twelve questions about the corpus; on the last two they say the same."""
    if not made_once:
        made = create_workspace(str(tmp_path_factory.mktemp("run") / "workspace"))
        questions = [
            ask(id=f"q{n:02}", question=f"Which of the {n} books?", documents=["library.pdf" if n % 2 else f"d{n}.pdf"], answers=["six books"])
            for n in range(12)
        ]
        weak = [reply(answer=f"Dragons <b>{n}</b> \x1b[31m.", quotes=["no such words here"]) for n in range(10)] + [abstain(), abstain()]
        write_run(made, questions, dict(zip(RUN_MODELS, (weak, [reply(answer="six books") for _ in range(10)] + [abstain(), abstain()]), strict=True)), corpus)
        made.store.close()
        made_once.append(made.root)
    shutil.copytree(made_once[0], tmp_path / "workspace")
    return open_workspace(str(tmp_path / "workspace"))


def write_run(workspace: Workspace, questions: list[Question], traces: dict[str, list[Trace]], corpus: dict[str, Chunk]) -> None:
    """Store the corpus, and write what `evaluate` leaves of these answers."""
    from rag.eval.report import build_report
    from rag.eval.run import traces_file

    for name in dict.fromkeys(chunk.document for chunk in corpus.values()):
        chunks = [chunk for chunk in corpus.values() if chunk.document == name]
        document = Document(
            id=chunks[0].document_id, source_key=name, source=name, title=name, media_type="text/plain", pages=1, text="…", page_starts=[0], ingested_at=0.0
        )
        workspace.store.add_document(document, chunks)
    folder = workspace.reports / "abc123"
    build_report(questions, traces, corpus, folder, k=2, concurrency=1, provenance={}, resamples=200)
    write_json(folder / "run.json", {"models": list(traces)})
    for name, of_model in traces.items():
        rows = [t.model_copy(update={"metadata": {"question_id": q.id}}).model_dump(mode="json") for q, t in zip(questions, of_model, strict=True)]
        write_jsonl(folder / traces_file(name), rows)
