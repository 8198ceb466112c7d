"""ask."""

from __future__ import annotations

import asyncio
import sys
from argparse import Namespace
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager, nullcontext
from typing import TYPE_CHECKING

from understudy.commands import Outcome, report, workspace_of
from understudy.errors import EndpointError
from understudy.records import Step, Trace
from understudy.terminal import printable
from understudy.workspace import Workspace

if TYPE_CHECKING:
    from rag.events import Event
    from rag.run import Tools

LOW_SCORE = 0.5


def ask(args: Namespace) -> Outcome:
    """Answer one question from the documents; the text is shown as soon as it may be."""
    from rag.answering import stream_answer

    printer = AnswerPrinter(not args.json)
    if (trace := _answer_without_engine(args)) is None:
        with answering(args) as (_, tools):
            trace = asyncio.run(_answer(stream_answer(args.question, tools), tools, printer))
    if not trace.complete and not trace.answer:
        raise EndpointError(trace.metadata.get("error", "the run did not finish"), f"the partial trace is {trace.id[:12]}; see `understudy traces show`")
    return Outcome(answer_json(trace), printer.rest(trace))


@contextmanager
def answering(args: Namespace) -> Iterator[tuple[Workspace, Tools]]:
    """The workspace, and the tools of the model and mode that the arguments name, on an engine that runs for the block."""
    from rag.generations import live_generation
    from rag.retrieve import open_retriever
    from serve.command import engine_for
    from understudy.commands.wiring import answering_tools, needs_engine, resolve_name, resolve_steps, usual_model
    from understudy.engines import find_engine, require_engine

    workspace = workspace_of(args)
    name = resolve_name(workspace, args.model or usual_model(workspace))
    remote = not needs_engine(workspace, name)
    live_generation(workspace.index, workspace.config.tenant)  # what is missing is told before anything is loaded
    if not remote and not args.start and find_engine(workspace) is None:
        require_engine(workspace)
    retriever = open_retriever(workspace)
    with nullcontext() if remote else engine_for(workspace, report, only=name) as engine:
        yield workspace, answering_tools(workspace, resolve_steps(workspace, name, engine), retriever, args.mode, not args.no_cache)


def _answer_without_engine(args: Namespace) -> Trace | None:
    """The cached answer, kept as a trace, where no engine is running that could be asked; None where none fits."""
    from rag.answering import trace_keeper
    from rag.cached import answer_without_model
    from rag.generations import live_generation
    from rag.retrieve import open_retriever
    from understudy.commands.wiring import cache_scope, cached_answers, needs_engine, resolve_name, usual_model
    from understudy.engines import find_engine

    workspace = workspace_of(args)
    name, mode = resolve_name(workspace, args.model or usual_model(workspace)), args.mode or workspace.config.agent.mode
    if args.no_cache or not workspace.config.cache.enabled or not needs_engine(workspace, name) or find_engine(workspace):
        return None
    live_generation(workspace.index, workspace.config.tenant)
    if not workspace.store.count_cache_entries(workspace.config.tenant, cache_scope(workspace, name, mode).digest):
        return None  # before the embedder is loaded for nothing
    cached = cached_answers(workspace, name, open_retriever(workspace), mode)
    if trace := answer_without_model(args.question, cached):
        trace_keeper(workspace)(trace)
    return trace


async def _answer(events: AsyncGenerator[Event, None], tools: Tools, printer: AnswerPrinter) -> Trace:
    async with tools:
        return await printer.follow(events)


class AnswerPrinter:
    """Shows runs to a person: steps on stderr, the answer's text on stdout as it comes. For programs (`shows_text` false), steps only."""

    def __init__(self, shows_text: bool) -> None:
        self._shows_text, self._shown, self._line_is_open = shows_text, "", False

    async def follow(self, events: AsyncGenerator[Event, None]) -> Trace:
        """Show a run to its end; returns its trace."""
        from rag.events import AnswerText, Done, StepDone

        self._shown = ""
        async with aclosing(events):
            async for event in events:
                if isinstance(event, StepDone):
                    self._end_line()
                    _announce(event.step)
                elif isinstance(event, AnswerText) and self._shows_text:
                    self._shown += event.text
                    self._line_is_open = True
                    sys.stdout.write(printable(event.text))
                    sys.stdout.flush()
                elif isinstance(event, Done):
                    return event.trace
        raise AssertionError("a run without an end")

    def rest(self, trace: Trace) -> list[str]:
        """The lines of the answer that were not shown while it came."""
        self._end_line()
        lines = answer_lines(trace)
        if not self._shown:
            return lines
        return lines[1:] if self._shown == trace.answer else ["The text above was withdrawn. The answer is:", *lines]

    def _end_line(self) -> None:
        if self._line_is_open:
            sys.stdout.write("\n")
            sys.stdout.flush()
        self._line_is_open = False


def _announce(step: Step) -> None:
    details = {
        "rewrite": f"question: {step.parsed.get('question')}",
        "plan": f"query: {step.parsed.get('query')}",
        "retrieve": f"{len(step.passage_ids)} passages",
    }
    report(printable(f"{step.name} {step.seconds:.1f} s  {details.get(step.name, '')}".rstrip()))


def answer_json(trace: Trace) -> dict[str, object]:
    """The `ask` command's JSON."""
    steps = [
        {
            "name": s.name,
            "model": s.model,
            "seconds": round(s.seconds, 3),
            "prompt_tokens": s.usage.prompt_tokens,
            "cached_tokens": s.usage.cached_tokens,
            "completion_tokens": s.usage.completion_tokens,
        }
        for s in trace.steps
    ]
    return {
        "answer": trace.answer,
        "abstained": trace.abstained,
        "citations": [citation.model_dump() for citation in trace.citations],
        "score": trace.score,
        "cache": trace.cache,
        "model": trace.model,
        "release": trace.release,
        "trace_id": trace.id,
        "steps": steps,
        "seconds": round(sum(s.seconds for s in trace.steps), 3),
        "mode": trace.metadata.get("mode"),
        "escalated": "escalated" in trace.metadata,
        "complete": trace.complete,
        "error": trace.metadata.get("error"),
    }


def answer_lines(trace: Trace) -> list[str]:
    """An answer for a person: text, quotes with their pages, each once, score."""
    lines = [printable(trace.answer or "(the model wrote nothing)")]
    lines += [printable(f'  "{citation.quote}"  {citation.document}, p. {citation.page}') for citation in dict.fromkeys(trace.citations)]
    unverified = [] if trace.abstained else trace.quotes[len(trace.citations) :]
    score = trace.score or 0.0
    caution = (
        "; no quote could be verified, take it with care" if not trace.abstained and not trace.citations else "; low, take it with care" * (score < LOW_SCORE)
    )
    if not trace.complete:
        caution += f"; cut off: {trace.metadata.get('error', 'the run did not finish')}"
    origin = f", from the cache ({trace.cache})" if trace.cache in ("exact", "semantic") else ""
    author = f"{trace.model} in {trace.release}" if trace.release else trace.model
    lines.append(printable(f"score {score:.2f} by {author}{origin}{caution}; trace {trace.id[:12]}"))
    return lines + [f"  {len(unverified)} quotes were not verbatim and are not shown"] * bool(unverified and trace.citations)
