"""What comes into the store as a trace, and goes out as chat JSONL.

Experts' answers become traces over real retrieval, their quotes located; other systems' calls are recovered by rag/recover.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any

from rag.citations import locate
from rag.eval.labels import HeldOut
from rag.eval.questions import read_questions
from rag.foreign import Format, collection_rows, detect_format, is_collection, read_call, rows_of
from rag.prompts import ABSTENTION, PROMPT_VERSION, answer_messages, answer_target, plan_messages
from rag.recover import DEPTH, Prompts, best_support, imported_trace, recover
from rag.redaction import redactor_of
from rag.retrieve import Retriever, document_order, open_retriever
from rag.telemetry import send_trace
from understudy.digests import digest_of
from understudy.errors import StorageError, UnderstudyError
from understudy.files import require_file
from understudy.progress import Progress
from understudy.records import Chunk, Citation, Message, Passage, Question, Split, Step, StepName, Trace, TraceFilter
from understudy.workspace import Workspace


def keep_trace(workspace: Workspace, trace: Trace) -> None:
    """Store a finished trace, the one way in: redacted first; the spans of what ran here go out after."""
    kept = redactor_of(workspace.config.redaction).trace(trace)
    workspace.store.put_trace(kept)
    if kept.source == "model":
        send_trace(workspace.config.telemetry, kept)


def import_traces(
    workspace: Workspace, source: Path | str, split: Split, progress: Callable[[str, int], Progress], kind: Format | None = None
) -> dict[str, Any]:
    """Import experts' answers or another system's calls; the result is the command's JSON.

    `source` is a file, or the URL of a MongoDB collection; its format is seen from its first row unless `kind` says it.
    Rows that cannot become a trace are skipped with the reason. Importing again changes nothing.
    """
    rows = collection_rows(str(source)) if is_collection(str(source)) else rows_of(require_file(Path(source)))
    first = next(rows, None)
    if first is None:
        raise StorageError("there is nothing in it to import", "give a question file, chat JSONL, or a log of calls")
    chosen = kind or detect_format(first[1])
    retriever = open_retriever(workspace)
    if chosen == "questions":
        result = _import_questions(workspace, read_questions(Path(source)), retriever, split, progress)
    else:
        result = _import_calls(workspace, chain([first], rows), chosen, retriever, split, progress)
    return {**result, "format": chosen, "split": split, "generation": retriever.generation}


def _import_questions(
    workspace: Workspace, questions: list[Question], retriever: Retriever, split: Split, progress: Callable[[str, int], Progress]
) -> dict[str, Any]:
    skipped: list[dict[str, Any]] = []
    held_out = HeldOut(workspace.reports, workspace.config.tenant)
    with progress("importing", len(questions)) as bar:
        for line, question in enumerate(questions, 1):
            try:
                if question.question in held_out:
                    raise UnsupportedAnswer(held_out.reason)
                keep_trace(workspace, expert_trace(question, retriever, split))
            except UnsupportedAnswer as error:
                skipped.append({"line": line, "id": question.id, "reason": error.message})
            bar.advance()
    return {"imported": len(questions) - len(skipped), "unverified": 0, "skipped": skipped}


def _import_calls(
    workspace: Workspace,
    rows: Iterable[tuple[int, dict[str, Any]]],
    kind: Format,
    retriever: Retriever,
    split: Split,
    progress: Callable[[str, int], Progress],
) -> dict[str, Any]:
    calls, skipped = [], []
    for line, row in rows:
        try:
            calls.append(read_call(row, line, kind))
        except ValueError as error:
            skipped.append((line, str(error)))
    found, left = recover(calls, Prompts(retriever.chunks.values()))
    unverified = 0
    with progress("importing", len(found)) as bar:
        for recovered in found:
            trace = imported_trace(recovered, retriever, split)
            keep_trace(workspace, trace)
            unverified += "unverified" in trace.metadata
            bar.advance()
    return {"imported": len(found), "unverified": unverified, "skipped": [{"line": line, "reason": reason} for line, reason in sorted(skipped + left)]}


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
    sentence = best_support(answer, [passage.chunk.text for passage in passages])
    if not sentence:
        raise UnsupportedAnswer("no retrieved sentence supports the answer, and no quote was given")
    return [sentence]


def export_traces(workspace: Workspace, where: TraceFilter, split: Split = "train") -> dict[str, Any]:
    """Chat JSONL rows of one split's whole traces under `traces`, and under `skipped` those that give none, with the reason."""
    config = workspace.config
    chunks = {chunk.id: chunk for chunk in workspace.store.chunks(config.tenant)}
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    for trace in workspace.store.traces(config.tenant, where):
        if trace.metadata.get("split", "train") != split:
            continue
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
    answers = [step for step in reversed(trace.steps) if step.name == "answer"]
    if not trace.complete or not answers:
        raise UnsupportedAnswer("the trace is incomplete")
    answer = next((step for step in answers if step.parsed.get("answer") == trace.answer), answers[0])  # a run may take an earlier one
    if answer.messages:
        withdrawn = trace.abstained and not answer.parsed.get("abstained")  # the calibration made an abstention of it
        return [_chat_row(trace, answer.name, answer.messages, ABSTENTION if withdrawn else answer.text)]
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
