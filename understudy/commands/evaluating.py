"""evaluate: models on the same questions, side by side; and its actions retrieval, compare and history."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from understudy.adapters import find_adapter
from understudy.commands import Outcome, workspace_of
from understudy.commands.evaluation_lines import gate_lines, robustness_lines, table_lines
from understudy.commands.evaluation_run import Plan, ask_models
from understudy.commands.wiring import adapters_of, calibration_folder, default_model, release_of, resolve_name
from understudy.digests import digest_of, digest_of_file
from understudy.errors import UsageError
from understudy.files import require_file
from understudy.records import Question, Trace
from understudy.settings.evaluating import Gate
from understudy.workspace import Workspace

if TYPE_CHECKING:
    from rag.eval.entailment import Entailment
    from rag.eval.leaks import Leak
    from rag.retrieve import Retriever


def evaluate(args: Namespace) -> Outcome:
    """Compare models on questions; exit 3 where a configured gate fails, and with --gate where any does not pass."""
    from rag.eval.opinions import add_opinions
    from rag.eval.provenance import machine_facts, package_versions
    from rag.eval.report import build_report
    from rag.eval.run import open_run
    from rag.retrieve import open_retriever

    if not args.questions:
        raise UsageError("evaluate needs questions", "name a question file with --questions")
    workspace = workspace_of(args)
    settings, path = workspace.config.evaluate, require_file(Path(args.questions))
    entailment = _entailment(workspace)
    retriever = open_retriever(workspace)
    plan = make_plan(workspace, path, args.models, retriever)
    if args.robustness is not None:
        plan = with_variants(workspace, plan, retriever, args.robustness, args.paraphrases)
    identity = identity_of(workspace, path, plan, retriever)
    folder = open_run(workspace.reports, identity)
    found = ask_models(workspace, plan, retriever, folder)
    build_report(
        plan.questions,
        {name: found.traces[name] for name in plan.names},
        retriever.chunks,
        folder,
        k=workspace.config.retrieval.k,
        concurrency=settings.concurrency,
        provenance={**identity, "served": found.served, "nli": settings.nli, "machine": machine_facts(), "packages": package_versions()},
        prices=found.prices,
        resamples=settings.resamples,
        seed=settings.seed,
        relative=workspace.relative,
        embed=retriever.embed,
        entailment=entailment,
        energy=found.energy,
        robustness=found.robustness,
        gates=plan.gates,
        candidates=candidates(workspace, plan.names),
        leaks=plan.leaks,
        notes=plan.notes,
    )
    result = add_opinions(folder)
    lines = [*table_lines(result), *robustness_lines(result["robustness"]), *(gate_lines(result) if settings.gates else []), *plan.notes]
    lines += [result["verdict"], f"report: {folder / 'report.html'}"]
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
    from rag.eval.modes import in_mode, split_mode
    from rag.eval.questions import read_questions
    from rag.eval.recorded_answers import TEACHER

    questions = [question for question in read_questions(path) if question.has_answer_key]
    if not questions:
        raise UsageError(f"{path} has no question with an answer", "give `answer` (null where the documents do not answer)")
    given = [split_mode(spec) for spec in models.split(",")] if models else [split_mode("base"), split_mode(default_model(workspace))]
    names = [in_mode(name if name == TEACHER else resolve_name(workspace, name), mode) for name, mode in given]
    if len(set(names)) < len(names):
        raise UsageError(f"nothing to compare: {', '.join(names)}", "train an adapter first, or name two different models with --models")
    gates = resolved_gates(workspace, names)
    check_gates(gates, names)
    questions, leaks, notes = guard(workspace, questions, names, retriever)
    recorded = recorded_models(workspace, questions, names)
    return Plan(questions, names, recorded, leaks, notes, gates)


def resolved_gates(workspace: Workspace, names: list[str]) -> dict[str, Gate]:
    """The configured gates; what is live is that of the last release's alias among the models."""
    from rag.eval.modes import split_mode
    from serve.release.evidence import live_name

    aliases = [release.alias for name in names if (release := release_of(workspace, split_mode(name)[0]))]
    gates = workspace.config.evaluate.gates
    if not aliases:
        return gates
    live = live_name(workspace, aliases[-1])
    return {metric: gate.model_copy(update={"against": live}) if gate.against == "live" else gate for metric, gate in gates.items()}


