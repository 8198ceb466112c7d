"""One run of the agent: what it works with, what it has gathered, what it may spend, and the Trace it becomes."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from rag import prompts
from rag.cached import Cached
from rag.events import AnswerWriter, Emit, StepDone, StepStarted
from rag.policy import WHOLE_GRAPH, Policy
from rag.prompts import EXAMPLE_SHOTS, Answer, Shot
from rag.retrieve import Retriever
from rag.validation import Calibration
from understudy.client import ModelClient
from understudy.completions import TOKENS_PER_CHARACTER, Completion
from understudy.errors import UnderstudyError
from understudy.records import Citation, Message, Passage, Step, StepName, Trace, Usage
from understudy.settings.answers import Agent

SECOND_TRY_TEMPERATURE = 0.7


class BudgetSpent(UnderstudyError):
    """A run has used what it may; its message says of what."""

    code = "budget"


@dataclass(frozen=True)
class Teacher:
    """The remote that answers where the model's score is too low."""

    client: ModelClient
    calibration: Calibration | None = None


@dataclass(frozen=True)
class Tools:
    """What a run works with; shared by many runs at once. Use as an async context manager: it closes the clients."""

    client: ModelClient  # asked at every step that `by_step` does not name
    retriever: Retriever
    settings: Agent
    calibration: Calibration | None = None
    teacher: Teacher | None = None
    cached: Cached | None = None  # what stands before the runs of rag.answering
    keep: Callable[[Trace], None] = lambda _: None  # gets every trace that rag.answering ends, whole or not, once
    by_step: Mapping[StepName, ModelClient] = field(default_factory=dict)
    release: str | None = None  # whose models these are, alias@digest12

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for client in dict.fromkeys([self.client, *self.by_step.values(), *([self.teacher.client] if self.teacher else [])]):
            await client.__aexit__()


@dataclass(frozen=True)
class Attempt:
    """One answer and what was found of it."""

    answer: Answer
    citations: list[Citation]
    score: float
    signals: dict[str, float]
    passages: list[Passage]
    model: str


