"""Documents from files, each parsed in a child process with a time and a memory limit."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from understudy.config import Ingest
from understudy.errors import DocumentError, NotFoundError
from understudy.records import Document

SUFFIXES = (".pdf", ".txt", ".md", ".markdown")


def find_files(paths: list[Path]) -> list[Path]:
    """The files named, and those that folders hold (links that leave a folder are passed over). Raises NotFoundError."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = (f for f in sorted(path.rglob("*")) if f.is_file() and f.suffix.lower() in SUFFIXES)
            files += [f for f in inside if f.resolve().is_relative_to(path.resolve())]
        elif path.is_file():
            files.append(path)
        else:
            raise NotFoundError(f"{path} does not exist", "check the path")
    return list(dict.fromkeys(files))


def load_document(path: Path, tenant: str, limits: Ingest) -> Document:
    """Read and parse one file; raises DocumentError with the reason it cannot be ingested."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DocumentError(f"cannot be read: {error.strerror}") from error
    parsed = _parse_in_child(path, limits)
    text, starts = join_pages(parsed["pages"])
    if not text.strip():
        raise DocumentError("no text in it")
    return Document(
        id=Document.make_id(tenant, content),
        source_key=str(path.resolve()),
        source=path.name,
        title=parsed["title"],
        media_type=parsed["media_type"],
        pages=len(starts),
        text=text,
        page_starts=starts,
        ingested_at=time.time(),
        tenant=tenant,
    )


def join_pages(pages: list[str]) -> tuple[str, list[int]]:
    """One text and where each page starts in it. A sentence that runs over a page break is not broken."""
    text, starts = "", []
    for page in pages:
        if text and page:
            text += "\n\n" if text.endswith((".", "!", "?", ":", ";")) and not page[:1].islower() else " "
        starts.append(len(text))
        text += page
    return text, starts


def _parse_in_child(path: Path, limits: Ingest) -> dict[str, Any]:
    memory = int(limits.parse_memory_gib * 2**30)
    try:
        child = subprocess.run(
            [sys.executable, "-m", "rag.parse", str(path.resolve())],
            capture_output=True,
            timeout=limits.parse_seconds,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (memory, memory)),
        )
    except subprocess.TimeoutExpired as error:
        raise DocumentError(f"the parser was stopped after {limits.parse_seconds:g} s") from error
    try:
        parsed = json.loads(child.stdout)
    except ValueError as error:
        detail = child.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit code {child.returncode}"]
        raise DocumentError(f"the parser failed: {detail[0][:200]}") from error
    if "error" in parsed:
        raise DocumentError(parsed["error"])
    return dict(parsed)
