"""Experts' answers become traces: retrieval runs for real, quotes are located, the source is `expert`. Traces become chat JSONL."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rag.citations import find_quote, locate
from rag.eval.questions import read_questions
from rag.prompts import ABSTENTION, PROMPT_VERSION, answer_messages, answer_target, plan_messages
from rag.retrieve import Retriever, document_order, open_retriever
from understudy.config import require_file
from understudy.digests import digest_of
from understudy.errors import UnderstudyError
from understudy.progress import Progress
from understudy.records import Chunk, Citation, Message, Passage, Question, Split, Step, StepName, Trace, TraceFilter
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
    """An expert's row that cannot become a trace, or a trace that cannot become a chat row; its message is the reason."""

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


def export_traces(workspace: Workspace, where: TraceFilter) -> dict[str, Any]:
    """Chat JSONL rows of whole traces under `traces`, and under `skipped` those that give none, with the reason."""
    config = workspace.config
    chunks = {chunk.id: chunk for chunk in workspace.store.chunks(config.tenant)}
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    for trace in workspace.store.traces(config.tenant, where):
        try:
            rows += chat_rows(trace, chunks, config.retrieval.k)
        except UnsupportedAnswer as error:
            skipped.append({"trace_id": trace.id, "reason": error.message})
    return {"traces": rows, "skipped": skipped}


def chat_rows(trace: Trace, chunks: dict[str, Chunk], k: int) -> list[dict[str, Any]]:
    """A trace as chat rows. A model's answer comes with the prompt it saw, as the model wrote it.

    An expert saw no prompt: the rows show those that a model would see, for the expert's search query and for the answer.
    `chunks` is the corpus by id, `k` the number of passages of a prompt. Raises UnsupportedAnswer.
    """
    answer = next((step for step in reversed(trace.steps) if step.name == "answer"), None)
    if not trace.complete or answer is None:
        raise UnsupportedAnswer("the trace is incomplete")
    if answer.messages:
        return [_chat_row(trace, answer.name, answer.messages, answer.text)]
    passages = [chunk.text for chunk in shown_chunks(trace, answer.passage_ids, chunks, k)]
    quotes = [" ".join(quote.split()) for quote in trace.quotes]  # a line each, as they are read back
    target = ABSTENTION if trace.abstained else answer_target(quotes, trace.answer)
    plans = [_chat_row(trace, step.name, plan_messages(trace.question), step.text) for step in trace.steps if step.name == "plan" and step.text]
    return [*plans, _chat_row(trace, answer.name, answer_messages(trace.question, passages), target)]


def shown_chunks(trace: Trace, retrieved: list[str], chunks: dict[str, Chunk], k: int) -> list[Chunk]:
    """The k passages that a prompt shows, in its order: those cited, which may be more, then the nearest of those retrieved.

    Raises UnsupportedAnswer where one that is cited is no longer in the corpus.
    """
    cited = list(dict.fromkeys(citation.chunk_id for citation in trace.citations))
    if not chunks.keys() >= set(cited):
        raise UnsupportedAnswer("it cites a passage that is no longer in the corpus")
    others = [chunk_id for chunk_id in retrieved if chunk_id in chunks and chunk_id not in cited]
    return sorted((chunks[chunk_id] for chunk_id in [*cited, *others[: max(0, k - len(cited))]]), key=document_order)


def _chat_row(trace: Trace, task: StepName, asked: list[Message], answered: str) -> dict[str, Any]:
    turns = [*asked, Message(role="assistant", content=answered)]
    return {"messages": [message.model_dump() for message in turns], "task": task, "trace_id": trace.id}
