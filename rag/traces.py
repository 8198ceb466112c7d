"""Experts' answers become traces: retrieval runs for real, quotes are located, the source is `expert`."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rag.citations import find_quote, locate
from rag.eval.questions import read_questions
from rag.prompts import ABSTENTION, PROMPT_VERSION, answer_target
from rag.retrieve import Retriever, open_retriever
from understudy.config import require_file
from understudy.digests import digest_of
from understudy.errors import UnderstudyError
from understudy.progress import Progress
from understudy.records import Citation, Passage, Question, Split, Step, Trace
from understudy.workspace import Workspace

DEPTH = 20  # passages retrieved for an expert's trace: the distractors of training come from them


def import_traces(workspace: Workspace, file: Path, split: Split, progress: Callable[[str, int], Progress]) -> dict[str, Any]:
    """Import a question file as expert traces; the result is the command's JSON.

    Rows without an answer, or whose answer no passage supports, are skipped with the reason. Importing again changes nothing.
    """
    questions = read_questions(require_file(file))
    retriever = open_retriever(workspace)
    skipped: list[dict[str, Any]] = []
    imported = 0
    with progress("importing", len(questions)) as bar:
        for line, question in enumerate(questions, 1):
            try:
                workspace.store.put_trace(expert_trace(question, retriever, split))
                imported += 1
            except UnsupportedAnswer as error:
                skipped.append({"line": line, "id": question.id, "reason": error.message})
            bar.advance()
    return {"imported": imported, "skipped": skipped, "split": split, "generation": retriever.generation}


class UnsupportedAnswer(UnderstudyError):
    """An expert's row that cannot become a trace; its message is the reason."""

    code = "unsupported_answer"


def expert_trace(question: Question, retriever: Retriever, split: Split) -> Trace:
    """One expert's answer over the passages that retrieval really returns. Raises UnsupportedAnswer."""
    if not question.has_answer_key:
        raise UnsupportedAnswer("it has no answer")
    began = time.time()
    passages = retriever.search([question.question, question.query], DEPTH)
    quotes = question.quotes
    if question.answers is not None and not quotes:
        quotes = find_support(question.answers[0], passages)
    citations = _locate_all(quotes, passages, retriever)
    plan = Step(name="plan", text=question.query, parsed={"query": question.query}, model="expert", started_at=began)
    shown = Step(name="retrieve", passage_ids=[p.chunk.id for p in passages], started_at=began, seconds=time.time() - began)
    text = ABSTENTION if question.answers is None else answer_target(quotes, question.answers[0])
    return Trace(
        id=digest_of([retriever.tenant, "expert", question.question, question.answers, quotes])[:32],
        tenant=retriever.tenant,
        question=question.question,
        steps=[*([plan] if question.query else []), shown, Step(name="answer", text=text, model="expert", passage_ids=shown.passage_ids, started_at=began)],
        answer=question.answers[0] if question.answers else ABSTENTION,
        abstained=question.answers is None,
        citations=citations,
        quotes=quotes,
        score=1.0,
        source="expert",
        model="expert",
        generation=retriever.generation,
        prompt_version=PROMPT_VERSION,
        created_at=began,
        metadata={"question_id": question.id, "split": split, "type": question.type, "document": (question.documents or [""])[0]},
    )


def _locate_all(quotes: list[str], passages: list[Passage], retriever: Retriever) -> list[Citation]:
    """Each quote in the passages retrieved, else anywhere in the corpus; raises UnsupportedAnswer where it is nowhere."""
    retrieved = [passage.chunk for passage in passages]
    citations = []
    for quote in quotes:
        found = locate(quote, retrieved, retriever.page_starts) or locate(quote, list(retriever.chunks.values()), retriever.page_starts)
        if found is None:
            raise UnsupportedAnswer(f"the quote is not verbatim in any passage: {quote[:80]!r}")
        citations.append(found)
    return citations


def find_support(answer: str, passages: list[Passage]) -> list[str]:
    """The sentence of the passages that shares most words with an answer that came without quotes; raises UnsupportedAnswer below half."""
    wanted = set(re.findall(r"\w+", answer.lower()))
    best, share = "", 0.0
    for passage in passages:
        for sentence in re.split(r"(?<=[.!?])\s+", passage.chunk.text):
            words = set(re.findall(r"\w+", sentence.lower()))
            overlap = len(wanted & words) / max(1, len(wanted))
            if overlap > share and find_quote(sentence, passage.chunk.text):
                best, share = sentence.strip(), overlap
    if share < 0.5:
        raise UnsupportedAnswer("no retrieved sentence supports the answer, and no quote was given")
    return [best]


def export_traces(workspace: Workspace, source: str | None) -> list[dict[str, Any]]:
    """Chat JSONL rows of whole traces: the last model step's messages and what was answered."""
    rows = []
    for trace in workspace.store.traces(workspace.config.tenant, source):
        answer = next((step for step in reversed(trace.steps) if step.name == "answer"), None)
        if not trace.complete or answer is None:
            continue
        asked = [message.model_dump() for message in answer.messages] or [{"role": "user", "content": trace.question}]
        rows.append({"messages": [*asked, {"role": "assistant", "content": answer.text}], "trace_id": trace.id})
    return rows
