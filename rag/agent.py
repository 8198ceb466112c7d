"""The agent: plan → retrieve → answer → validate, again where the answer does not hold, within bounds.

    plan ─► retrieve ─► answer ─► validate ─► the best answer so far
     ▲                    ▲          │
     │                    └──────────┤ a quote is not verbatim or the form is broken: answer again
     └───────────────────────────────┘ abstained or scored low: plan again, over other passages

Every run is one Trace, whole or marked incomplete.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypedDict

from langgraph.graph import END, START, StateGraph

from rag import prompts
from rag.citations import locate
from rag.prompts import Answer
from rag.retrieve import Retriever, document_order
from rag.validation import Calibration, plain_score, read_verdict, signals_of
from understudy.client import Completion, ModelClient
from understudy.config import Agent
from understudy.errors import EndpointError
from understudy.records import Citation, Message, Passage, Step, StepName, Trace

SECOND_TRY_TEMPERATURE = 0.7


@dataclass(frozen=True)
class Tools:
    """What a run works with; shared by many runs at once."""

    client: ModelClient
    retriever: Retriever
    settings: Agent
    calibration: Calibration | None = None
    on_step: Callable[[Step], None] = lambda _: None

    @property
    def worked_example(self) -> bool:
        """Whether prompts carry a worked example: a model without an adapter needs one."""
        chosen = self.settings.worked_example
        return not self.client.model.has_adapter if chosen is None else chosen


@dataclass(frozen=True)
class Attempt:
    """One answer and what was found of it."""

    answer: Answer
    citations: list[Citation]
    score: float
    signals: dict[str, float]


@dataclass
class Run:
    """What a run has gathered so far."""

    question: str
    tools: Tools
    steps: list[Step] = field(default_factory=list)
    query: str = ""
    passages: list[Passage] = field(default_factory=list)  # as shown, in document order
    seen: set[str] = field(default_factory=set)  # chunk ids of earlier rounds
    answer: Answer | None = None
    written: Completion | None = None
    attempts: list[Attempt] = field(default_factory=list)
    answer_again: bool = False

    @property
    def best(self) -> Attempt | None:
        """The attempt with the highest score; the earliest of equals."""
        return max(self.attempts, key=lambda attempt: attempt.score, default=None)


class State(TypedDict):
    """The graph's state: the run itself, passed from node to node."""

    run: Run


async def plan(state: State) -> State:
    """Rewrite the question as a search query; sampled in later rounds, for another one."""
    run = state["run"]
    messages = prompts.plan_messages(run.question, run.tools.worked_example)
    written, step = await _call(run, "plan", messages, run.tools.settings.max_plan_tokens)
    run.query = prompts.parse_query(written.text)
    _add(run, step, {"query": run.query})
    return state


async def retrieve(state: State) -> State:
    """The best passages over question and query together, none of them shown before."""
    run, began = state["run"], time.time()
    started = time.perf_counter()
    retriever = run.tools.retriever
    found = await asyncio.to_thread(retriever.search, [run.question, run.query], None, frozenset(run.seen))
    run.passages = sorted(found, key=lambda passage: document_order(passage.chunk))
    run.seen |= {passage.chunk.id for passage in found}
    ids = [passage.chunk.id for passage in run.passages]
    _add(run, Step(name="retrieve", passage_ids=ids, started_at=began, seconds=time.perf_counter() - started), {"query": run.query})
    return state


async def answer(state: State) -> State:
    """Quote and answer from the passages, or abstain."""
    run = state["run"]
    messages = prompts.answer_messages(run.question, [p.chunk.text for p in run.passages], run.tools.worked_example)
    run.written, step = await _call(run, "answer", messages, run.tools.settings.max_answer_tokens)
    run.answer = prompts.parse_answer(run.written.text)
    ids = [passage.chunk.id for passage in run.passages]
    parsed: dict[str, object] = {"quotes": run.answer.quotes, "answer": run.answer.text, "abstained": run.answer.abstained}
    _add(run, step.model_copy(update={"passage_ids": ids}), parsed)
    return state


