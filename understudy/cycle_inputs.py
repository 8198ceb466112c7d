"""What a cycle sets out from: files and traces that are new, what is live, and the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from understudy.adapters import find_adapter
from understudy.cycles import Seen
from understudy.digests import digest_of
from understudy.errors import NotFoundError
from understudy.records import Trace, TraceFilter
from understudy.releases import ENGINE, Release, read_release, standing
from understudy.workspace import Workspace

if TYPE_CHECKING:
    from train.recipe import Recipe

DRIFT_CONFIDENCE, DRIFT_DAYS = 0.99, 7.0  # as `understudy drift` has them


def new_traces(workspace: Workspace, seen: Seen, learnt: frozenset[str]) -> list[Trace]:
    """What may teach, came since the cycles until now, and asks nothing that was learnt already (digests of questions)."""
    from train.dataset import students_of
    from train.ledger import is_teaching

    known, students = set(seen.traces), students_of(workspace)
    found = workspace.store.traces(workspace.config.tenant, TraceFilter(complete=True))
    return [trace for trace in found if trace.id not in known and is_teaching(trace, students) and digest_of(trace.question) not in learnt]


def learnt_by(workspace: Workspace, adapter: str | None) -> frozenset[str]:
    """The digests of the questions that an adapter learnt; none without one."""
    return frozenset(find_adapter(workspace, adapter)[0].question_digests) if adapter else frozenset()


def files_digest(workspace: Workspace, folder: Path | None) -> str:
    """What a folder's documents and their sidecars are, by content; empty without any. Raises NotFoundError where the folder is missing."""
    from rag.load import file_digest, find_files
    from rag.metadata import sidecar_of

    tenant, rows = workspace.config.tenant, []
    for file in find_files([folder] if folder else []):
        rows.append((str(file.resolve()), file_digest(file, tenant)))
        sidecar = sidecar_of(file)
        rows += [(str(sidecar.resolve()), file_digest(sidecar, tenant))] if sidecar.is_file() else []
    return digest_of(rows) if rows else ""


def recipe_of(workspace: Workspace) -> Recipe:
    """The recipe that cycles train by. Raises NotFoundError, UsageError."""
    from train.recipe import load_recipe

    name = workspace.config.cycle.recipe
    own = workspace.root / name
    return load_recipe(str(own) if name and own.is_file() else name or workspace.config.recipe, [])


def live_release(workspace: Workspace, alias: str) -> Release | None:
    """What is live under an alias."""
    digest = standing(workspace, alias).live
    return read_release(workspace, alias, digest) if digest else None


def warm_start_of(workspace: Workspace, live: Release | None) -> str | None:
    """The adapter that training goes on from."""
    has_one = live is not None and live.endpoint == ENGINE and live.adapters["answer"] != "base"
    return live.adapters["answer"] if live and has_one and workspace.config.cycle.warm_start else None


def drift_of(workspace: Workspace, alias: str) -> dict[str, Any] | None:
    """What `understudy drift` says of what answers under the alias; None where it has answered nothing."""
    from understudy.commands.drifting import measure_drift

    try:
        return measure_drift(workspace, alias, DRIFT_DAYS, DRIFT_CONFIDENCE)
    except NotFoundError:
        return None
