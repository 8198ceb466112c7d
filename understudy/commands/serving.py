"""serve, prove, calibrate, evaluate: what needs an engine. One that is running is used; else one runs for the command."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from understudy.adapters import find_adapter
from understudy.commands import Outcome, report, workspace_of
from understudy.commands.wiring import calibration_folder, default_model, resolve, resolve_name, tools_for
from understudy.config import require_file
from understudy.digests import digest_of_file
from understudy.errors import UsageError
from understudy.progress import show_progress
from understudy.records import Question, Trace
from understudy.workspace import Workspace

if TYPE_CHECKING:
    from rag.agent import Tools
    from understudy.client import Model


def serve(args: Namespace) -> Outcome:
    """Serve until interrupted."""
    from serve.command import run_serve

    run_serve(workspace_of(args))
    return Outcome({})


def prove(args: Namespace) -> Outcome:
    """Prove an adapter on the engine that serves it; exit 3 where it fails."""
    from serve.command import engine_for
    from serve.prove import prove as run

    workspace = workspace_of(args)
    find_adapter(workspace, args.adapter)
    with engine_for(workspace, report) as engine:
        result = run(workspace, args.adapter, engine, report, show_progress)
    lines = [f"{'ok  ' if c['passed'] else 'FAIL'} {c['name']}: {c['value']} (limit {c['limit']})" for c in result["checks"]]
    lines.append(f"{result['adapter']} is {'proven' if result['passed'] else 'NOT proven: it must take no traffic'}")
    return Outcome(result, lines, 0 if result["passed"] else 3)


def calibrate(args: Namespace) -> Outcome:
    """Fit a model's validation score and its decision to abstain."""
    from rag.calibrate import calibrate as fit
    from rag.calibrate import calibration_json, calibration_key
    from rag.eval.questions import read_questions
    from rag.retrieve import open_retriever
    from rag.validation import read_calibration
    from serve.command import engine_for

    workspace = workspace_of(args)
    name = resolve_name(workspace, args.model)
    folder = calibration_folder(workspace, name)
    path = require_file(Path(args.questions))
    questions = read_questions(path)
    refuse_trained_on(workspace, questions, [name])
    retriever = open_retriever(workspace)
    key, kept = calibration_key(digest_of_file(path), retriever, folder.name), read_calibration(folder)
    if kept and kept.key == key:
        return Outcome(calibration_json(kept), [f"{name} was calibrated on these questions already"])
    with engine_for(workspace, report) as engine:
        tools = tools_for(workspace, resolve(workspace, name, engine), retriever)
        result = asyncio.run(fit(questions, key, tools, folder, workspace.config.evaluate.concurrency, show_progress))
    lines = [
        f"{name} calibrated on {result['questions']} questions; cross-validated: AUROC of its score {_number(result['auroc'])},"
        f" abstention accuracy {_number(result['abstention_accuracy'])}"
    ]
    for fit_name, weights in result["weights"].items():
        lines.append(f"  {fit_name}: " + (", ".join(f"{signal} {weight:+.2f}" for signal, weight in weights.items()) or "the same for every answer"))
    lines.append("  policy: " + ", ".join(f"{name} {setting}" for name, setting in result["policy"].items()))
    return Outcome(result, lines)


