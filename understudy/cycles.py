"""Cycles on disk: cycles/NUMBER/stages.jsonl, a line for each stage that is done, and the frozen regression sets.

A line is on disk before the next stage begins; one that was cut off has not happened, and its stage runs again. The first line says
what the cycle set out from, the one with a verdict ends it. cycles/regression.jsonl tells which regression set holds since when.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError

from understudy.digests import digest_of_file
from understudy.errors import NotFoundError, StorageError, UsageError
from understudy.files import append_jsonl, read_json, write_bytes, write_json
from understudy.records import SCHEMA_VERSION, Record
from understudy.workspace import Workspace

Verdict = Literal["canary", "ready", "refused", "nothing", "abandoned"]  # ready: passed, and nothing is live yet
STAGES, SEEN, REGRESSION = "stages.jsonl", "seen.json", "regression.jsonl"
BEGIN = "begin"


class Done(Record):
    """What a stage came to; a verdict ends the cycle."""

    outcome: dict[str, Any] = Field(default_factory=dict)
    verdict: Verdict | None = None
    reason: str = ""  # of the verdict


class Line(Done):
    """A stage that is done."""

    schema_version: int = SCHEMA_VERSION
    stage: str
    at: float  # seconds since the epoch
    seconds: float


class Frozen(Record):
    """A regression set, from a moment on."""

    schema_version: int = SCHEMA_VERSION
    at: float  # seconds since the epoch
    tenant: str
    digest: str
    source: str  # where it came from


class Seen(Record):
    """What the cycles until now have looked at: anything else is new."""

    files: str = ""  # digest of the documents folder's files
    documents: list[str] = Field(default_factory=list)  # ids
    traces: list[str] = Field(default_factory=list)  # ids of those that teach


@dataclass(frozen=True)
class Cycle:
    """One cycle, as far as it has come."""

    folder: Path
    lines: list[Line]

    @property
    def name(self) -> str:
        """Its number."""
        return self.folder.name

    @property
    def outcomes(self) -> dict[str, dict[str, Any]]:
        """What each stage that is done came to."""
        return {line.stage: line.outcome for line in self.lines}

    @property
    def end(self) -> Line | None:
        """The line with the verdict, once there is one."""
        return next((line for line in self.lines if line.verdict), None)

    def enter(self, stage: str, done: Done, seconds: float) -> Cycle:
        """The cycle with one stage more, on disk when this returns."""
        line = Line(stage=stage, at=time.time(), seconds=round(seconds, 2), **done.model_dump())
        append_jsonl(self.folder / STAGES, line.model_dump())
        return Cycle(self.folder, [*self.lines, line])

    def see(self, seen: Seen) -> None:
        """Keep what this cycle looked at; it counts once the cycle has ended."""
        write_json(self.folder / SEEN, seen.model_dump())


Stage = Callable[[Cycle], Done]
Row = TypeVar("Row", bound=Record)


def run_stages(cycle: Cycle, stages: Mapping[str, Stage], report: Callable[[str], None]) -> Cycle:
    """Run the stages that are not done, in order, until one ends the cycle."""
    for place, (name, stage) in enumerate(stages.items(), 1):
        if cycle.end is None and name not in cycle.outcomes:
            report(f"cycle {cycle.name}, {place}/{len(stages)}: {name}")
            began = time.monotonic()
            done = stage(cycle)
            cycle = cycle.enter(name, done, time.monotonic() - began)
    return cycle


def cycles(workspace: Workspace) -> list[Cycle]:
    """Every cycle that began, oldest first. Raises StorageError."""
    found = [Cycle(file.parent, _read(file, Line)) for file in sorted(workspace.cycles.glob(f"*/{STAGES}"))]
    return [cycle for cycle in found if cycle.lines]


def cycles_of(workspace: Workspace) -> list[Cycle]:
    """Those of the workspace's tenant. Raises StorageError."""
    return [cycle for cycle in cycles(workspace) if cycle.outcomes[BEGIN]["tenant"] == workspace.config.tenant]


def new_cycle(workspace: Workspace, outcome: dict[str, Any]) -> Cycle:
    """Begin a cycle; its first line says what it sets out from."""
    number = max((int(cycle.name) for cycle in cycles(workspace)), default=0) + 1
    return Cycle(workspace.cycles / f"{number:04d}", []).enter(BEGIN, Done(outcome=outcome), 0.0)


def last_seen(known: list[Cycle]) -> Seen:
    """What the last cycle that ended had looked at; abandoned ones have not."""
    for cycle in reversed(known):
        if cycle.end and cycle.end.verdict != "abandoned" and (cycle.folder / SEEN).exists():
            return Seen.model_validate(read_json(cycle.folder / SEEN))
    return Seen()


def frozen_set(workspace: Workspace, source: Path, refreeze: bool) -> tuple[str, Path]:
    """(digest, the workspace's own copy) of the tenant's regression set, which is `source` from the first time on.

    Raises NotFoundError, StorageError where the copy is damaged, UsageError where the source has changed since and `refreeze` does not take it.
    """
    log, tenant = workspace.cycles / REGRESSION, workspace.config.tenant
    history = [frozen for frozen in _read(log, Frozen) if frozen.tenant == tenant]
    held = history[-1].digest if history else None
    if not source.is_file():
        raise NotFoundError(f"the regression set {source} does not exist", "check cycle.regression")
    digest = digest_of_file(source)
    if held and digest != held and not refreeze:
        raise UsageError(
            f"the regression set {source} is not the one that was frozen ({held[:12]}): figures before and after would not compare",
            f"restore it from {workspace.relative(_copy(workspace, held))}; or `understudy cycle --refreeze`, which the record will say",
        )
    if digest != held:
        write_bytes(_copy(workspace, digest), source.read_bytes())
        append_jsonl(log, Frozen(at=time.time(), tenant=tenant, digest=digest, source=workspace.relative(source)).model_dump())
    copy = _copy(workspace, digest)
    if not copy.is_file() or digest_of_file(copy) != digest:
        raise StorageError(f"{copy} is not the regression set of its digest", f"copy {source} there")
    return digest, copy


def _copy(workspace: Workspace, digest: str) -> Path:
    return workspace.cycles / f"regression-{digest[:12]}.jsonl"


def _read(file: Path, model: type[Row]) -> list[Row]:
    """The rows of a log; a line that was cut off is none."""
    try:
        return [model.model_validate_json(line) for line in file.read_bytes().split(b"\n")[:-1]] if file.exists() else []
    except ValidationError as error:
        raise StorageError(f"{file} holds a line that is none of its own: {error.errors()[0]['msg']}", "restore the file from a backup") from error