@dataclass
class Run:
    """What a run has gathered so far."""

    question: str
    tools: Tools
    emit: Emit
    steps: list[Step] = field(default_factory=list)
    query: str = ""
    passages: list[Passage] = field(default_factory=list)  # as shown, in document order
    shown: list[str] = field(default_factory=list)  # the texts of the answer's prompt
    seen: set[str] = field(default_factory=set)  # chunk ids of earlier rounds
    answer: Answer | None = None
    written: Completion | None = None
    attempts: list[Attempt] = field(default_factory=list)
    answer_again: bool = False
    escalated: bool = False  # whether the teacher is asked now
    own_steps: int = 0  # taken before the teacher's
    pending: Step | None = None  # a call under way

    def __post_init__(self) -> None:
        self.created_at = time.time()
        self.writer = AnswerWriter(self.emit)

    def client(self, name: StepName = "answer") -> ModelClient:
        """The model that a step asks now."""
        if self.escalated and self.tools.teacher:
            return self.tools.teacher.client
        return self.tools.by_step.get(name, self.tools.client)

    @property
    def calibration(self) -> Calibration | None:
        """Of the model that answers now."""
        return self.tools.teacher.calibration if self.escalated and self.tools.teacher else self.tools.calibration

    @property
    def policy(self) -> Policy:
        """The steps that are taken of the graph."""
        return self.calibration.policy if self.calibration else WHOLE_GRAPH

    def worked_example(self, name: StepName) -> bool:
        """Whether a step's prompt carries a worked example: a model without an adapter needs one."""
        chosen = self.tools.settings.worked_example
        return not self.client(name).model.has_adapter if chosen is None or self.escalated else chosen

    @property
    def shots(self) -> Sequence[Shot]:
        """The worked examples of the answer's prompt: those that its calibration chose."""
        if not self.worked_example("answer"):
            return ()
        return self.calibration.shots if self.calibration and self.calibration.shots else EXAMPLE_SHOTS

    @property
    def best(self) -> Attempt | None:
        """The teacher's attempt where there is one; else the attempt with the highest score, the earliest of equals.

        An abstention speaks of its own round's passages only: it never outdoes an answer that cites another round's.
        """
        teachers = [attempt for attempt in self.attempts if self.tools.teacher and attempt.model == self.tools.teacher.client.model.name]
        return max(teachers or self.attempts, key=lambda attempt: (bool(attempt.citations), attempt.score), default=None)

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens spent."""
        return sum(step.usage.prompt_tokens + step.usage.completion_tokens for step in self.steps)

    async def ask(self, name: StepName, messages: list[Message], max_tokens: int, on_progress: Callable[[Completion], None] | None = None) -> Step:
        """Ask the model, within what is left of the run's tokens; later tries are sampled, so that they differ. Raises BudgetSpent, EndpointError."""
        model = self.client(name).model
        step = Step(name=name, messages=messages, model=model.name, endpoint=model.base_url, started_at=time.time())
        self.emit(StepStarted(name, step.model))
        self.written = Completion("", Usage(), "", [], [], {})
        return await self._write(step, "", max_tokens, on_progress)

    async def go_on(self, step: Step, text: str, max_tokens: int, on_progress: Callable[[Completion], None] | None = None) -> Step:
        """The step whose completion was cut off, gone on with as if the model had written `text` so far; usage and seconds add up."""
        self.pending = step  # with what was written of it
        return await self._write(step, text, max_tokens, on_progress)

    async def _write(self, step: Step, text: str, max_tokens: int, on_progress: Callable[[Completion], None] | None) -> Step:
        """The step with what the model writes after `text`; `written` holds all of it, with the tokens that it wrote itself."""
        assert self.written is not None
        before, client, started = self.written, self.client(step.name), time.perf_counter()
        messages = [*step.messages, Message(role="assistant", content=text)] if text else step.messages
        spent = self.tokens + step.usage.prompt_tokens + step.usage.completion_tokens
        left = self.tools.settings.max_tokens - spent - estimate_tokens(messages)
        if left <= 0:
            raise BudgetSpent(f"the run was stopped: {spent} tokens spent, and agent.max_tokens = {self.tools.settings.max_tokens}")
        first_token = step.first_token_seconds

        def pass_on(written: Completion) -> None:
            nonlocal first_token
            if first_token is None and written.text:
                first_token = step.seconds + time.perf_counter() - started
            if on_progress:
                on_progress(written)

        is_retry = bool(self.attempts) and step.name != "validate" and not self.escalated
        self.pending = step
        temperature = SECOND_TRY_TEMPERATURE if is_retry else 0.0
        written = await client.complete(messages, min(max_tokens, left), temperature, pass_on if on_progress else None)
        usage = written.usage if written.usage.prompt_tokens else written.usage.model_copy(update={"prompt_tokens": estimate_tokens(messages)})
        self.written = written.after(before, text)
        return step.model_copy(
            update={
                "text": self.written.text,
                "usage": step.usage + usage,
                "mean_logprob": self.written.mean_logprob,
                "finish_reason": written.finish_reason,
                "seconds": step.seconds + time.perf_counter() - started,
                "first_token_seconds": first_token,
            }
        )

    def add(self, step: Step, parsed: dict[str, object]) -> None:
        """Record a step that has ended well."""
        step, self.pending = step.model_copy(update={"parsed": parsed}), None
        self.steps.append(step)
        self.emit(StepDone(step))

    def drop_escalation(self) -> None:
        """Forget what a teacher that failed had begun."""
        del self.steps[self.own_steps :]
        self.pending = None

    def trace(self, error: str, metadata: dict[str, str]) -> Trace:
        """The run as a Trace; one that ended by an error is incomplete, and its last step says why."""
        best, tools = self.best, self.tools
        is_teachers = bool(tools.teacher and best and best.model == tools.teacher.client.model.name)
        cut_off = [self.pending.model_copy(update={"error": error, "seconds": time.time() - self.pending.started_at})] if self.pending and error else []
        is_low = bool(best and best.score < tools.settings.escalate_below)
        noted = {"mode": tools.settings.mode, "escalated": "true" if is_teachers else "", "low_score": "true" if is_low else "", "error": error}
        return Trace(
            id=uuid.uuid4().hex,
            tenant=tools.retriever.tenant,
            question=self.question,
            steps=[*self.steps, *cut_off],
            answer=best.answer.text if best else "",
            abstained=bool(best and best.answer.abstained),
            citations=best.citations if best else [],
            quotes=best.answer.quotes if best else [],
            score=best.score if best else None,
            source="model",
            model=best.model if best else tools.client.model.name,
            generation=tools.retriever.generation,
            prompt_version=prompts.PROMPT_VERSION,
            release=tools.release,
            complete=not error and best is not None,
            created_at=self.created_at,
            metadata={**metadata, **{name: value for name, value in noted.items() if value}},
        )


def estimate_tokens(messages: list[Message]) -> int:
    """About how many tokens a prompt has."""
    return round(sum(len(message.content) for message in messages) * TOKENS_PER_CHARACTER)
