"""evaluate: models on the same questions, side by side; and its actions retrieval, compare and history."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from understudy.adapters import find_adapter
from understudy.commands import Outcome, report, workspace_of
from understudy.commands.wiring import adapters_of, calibration_folder, default_model, needs_engine, release_of, resolve_name, resolve_steps, tools_for
from understudy.config import Gate, require_file
from understudy.digests import digest_of, digest_of_file
from understudy.errors import UsageError
from understudy.progress import show_progress
from understudy.records import Question, Trace
from understudy.workspace import Workspace

if TYPE_CHECKING:
    from rag.agent import Tools
    from rag.eval.leaks import Leak
    from rag.retrieve import Retriever
    from understudy.client import Model


@dataclass(frozen=True)
class Plan:
    """What an evaluation asks of whom."""

    questions: list[Question]
    names: list[str]  # resolved, the baseline first
    recorded: dict[str, list[Trace]]  # answers of models that are not asked
    leaks: list[Leak]
    notes: list[str]
    gates: dict[str, Gate]  # each against a resolved name

    @property
    def asked(self) -> list[str]:
        """The models that are asked."""
        return [name for name in self.names if name not in self.recorded]


def evaluate(args: Namespace) -> Outcome:
    """Compare models on questions; exit 3 where a configured gate fails, and with --gate where any does not pass."""
    from rag.eval.provenance import machine_facts, package_versions
    from rag.eval.report import build_report
    from rag.eval.run import open_run
    from rag.retrieve import open_retriever

    if not args.questions:
        raise UsageError("evaluate needs questions", "name a question file with --questions")
    workspace = workspace_of(args)
    settings, path = workspace.config.evaluate, require_file(Path(args.questions))
    retriever = open_retriever(workspace)
    plan = make_plan(workspace, path, args.models, retriever)
    identity = _identity(workspace, path, plan, retriever)
    folder = open_run(workspace.reports, identity)
    traces, models, served = _ask(workspace, plan, retriever, folder)
    result = build_report(
        plan.questions,
        {name: traces[name] for name in plan.names},
        retriever.chunks,
        folder,
        k=workspace.config.retrieval.k,
        concurrency=settings.concurrency,
        provenance={**identity, "served": served, "machine": machine_facts(), "packages": package_versions()},
        prices={name: (model.price_in, model.price_out) for name, model in models.items()},
        resamples=settings.resamples,
        seed=settings.seed,
        relative=workspace.relative,
        embed=retriever.embed,
        gates=plan.gates,
        candidates=candidates(workspace, plan.names),
        leaks=plan.leaks,
        notes=plan.notes,
    )
    lines = [*table_lines(result), *(gate_lines(result) if settings.gates else []), *plan.notes, result["verdict"], f"report: {folder / 'report.html'}"]
    return Outcome(result, lines, exit_code([gate["status"] for gate in result["gates"]], bool(settings.gates), args.gate))


def exit_code(statuses: list[str], are_configured: bool, must_pass: bool) -> int:
    """3 where a configured gate failed; with --gate, where any did not pass, configured or not, and where there was none."""
    is_refused = not statuses or set(statuses) != {"pass"} if must_pass else are_configured and "fail" in statuses
    return 3 if is_refused else 0


def compare(args: Namespace) -> Outcome:
    """Two evaluations against each other, question by question."""
    from rag.eval.compare import compare_reports, comparison_lines

    result = compare_reports(require_file(Path(args.a)), require_file(Path(args.b)))
    return Outcome(result, comparison_lines(result))


def retrieval(args: Namespace) -> Outcome:
    """Retrieval alone, on questions that say what is to be found; no engine runs."""
    from rag.eval.questions import read_questions
    from rag.eval.retrieval import evaluate_retrieval, retrieval_lines
    from rag.retrieve import open_retriever

    workspace = workspace_of(args)
    questions, settings = read_questions(require_file(Path(args.file))), workspace.config.evaluate
    result = evaluate_retrieval(questions, open_retriever(workspace), args.k or workspace.config.retrieval.k, settings.resamples, settings.seed)
    return Outcome(result, retrieval_lines(result))


def history(args: Namespace) -> Outcome:
    """Every evaluation over time, and a page that plots them."""
    from rag.eval.history import history_lines, read_history, write_history

    workspace = workspace_of(args)
    runs, path = read_history(workspace.reports), workspace.reports / "history.html"
    if not runs:
        return Outcome({"runs": [], "history": None}, ["no evaluations yet"])
    write_history(runs, path)
    return Outcome({"runs": runs, "history": workspace.relative(path)}, [*history_lines(runs), f"plots: {path}"])


def make_plan(workspace: Workspace, path: Path, models: str | None, retriever: Retriever) -> Plan:
    """Resolve the models and leave out what they have seen; raises UsageError where nothing is left to compare."""
    from rag.eval.gates import check_gates
    from rag.eval.questions import read_questions

    questions = [question for question in read_questions(path) if question.has_answer_key]
    if not questions:
        raise UsageError(f"{path} has no question with an answer", "give `answer` (null where the documents do not answer)")
    given = models.split(",") if models else ["base", default_model(workspace)]
    names = [name if name == "teacher" else resolve_name(workspace, name) for name in given]
    if len(set(names)) < len(names):
        raise UsageError(f"nothing to compare: {', '.join(names)}", "train an adapter first, or name two different models with --models")
    gates = resolved_gates(workspace, names)
    check_gates(gates, names)
    questions, leaks, notes = guard(workspace, questions, names, retriever)
    recorded = recorded_models(workspace, questions, names)
    return Plan(questions, names, recorded, leaks, notes, gates)


def resolved_gates(workspace: Workspace, names: list[str]) -> dict[str, Gate]:
    """The configured gates; what is live is that of the last release's alias among the models."""
    from serve.release.evidence import live_name

    aliases = [release.alias for name in names if (release := release_of(workspace, name))]
    gates = workspace.config.evaluate.gates
    if not aliases:
        return gates
    live = live_name(workspace, aliases[-1])
    return {metric: gate.model_copy(update={"against": live}) if gate.against == "live" else gate for metric, gate in gates.items()}


