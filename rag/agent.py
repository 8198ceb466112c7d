"""The agent: plan → retrieve → answer → validate, again where the answer does not hold, within bounds.

    plan ─► retrieve ─► answer ─► validate ─► the best answer so far
     ▲                    ▲          │
     │                    ├──────────┤ a quote is not verbatim or the form is broken: answer again
     │                    │          │ the score is too low in the end: the teacher answers, over the same passages
     └────────────────────┼──────────┘ abstained or scored low: plan again, over other passages
                          └─ docs/agent.md draws the whole graph, with the modes fast and closed-book

Every run is one Trace, whole or marked incomplete. The graph has no checkpointer: a run takes seconds and its trace is the record, so
there is no second copy of questions and passages, and nothing to unpickle.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from functools import lru_cache
from typing import Any, TypedDict

from langgraph.errors import GraphRecursionError
from langgraph.graph import END, START, StateGraph

from rag import prompts
from rag.aggregate import contexts
from rag.citations import locate
from rag.events import Emit, Event, StepStarted, ignore, stream
from rag.prompts import Answer
from rag.retrieve import document_order
from rag.run import Attempt, BudgetSpent, Run, Teacher, Tools
from rag.validation import first_signals, plain_score, read_verdict, signals_of, unasked_verdict
from understudy.completions import Completion
from understudy.errors import EndpointError
from understudy.records import Message, Step, Trace

__all__ = ["Teacher", "Tools", "compiled_graph", "run_agent", "stream_agent"]

BEGINNING_TOKENS = 12  # of an answer whose quote is completed: long enough for the quote's first words
VERDICT_TOKENS = 4  # read from log-probabilities
STATED_VERDICT_TOKENS = 24  # read from the text


class State(TypedDict):
    """The graph's state: the run itself, passed from node to node."""

    run: Run


async def plan(state: State) -> State:
    """Rewrite the question as a search query; sampled in later rounds, for another one."""
    run = state["run"]
    step = await run.ask("plan", prompts.plan_messages(run.question, run.worked_example("plan")), run.tools.settings.max_plan_tokens)
    run.query = prompts.parse_query(step.text)
    run.add(step, {"query": run.query})
    return state


async def retrieve(state: State) -> State:
    """The best passages over question and query together, none of them shown before."""
    run, began = state["run"], time.time()
    started = time.perf_counter()
    run.emit(StepStarted("retrieve"))
    retriever = run.tools.retriever
    queries = [query for query in (run.question, run.query) if query.strip()]
    if queries:
        await asyncio.to_thread(retriever.embed, queries)  # timed apart; the search finds the vectors in the cache
    embedded = time.perf_counter() - started
    found = await asyncio.to_thread(retriever.search, queries, None, frozenset(run.seen))
    run.passages = sorted(found, key=lambda passage: document_order(passage.chunk))
    run.seen |= {passage.chunk.id for passage in found}
    ids = [passage.chunk.id for passage in run.passages]
    noted: dict[str, object] = {"query": run.query, "embedding_seconds": embedded, "ranking": [passage.chunk.id for passage in found]}
    run.add(Step(name="retrieve", passage_ids=ids, started_at=began, seconds=time.perf_counter() - started), noted)
    return state


async def answer(state: State) -> State:
    """Quote and answer from the passages, or abstain. In mode fast the text goes out while it is written."""
    run, settings = state["run"], state["run"].tools.settings
    for texts in contexts(run.tools.retriever.settings.aggregate, run.question, run.passages):
        run.shown = texts
        messages = prompts.closed_book_messages(run.question) if settings.mode == "closed-book" else prompts.answer_messages(run.question, texts, run.shots)
        step = await (_write_from_beginning(run, messages) if _completes_quotes(run) else run.ask("answer", messages, settings.max_answer_tokens, _shown(run)))
        run.answer = prompts.parse_answer(step.text)
        ids = [passage.chunk.id for passage in run.passages]
        parsed: dict[str, object] = {"quotes": run.answer.quotes, "answer": run.answer.text, "abstained": run.answer.abstained}
        run.add(step.model_copy(update={"passage_ids": ids}), parsed)
        if not run.answer.abstained:
            break
    return state