def with_variants(workspace: Workspace, plan: Plan, retriever: Retriever, limit: int, paraphrases: str | None) -> Plan:
    """The plan with its questions under other conditions, of `limit` questions (0: all); raises UsageError where none can be put so."""
    from rag.eval.questions import read_questions
    from rag.eval.variants import make_variants

    reworded = {question.id: question.question for question in read_questions(require_file(Path(paraphrases)))} if paraphrases else {}
    variants, left_out = make_variants(plan.questions, retriever, workspace.config.evaluate.seed, limit or None, reworded)
    if not variants:
        raise UsageError(
            "no question can be put under the conditions of --robustness",
            "give questions with quotes that stand whole in a passage, over a corpus with a dozen other passages, or leave the option out",
        )
    return replace(plan, variants=variants, left_out=left_out)


def guard(workspace: Workspace, questions: list[Question], names: list[str], retriever: Retriever) -> tuple[list[Question], list[Leak], list[str]]:
    """(questions that are new to every adapter and the embedder, the others, what to say of it), by evaluate.leaks; raises UsageError where it refuses."""
    from rag.eval.leaks import adapter_learner, embedder_learner, find_leaks, spoken, trained_questions
    from rag.eval.modes import split_mode
    from understudy.models import model_path

    policy = workspace.config.evaluate.leaks
    leaks: list[Leak] = []
    notes = []
    adapters = dict.fromkeys(adapter for name in names for adapter in adapters_of(workspace, split_mode(name)[0]))
    tuned = embedder_learner(model_path(workspace, workspace.config.models.embedder))
    for learner in [*(adapter_learner(find_adapter(workspace, adapter)[0]) for adapter in adapters), *([tuned] if tuned else [])]:
        trained = trained_questions(workspace.datasets, learner)
        if trained is None:
            notes.append(f"The dataset of {learner.name} is gone: whether a question is nearly one it trained on was not checked.")
        leaks += find_leaks(questions, learner, retriever.chunks.values(), trained, retriever.embed)
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
        known = len({leak.question_id for leak in leaks})
        notes.append(f"{known} questions are about documents that a model learnt from: they say little about other documents.")
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
    from rag.eval.modes import split_mode

    models = {name: split_mode(name)[0] for name in names[1:]}
    return [name for name, model in models.items() if adapters_of(workspace, model) or release_of(workspace, model)] or names[1:]


def identity_of(workspace: Workspace, path: Path, plan: Plan, retriever: Retriever) -> dict[str, object]:
    """What decides the answers, and so names the run's folder."""
    from rag.eval.modes import split_mode
    from rag.prompts import PROMPT_VERSION

    identity: dict[str, object] = {
        "questions": digest_of_file(path),
        "models": plan.names,
        "calibrations": [_calibration_digest(workspace, split_mode(name)[0]) for name in plan.asked],
        "agent": workspace.config.agent.model_dump(),
        "retrieval": workspace.config.retrieval.model_dump(),
        "prompt_version": PROMPT_VERSION,
        "generation": retriever.generation,
    }
    remotes = {name: workspace.config.remotes[name] for name in (split_mode(asked)[0] for asked in plan.asked) if name in workspace.config.remotes}
    if remotes:
        identity["remotes"] = {name: [endpoint.model, digest_of(endpoint.base_url)[:12]] for name, endpoint in remotes.items()}
    if plan.recorded:
        identity["recorded"] = {name: digest_of([trace.id for trace in traces]) for name, traces in plan.recorded.items()}
    return identity


def _entailment(workspace: Workspace) -> Entailment | None:
    """The configured NLI model."""
    if not workspace.config.evaluate.nli:
        return None
    from rag.eval.entailment import Entailment
    from understudy.models import model_path

    return Entailment(model_path(workspace, workspace.config.evaluate.nli))


def _calibration_digest(workspace: Workspace, name: str) -> str | None:
    from rag.validation import FILE

    path = calibration_folder(workspace, name) / FILE
    return digest_of_file(path) if path.exists() else None
