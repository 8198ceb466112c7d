"""`serve --tune`: a few engine settings measured on this machine with the workspace's own prompts, the best written to the settings.

Coordinate descent: one setting after the other, each tried at a few values with the best of the others. Only settings that change no
answer are tried; prefix caching is not, because single prompts do not show what it gives to a run of several steps. In the end the
settings in force are measured again, so that a machine that was busy at first does not make others look better. A trial that was
measured is kept, so an interrupted tuning goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from serve.arguments import CPU_BATCHED_TOKENS, CPU_SEQS, EngineSpec
from serve.load import CONCURRENCY, read_prompts
from serve.measured import PROMPTS, Measured, fingerprint, measure_engine, recall, remember, trial_engine
from understudy.config import FILE_NAME
from understudy.errors import EngineError
from understudy.progress import Progress
from understudy.settings_file import set_values
from understudy.workspace import Workspace

GRID: dict[str, dict[str, list[Any]]] = {
    "cpu": {"max_num_batched_tokens": [256, 512, 1024, 2048], "max_num_seqs": [8, 16, 32]},
    "cuda": {"max_num_batched_tokens": [2048, 4096, 8192, 16384], "max_num_seqs": [64, 128, 256, 512]},
}
MIN_GAIN = 1.03  # of throughput; less is within what two runs differ by
MAX_WAIT = 1.05  # × the alone latency of the settings in force: throughput is not bought with a single user's time

Settings = dict[str, Any]


def tune(
    workspace: Workspace,
    spec: EngineSpec,
    report: Callable[[str], None],
    progress: Callable[[str, int], Progress],
    write: bool,
    open_trial: Callable[..., Any] = trial_engine,
) -> dict[str, Any]:
    """Measure the grid of the spec's device; the result is the command's JSON. `write`: set what is better in understudy.yaml.

    Raises EngineError where the settings in force cannot run. Interrupted, it leaves no engine behind, and its trials in run/.
    """
    prompts = read_prompts(workspace, PROMPTS)
    model = spec.adapters[-1].name if spec.adapters else spec.base
    grid, current = GRID[spec.device], settings_in_force(spec)
    trials: dict[str, tuple[Settings, Measured | None]] = {}
    total = 2 + sum(len(values) - (current[name] in values) for name, values in grid.items())
    with progress("tuning", total) as bar:

        def try_out(settings: Settings, turn: str = "tune") -> Measured | None:
            key = fingerprint(with_settings(spec, settings), [[message.content for message in prompt] for prompt in prompts], model)
            decision = f"{turn} " + " ".join(f"{name}={value}" for name, value in settings.items())
            kept = recall(workspace, decision, key)
            if kept is None:
                kept = _measure(workspace, with_settings(spec, settings), model, prompts, report, open_trial)
                remember(workspace, decision, key, kept)
            measured = Measured(**kept["measured"]) if kept["measured"] else None
            trials[decision] = (settings, measured)
            bar.advance(note=decision)
            report(describe(settings, measured, kept.get("fault", "")))
            return measured

        first = try_out(current)
        if first is None:
            raise EngineError("the engine cannot run with the settings in force, so there is nothing to better", "see logs/engine.log")
        best, measured = descend(current, first, grid, try_out)
        again = try_out(current, "again") if best != current else first
        if again is None or not is_better(measured, again, again):
            best, measured = current, again or first
    changed = {name: value for name, value in best.items() if value != current[name]}
    if changed and write:
        set_values(workspace.root / FILE_NAME, {f"serve.{name}": value for name, value in changed.items()})
    return {
        "model": model, "concurrency": CONCURRENCY, "prompts": len(prompts), "before": (again or first).to_json(), "best": measured.to_json(), "settings": best,
        "changed": changed, "written": bool(changed and write), "gain": round(measured.throughput / (again or first).throughput, 3),
        "trials": [{"settings": settings, "measured": each.to_json() if each else None} for settings, each in trials.values()],
    }  # fmt: skip


def descend(current: Settings, first: Measured, grid: dict[str, list[Any]], try_out: Callable[[Settings], Measured | None]) -> tuple[Settings, Measured]:
    """The best settings found, one coordinate after the other, and their figures."""
    best, figures = current, first
    for name, values in grid.items():
        for value in values:
            if value == best[name]:
                continue
            measured = try_out({**best, name: value})
            if measured is not None and is_better(measured, figures, first):
                best, figures = {**best, name: value}, measured
    return best, figures


def is_better(measured: Measured, than: Measured, first: Measured) -> bool:
    """More throughput than the noise of runs, in every run, and no longer alone than the settings in force allow."""
    gains = measured.throughput >= MIN_GAIN * than.throughput and min(measured.tokens_per_second) > max(than.tokens_per_second)
    return gains and not measured.faults and measured.alone_latency <= MAX_WAIT * first.alone_latency


def settings_in_force(spec: EngineSpec) -> Settings:
    """The tuned settings as they are now, what is unset by its default on this device."""
    settings = spec.settings
    seqs = settings.max_num_seqs or (CPU_SEQS if spec.device == "cpu" else None)
    tokens = settings.max_num_batched_tokens or (CPU_BATCHED_TOKENS if spec.device == "cpu" else None)
    return {"max_num_batched_tokens": tokens, "max_num_seqs": seqs}


def with_settings(spec: EngineSpec, settings: Settings) -> EngineSpec:
    """The spec under other settings."""
    return replace(spec, settings=spec.settings.model_copy(update=settings))


def describe(settings: Settings, measured: Measured | None, fault: str = "") -> str:
    """A trial as a line."""
    named = ", ".join(f"{name} {'default' if value is None else value}" for name, value in settings.items())
    if measured is None:
        return f"{named}: cannot run: {fault}"
    return f"{named}: {measured.throughput:.0f} tokens/s at {CONCURRENCY} at once, {measured.alone_latency:.2f} s alone"


def _measure(
    workspace: Workspace, spec: EngineSpec, model: str, prompts: list[Any], report: Callable[[str], None], open_trial: Callable[..., Any]
) -> dict[str, Any]:
    try:
        with open_trial(spec, workspace.logs / "engine.log", lambda _: None) as engine:
            return {"measured": measure_engine(engine.url, [model], prompts).to_json()}
    except EngineError as error:
        report(error.message)
        return {"measured": None, "fault": error.message[:200]}
