"""What an evaluation asks of whom, and the asking."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from understudy.commands import report
from understudy.commands.wiring import needs_engine, resolve_steps, tools_for
from understudy.progress import show_progress
from understudy.records import Question, Trace
from understudy.settings.evaluating import Gate
from understudy.workspace import Workspace

if TYPE_CHECKING:
    from rag.agent import Tools
    from rag.eval.leaks import Leak
    from rag.eval.robustness import Asked
    from rag.eval.variants import Variant
    from rag.retrieve import Retriever


@dataclass(frozen=True)
class Plan:
    """What an evaluation asks of whom."""

    questions: list[Question]
    names: list[str]  # resolved, with their modes (rag.eval.modes), the baseline first
    recorded: dict[str, list[Trace]]  # answers of models that are not asked
    leaks: list[Leak]
    notes: list[str]
    gates: dict[str, Gate]  # each against a resolved name
    variants: list[Variant] = field(default_factory=list)  # the questions under the conditions of --robustness
    left_out: int = 0  # questions that could not be put under them

    @property
    def asked(self) -> list[str]:
        """The models that are asked."""
        return [name for name in self.names if name not in self.recorded]


@dataclass(frozen=True)
class Answers:
    """What the models answered, and what it took."""

    traces: dict[str, list[Trace]]  # by model
    prices: dict[str, tuple[float, float]]  # money per million prompt and completion tokens
    energy: dict[str, dict[str, Any]]
    robustness: Asked | None
    served: dict[str, str]  # by the engine


def ask_models(workspace: Workspace, plan: Plan, retriever: Retriever, folder: Path) -> Answers:
    """Ask every model that is not recorded; the engine runs only where one needs it."""
    from contextlib import nullcontext

    from rag.eval.energy import Meter, keep_energy
    from rag.eval.modes import split_mode
    from rag.eval.robustness import ask_variants
    from rag.eval.run import evaluate_models, require_served
    from rag.eval.variants import conditions
    from serve.command import engine_for

    concurrency, seed = workspace.config.evaluate.concurrency, workspace.config.evaluate.seed
    meters = {name: Meter() for name in plan.asked}

    async def run(tools: dict[str, Tools]) -> tuple[dict[str, list[Trace]], Asked | None]:
        try:
            runners = {name: meters[name].metered(_runner(of_name)) for name, of_name in tools.items()}
            traces = await evaluate_models(plan.questions, runners, folder, concurrency, show_progress)
            if not plan.variants:
                return traces, None
            return traces, await ask_variants(plan.variants, conditions(), tools, folder, concurrency, plan.left_out, seed, show_progress)
        finally:
            for of_name in tools.values():
                await of_name.__aexit__()

    is_needed = any(needs_engine(workspace, split_mode(name)[0]) for name in plan.asked)
    with engine_for(workspace, report) if is_needed else nullcontext() as engine:
        models = {name: resolve_steps(workspace, split_mode(name)[0], engine) for name in plan.asked}
        served = {"base": engine.base, "base_digest": engine.base_digest, "precision": engine.precision} if engine else {}
        if served:
            require_served(folder, served)
        try:
            traces, asked = asyncio.run(run({name: _in_mode(tools_for(workspace, model, retriever), name) for name, model in models.items()}))
        finally:
            energy = keep_energy(folder, meters)
    prices = {name: (model.answer.price_in, model.answer.price_out) for name, model in models.items()}
    return Answers({**traces, **plan.recorded}, prices | _prices_of_recorded(workspace, plan), energy, asked, served)


def _prices_of_recorded(workspace: Workspace, plan: Plan) -> dict[str, tuple[float, float]]:
    """What recorded answers cost, where one configured remote wrote them all."""
    prices = {}
    for name, traces in plan.recorded.items():
        [writer, *others] = {trace.model for trace in traces}
        if not others and writer in workspace.config.remotes:
            endpoint = workspace.config.remotes[writer]
            prices[name] = (endpoint.price_in, endpoint.price_out)
    return prices


def _in_mode(tools: Tools, name: str) -> Tools:
    """The tools of a model, in the mode that its name in the report says."""
    from rag.eval.modes import split_mode

    return replace(tools, settings=tools.settings.model_copy(update={"mode": split_mode(name)[1]}))


def _runner(tools: Tools) -> Callable[[Question], Awaitable[Trace]]:
    from rag.agent import run_agent

    return lambda question: run_agent(question.question, tools, {"question_id": question.id})
