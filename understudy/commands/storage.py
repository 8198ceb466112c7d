"""store copy, backup and restore."""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from understudy.commands import Outcome, workspace_of
from understudy.errors import NotFoundError, UsageError
from understudy.progress import show_progress
from understudy.store.urls import refuse_secret, resolve_url, shown_url

if TYPE_CHECKING:
    from understudy.store import Store

Collections = dict[str, dict[str, object]]


def store_copy(args: Namespace) -> Outcome:
    """Copy everything from one store to another, verified by digest."""
    from understudy.store import open_store
    from understudy.store.copying import copy_store

    root = workspace_of(args).root
    for url in (args.source, args.target):
        refuse_secret(url, "command line")
    if resolve_url(args.source) == resolve_url(args.target):
        raise UsageError("source and target are the same store", "name two stores")
    began = time.monotonic()
    source = _open_existing(args.source, root)
    target = open_store(args.target, root)
    collections = copy_store(source, target, show_progress)
    source.close()
    target.close()
    result = {"source": shown_url(args.source), "target": shown_url(args.target), "collections": collections, "seconds": round(time.monotonic() - began, 2)}
    return Outcome(result, [*_lines(collections), f"{shown_url(args.target)} holds the same records as {shown_url(args.source)}"])


def store_backup(args: Namespace) -> Outcome:
    """Every record of the workspace in one file."""
    from understudy.store.archive import back_up

    collections = back_up(workspace_of(args).store, Path(args.file), show_progress)
    return Outcome({"file": args.file, "collections": collections}, [*_lines(collections), f"{args.file} holds them all"])


def store_restore(args: Namespace) -> Outcome:
    """The records of a backup in the workspace's empty store."""
    from understudy.store.archive import restore

    workspace = workspace_of(args)
    collections = restore(Path(args.file), workspace.config.store, workspace.root, show_progress)
    lines = [*_lines(collections), "restored; run `understudy index rebuild` to search them"]
    return Outcome({"file": args.file, "store": shown_url(workspace.config.store), "collections": collections}, lines)


def _open_existing(url: str, root: Path) -> Store:
    from understudy.store import open_store

    resolved = resolve_url(url)
    if resolved.startswith("sqlite:///") and not (root / resolved.removeprefix("sqlite:///")).is_file():
        raise NotFoundError(f"there is no store {shown_url(url)}", "check the path; a relative one is inside the workspace")
    return open_store(url, root)


def _lines(collections: Collections) -> list[str]:
    return [f"{name}: {of['count']} records, sha256 {str(of['sha256'])[:16]}" for name, of in collections.items()]