async def validate(state: State) -> State:
    """Check the quotes against the passages, ask for a verdict, score the answer; abstain where the calibration says so."""
    run = state["run"]
    assert run.answer is not None and run.written is not None
    answered = run.written
    proposal = prompts.ABSTENTION if run.answer.abstained else prompts.proposal_text(run.answer.quotes, run.answer.text)
    messages = prompts.validate_messages(run.question, run.shown, proposal, run.worked_example("validate"))
    step = await run.ask("validate", messages, VERDICT_TOKENS if run.client("validate").gives_logprobs else STATED_VERDICT_TOKENS)
    _judge(run, answered, read_verdict(run.written))
    last = run.attempts[-1]
    run.add(step, {"score": last.score, "abstained": last.answer.abstained, **last.signals})
    return state


async def score(state: State) -> State:
    """Check the quotes and score the answer by what its writing tells, without asking the model; abstain where the calibration says so."""
    run = state["run"]
    assert run.written is not None
    _judge(run, run.written, unasked_verdict(run.calibration, run.written))
    last = run.attempts[-1]
    run.steps[-1] = run.steps[-1].model_copy(update={"parsed": {**run.steps[-1].parsed, "score": last.score, **last.signals}})
    return state


async def escalate(state: State) -> State:
    """Hand the question to the teacher, with the passages of the best attempt."""
    run = state["run"]
    assert run.best is not None
    run.passages, run.escalated, run.own_steps = run.best.passages, True, len(run.steps)
    return state


def first_node(state: State) -> str:
    """Where a mode begins."""
    run = state["run"]
    return {"agentic": "plan" if run.policy.plans_first else "retrieve", "fast": "retrieve", "closed-book": "answer"}[run.tools.settings.mode]


def checking_node(state: State) -> str:
    """How an answer is checked: by a call in mode agentic only, and there only where a verdict would change the score."""
    run = state["run"]
    assert run.answer is not None and run.written is not None
    is_settled = run.calibration and run.calibration.answerable and (run.answer.abstained or _will_abstain(run, run.written))
    return "validate" if run.tools.settings.mode == "agentic" and run.policy.asks_verdict and not is_settled else "score"


def next_node(state: State) -> str:
    """Where a scored answer leads: to another answer, another plan, the teacher, or the end."""
    run = state["run"]
    settings, last = run.tools.settings, run.attempts[-1]
    if run.escalated:
        return END
    tries = settings.max_rounds if settings.mode == "agentic" else 1
    if last.score < min(settings.accept_score, run.policy.goes_on_below) and len(run.attempts) < tries and run.passages:
        return "answer" if run.answer_again else "plan"
    return "escalate" if run.tools.teacher and run.best and run.best.score < settings.escalate_below else END


@lru_cache(maxsize=1)
def compiled_graph() -> Any:
    """The compiled graph; it holds no state of its own."""
    graph = StateGraph(State)
    for name, node in (("plan", plan), ("retrieve", retrieve), ("answer", answer), ("validate", validate), ("score", score), ("escalate", escalate)):
        graph.add_node(name, node)
    graph.add_conditional_edges(START, first_node, ["plan", "retrieve", "answer"])
    graph.add_edge("plan", "retrieve")
    graph.add_edge("retrieve", "answer")
    graph.add_conditional_edges("answer", checking_node, ["validate", "score"])
    graph.add_conditional_edges("validate", next_node, ["plan", "answer", "escalate", END])
    graph.add_conditional_edges("score", next_node, ["plan", "answer", "escalate", END])
    graph.add_edge("escalate", "answer")
    return graph.compile(checkpointer=False)


