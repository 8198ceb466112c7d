"""`serve.merge: auto`: a lone adapter served inside its base's weights where that is measured to be faster, and proven.

An engine without LoRA is faster than one with it (docs/benchmarks.md). What it costs: the base is not served, no adapter can be
loaded beside it, and merging rounds the sum of base and adapter to bfloat16: so the merged engine is proven against PEFT with the
adapter unmerged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from serve.arguments import EngineSpec
from serve.load import read_prompts
from serve.measured import PROMPTS, Measured, fingerprint, measure_engine, recall, remember, trial_engine
from serve.prove import prove
from understudy.digests import digest_of_files
from understudy.errors import UnderstudyError
from understudy.files import read_json, write_json
from understudy.models import CARD
from understudy.progress import show_progress
from understudy.workspace import Workspace

MIN_GAIN = 1.10  # in throughput under load; less is not worth the base

Merger = Callable[[str, Path], object]  # writes an adapter (name@digest12), merged into its base, to a folder that is not there yet


def decide_merge(
    workspace: Workspace,
    spec: EngineSpec,
    merge: Merger,
    report: Callable[[str], None],
    open_trial: Callable[..., Any] = trial_engine,
    may_measure: bool = True,
) -> EngineSpec:
    """The spec, or with `serve.merge: auto` that of its lone adapter merged where that is faster and proven; the finding is kept.

    Starts three engines, one after the other, the first time. Raises EngineError where the plain one cannot run.
    """
    if spec.settings.merge != "auto":
        return spec
    if len(spec.adapters) != 1:
        report(f"serve.merge is auto: only a lone adapter can be merged, and there are {len(spec.adapters)} for this base")
        return spec
    key = fingerprint(spec, "merge")
    kept = recall(workspace, "merge", key)
    if kept is None and not may_measure:
        return spec
    if kept is None:
        report("measuring the adapter beside its base and merged into it, once for this adapter and these settings")
        kept = _measure(workspace, spec, merge, report, open_trial)
        remember(workspace, "merge", key, kept)
    report(kept["because"])
    return merged_spec(workspace, spec, merge) if kept["use"] else spec


def merged_spec(workspace: Workspace, spec: EngineSpec, merge: Merger) -> EngineSpec:
    """The engine of the spec's one adapter alone, in its base's weights; merges them where that has not been done."""
    [adapter] = spec.adapters
    folder = workspace.merged / adapter.name
    if not folder.exists():
        merge(adapter.name, folder)
    if not (folder / CARD).exists():
        digest = digest_of_files(sorted(folder.glob("*.safetensors")))
        write_json(folder / CARD, {"id": spec.base, "origin": f"{adapter.name} merged into its base", "weights_digest": digest})
    return replace(spec, base_path=folder, base_digest=read_json(folder / CARD)["weights_digest"], adapters=[], merged=adapter.name)


def judge(beside: Measured, merged: Measured, proven: bool) -> dict[str, Any]:
    """The decision as it is kept and told."""
    gain, alone = merged.throughput / beside.throughput, beside.alone_latency / merged.alone_latency
    use = proven and gain >= MIN_GAIN and alone >= 1.0
    figures = f"{gain:.2f} × the throughput under load, {alone:.2f} × the speed alone"
    why = "" if proven else "; the merged weights are not proven"
    because = f"the adapter is served {'merged into its base' if use else 'beside its base'}: merged it has {figures}{why}"
    return {"use": use, "because": because, "gain": round(gain, 3), "beside": beside.to_json(), "merged": merged.to_json(), "proven": proven}


def _measure(workspace: Workspace, spec: EngineSpec, merge: Merger, report: Callable[[str], None], open_trial: Callable[..., Any]) -> dict[str, Any]:
    prompts, log = read_prompts(workspace, PROMPTS), workspace.logs / "engine.log"
    [adapter] = spec.adapters
    with open_trial(spec, log, report) as engine:
        beside = measure_engine(engine.url, [adapter.name], prompts)
    try:
        with open_trial(merged_spec(workspace, spec, merge), log, report) as engine:
            merged = measure_engine(engine.url, [adapter.name], prompts)
            proven = bool(prove(workspace, adapter.name, engine, report, show_progress)["passed"])
        with open_trial(spec, log, report) as engine:  # once more: the machine may have been busy the first time
            beside = max(beside, measure_engine(engine.url, [adapter.name], prompts), key=lambda each: each.throughput)
    except UnderstudyError as error:
        return {"use": False, "because": f"the adapter is served beside its base: merged it cannot be served and proven: {error.message}"}
    return judge(beside, merged, proven)
