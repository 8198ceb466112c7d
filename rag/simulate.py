"""The simulation phase: a teacher writes questions about chunks and answers them through the agent; what holds becomes traces.

Chunks are visited spread over documents and headings. A question is dropped when its quote is not verbatim, when it is a
duplicate, when retrieval does not find what answers it, or when the teacher's own answer does not hold; a share of the
questions is meant to find no answer, and is kept where the teacher, over real retrieval, abstains.

The only state is the log of the teacher's calls (rag/recorded.py): a run that is started again takes the same way over it.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, TypeVar

from rag.agent import Tools, run_agent
from rag.citations import find_quote
from rag.eval.run import failure_of, open_run
from rag.prompts import PROMPT_VERSION
from rag.question_writing import MAX_TOKENS, WRITING_VERSION, Unusable, WrittenQuestion, read_question, writing_messages
from rag.recorded import Budget, BudgetReached, CallLog, RecordedClient
from rag.retrieve import Retriever
from rag.same_questions import KnownQuestions
from rag.traces import keep_trace
from understudy.client import Model
from understudy.digests import digest_of
from understudy.errors import EndpointError
from understudy.files import locked, write_json
from understudy.progress import Progress
from understudy.records import Chunk, Trace
from understudy.workspace import Workspace

MIN_WORDS = 8  # a shorter chunk is a heading or a table's edge
PASSES = 3  # over all chunks; the first is greedy, later ones are sampled
TEMPERATURE = 0.8  # of later passes
FAILURES_IN_A_ROW = 5  # is an endpoint that is gone

Done = TypeVar("Done")


@dataclass(frozen=True)
class Plan:
    """What is wanted; all but the bounds is part of the simulation's identity."""

    questions: int  # kept, unanswerable ones included
    unanswerable: float  # share of the questions that are meant to find no answer
    budget: Budget
    concurrency: int = 4
    seed: int = 0
    documents: frozenset[str] = frozenset()  # ids of those to write about; empty: all


@dataclass(frozen=True)
class Visit:
    """One request for a question."""

    chunk: Chunk
    answered: bool
    temperature: float


@dataclass
class Outcome:
    """What a simulation has come to."""

    kept: list[Trace] = field(default_factory=list)
    rejected: list[dict[str, str]] = field(default_factory=list)
    stopped: str = "chunks"  # what ran out, or was reached: chunks, questions, calls, tokens
    failures: int = 0  # of the teacher, since its last answer

    def reject(self, chunk: Chunk, question: str, reason: str) -> None:
        """Note what is not kept."""
        self.rejected.append({"reason": reason, "question": question, "chunk_id": chunk.id, "document": chunk.document})


def simulate(workspace: Workspace, teacher: Model, retriever: Retriever, plan: Plan, progress: Callable[[str, int], Progress]) -> dict[str, Any]:
    """Run a simulation, or go on with it; the result is the command's JSON. Raises EndpointError where the teacher is gone."""
    identity = {
        "teacher": [teacher.name, teacher.served_name],
        "generation": retriever.generation,
        "tenant": retriever.tenant,
        "prompts": [PROMPT_VERSION, WRITING_VERSION],
        "agent": workspace.config.agent.model_dump(),
        "retrieval": workspace.config.retrieval.model_dump(),
        "unanswerable": plan.unanswerable,
        "seed": plan.seed,
    } | ({"documents": sorted(plan.documents)} if plan.documents else {})
    folder = open_run(workspace.simulations, identity)
    with locked(folder / ".lock"):
        log = CallLog(folder / "calls.jsonl")
        with progress("simulating", plan.questions) as bar:
            outcome = asyncio.run(_Simulation(workspace, RecordedClient(teacher, log, plan.budget), retriever, plan, folder.name, bar).run())
        return _report(workspace, folder, teacher.name, outcome, log)


