"""`ingest --watch`: a folder's changes become ingests, a moment after they stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag.embed import Embedder
from rag.ingest import ingest, remove_documents
from rag.load import file_of, has_known_name, in_folder, is_inside
from rag.metadata import SIDECAR, Metadata
from rag.reindex import open_embedder
from understudy.errors import DocumentError, UsageError
from understudy.progress import Progress
from understudy.workspace import Workspace

if TYPE_CHECKING:
    from threading import Event

SETTLED_MILLISECONDS = 1000  # changes are taken up once no other has come for so long, or after ten times as long at most
IDLE_MILLISECONDS = 500  # between looks at the stop event


def watch(
    workspace: Workspace, folder: Path, given: Metadata, mirror: bool, progress: Callable[[str, int], Progress], stop: Event | None = None
) -> Iterator[dict[str, Any]]:
    """First the folder as it is, then each round of changes: what `ingest` returns, with `removed` and `gone` (sources of deleted files).

    Documents of deleted files are removed with `mirror`, unless the folder is empty, and named in `gone` otherwise. Ends when `stop` is set. Raises UsageError.
    """
    from watchfiles import Change
    from watchfiles import watch as changes_in

    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder", "--watch takes one folder")
    embedder = open_embedder(workspace)
    changes = changes_in(
        folder, debounce=10 * SETTLED_MILLISECONDS, step=SETTLED_MILLISECONDS, stop_event=stop, yield_on_timeout=True, rust_timeout=IDLE_MILLISECONDS
    )
    next(changes, None)  # from here on no change is missed
    yield _round(workspace, in_folder(folder), folder, given, mirror, progress, embedder)
    for batch in changes:
        files = touched(folder, {Path(name) for _, name in batch})
        if files or any(change is Change.deleted for change, _ in batch):
            yield _round(workspace, files, folder, given, mirror, progress, embedder)


def touched(folder: Path, changed: set[Path]) -> list[Path]:
    """The documents in a folder that changes are about: the files themselves, those of sidecars, and those in new folders."""
    found: set[Path] = set()
    for path in changed:
        inside = path.relative_to(folder) if path.is_relative_to(folder) else path.resolve().relative_to(folder.resolve())
        if any(part.startswith(".") for part in inside.parts):
            continue
        if path.is_dir() and path.resolve().is_relative_to(folder.resolve()):
            found.update(in_folder(path))
        else:
            found.add(path.with_name(path.name.removesuffix(SIDECAR)))
    return sorted(file for file in found if has_known_name(file.name) and is_inside(file, folder))


def _round(
    workspace: Workspace, files: list[Path], folder: Path, given: Metadata, mirror: bool, progress: Callable[[str, int], Progress], embedder: Embedder
) -> dict[str, Any]:
    """Ingest the files, and remove or name the documents whose files have gone from the folder."""
    result: dict[str, Any] = {}
    if files:
        try:
            result = ingest(workspace, files, progress, given, embedder)
        except DocumentError as error:  # every file of this round; the watch goes on
            result = {"error": {"code": error.code, "message": error.message, "remedy": error.remedy}}
    gone = gone_from(workspace, folder)
    mirrors = mirror and bool(gone) and folder.is_dir() and any(folder.iterdir())  # an empty folder may be a disk that is not mounted
    removed = remove_documents(workspace, gone) if mirrors else None
    return {**result, "removed": removed, "gone": [] if mirrors else gone}


def gone_from(workspace: Workspace, folder: Path) -> list[str]:
    """The files of documents that lie in the folder by their name and are no longer there."""
    files = {file_of(document.source_key) for document in workspace.store.documents(workspace.config.tenant)}
    return sorted(str(file) for file in files if file.is_relative_to(folder.resolve()) and not file.exists())
