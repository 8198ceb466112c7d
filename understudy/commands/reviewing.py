"""evaluate review and evaluate judge: a second opinion on a finished evaluation, by people or by a model."""

from __future__ import annotations

import asyncio
import socket
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from understudy.commands import Outcome, report, workspace_of
from understudy.errors import EngineError, NotFoundError, UsageError
from understudy.progress import show_progress
from understudy.records import Question, Trace
from understudy.terminal import printable
from understudy.workspace import Workspace

if TYPE_CHECKING:
    from rag.eval.contest import Contest
    from rag.eval.review import Review


def review(args: Namespace) -> Outcome:
    """Serve blind pairs to a person until all are labelled and it is ended, or Ctrl-C; exit 130 where pairs are left."""
    from rag.eval.contest import find_run, open_contest, read_answers
    from rag.eval.labels import LONGEST_NAME
    from rag.eval.opinions import add_opinions
    from rag.eval.review import draw_review

    if args.pairs < 1:
        raise UsageError("there is nothing to review", "--pairs is at least 1")
    if not 0 <= args.port < 65536:
        raise UsageError(f"{args.port} is no port", "give one from 1024 to 65535, or leave --port out")
    reviewer = " ".join((args.reviewer or "").split())
    if len(reviewer) > LONGEST_NAME or not reviewer.isprintable():
        raise UsageError(f"that is no reviewer's name: {printable(reviewer[:LONGEST_NAME])}", f"give --reviewer at most {LONGEST_NAME} printable characters")
    workspace = workspace_of(args)
    contest = open_contest(find_run(workspace.reports, args.name), _two(args.models))
    pairs = read_answers(contest, _recorded(workspace, contest))
    chosen = draw_review(contest, pairs, _chunks(workspace, pairs), args.pairs, args.seed, reviewer)
    if not chosen.shown:
        raise NotFoundError(f"{contest.a} and {contest.b} say the same on every question", "name two other models of the run with --models")
    if chosen.waiting():
        _serve(chosen, args.port)
    add_opinions(contest.folder)
    found = {"run": workspace.relative(contest.folder), **chosen.summary()}
    return Outcome(found, review_lines(found), 130 if found["waiting"] else 0)


def judge(args: Namespace) -> Outcome:
    """Let a model compare every pair, in both orders."""
    from rag.eval.contest import find_run, open_contest, read_answers
    from rag.eval.judge import ask_judge, summarise_judge
    from rag.eval.modes import split_mode
    from rag.eval.opinions import add_opinions
    from serve.command import engine_for
    from understudy.commands.wiring import resolve, resolve_name

    workspace = workspace_of(args)
    contest = open_contest(find_run(workspace.reports, args.name), _two(args.models))
    name = resolve_name(workspace, args.model)
    if name in (split_mode(contest.a)[0], split_mode(contest.b)[0]):
        raise UsageError(f"{name} would judge its own answers", "name another model with --model")
    pairs = read_answers(contest, _recorded(workspace, contest))
    chunks = _chunks(workspace, pairs)
    with nullcontext() if name in workspace.config.remotes else engine_for(workspace, report) as engine:
        path = ask_judge(contest, pairs, resolve(workspace, name, engine), chunks, workspace.config.evaluate.concurrency, show_progress)
    add_opinions(contest.folder)
    found = {"run": workspace.relative(contest.folder), **summarise_judge(contest, path)}
    return Outcome(found, judge_lines(found))


def review_lines(found: dict[str, Any]) -> list[str]:
    """What people found, for people."""
    labels, left = found["labels"], f", {found['waiting']} to go" if found["waiting"] else ""
    same = [f"{found['same']} questions were not asked about: both models say the same"] * bool(found["same"])
    counts = f"{found['a']} is better {labels['a']} times, {found['b']} {labels['b']} times; both good {labels['both']}, both bad {labels['neither']}"
    between = [_kappa_line(" and ".join(name or "unnamed" for name in row["reviewers"]) + " agree on", row) for row in found["between"] if row["n"]]
    return [f"{found['n']} pairs labelled{left}", counts, *same, *between, *_agreement_lines(found)]


def judge_lines(found: dict[str, Any]) -> list[str]:
    """What a judge found, for people."""
    counts, bias = found["counts"], found["position_bias"]
    by_place = "" if bias["value"] is None else f"; the place alone decided {bias['value']:.2f}{_ends(bias)} of the pairs"
    unreadable = f", {found['unreadable']} without a verdict" if found["unreadable"] else ""
    return [
        f"{found['judge']}: {found['a']} is better {counts['a']} times, {found['b']} {counts['b']} times, {counts['tie']} ties{unreadable}{by_place}",
        *_agreement_lines(found),
        f"{found['calls']} calls, {found['prompt_tokens']} + {found['completion_tokens']} tokens, {found['cost']:.4g} money",
    ]


def _agreement_lines(found: dict[str, Any]) -> list[str]:
    return [_kappa_line(f"agrees with {name:20}", agreed) for name, agreed in found["agreement"].items() if agreed["n"]]


def _kappa_line(what: str, agreed: dict[str, Any]) -> str:
    kappa = "undefined" if agreed["kappa"] is None else f"{agreed['kappa']:.2f}{_ends(agreed)}"
    return f"{what} {100 * agreed['observed']:3.0f} % of {agreed['n']}, kappa {kappa}"


def _ends(found: dict[str, Any]) -> str:
    return "" if found["low"] is None else f" [{found['low']:.2f}, {found['high']:.2f}]"


def _serve(chosen: Review, port: int) -> None:
    """Serve the pages on this machine alone until they are finished or interrupted. Raises EngineError where the port is taken."""
    import uvicorn

    from rag.eval.review import build_app
    from serve.gateway.server import Server

    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen()  # whoever is quicker than the server waits
    except OSError as error:
        raise EngineError(f"cannot listen on port {port}: {error.strerror}", "choose another with --port, or leave it out") from error
    own = listener.getsockname()[1]
    app = build_app(chosen, (f"127.0.0.1:{own}", f"localhost:{own}"), lambda: setattr(server, "should_exit", True))
    server = Server(uvicorn.Config(app, lifespan="off", log_config=None, access_log=False, server_header=False, ws="none", timeout_graceful_shutdown=2))
    report(f"{len(chosen.waiting())} pairs to label at http://127.0.0.1:{own}/{chosen.secret}/")
    report("Ctrl-C ends it; the same command goes on where it stopped")
    with listener:
        asyncio.run(server.serve(sockets=[listener]))


def _two(models: str | None) -> list[str] | None:
    return models.split(",") if models else None


def _recorded(workspace: Workspace, contest: Contest) -> Callable[[], list[Trace]]:
    from rag.eval.recorded_answers import recorded_answers

    questions = [Question(id=question_id, question=text) for question_id, text in zip(contest.ids, contest.questions, strict=True)]
    return lambda: recorded_answers(questions, workspace.store.traces(workspace.config.tenant))


def _chunks(workspace: Workspace, pairs: list[tuple[Trace, Trace]]) -> dict[str, Any]:
    """The passages that the runs were shown, by id, of this tenant."""
    wanted = {chunk_id for pair in pairs for trace in pair for step in trace.steps for chunk_id in step.passage_ids}
    return {chunk_id: chunk for chunk_id, chunk in workspace.store.chunks_by_id(wanted).items() if chunk.tenant == workspace.config.tenant}