class _Simulation:
    """One run over the log."""

    def __init__(self, workspace: Workspace, client: RecordedClient, retriever: Retriever, plan: Plan, name: str, bar: Progress) -> None:
        self._workspace, self._client, self._retriever, self._plan, self._name, self._bar = workspace, client, retriever, plan, name, bar
        self._tools = Tools(client, retriever, workspace.config.agent.model_copy(update={"mode": "agentic"}))
        self._known = KnownQuestions(retriever.embed)

    async def run(self) -> Outcome:
        """Visit chunks, a few at once, until enough is kept or something runs out."""
        outcome, plan = Outcome(), self._plan
        stored = self._workspace.store.traces(self._retriever.tenant)
        await asyncio.to_thread(self._known.add, [t.question for t in stored if t.metadata.get("simulation") != self._name])
        chunks = [chunk for chunk in self._retriever.chunks.values() if not plan.documents or chunk.document_id in plan.documents]
        visits = visits_of(chunks, plan.unanswerable, plan.seed)
        async with self._client:
            while outcome.stopped == "chunks" and (wave := list(islice(visits, min(plan.concurrency, plan.questions - len(outcome.kept))))):
                await self._visit_all(wave, outcome)
                if len(outcome.kept) >= plan.questions:
                    outcome.stopped = "questions"
        return outcome

    async def _visit_all(self, wave: list[Visit], outcome: Outcome) -> None:
        """Write a question at each visit, then answer those that are new; in order, so that every run takes the same way."""
        written = []
        for visit, result in zip(wave, await _all(self._write(visit) for visit in wave), strict=True):
            question = self._take(result, visit.chunk, "", outcome)
            if question is not None:
                written.append(question)
        fresh = []
        for question in written:
            reason = await asyncio.to_thread(self._known.admit, question.question)
            if reason:
                outcome.reject(question.chunk, question.question, reason)
            else:
                fresh.append(question)
        for question, answered in zip(fresh, await _all(self._answer(question) for question in fresh), strict=True):
            trace = self._take(answered, question.chunk, question.question, outcome)
            if trace is not None and len(outcome.kept) < self._plan.questions:
                await asyncio.to_thread(self._keep, trace)
                outcome.kept.append(trace)
                self._bar.advance(1, f"{len(outcome.rejected)} rejected")

    def _take(self, result: Done | BaseException, chunk: Chunk, question: str, outcome: Outcome) -> Done | None:
        """A result as it is; a failure is noted and becomes None. Raises EndpointError where the teacher fails again and again."""
        if isinstance(result, BudgetReached):
            outcome.stopped = result.message
            return None
        if isinstance(result, EndpointError):
            outcome.failures += 1
            if outcome.failures >= FAILURES_IN_A_ROW:
                raise EndpointError(
                    f"the teacher failed {outcome.failures} times in a row: {result.message}", "check its server, then repeat: it goes on"
                ) from result
            outcome.reject(chunk, question, "the teacher failed")
            return None
        if isinstance(result, Unusable):
            outcome.reject(chunk, question, str(result))
            outcome.failures = 0
            return None
        if isinstance(result, BaseException):
            raise result
        outcome.failures = 0
        return result

    async def _write(self, visit: Visit) -> WrittenQuestion:
        completion = await self._client.complete(writing_messages(visit.chunk, visit.answered), MAX_TOKENS, visit.temperature)
        return read_question(completion.text, visit.chunk, visit.answered)

    async def _answer(self, question: WrittenQuestion) -> Trace:
        """The agent's trace of a question, where it holds; raises Unusable where it does not."""
        noted = {"teacher": self._client.model.name, "simulation": self._name, "written_from": question.chunk.id, "split": "train"}
        trace = await run_agent(question.question, self._tools, noted)
        if not trace.complete:
            raise EndpointError(failure_of(trace), "see the teacher's log")
        reason = fault_of(trace, question, self._retriever.chunks, self._workspace.config.agent.accept_score)
        if reason:
            raise Unusable(reason)
        return trace.model_copy(update={"id": digest_of([self._name, question.question])[:32]})

    def _keep(self, trace: Trace) -> None:
        """Store a trace once: of a run that is taken up again, what was stored first stays."""
        if self._workspace.store.trace(trace.id) is None:
            keep_trace(self._workspace, trace)


def fault_of(trace: Trace, question: WrittenQuestion, chunks: dict[str, Chunk], accept_score: float) -> str | None:
    """Why a teacher's answer to its own question may not teach, or None."""
    if not question.quote:
        return None if trace.abstained else "answered, though it was written to find no answer"
    shown = {chunk_id for step in trace.steps if step.name == "retrieve" for chunk_id in step.passage_ids}
    if not any(find_quote(question.quote, chunks[chunk_id].text) for chunk_id in shown & chunks.keys()):
        return "retrieval does not find the passage it was written about"
    if trace.abstained:
        return "the teacher abstained"
    if not trace.citations:
        return "the answer has no verbatim quote"
    if trace.score is not None and trace.score < accept_score:
        return "validated below agent.accept_score"
    return None


def visits_of(chunks: list[Chunk], unanswerable: float, seed: int) -> Iterator[Visit]:
    """Visits in an order that spreads over documents and headings; the share that is to find no answer is spread evenly too."""
    number = 0
    for turn in range(PASSES):
        for chunk in spread([c for c in chunks if len(c.text.split()) >= MIN_WORDS], seed + turn):
            answered = int((number + 1) * unanswerable) == int(number * unanswerable)
            yield Visit(chunk, answered, TEMPERATURE if turn else 0.0)
            number += 1


def spread(chunks: list[Chunk], seed: int) -> list[Chunk]:
    """Every chunk once: documents in turn, within each its headings in turn, within each at random."""
    rng = random.Random(seed)
    documents: dict[str, dict[tuple[str, ...], list[Chunk]]] = defaultdict(lambda: defaultdict(list))
    for chunk in sorted(chunks, key=lambda c: c.id):
        documents[chunk.document_id][tuple(chunk.headings)].append(chunk)
    queues = []
    for headings in documents.values():
        sections = list(headings.values())
        for section in [*sections]:
            rng.shuffle(section)
        rng.shuffle(sections)
        queues.append(_in_turn(sections))
    rng.shuffle(queues)
    return _in_turn(queues)


def _in_turn(queues: list[list[Chunk]]) -> list[Chunk]:
    return [chunk for row in zip_longest(*queues) for chunk in row if chunk is not None]


async def _all(work: Iterator[Awaitable[Done]]) -> list[Done | BaseException]:
    """Results and failures in order; what is in flight when one fails is waited for, because it is paid for."""
    return await asyncio.gather(*work, return_exceptions=True)


def _report(workspace: Workspace, folder: Path, teacher: str, outcome: Outcome, log: CallLog) -> dict[str, Any]:
    unanswerable = sum(trace.abstained for trace in outcome.kept)
    result = {
        "simulation": folder.name,
        "teacher": teacher,
        "kept": {"answerable": len(outcome.kept) - unanswerable, "unanswerable": unanswerable},
        "rejected": dict(Counter(row["reason"] for row in outcome.rejected).most_common()),
        "stopped": outcome.stopped,
        "calls": len(log),
        "tokens": {"prompt": log.prompt_tokens, "completion": log.completion_tokens},
        "report": workspace.relative(folder / "report.json"),
    }
    write_json(folder / "report.json", {"schema_version": 1, **result, "rejections": outcome.rejected})
    return result
