"""Files on disk are always whole: written beside their place, synced, then renamed into it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from understudy.errors import NotFoundError, StorageError


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` atomically; raises StorageError (disk full, permissions) with the old file intact."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(f"cannot write {path}: {error.strerror}", "free space or fix the folder's permissions") from error


def write_text(path: Path, text: str) -> None:
    """Replace `path` atomically with UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replace `path` atomically with indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace `path` atomically with one JSON object a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def require_file(path: Path) -> Path:
    """The path, if a file is there; raises NotFoundError otherwise."""
    if not path.is_file():
        raise NotFoundError(f"{path} does not exist", "check the path")
    return path


def read_json(path: Path) -> Any:
    """The JSON value of a file; raises NotFoundError or StorageError naming the path."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} does not exist", "check the path") from error
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} is not readable JSON: {error}", "restore the file, or remove it and repeat the step") from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; raises NotFoundError, or StorageError naming the first bad line."""
    return [row for _, row in numbered_rows(path)]


def numbered_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(1-based line number, object) of each non-empty line of a JSONL file; a byte-order mark is passed over."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} does not exist", "check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"cannot read {path}: {error}", "give a UTF-8 JSONL file") from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise StorageError(f"{path} line {number} is not JSON: {error}", "one JSON object a line") from error
        if not isinstance(row, dict):
            raise StorageError(f"{path} line {number} is not a JSON object", "one JSON object a line")
        yield number, row


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Add one line, on disk when this returns; what a killed writer left of a line goes first. Hold a lock that other writers hold too."""
    line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            whole = _end_of_lines(file, end)
            if whole < end:
                file.truncate(whole)
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    file.truncate(whole)
                raise
        sync_folder(path.parent)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}", "free space or fix the folder's permissions") from error


def _end_of_lines(file: FileIO, end: int) -> int:
    """Where the last whole line ends, looked for from the end."""
    while end > 0:
        start = max(0, end - 64 * 1024)
        found = os.pread(file.fileno(), end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def sync_file(path: Path) -> None:
    """Make a file's bytes durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A scratch folder that becomes `path` when the block ends well, and vanishes when it does not.

    The scratch folder is the same on every run, so a killed run's remains are cleared by the next.
    Two processes that build the same folder at once are told apart by a lock on it.
    """
    scratch = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_name(f".{path.name}.lock")):
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            yield scratch
            for file in scratch.rglob("*"):
                if file.is_file():
                    sync_file(file)
            shutil.rmtree(path, ignore_errors=True)
            scratch.rename(path)
            sync_folder(path.parent)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}", "free space or fix the folder's permissions") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def locked(path: Path, held_by: str = "") -> Iterator[None]:
    """Hold an exclusive lock file; the kernel lets it go when the process ends, however it ends.

    `held_by` says what another holder is doing: then StorageError is raised in place of waiting for it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if held_by else 0))
        except BlockingIOError as error:
            raise StorageError(f"{held_by} in this workspace", "wait until it ends") from error
        yield