async def validate(state: State) -> State:
    """Check the quotes against the passages, ask for a verdict, score the answer; abstain where the calibration says so."""
    run, tools = state["run"], state["run"].tools
    assert run.answer is not None and run.written is not None
    proposal = prompts.ABSTENTION if run.answer.abstained else prompts.proposal_text(run.answer.quotes, run.answer.text)
    messages = prompts.validate_messages(run.question, [p.chunk.text for p in run.passages], proposal, tools.worked_example)
    judged, step = await _call(run, "validate", messages, 4)
    found = [locate(quote, [p.chunk for p in run.passages], tools.retriever.page_starts) for quote in run.answer.quotes]
    citations = [citation for citation in found if citation]
    verbatim = len(citations) / len(found) if found else 0.0
    signals = signals_of(run.question, run.passages, run.answer, verbatim, run.written, read_verdict(judged))
    if tools.calibration and tools.calibration.abstains(signals):
        run.answer, citations = Answer(prompts.ABSTENTION, [], True, True), []
    score = tools.calibration.score(signals, run.answer.abstained) if tools.calibration else plain_score(signals, run.answer.abstained)
    run.attempts.append(Attempt(run.answer, citations, score, signals))
    run.answer_again = not run.answer.abstained and (verbatim < 1.0 or not run.answer.well_formed) and not run.answer_again
    _add(run, step, {"score": score, "abstained": run.answer.abstained, **signals})
    return state


def next_node(state: State) -> str:
    """Where validation leads: the end, another answer, or another plan."""
    run = state["run"]
    settings = run.tools.settings
    if run.attempts[-1].score >= settings.accept_score or len(run.attempts) >= settings.max_rounds or not run.passages:
        return END
    return "answer" if run.answer_again else "plan"


@lru_cache(maxsize=1)
def compiled_graph() -> Any:
    """The compiled graph; it holds no state of its own."""
    graph = StateGraph(State)
    for name, node in (("plan", plan), ("retrieve", retrieve), ("answer", answer), ("validate", validate)):
        graph.add_node(name, node)
    graph.add_edge(START, "plan")
    graph.add_edge("plan", "retrieve")
    graph.add_edge("retrieve", "answer")
    graph.add_edge("answer", "validate")
    graph.add_conditional_edges("validate", next_node, ["plan", "answer", END])
    return graph.compile()


async def run_agent(question: str, tools: Tools, metadata: dict[str, str] | None = None) -> Trace:
    """Answer one question. A failure of the endpoint or of the time limit gives an incomplete trace that says so."""
    run, error = Run(question, tools), ""
    created = time.time()
    try:
        async with asyncio.timeout(tools.settings.max_seconds):
            await compiled_graph().ainvoke({"run": run}, {"recursion_limit": 4 * tools.settings.max_rounds + 4})
    except EndpointError as failure:
        error = failure.message
    except TimeoutError:
        error = f"the run was stopped after agent.max_seconds = {tools.settings.max_seconds:g} s"
    best = run.best
    return Trace(
        id=uuid.uuid4().hex,
        tenant=tools.retriever.tenant,
        question=question,
        steps=run.steps,
        answer=best.answer.text if best else "",
        abstained=bool(best and best.answer.abstained),
        citations=best.citations if best else [],
        quotes=best.answer.quotes if best else [],
        score=best.score if best else None,
        source="model",
        model=tools.client.model.name,
        generation=tools.retriever.generation,
        prompt_version=prompts.PROMPT_VERSION,
        complete=not error and best is not None,
        created_at=created,
        metadata={**(metadata or {}), **({"error": error} if error else {})},
    )


async def _call(run: Run, name: StepName, messages: list[Message], max_tokens: int) -> tuple[Completion, Step]:
    """Ask the model; later tries are sampled, so that they differ."""
    client, began, started = run.tools.client, time.time(), time.perf_counter()
    is_retry = bool(run.attempts) and name != "validate"
    written = await client.complete(messages, max_tokens, SECOND_TRY_TEMPERATURE if is_retry else 0.0)
    step = Step(
        name=name,
        messages=messages,
        text=written.text,
        model=client.model.name,
        endpoint=client.model.base_url,
        usage=written.usage,
        mean_logprob=written.mean_logprob,
        finish_reason=written.finish_reason,
        started_at=began,
        seconds=time.perf_counter() - started,
    )
    return written, step


def _add(run: Run, step: Step, parsed: dict[str, object]) -> None:
    step = step.model_copy(update={"parsed": parsed})
    run.steps.append(step)
    run.tools.on_step(step)