def guard(workspace: Workspace, questions: list[Question], names: list[str], retriever: Retriever) -> tuple[list[Question], list[Leak], list[str]]:
    """(questions that are new to every adapter, the others, what to say of it), as evaluate.leaks has it; raises UsageError where it refuses."""
    from rag.eval.leaks import find_leaks, spoken, trained_questions

    policy = workspace.config.evaluate.leaks
    leaks: list[Leak] = []
    notes = []
    for adapter in dict.fromkeys(adapter for name in names for adapter in adapters_of(workspace, name)):
        manifest = find_adapter(workspace, adapter)[0]
        trained = trained_questions(workspace.datasets, manifest)
        if trained is None:
            notes.append(f"The dataset of {adapter} is gone: whether a question is nearly one it trained on was not checked.")
        leaks += find_leaks(questions, manifest, retriever.chunks.values(), trained, retriever.embed)
    barred = {leak.question_id for leak in leaks if leak.kind != "document" or policy != "allow-documents"}
    if barred and policy != "set-apart":
        of_barred = [leak for leak in leaks if leak.question_id in barred]
        raise UsageError(
            f"not new to {', '.join(dict.fromkeys(leak.model for leak in of_barred))}: {spoken(of_barred)}",
            "evaluate on other questions, or --set evaluate.leaks=set-apart (leaves these out) or allow-documents (new questions about seen documents)",
        )
    kept = [question for question in questions if question.id not in barred]
    if not kept:
        raise UsageError(f"no question is new to every model: {spoken(leaks)}", "evaluate on other questions")
    if barred:
        notes.append(f"{len(barred)} questions were set apart and are in no figure: {spoken(leaks)}.")
    elif leaks:
        notes.append(f"{len(leaks)} questions are about documents that an adapter learnt from: they say little about other documents.")
    return kept, leaks, notes


