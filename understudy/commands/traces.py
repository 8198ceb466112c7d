"""traces ls/show/simulate/import/export."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections import deque
from contextlib import nullcontext
from datetime import UTC, datetime

from understudy.commands import Outcome, report, workspace_of
from understudy.errors import NotFoundError, UsageError
from understudy.progress import show_progress
from understudy.records import Trace, TraceFilter
from understudy.terminal import inert_json, printable

STOPPED = {
    "questions": "all that were asked for",
    "chunks": "every chunk was visited",
    "calls": "the budget of calls is reached: a larger --calls goes on",
    "tokens": "the budget of tokens is reached: a larger --tokens goes on",
}


def traces_ls(args: Namespace) -> Outcome:
    """The newest traces that meet the filters, newest last."""
    workspace = workspace_of(args)
    found = workspace.store.traces(workspace.config.tenant, filter_of(args))
    traces = deque(found, maxlen=max(0, args.limit))
    rows = [
        {
            "id": t.id,
            "created_at": t.created_at,
            "source": t.source,
            "model": t.model,
            "question": t.question,
            "outcome": t.outcome,
            "score": t.score,
            "complete": t.complete,
            "citations": len(t.citations),
            "seconds": round(sum(step.seconds for step in t.steps), 3),
            "unverified": t.metadata.get("unverified"),
            "escalated": "escalated" in t.metadata,
        }
        for t in traces
    ]
    escalated, answered = sum(bool(row["escalated"]) for row in rows), sum(row["source"] == "model" for row in rows)
    shares = [f"{escalated} of {answered} runs went to the teacher"] * bool(escalated)
    return Outcome({"traces": rows, "escalated": escalated}, [_line(trace) for trace in traces] + shares or ["no such traces"])


def traces_show(args: Namespace) -> Outcome:
    """One trace as a tree."""
    from understudy.commands.trace_view import trace_lines

    workspace = workspace_of(args)
    trace = workspace.store.trace(args.trace)
    if trace is None or trace.tenant != workspace.config.tenant:
        raise NotFoundError(f"no single trace begins with {args.trace!r}", "`understudy traces ls` lists them")
    shown = workspace.store.chunks_by_id({chunk_id for step in trace.steps for chunk_id in step.passage_ids} | {c.chunk_id for c in trace.citations})
    chunks = {chunk_id: chunk for chunk_id, chunk in shown.items() if chunk.tenant == trace.tenant}
    result = trace.model_dump() | {"passages": {chunk_id: chunk.text for chunk_id, chunk in sorted(chunks.items())}}
    return Outcome(result, trace_lines(trace, chunks, in_colour=sys.stdout.isatty()))


def traces_import(args: Namespace) -> Outcome:
    """Import experts' answers, or another system's calls."""
    from rag.traces import import_traces

    result = import_traces(workspace_of(args), args.source, args.split, show_progress, args.format)
    lines = [f"{result['imported']} traces imported ({result['format']}, {result['split']})"]
    if result["unverified"]:
        lines.append(f"{result['unverified']} of them are unverified: `dataset build` leaves them out unless told --unverified")
    named = [f"skipped {row['id']} (row {row['line']})" if "id" in row else f"skipped row {row['line']}" for row in result["skipped"]]
    return Outcome(result, lines + [printable(f"{name}: {row['reason']}") for name, row in zip(named, result["skipped"], strict=True)])


def traces_simulate(args: Namespace) -> Outcome:
    """Let a teacher write and answer questions."""
    from rag.recorded import Budget
    from rag.retrieve import open_retriever
    from rag.simulate import Plan, simulate
    from serve.command import engine_for
    from understudy.commands.wiring import resolve

    workspace = workspace_of(args)
    if args.teacher != "base" and args.teacher not in workspace.config.remotes:
        raise UsageError(f"{args.teacher} is no teacher", "name one of `remotes` in understudy.yaml, or base; an adapter would learn from its own answers")
    if not 0 <= args.unanswerable < 1 or min(args.questions, args.concurrency) < 1:
        raise UsageError("there is nothing to simulate", "--questions and --concurrency are at least 1, --unanswerable is a share from 0 to less than 1")
    plan = Plan(args.questions, args.unanswerable, Budget(args.calls, args.tokens), args.concurrency, args.seed)
    retriever = open_retriever(workspace)
    with nullcontext() if args.teacher in workspace.config.remotes else engine_for(workspace, report) as engine:
        result = simulate(workspace, resolve(workspace, args.teacher, engine), retriever, plan, show_progress)
    kept, tokens = result["kept"], result["tokens"]
    lines = [
        f"{kept['answerable'] + kept['unanswerable']} traces kept ({kept['unanswerable']} without an answer), {sum(result['rejected'].values())} rejected;"
        f" {result['calls']} calls, {tokens['prompt']} + {tokens['completion']} tokens; {STOPPED[result['stopped']]}",
        *(f"rejected {count}: {reason}" for reason, count in result["rejected"].items()),
        f"report: {result['report']}",
    ]
    return Outcome(result, lines)


def traces_export(args: Namespace) -> Outcome:
    """Write traces as chat JSONL."""
    from rag.traces import export_traces

    result = export_traces(workspace_of(args), filter_of(args), args.split)
    for row in result["skipped"]:
        report(f"skipped {row['trace_id'][:12]}: {row['reason']}")
    return Outcome(result, [inert_json(row, indent=None) for row in result["traces"]])


def filter_of(args: Namespace) -> TraceFilter:
    """The filter that the options name; raises UsageError for a day that is none."""
    return TraceFilter(
        source=args.source,
        model=args.model,
        contains=args.contains,
        min_score=args.min_score,
        max_score=args.max_score,
        since=_day(args.since, "--since"),
        until=_day(args.until, "--until"),
        outcome=args.outcome,
    )


def _day(text: str | None, option: str) -> float | None:
    """An ISO day or time, UTC unless it says otherwise, in seconds since the epoch."""
    if text is None:
        return None
    try:
        when = datetime.fromisoformat(text)
    except ValueError as error:
        raise UsageError(f"{option} {text!r} is not a day or time", "write for example 2026-11-21 or 2026-11-21T14:30") from error
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


def _line(trace: Trace) -> str:
    when = datetime.fromtimestamp(trace.created_at, UTC).strftime("%Y-%m-%d %H:%M")
    score = "  – " if trace.score is None else f"{trace.score:.2f}"
    mark = "  (unverified)" if "unverified" in trace.metadata else ""
    return printable(f"{trace.id[:12]}  {when}  {trace.source:8} {trace.outcome:10} {score}  {trace.model[:24]:24}  {' '.join(trace.question.split())}{mark}")
