"""The peer of `scripts/bench agent`: agentic RAG as notebooks write it, over the same server, retriever and limits.

Each step has a prompt of its own, the passages are stated anew after the question, and validation reasons in free text before it writes
`Score: x`. Either saving of ours can be switched on alone, for the ablation. The loop, its stop rules, the retrieval, the limits and the
reading of an answer are those of rag/agent.py.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass, field

from rag import prompts
from rag.citations import locate
from rag.prompts import Answer
from rag.retrieve import Retriever, document_order
from rag.run import SECOND_TRY_TEMPERATURE
from rag.validation import read_verdict, stated_score
from understudy.client import ModelClient
from understudy.records import Citation, Message, Passage, Step, StepName, Trace
from understudy.settings.answers import Agent

PLANNER = "You are the planning agent of a question answering system. You decide what to search for."
RESEARCHER = "You are the research agent of a question answering system. You answer questions with evidence from the context."
VALIDATOR = "You are the validation agent of a question answering system. You judge whether answers are supported by the context."
PLAN = "Question: {question}\nWrite a short search query of keywords for this question."
ANSWER = (
    "Question: {question}\n\nContext:\n{context}\n\n"
    "Copy the sentence of the context that answers the question, word for word, after 'Quote:'. Then answer in one sentence after 'Answer:'. "
    f"If the context does not answer it, write only: {prompts.ABSTENTION}"
)
VALIDATE = (
    "Question: {question}\nProposed answer: {proposal}\n\nContext:\n{context}\n\n"
    "Is the proposed answer right, by the context alone? Reason step by step, then write 'Score: x' with x from 0 (wrong) to 1 (right)."
)


@dataclass(frozen=True)
class Notebook:
    """The pipeline; with both savings it does what rag/agent.py does, without a calibration."""

    client: ModelClient
    retriever: Retriever
    settings: Agent
    shares_prefix: bool = False  # our prompts: system and passages first, the same for answer and validation
    asks_one_token: bool = False  # our verdict, read from log-probabilities

    async def run(self, question: str) -> Trace:
        """One question through the loop, step after step."""
        run = _Run(question)
        while True:
            if not run.answer_again:
                await self._plan(run)
                await self._retrieve(run)
            await self._answer(run)
            await self._validate(run)
            score = run.attempts[-1][2]
            if score >= self.settings.accept_score or len(run.attempts) >= self.settings.max_rounds or not run.passages:
                return self._trace(run)

    async def _plan(self, run: _Run) -> None:
        messages = (
            prompts.plan_messages(run.question, self._shows_example)
            if self.shares_prefix
            else [
                *_turns(PLANNER),
                *self._shot(PLAN.format(question=prompts.EXAMPLE_QUESTION), prompts.EXAMPLE_QUERY),
                *_user(PLAN.format(question=run.question)),
            ]
        )
        run.query = prompts.parse_query((await self._call(run, "plan", messages, self.settings.max_plan_tokens)).text)

    async def _retrieve(self, run: _Run) -> None:
        started = time.perf_counter()
        found = await asyncio.to_thread(self.retriever.search, [run.question, run.query], None, frozenset(run.seen))
        run.passages = sorted(found, key=lambda passage: document_order(passage.chunk))
        ids = [passage.chunk.id for passage in run.passages]
        run.seen |= set(ids)
        run.steps.append(Step(name="retrieve", passage_ids=ids, seconds=time.perf_counter() - started))

    async def _answer(self, run: _Run) -> None:
        texts = [passage.chunk.text for passage in run.passages]
        if self.shares_prefix:
            messages = prompts.answer_messages(run.question, texts, prompts.EXAMPLE_SHOTS if self._shows_example else ())
        else:
            example = ANSWER.format(question=prompts.EXAMPLE_QUESTION, context=_context(prompts.EXAMPLE_PASSAGES))
            unanswered = ANSWER.format(question=prompts.EXAMPLE_UNANSWERED, context=_context(prompts.EXAMPLE_PASSAGES))
            shots = self._shot(unanswered, prompts.ABSTENTION) + self._shot(example, prompts.answer_target([prompts.EXAMPLE_QUOTE], prompts.EXAMPLE_ANSWER))
            messages = [*_turns(RESEARCHER), *shots, *_user(ANSWER.format(question=run.question, context=_context(texts)))]
        step = await self._call(run, "answer", messages, self.settings.max_answer_tokens)
        run.steps[-1] = step.model_copy(update={"passage_ids": [passage.chunk.id for passage in run.passages]})
        run.answer = prompts.parse_answer(step.text)

    async def _validate(self, run: _Run) -> None:
        answer, texts = run.answer, [passage.chunk.text for passage in run.passages]
        proposal = prompts.ABSTENTION if answer.abstained else prompts.proposal_text(answer.quotes, answer.text)
        if self.asks_one_token:
            messages = self._one_token_messages(run.question, texts, proposal)
            step, completion = await self._complete(run, "validate", messages, 4)
            verdict = read_verdict(completion)
        else:
            system = _turns(prompts.SYSTEM if self.shares_prefix else VALIDATOR)
            free = VALIDATE if not self.shares_prefix else "Passages:\n{context}\n\n" + VALIDATE.replace("\n\nContext:\n{context}", "")
            messages = [*system, *_user(free.format(question=run.question, proposal=proposal, context=_context(texts)))]
            step, _ = await self._complete(run, "validate", messages, self.settings.max_answer_tokens)
            verdict = stated_score(step.text)
        citations = [found for quote in answer.quotes if (found := locate(quote, [p.chunk for p in run.passages], self.retriever.page_starts))]
        verbatim = len(citations) / len(answer.quotes) if answer.quotes else 0.0
        score = (verdict or 0.0) * (1.0 if answer.abstained else 0.5 + 0.5 * verbatim)
        run.attempts.append((answer, citations, score))
        run.answer_again = not answer.abstained and (verbatim < 1.0 or not answer.well_formed) and not run.answer_again

    def _one_token_messages(self, question: str, texts: list[str], proposal: str) -> list[Message]:
        """Our validation prompt; without the shared prefix, the passages come after question and proposal."""
        messages = prompts.validate_messages(question, texts, proposal, self._shows_example)
        if self.shares_prefix:
            return messages
        task = prompts.VALIDATE_TASK.format(question=question, proposal=proposal)
        return [*_turns(VALIDATOR), *messages[1:-1], *_user(f"{task}\n\nContext:\n{_context(texts)}")]

    async def _call(self, run: _Run, name: StepName, messages: list[Message], limit: int) -> Step:
        return (await self._complete(run, name, messages, limit))[0]

    async def _complete(self, run: _Run, name: StepName, messages: list[Message], limit: int):  # type: ignore[no-untyped-def]
        started = time.perf_counter()
        written = await self.client.complete(messages, limit, SECOND_TRY_TEMPERATURE if run.attempts and name != "validate" else 0.0)
        seconds = time.perf_counter() - started
        run.steps.append(Step(name=name, messages=messages, text=written.text, usage=written.usage, finish_reason=written.finish_reason, seconds=seconds))
        return run.steps[-1], written

    @property
    def _shows_example(self) -> bool:
        return not self.client.model.has_adapter

    def _shot(self, asked: str, answered: str) -> list[Message]:
        return [Message(role="user", content=asked), Message(role="assistant", content=answered)] if self._shows_example else []

    def _trace(self, run: _Run) -> Trace:
        answer, citations, score = max(run.attempts, key=lambda attempt: attempt[2])
        return Trace(
            id=uuid.uuid4().hex, question=run.question, steps=run.steps, answer=answer.text, abstained=answer.abstained, citations=citations,
            quotes=answer.quotes, score=score, source="model", model=self.client.model.name, generation=self.retriever.generation,
            prompt_version="notebook", created_at=time.time(),
        )  # fmt: skip


@dataclass
class _Run:
    question: str
    query: str = ""
    steps: list[Step] = field(default_factory=list)
    passages: list[Passage] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    answer: Answer = field(default_factory=lambda: Answer("", [], False, False))
    attempts: list[tuple[Answer, list[Citation], float]] = field(default_factory=list)
    answer_again: bool = False


def _turns(system: str) -> list[Message]:
    return [Message(role="system", content=system)]


def _user(content: str) -> list[Message]:
    return [Message(role="user", content=content)]


def _context(texts: list[str]) -> str:
    return "\n\n".join(f"[{number}] {' '.join(text.split())}" for number, text in enumerate(texts, 1))
