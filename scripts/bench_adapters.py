"""`scripts/bench adapters`: a base and eight adapters on one engine under mixed load, against the base alone on the same engine.

The adapters are copies of a trained one, each with its matrices disturbed, registered under names and digests of their own in a
workspace that ends with the run. Rounds of the same prompts go to the base alone and to base and adapters mixed, in turn; then the
mixed load runs again while a ninth adapter is loaded and unloaded over and over. `ratio` is mixed over base alone, of the same rounds;
`spread` the quartiles over rounds. Two settings of max_loras: room for all eight, and for half of them (vLLM then swaps).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from serve.arguments import EngineSpec, ServedAdapter
from serve.engine import load_adapter, plan_engine, unload_adapter
from serve.load import CONCURRENCY, Load, Prompt, read_prompts, run_load
from serve.measured import trial_engine
from understudy.adapters import CONFIG, WEIGHTS, adapter_digest, find_adapter
from understudy.errors import AdapterError
from understudy.files import write_json
from understudy.progress import show_progress
from understudy.workspace import Workspace, open_workspace

ADAPTERS, PROMPTS = 8, 36
DISTURBANCE = 0.02  # of each value of B, relative: distinct weights that still answer


def register_copies(workspace: Workspace, adapter: str, count: int, root: Path) -> Workspace:
    """A workspace in `root` with the same models and data, and `count` disturbed copies of the adapter (without its proof)."""
    manifest, source = find_adapter(workspace, adapter)
    for shared in ("models", "datasets"):
        (root / shared).symlink_to((workspace.root / shared).resolve())
    weights = load_file(source / WEIGHTS)
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        scratch = root / "scratch"
        scratch.mkdir()
        shutil.copy2(source / CONFIG, scratch)
        moved = {name: _disturbed(value, generator) if "lora_B" in name else value for name, value in weights.items()}
        save_file(moved, scratch / WEIGHTS, metadata={"format": "pt"})
        digest = adapter_digest(scratch, manifest.served_base_digest)
        named = manifest.model_copy(update={"name": f"copy-{number}", "digest": digest, "created_at": float(number)})
        write_json(scratch / "manifest.json", named.model_dump())
        target = root / "adapters" / named.name / digest
        target.parent.mkdir(parents=True)
        scratch.rename(target)
    return Workspace(root, workspace.config, {})


def _disturbed(value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    noise = 1 + DISTURBANCE * torch.randn(value.shape, generator=generator)
    return (value.float() * noise).to(value.dtype).contiguous()


async def load_and_unload(url: str, adapter: ServedAdapter, until: asyncio.Event) -> tuple[list[float], list[str]]:
    """Load and unload an adapter until told to stop: (seconds of each load, faults)."""
    seconds: list[float] = []
    faults: list[str] = []
    while not until.is_set():
        began = time.perf_counter()
        try:
            await asyncio.to_thread(load_adapter, url, adapter)
            seconds.append(time.perf_counter() - began)
            await asyncio.to_thread(unload_adapter, url, adapter.name)
        except AdapterError as error:
            faults.append(error.message)
    return seconds, faults


async def load_while_changing(url: str, models: list[str], prompts: list[Prompt], adapter: ServedAdapter) -> tuple[Load, list[float], list[str]]:
    """The mixed load while `adapter`, which it does not ask, comes and goes."""
    stop = asyncio.Event()
    changing = asyncio.ensure_future(load_and_unload(url, adapter, stop))
    load = await run_load(url, models, prompts, CONCURRENCY)
    stop.set()
    return load, *await changing


def measure(spec: EngineSpec, prompts: list[Prompt], rounds: int, log: Path) -> Iterator[dict[str, Any]]:
    """The lines of one engine, as they are measured; its last adapter is the one that comes and goes."""
    *served, ninth = spec.adapters
    names, what = [spec.base, *(adapter.name for adapter in served)], f"base and {len(served)} adapters, max_loras {spec.settings.max_loras}"
    pairs: list[tuple[Load, Load]] = []
    with trial_engine(replace(spec, adapters=served), log, lambda text: print(text, file=sys.stderr)) as engine:
        asyncio.run(run_load(engine.url, names, prompts[: 2 * len(names)], CONCURRENCY))
        with show_progress("rounds", rounds) as bar:
            for number in range(rounds):
                order = (names, names[:1]) if number % 2 else (names[:1], names)
                done = [asyncio.run(run_load(engine.url, models, prompts, CONCURRENCY)) for models in order]
                pairs.append((done[0], done[1]) if number % 2 else (done[1], done[0]))
                bar.advance()
        for unit, figure in (("tokens/s", "tokens_per_second"), ("s/request, p50", "latency"), ("s to the first token, p50", "first_token")):
            yield line(f"adapters: {what}", unit, [(getattr(mixed, figure), getattr(base, figure)) for mixed, base in pairs], errors_of(pairs))
        changed = [asyncio.run(load_while_changing(engine.url, names, prompts, ninth)) for _ in range(max(2, rounds // 2))]
    undisturbed = statistics.median(mixed.tokens_per_second for mixed, _ in pairs)
    loads = [seconds for _, each, _ in changed for seconds in each]
    yield line(
        f"adapters: {what}, a ninth loaded and unloaded meanwhile",
        "tokens/s",
        [(load.tokens_per_second, undisturbed) for load, _, _ in changed],
        sum(len(load.faults) + len(faults) for load, _, faults in changed),
        peer_name="the same without changes",
        loads=len(loads),
        load_seconds=round(statistics.median(loads), 3) if loads else None,
        first=[fault for load, _, faults in changed for fault in (*load.faults, *faults)][:3],
    )


def errors_of(pairs: list[tuple[Load, Load]]) -> int:
    """Requests that failed."""
    return sum(len(load.faults) for pair in pairs for load in pair)


def line(bench: str, unit: str, pairs: list[tuple[float, float]], errors: int, peer_name: str = "the base alone, same engine", **more: Any) -> dict[str, Any]:
    """One comparison as scripts/bench prints it; `spread` is of the rounds' ratios."""
    ours, peer = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratios = [a / b for a, b in pairs]
    low, middle, high = statistics.quantiles(ratios, n=4)
    figures = {"ours": round(ours, 2), "peer": round(peer, 2), "peer_name": peer_name, "ratio": round(ours / peer, 3), "median_ratio": round(middle, 3)}
    return {"bench": bench, **figures, "unit": unit, "n": len(pairs), "spread": [round(low, 3), round(high, 3)], "errors": errors, **more}


def main() -> None:
    """Measure with the newest adapter of a workspace."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workspace", default="workspace")
    parser.add_argument("--adapter", default="handbooks")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--max-loras", type=int, nargs="+", default=[ADAPTERS, ADAPTERS // 2])
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("a spread needs two rounds")
    workspace = open_workspace(args.workspace)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        copies = register_copies(workspace, args.adapter, ADAPTERS + 1, Path(folder))
        prompts = read_prompts(workspace, PROMPTS)
        for max_loras in args.max_loras:
            spec = plan_engine(copies)
            spec = replace(spec, settings=spec.settings.model_copy(update={"max_loras": max_loras}))
            for printed in measure(spec, prompts, args.rounds, workspace.logs / "engine.log"):
                print(json.dumps(printed), flush=True)
                failed += printed["errors"]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