def evaluate(args: Namespace) -> Outcome:
    """Compare models on questions; with --gate, exit 3 where one does not beat the first."""
    from rag.eval.provenance import machine_facts, package_versions
    from rag.eval.questions import read_questions
    from rag.eval.report import build_report
    from rag.eval.run import evaluate_models, open_run
    from rag.prompts import PROMPT_VERSION
    from rag.retrieve import open_retriever
    from serve.command import engine_for

    workspace = workspace_of(args)
    path = require_file(Path(args.questions))
    questions = [question for question in read_questions(path) if question.has_answer_key]
    if not questions:
        raise UsageError(f"{path} has no question with an answer", "give `answer` (null where the documents do not answer)")
    names = [resolve_name(workspace, name) for name in (args.models.split(",") if args.models else ["base", default_model(workspace)])]
    if len(set(names)) < len(names):
        raise UsageError(f"nothing to compare: {', '.join(names)}", "train an adapter first, or name two different models with --models")
    refuse_trained_on(workspace, questions, names)
    retriever = open_retriever(workspace)
    settings = workspace.config.evaluate
    identity: dict[str, object] = {
        "questions": digest_of_file(path),
        "models": names,
        "calibrations": [_calibration_digest(workspace, name) for name in names],
        "agent": workspace.config.agent.model_dump(),
        "retrieval": workspace.config.retrieval.model_dump(),
        "prompt_version": PROMPT_VERSION,
        "generation": retriever.generation,
    }
    folder = open_run(workspace.reports, identity)

    async def run(runners: dict[str, Tools]) -> dict[str, list[Trace]]:
        try:
            asked = {name: _runner(tools) for name, tools in runners.items()}
            return await evaluate_models(questions, asked, folder, settings.concurrency, show_progress)
        finally:
            for tools in runners.values():
                await tools.client.__aexit__()

    with engine_for(workspace, report) as engine:
        models: dict[str, Model] = {name: resolve(workspace, name, engine) for name in names}
        traces = asyncio.run(run({name: tools_for(workspace, model, retriever) for name, model in models.items()}))
        served = {"base": engine.base, "base_digest": engine.base_digest}
    result = build_report(
        questions,
        traces,
        retriever.chunks,
        folder,
        k=workspace.config.retrieval.k,
        concurrency=settings.concurrency,
        provenance={**identity, "served": served, "machine": machine_facts(), "packages": package_versions()},
        prices={name: (model.price_in, model.price_out) for name, model in models.items()},
        resamples=settings.resamples,
        seed=settings.seed,
        relative=workspace.relative,
    )
    is_better = bool(result["gates"]) and all(gate["passed"] for gate in result["gates"])
    return Outcome(result, [*table_lines(result), result["verdict"], f"report: {folder / 'report.html'}"], 3 if args.gate and not is_better else 0)


def _runner(tools: Tools) -> Callable[[Question], Awaitable[Trace]]:
    from rag.agent import run_agent

    return lambda question: run_agent(question.question, tools, {"question_id": question.id})


def _calibration_digest(workspace: Workspace, name: str) -> str | None:
    from rag.validation import FILE

    path = calibration_folder(workspace, name) / FILE
    return digest_of_file(path) if path.exists() else None


def refuse_trained_on(workspace: Workspace, questions: list[Question], names: list[str]) -> None:
    """Never evaluate an adapter on a question it was trained on; raises UsageError."""
    from understudy.digests import digest_of

    asked = {digest_of(question.question): question for question in questions}
    for name in names:
        if name == "base" or name in workspace.config.remotes:
            continue
        seen = asked.keys() & set(find_adapter(workspace, name)[0].question_digests)
        if seen:
            first = asked[sorted(seen)[0]].question
            raise UsageError(f"{name} was trained on {len(seen)} of these questions, such as {first!r}", "evaluate on questions it has not seen")


def table_lines(result: dict[str, Any]) -> list[str]:
    """Models side by side: each metric with its difference and interval where one was computed."""
    models = result["models"]
    shown = [name for name in models[0]["metrics"] if any(model["metrics"][name] is not None for model in models)]
    pairs = {(pair["b"], pair["metric"]): pair for pair in result["pairs"]}
    header = f"{'metric':24}" + "".join(f"{model['name'][:28]:>30}" for model in models) + "   difference [95 %]"
    lines = [header, "─" * len(header)]
    for metric in shown:
        cells = "".join(f"{_number(model['metrics'][metric]):>30}" for model in models)
        pair = pairs.get((models[-1]["name"], metric)) if len(models) == 2 else None
        interval = f"   {pair['difference']:+.3f} [{pair['low']:+.3f}, {pair['high']:+.3f}]" if pair and pair["low"] is not None else ""
        lines.append(f"{metric:24}{cells}{interval}")
    return lines


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
