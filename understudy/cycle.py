"""The whole loop once: new documents and traces in, a candidate on trial out, or the reason why not.

    ingest → traces → dataset → train → prove → calibrate → evaluate → release

What each stage came to is a line of the cycle's log (understudy/cycles.py). So a cycle that was killed goes on at its stage, no stage is
done twice, and whether another cycle is due is seen from what the last one had looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from understudy.adapters import is_served
from understudy.commands.wiring import remote_of
from understudy.cycle_inputs import drift_of, files_digest, learnt_by, live_release, new_traces, recipe_of, warm_start_of
from understudy.cycle_stages import Turn
from understudy.cycles import BEGIN, Cycle, Done, Seen, cycles_of, frozen_set, last_seen, new_cycle, run_stages
from understudy.errors import UnderstudyError, UsageError
from understudy.files import locked
from understudy.progress import Progress
from understudy.releases import standing
from understudy.workspace import Workspace


@dataclass(frozen=True)
class Look:
    """What speaks for and against a cycle now."""

    unfinished: Cycle | None
    seen: Seen
    folder: Path | None  # to ingest from
    documents: int = 0  # in the store, and new
    traces: int = 0  # new, and such as teach
    reasons: list[str] = field(default_factory=list)  # why one is due
    waits: list[str] = field(default_factory=list)  # why none is

    @property
    def is_due(self) -> bool:
        """Whether there is something to do."""
        return self.unfinished is not None or (bool(self.reasons) and not self.waits)


def look(workspace: Workspace, documents: str | None) -> Look:
    """Whether a cycle is due, without loading a model unless a few new traces make drift matter. Raises UsageError without an alias."""
    settings, alias = workspace.config.cycle, alias_of(workspace)
    known = cycles_of(workspace)
    unfinished = known[-1] if known and known[-1].end is None else None
    seen = last_seen(known)
    folder = Path(documents) if documents else workspace.root / settings.documents if settings.documents else None
    if unfinished:
        return Look(unfinished, seen, folder)
    reasons, waits = [], []
    canary = standing(workspace, alias).canary
    if canary:
        waits.append(f"{alias}@{canary.release[:12]} is on trial: `understudy release promote` it, or roll it back, first")
    if files_digest(workspace, folder) not in ("", seen.files):
        reasons.append(f"new or changed files in {folder}")
    fresh = set(workspace.store.document_ids(workspace.config.tenant)) - set(seen.documents)
    if fresh and settings.teacher:
        reasons.append(f"{len(fresh)} new documents for {settings.teacher} to ask about")
    found = len(new_traces(workspace, seen, learnt_by(workspace, warm_start_of(workspace, live_release(workspace, alias)))))
    if found >= settings.fewest_traces:
        reasons.append(f"{found} new traces")
    elif found and not reasons and not waits and "retrain" in (drift_of(workspace, alias) or {}).get("due", []):
        reasons.append(f"{found} new traces, and drift says that answers got worse")
    if not reasons:
        waits.append(f"{found} new traces, and no new documents; a cycle trains from {settings.fewest_traces} traces on (cycle.fewest_traces)")
    return Look(None, seen, folder, len(fresh), found, reasons, waits)


def alias_of(workspace: Workspace) -> str:
    """Whose releases a cycle makes: what answers the workspace's tenant. Raises UsageError where that is not set."""
    alias = workspace.config.releases.alias_of(workspace.config.tenant)
    if not alias:
        raise UsageError("a cycle makes releases, and no alias answers here", "set releases.default in understudy.yaml, for example to handbook")
    return alias