async def run_agent(question: str, tools: Tools, metadata: dict[str, str] | None = None, emit: Emit = ignore, before: tuple[Step, ...] = ()) -> Trace:
    """Answer one question; `before` are steps already taken for it.

    A failure of the endpoint and a spent budget give an incomplete trace that says so. So does a cancelled task: nobody can be given that
    trace, so it goes to `tools.keep`, and the cancellation goes on.
    """
    settings = tools.settings
    run, error, noted = Run(question, tools, emit, list(before)), "", dict(metadata or {})
    try:
        async with asyncio.timeout(settings.max_seconds):
            await compiled_graph().ainvoke({"run": run}, {"recursion_limit": 4 * settings.max_rounds + 8})
    except asyncio.CancelledError:
        tools.keep(run.trace("the run was cancelled", noted))  # in the loop: an await would be cancelled too
        raise
    except EndpointError as failure:
        if run.escalated and run.best:  # the model's own answer stands
            noted["escalation_error"] = failure.message
            run.drop_escalation()
        else:
            error = failure.message
    except BudgetSpent as spent:
        error = spent.message
    except TimeoutError:
        error = f"the run was stopped after agent.max_seconds = {settings.max_seconds:g} s"
    except GraphRecursionError:
        error = f"the run was stopped after {len(run.steps)} steps"
    trace = run.trace(error, noted)
    run.writer.finish(trace.answer)
    return trace


def stream_agent(question: str, tools: Tools, metadata: dict[str, str] | None = None) -> AsyncGenerator[Event, None]:
    """The events of a run as they happen, Done last. Close it (contextlib.aclosing), or cancel its reader, to cancel the run."""
    return stream(lambda emit: run_agent(question, tools, metadata, emit))


def _judge(run: Run, answered: Completion, verdict: float | None) -> None:
    """Add the attempt that an answer makes, and say whether it is to be answered anew over the same passages."""
    assert run.answer is not None
    found = [locate(quote, [p.chunk for p in run.passages], run.tools.retriever.page_starts) for quote in run.answer.quotes]
    citations = [citation for citation in found if citation]
    verbatim = len(citations) / len(found) if found else 0.0
    signals = signals_of(run.question, run.passages, run.answer, verbatim, answered, verdict)
    calibration = None if run.tools.settings.mode == "closed-book" else run.calibration  # it knows answers from passages only
    if calibration and calibration.abstains(signals):
        run.answer, citations = Answer(prompts.ABSTENTION, [], True, True), []
    abstained = run.answer.abstained
    points = calibration.score(signals, abstained) if calibration else plain_score(signals, abstained)
    if not run.answer.text:
        points = 0.0  # a quote without an answer: cut off, or going round in circles
    run.attempts.append(Attempt(run.answer, citations, points, signals, run.passages, run.client().model.name))
    run.answer_again = not abstained and (verbatim < 1.0 or not run.answer.well_formed) and not run.answer_again


def _completes_quotes(run: Run) -> bool:
    return run.policy.completes_quotes and run.client().model.continues and run.tools.settings.mode != "closed-book"


async def _write_from_beginning(run: Run, messages: list[Message]) -> Step:
    """The answer step in two calls: its beginning, which tells whether it will be an abstention and what it quotes, then what is left to write."""
    limit = run.tools.settings.max_answer_tokens
    step = await run.ask("answer", messages, min(limit, BEGINNING_TOKENS))
    assert run.written is not None
    if step.finish_reason != "length" or limit <= BEGINNING_TOKENS or _will_abstain(run, run.written):
        return step
    text = prompts.completed(run.written.text, run.shown)
    show = (lambda written: run.writer.feed(text + written.text)) if _is_live(run) else None
    return await run.go_on(step, text, limit - BEGINNING_TOKENS, show)


def _is_live(run: Run) -> bool:
    return run.tools.settings.mode == "fast" and run.tools.teacher is None  # a teacher's answer may take its place


def _shown(run: Run) -> Callable[[Completion], None] | None:
    """What passes an answer on while it is written, unless the calibration will turn it into an abstention."""
    if not _is_live(run):
        return None
    will_abstain: bool | None = None

    def show(written: Completion) -> None:
        nonlocal will_abstain
        if will_abstain is None and prompts.strip_thinking(written.text):
            will_abstain = _will_abstain(run, written)
        if will_abstain is False:
            run.writer.feed(written.text)

    return show


def _will_abstain(run: Run, written: Completion) -> bool:
    """Whether the calibration will turn an answer into an abstention: its first token tells."""
    return bool(run.calibration and run.calibration.abstains(first_signals(run.question, run.passages, written)))
