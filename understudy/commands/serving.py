"""serve, prove, calibrate: what needs an engine. One that is running is used; else one runs for the command."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

from understudy.adapters import find_adapter, require_served
from understudy.client import StepModels
from understudy.commands import Outcome, report, workspace_of
from understudy.commands.wiring import answering_name, answering_tools, calibration_folder, resolve, resolve_name, tools_for
from understudy.digests import digest_of_file
from understudy.errors import UsageError
from understudy.files import require_file
from understudy.progress import show_progress
from understudy.records import Question, TraceFilter
from understudy.terminal import figure
from understudy.workspace import Workspace

MARKS = {"pass": "ok  ", "undecided": "??? ", "fail": "FAIL"}
VERDICTS = {
    "pass": "proven",
    "undecided": "NOT proven, and not refuted: its dataset has too few rows; it must take no traffic",
    "fail": "NOT proven: it must take no traffic",
}


def serve(args: Namespace) -> Outcome:
    """Serve until interrupted; with --tune, measure settings for it instead."""
    from serve.command import run_serve, run_tune
    from serve.gateway.agents import Wiring
    from understudy.commands.answers import answer_json

    workspace = workspace_of(args)
    if args.dry_run and not args.tune:
        raise UsageError("--dry-run is for --tune", "`understudy serve --tune --dry-run` measures and writes nothing")
    if args.tune:
        return _tuned(run_tune(workspace, show_progress, write=not args.dry_run))

    def merge(adapter: str, folder: Path) -> None:
        from train.exchange import export_adapter

        export_adapter(workspace, adapter, folder, "merged")

    run_serve(workspace, Wiring(partial(answering_tools, may_cache=True), answer_json), merge)
    return Outcome({})


def _tuned(result: dict[str, Any]) -> Outcome:
    changed = ", ".join(f"serve.{name} {value}" for name, value in result["changed"].items())
    if not changed:
        return Outcome(result, [f"the settings in force are the best of {len(result['trials'])} for {result['model']}; nothing is changed"])
    done = "written to understudy.yaml" if result["written"] else "not written"
    return Outcome(result, [f"best of {len(result['trials'])} for {result['model']}: {changed}, {result['gain']:.2f} × the throughput; {done}"])


def serve_pause(args: Namespace) -> Outcome:
    """Free the engine's memory until it is resumed."""
    from serve.pausing import pause

    serving = pause(workspace_of(args), report)
    return Outcome(serving.model_dump(), [f"the engine behind {serving.url} is paused: requests get 503 and Retry-After until `understudy serve resume`"])


def serve_resume(args: Namespace) -> Outcome:
    """Bring the engine back."""
    from serve.pausing import resume

    serving = resume(workspace_of(args), report)
    return Outcome(serving.model_dump(), [f"the engine behind {serving.url} answers again"])


def prove(args: Namespace) -> Outcome:
    """Prove an adapter on the engine that serves it; exit 3 where it fails."""
    from serve.command import engine_for
    from serve.prove import prove as run

    workspace = workspace_of(args)
    require_served(find_adapter(workspace, args.adapter)[0])
    if args.matrix:
        return _matrix(workspace, args.adapter)
    with engine_for(workspace, report) as engine:
        result = run(workspace, args.adapter, engine, report, show_progress)
    lines = [f"{MARKS[check['status']]} {check['name']}: {check['value']} (limit {check['limit']})" for check in result["checks"]]
    lines.append(f"{result['adapter']} is {VERDICTS[result['verdict']]}")
    return Outcome(result, lines, 0 if result["passed"] else 3)


def _matrix(workspace: Workspace, adapter: str) -> Outcome:
    from serve.command import engine_for
    from serve.matrix import measure_matrix

    with engine_for(workspace, report) as engine:
        result = measure_matrix(workspace, adapter, engine, report, show_progress)
    lines = [f"{'pair':<58} {'loss':>7} {'against trained':>16} {'95 %':>20} {'nats apart':>11}"]
    lines += [_matrix_line(row) for row in result["matrix"]]
    return Outcome(result, [*lines, f"{result['rows']} rows, {result['answer_tokens']} answer tokens; to serve: {result['recommended']}"])


def _matrix_line(row: dict[str, Any]) -> str:
    interval = f"[{row['low']:+.4f}, {row['high']:+.4f}]"
    return f"{row['pair']:<58} {row['loss']:7.4f} {row['loss_difference']:+16.4f} {interval:>20} {row['distance']:11.4f}"


def calibrate(args: Namespace) -> Outcome:
    """Fit a model's validation score and its decision to abstain."""
    from rag.calibrate import calibrate as fit
    from rag.calibrate import calibration_json, calibration_key
    from rag.eval.questions import read_questions
    from rag.retrieve import open_retriever
    from rag.validation import read_calibration
    from serve.command import engine_for

    workspace = workspace_of(args)
    name = answering_name(workspace, resolve_name(workspace, args.model))
    folder = calibration_folder(workspace, name)
    path = require_file(Path(args.questions))
    questions = read_questions(path)
    refuse_trained_on(workspace, questions, [name])
    retriever = open_retriever(workspace)
    key, kept = calibration_key(digest_of_file(path), retriever, folder.name, workspace.config.agent), read_calibration(folder)
    if kept and kept.key == key:
        return Outcome(calibration_json(kept), [f"{name} was calibrated on these questions already"])
    with engine_for(workspace, report) as engine:
        tools = tools_for(workspace, StepModels.alike(resolve(workspace, name, engine)), retriever)
        training = workspace.store.traces(workspace.config.tenant, TraceFilter(source="expert", complete=True))
        result = asyncio.run(fit(questions, key, tools, folder, workspace.config.evaluate.concurrency, show_progress, training))
    lines = [
        f"{name} calibrated on {result['questions']} questions; cross-validated: AUROC of its score {figure(result['auroc'])},"
        f" abstention accuracy {figure(result['abstention_accuracy'])}"
    ]
    for fit_name, weights in result["weights"].items():
        lines.append(f"  {fit_name}: " + (", ".join(f"{signal} {weight:+.2f}" for signal, weight in weights.items()) or "the same for every answer"))
    if result["worked_examples"]:
        lines.append("  worked examples: " + "; ".join(result["worked_examples"]))
    lines.append("  policy: " + ", ".join(f"{name} {setting}" for name, setting in result["policy"].items()))
    return Outcome(result, lines)


def refuse_trained_on(workspace: Workspace, questions: list[Question], names: list[str]) -> None:
    """Never evaluate an adapter on a question it was trained on; raises UsageError."""
    from understudy.digests import digest_of

    asked = {digest_of(question.question): question for question in questions}
    for name in names:
        if name == "base" or name in workspace.config.remotes:
            continue
        manifest, _ = find_adapter(workspace, name)
        if manifest.lineage == "unknown":
            report(f"{name} was imported, and what it was trained on is unknown: it may have seen these questions")
        seen = asked.keys() & set(manifest.question_digests)
        if seen:
            first = asked[sorted(seen)[0]].question
            raise UsageError(f"{name} was trained on {len(seen)} of these questions, such as {first!r}", "evaluate on questions it has not seen")
