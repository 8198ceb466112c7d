"""Which generation of each tenant is live, and which are kept by name: one file of pointers, changed under a lock.

A folder that nothing points at is deleted. What a document's removal takes out of the corpus it takes out of every
snapshot too (rag/reindex.py), so a snapshot brings back an earlier choice of documents, chunker or embedder, never a
deleted text.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from understudy.errors import NotFoundError, UsageError
from understudy.files import locked, read_json, write_json

POINTERS = "pointers.json"
FORMER_POINTERS = "live.json"  # {tenant: generation}, before there were snapshots
NAME = r"[a-z0-9][a-z0-9._-]{0,63}"


def live_generation(root: Path, tenant: str) -> str:
    """The tenant's live generation; raises NotFoundError while nothing has been ingested."""
    generation = _read(root)["live"].get(tenant)
    if not generation:
        raise NotFoundError("the corpus is empty", "run `understudy ingest PATH` first")
    return str(generation)


def snapshots(root: Path, tenant: str) -> dict[str, dict[str, Any]]:
    """{name: {generation, created_at}} of a tenant, oldest first."""
    kept: dict[str, dict[str, Any]] = _read(root)["snapshots"].get(tenant, {})
    return dict(sorted(kept.items(), key=lambda item: item[1]["created_at"]))


def snapshot(root: Path, tenant: str, name: str) -> str:
    """Keep the live generation under a name of its own; returns it. Raises UsageError where the name is taken or no name."""
    if not re.fullmatch(NAME, name):
        raise UsageError(f"{name!r} is no name for a snapshot", "use small letters, digits, dots and dashes")
    generation = live_generation(root, tenant)
    with _changing(root) as pointers:
        kept = pointers["snapshots"].setdefault(tenant, {})
        if kept.get(name, {}).get("generation", generation) != generation:
            raise UsageError(f"there is a snapshot {name} already", "choose another name; `understudy index ls` lists them")
        kept.setdefault(name, {"generation": generation, "created_at": time.time()})
    return generation


def replace_snapshot(root: Path, tenant: str, name: str, generation: str | None) -> None:
    """Point a snapshot at another generation whose folder is there, or drop it."""
    with _changing(root) as pointers:
        kept = pointers["snapshots"].get(tenant, {})
        if generation is None:
            kept.pop(name, None)
        elif name in kept and (root / generation).is_dir():
            kept[name]["generation"] = generation


def make_live(root: Path, tenant: str, generation: str | None, still_right: Callable[[], bool] = lambda: True) -> bool:
    """Point the tenant at a generation (None: at nothing).

    False, and nothing changed, where its folder has gone or `still_right`, asked while nobody else can change a pointer, says no.
    """
    with _changing(root) as pointers:
        if (generation and not (root / generation).is_dir()) or not still_right():
            return False
        pointers["live"][tenant] = generation
    return True


def warm_file(root: Path, generation: str) -> Path:
    """Where a generation's warm set lies: beside its folder, which never changes, and deleted with it."""
    return root / f"{generation}.warm.npz"


def _read(root: Path) -> dict[str, Any]:
    if (root / POINTERS).exists():
        return dict(read_json(root / POINTERS))
    return {"live": dict(read_json(root / FORMER_POINTERS)) if (root / FORMER_POINTERS).exists() else {}, "snapshots": {}}


@contextmanager
def _changing(root: Path) -> Iterator[dict[str, Any]]:
    """The pointers, to be changed; then they are written, and folders and warm sets that nothing points at are deleted."""
    with locked(root / ".pointers.lock"):
        pointers = _read(root)
        before = repr(pointers)
        yield pointers
        if repr(pointers) == before and (root / POINTERS).exists():
            return
        write_json(root / POINTERS, pointers)
        (root / FORMER_POINTERS).unlink(missing_ok=True)
        used = {*pointers["live"].values(), *(kept["generation"] for names in pointers["snapshots"].values() for kept in names.values())}
        for path in root.iterdir():
            if path.name.startswith(".") or path.name.partition(".")[0] in used:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name.endswith(".warm.npz"):
                path.unlink(missing_ok=True)