def recorded_models(workspace: Workspace, questions: list[Question], names: list[str]) -> dict[str, list[Trace]]:
    """The recorded teacher's traces, where it is named; a configured remote of that name is asked where they are not whole."""
    from rag.eval.recorded_answers import TEACHER, recorded_answers

    if TEACHER not in names:
        return {}
    try:
        return {TEACHER: recorded_answers(questions, workspace.store.traces(workspace.config.tenant))}
    except UsageError:
        if TEACHER in workspace.config.remotes:
            return {}
        raise


def candidates(workspace: Workspace, names: list[str]) -> list[str]:
    """The models that gates are put to: the adapters and releases, or where there are none every model but the first."""
    return [name for name in names[1:] if adapters_of(workspace, name) or release_of(workspace, name)] or names[1:]


def _identity(workspace: Workspace, path: Path, plan: Plan, retriever: Retriever) -> dict[str, object]:
    """What decides the answers, and so names the run's folder."""
    from rag.prompts import PROMPT_VERSION

    identity: dict[str, object] = {
        "questions": digest_of_file(path),
        "models": plan.names,
        "calibrations": [_calibration_digest(workspace, name) for name in plan.asked],
        "agent": workspace.config.agent.model_dump(),
        "retrieval": workspace.config.retrieval.model_dump(),
        "prompt_version": PROMPT_VERSION,
        "generation": retriever.generation,
    }
    if plan.recorded:
        identity["recorded"] = {name: digest_of([trace.id for trace in traces]) for name, traces in plan.recorded.items()}
    return identity


def _ask(workspace: Workspace, plan: Plan, retriever: Retriever, folder: Path) -> tuple[dict[str, list[Trace]], dict[str, Model], dict[str, str]]:
    """(traces by model, the models that were asked, what the engine serves); the engine runs only where a model needs it."""
    from contextlib import nullcontext

    from rag.eval.run import evaluate_models
    from serve.command import engine_for

    async def run(tools: dict[str, Tools]) -> dict[str, list[Trace]]:
        try:
            asked = {name: _runner(of_model) for name, of_model in tools.items()}
            return await evaluate_models(plan.questions, asked, folder, workspace.config.evaluate.concurrency, show_progress)
        finally:
            for of_model in tools.values():
                await of_model.__aexit__()

    is_needed = any(needs_engine(workspace, name) for name in plan.asked)
    with engine_for(workspace, report) if is_needed else nullcontext() as engine:
        models = {name: resolve_steps(workspace, name, engine) for name in plan.asked}
        traces = asyncio.run(run({name: tools_for(workspace, model, retriever) for name, model in models.items()}))
        served = {"base": engine.base, "base_digest": engine.base_digest} if engine else {}
    return {**traces, **plan.recorded}, {name: of_name.answer for name, of_name in models.items()}, served


def _runner(tools: Tools) -> Callable[[Question], Awaitable[Trace]]:
    from rag.agent import run_agent

    return lambda question: run_agent(question.question, tools, {"question_id": question.id})


def _calibration_digest(workspace: Workspace, name: str) -> str | None:
    from rag.validation import FILE

    path = calibration_folder(workspace, name) / FILE
    return digest_of_file(path) if path.exists() else None


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


def gate_lines(result: dict[str, Any]) -> list[str]:
    """A line for every gate: outcome, difference with its interval, and how many more questions would tell."""
    lines = []
    for gate in result["gates"]:
        limit = f"min gain {gate['min_gain']:g}" if "min_gain" in gate else f"max loss {gate['max_loss']:g}"
        found = "not measured" if gate["low"] is None else f"{gate['difference']:+.3f} [{gate['low']:+.3f}, {gate['high']:+.3f}]"
        more = f", about {gate['more_questions']} more questions would tell" if gate["more_questions"] else ""
        lines.append(f"gate {gate['status']:9} {gate['model']} against {gate['against']}, {gate['metric']} ({limit}): {found}{more}")
    return lines


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