def run_cycle(
    workspace: Workspace,
    overrides: list[str],
    documents: str | None,
    anew: bool,
    refreeze: bool,
    report: Callable[[str], None],
    progress: Callable[[str, int], Progress],
) -> tuple[Look, Cycle | None]:
    """(what there was to do, the cycle that was run or gone on with); None where nothing was due.

    Raises StorageError where another cycle is at work, and what a stage raises: the cycle then goes on at that stage.
    """
    with locked(workspace.cycles / ".lock", held_by="another cycle is at work"):
        found = look(workspace, documents)
        if found.unfinished and anew:
            found.unfinished.enter("left", Done(verdict="abandoned", reason="another was begun in its place"), 0.0)
            found = look(workspace, documents)
        if not found.is_due and not anew:
            return found, None
        digest, copy = frozen_set(workspace, regression_source(workspace), refreeze)
        cycle = found.unfinished or begin(workspace, found, digest, anew)
        if cycle.outcomes[BEGIN]["regression"] != digest:
            raise UsageError(f"cycle {cycle.name} began on another regression set", "`understudy cycle --anew` begins another cycle")
        is_anew = cycle.outcomes[BEGIN]["anew"]
        seen = found.seen.model_copy(update={"traces": []}) if is_anew else found.seen
        with ExitStack() as held:
            turn = Turn(workspace, overrides, found.folder, copy, seen, report, progress, held)
            try:
                return found, run_stages(cycle, turn.stages, report)
            except (KeyboardInterrupt, UnderstudyError):
                report(f"cycle {cycle.name} stopped; what is done is kept, and `understudy cycle` goes on with it")
                raise


def begin(workspace: Workspace, found: Look, regression: str, anew: bool) -> Cycle:
    """A new cycle, once everything that would stop it later is in order. Raises UsageError, NotFoundError."""
    recipe, settings, alias = recipe_of(workspace), workspace.config.cycle, alias_of(workspace)
    if not is_served(recipe.method):
        raise UsageError(f"a cycle serves what it trains, and {recipe.method} cannot be served", "set cycle.recipe to one with method: lora")
    if settings.teacher:
        remote_of(workspace, settings.teacher)
    live = live_release(workspace, alias)
    return new_cycle(
        workspace,
        {
            "tenant": workspace.config.tenant,
            "alias": alias,
            "live": live.name if live else None,
            "warm_start": warm_start_of(workspace, live),
            "regression": regression,
            "anew": anew,
            "reasons": found.reasons,
        },
    )


def regression_source(workspace: Workspace) -> Path:
    """The configured regression set. Raises UsageError where there is none."""
    name = workspace.config.cycle.regression
    if not name:
        raise UsageError("a cycle measures its candidate on a fixed set of questions", "set cycle.regression to a question file that is never trained on")
    return workspace.root / name


def dry_run(workspace: Workspace, documents: str | None) -> dict[str, Any]:
    """Whether a cycle is due, what it would do, and what drift says; changes nothing."""
    found, settings, alias = look(workspace, documents), workspace.config.cycle, alias_of(workspace)
    live, regression = live_release(workspace, alias), regression_source(workspace)
    warm_start = warm_start_of(workspace, live)
    done = set(found.unfinished.outcomes) if found.unfinished else set()
    start = f"from {warm_start}, {100 * settings.replay:g} % of the rows repeated" if warm_start else f"from {workspace.config.models.base}, on every trace"
    teacher = f"{settings.teacher} keeps at most {settings.teacher_questions} traces in {settings.teacher_calls} calls" if settings.teacher else "no teacher"
    steps = {
        "ingest": str(found.folder or "nothing: no folder is configured"),
        "traces": f"{teacher}; {found.traces} new ones are in the store",
        "dataset": "what is new and may teach, nothing that the regression set asks",
        "train": f"{settings.recipe or workspace.config.recipe}, {start}",
        "prove": "the candidate",
        "calibrate": "the candidate, on the dataset's calibration side",
        "evaluate": f"{live.name if live else 'base'} against the candidate on {regression.name}",
        "release": f"{100 * settings.canary:g} % of the conversations of {alias}" if live else "wait for `understudy release promote`: nothing is live",
    }
    drift = drift_of(workspace, alias)
    return {
        "due": found.is_due,
        "reasons": found.reasons,
        "waits": found.waits if not found.is_due else [],
        "unfinished": found.unfinished.name if found.unfinished else None,
        "steps": [{"stage": name, "done": name in done, "would": would} for name, would in steps.items()],
        "drift": {key: drift[key] for key in ("subject", "due", "advice")} if drift else None,
    }
