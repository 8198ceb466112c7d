"""ask, and traces import/export/ls/show."""

from __future__ import annotations

import asyncio
import json
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from understudy.commands import Outcome, printable, report, workspace_of
from understudy.errors import EndpointError, NotFoundError
from understudy.progress import show_progress
from understudy.records import Step, Trace
from understudy.workspace import Workspace

if TYPE_CHECKING:
    from rag.agent import Tools
    from rag.cached import Cached

LOW_SCORE = 0.5


def ask(args: Namespace) -> Outcome:
    """Answer one question from the documents."""
    from rag.retrieve import open_retriever
    from serve.command import engine_for
    from understudy.commands.wiring import cached_answers, default_model, resolve, tools_for
    from understudy.engines import find_engine, require_engine

    workspace = workspace_of(args)
    name = args.model or default_model(workspace)
    remote = name in workspace.config.remotes
    retriever = open_retriever(workspace)
    if not remote and not args.start and find_engine(workspace) is None:
        require_engine(workspace)
    with nullcontext() if remote else engine_for(workspace, report) as engine:
        model = resolve(workspace, name, engine)
        cached = cached_answers(workspace, model.name, retriever) if workspace.config.cache.enabled and not args.no_cache else None
        trace = asyncio.run(_answer(workspace, args.question, tools_for(workspace, model, retriever, _announce), cached))
    if not trace.complete:
        raise EndpointError(trace.metadata.get("error", "the run did not finish"), f"the partial trace is {trace.id[:12]}; see `understudy traces show`")
    return Outcome(answer_json(trace), answer_lines(trace))


async def _answer(workspace: Workspace, question: str, tools: Tools, cached: Cached | None) -> Trace:
    from rag.agent import run_agent
    from rag.cached import answer_cached

    async with tools.client:
        trace = await (answer_cached(question, cached, lambda: run_agent(question, tools)) if cached else run_agent(question, tools))
    await asyncio.to_thread(workspace.store.put_trace, trace)
    return trace


def _announce(step: Step) -> None:
    detail = {"plan": f"query: {step.parsed.get('query')}", "retrieve": f"{len(step.passage_ids)} passages"}.get(step.name, "")
    report(printable(f"{step.name} {step.seconds:.1f} s  {detail}".rstrip()))


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
    }


def answer_lines(trace: Trace) -> list[str]:
    """An answer for a person: text, quotes with their pages, score."""
    lines = [printable(trace.answer or "(the model wrote nothing)")]
    lines += [printable(f'  "{citation.quote}"  {citation.document}, p. {citation.page}') for citation in trace.citations]
    unverified = [] if trace.abstained else trace.quotes[len(trace.citations) :]
    score = trace.score or 0.0
    caution = (
        "; no quote could be verified, take it with care" if not trace.abstained and not trace.citations else "; low, take it with care" * (score < LOW_SCORE)
    )
    origin = f", from the cache ({trace.cache})" if trace.cache in ("exact", "semantic") else ""
    lines.append(f"score {score:.2f} by {trace.model}{origin}{caution}; trace {trace.id[:12]}")
    return lines + [f"  {len(unverified)} quotes were not verbatim and are not shown"] * bool(unverified and trace.citations)


def traces_import(args: Namespace) -> Outcome:
    """Import experts' answers."""
    from rag.traces import import_traces

    result = import_traces(workspace_of(args), Path(args.file), args.split, show_progress)
    lines = [f"{result['imported']} traces imported ({result['split']})"]
    return Outcome(result, lines + [f"skipped {row['id']} (row {row['line']}): {row['reason']}" for row in result["skipped"]])


def traces_export(args: Namespace) -> Outcome:
    """Write traces as chat JSONL."""
    from rag.traces import export_traces

    result = export_traces(workspace_of(args), args.source)
    for row in result["skipped"]:
        report(f"skipped {row['trace_id'][:12]}: {row['reason']}")
    return Outcome(result, [json.dumps(row, ensure_ascii=False) for row in result["traces"]])


def traces_ls(args: Namespace) -> Outcome:
    """List the traces."""
    workspace = workspace_of(args)
    traces = list(workspace.store.traces(workspace.config.tenant, args.source))
    rows = [{"id": t.id, "source": t.source, "model": t.model, "question": t.question, "score": t.score, "complete": t.complete} for t in traces]
    lines = [printable(f"{t.id[:12]}  {t.source:8} {t.model:24} {'–' if t.score is None else f'{t.score:.2f}'}  {t.question}") for t in traces]
    return Outcome({"traces": rows}, lines or ["no traces yet"])


def traces_show(args: Namespace) -> Outcome:
    """One trace, step by step."""
    trace = workspace_of(args).store.trace(args.trace)
    if trace is None:
        raise NotFoundError(f"no single trace begins with {args.trace!r}", "`understudy traces ls` lists them")
    lines = [printable(trace.question), ""]
    for step in trace.steps:
        lines.append(f"── {step.name}  {step.model}  {step.seconds:.2f} s  {step.usage.prompt_tokens} + {step.usage.completion_tokens} tokens")
        lines += [printable(f"[{message.role}] {message.content}") for message in step.messages]
        lines.append(printable(step.text) if step.text else f"{len(step.passage_ids)} passages")
    return Outcome(trace.model_dump(), [*lines, "", *answer_lines(trace)])
