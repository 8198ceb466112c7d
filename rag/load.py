"""Documents from files: which files there are, and each one's text, headings and metadata."""

from __future__ import annotations

import glob
import hashlib
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rag.metadata import SIDECAR, Metadata, read_sidecar, row_metadata
from rag.parse.formats import SUFFIXES
from rag.parsers import Parsers
from understudy.errors import DocumentError, NotFoundError, UsageError
from understudy.records import Document, Heading
from understudy.settings.corpus import Ingest

STDIN = "-"
WILDCARDS = "*?["
ROW = "//"  # in a source key, between a file and one of its rows; no resolved path holds it


def find_files(inputs: Iterable[str | Path]) -> list[Path]:
    """The files that paths, folders, globs and `-` (a list on stdin) name, each once. Raises NotFoundError.

    What a folder or glob finds stays inside it: links that lead out, `..` and hidden files are passed over. A file
    named outright is taken wherever it lies.
    """
    files: list[Path] = []
    for given in inputs:
        name = str(given)
        if name == STDIN:
            files += find_files(line.rstrip("\r\n") for line in sys.stdin if line.strip() and line.strip() != STDIN)
        elif os.path.isdir(name):
            files += in_folder(Path(name))
        elif os.path.isfile(name):
            files.append(Path(name))
        elif any(c in name for c in WILDCARDS):
            files += in_glob(name)
        elif os.path.exists(name):
            raise UsageError(f"{name} is neither a file nor a folder", "name files, folders, or - for a list on stdin")
        else:
            raise NotFoundError(f"{name} does not exist", "check the path")
    return list(dict.fromkeys(files))


def in_folder(folder: Path) -> list[Path]:
    """The readable files that a folder holds, at any depth, without hidden ones and without links that leave it."""
    found = []
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(where, name) for name in sorted(names) if not name.startswith(".") and has_known_name(name)]
    return [file for file in found if is_inside(file, folder)]


def in_glob(pattern: str) -> list[Path]:
    """The readable files that a glob (`**` for any depth) finds within its fixed part. Raises NotFoundError where there are none."""
    parts = Path(pattern).parts
    fixed = Path(*parts[: next(n for n, part in enumerate(parts) if any(c in part for c in WILDCARDS))])
    if ".." in parts[len(fixed.parts) :]:
        raise UsageError(f"{pattern} leaves its own folder", "write the .. before the first wildcard")
    found = (Path(name) for name in sorted(glob.glob(pattern, recursive=True)))
    files = [file for file in found if has_known_name(file.name) and is_inside(file, fixed)]
    if not files:
        raise NotFoundError(f"nothing matches {pattern}", "check the pattern, and quote it so that the shell leaves it alone")
    return files


def has_known_name(name: str) -> bool:
    """Whether a file is of a kind that is read; sidecars belong to theirs."""
    return name.lower().endswith(SUFFIXES) and not name.endswith(SIDECAR)


def is_inside(file: Path, folder: Path) -> bool:
    """Whether a file, its links followed, is a regular one inside a folder."""
    return file.is_file() and file.resolve().is_relative_to(folder.resolve())


def file_of(source_key: str) -> Path:
    """The file that a document came from."""
    return Path(source_key.partition(ROW)[0])


def file_digest(path: Path, tenant: str) -> str:
    """Document.make_id of a file's content, read in blocks; raises DocumentError."""
    digest = hashlib.sha256(tenant.encode() + b"\0")
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DocumentError(f"cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def load_documents(path: Path, tenant: str, parsers: Parsers, given: Metadata, document_id: str | None = None) -> list[Document]:
    """Read and parse one file; raises DocumentError with the reason it cannot be ingested. `document_id`: its file_digest, if known."""
    document_id = document_id or file_digest(path, tenant)
    before = _written(path)
    metadata = read_sidecar(path).over(given)
    found = parsers.parse(path.resolve())
    if _written(path) != before:
        raise DocumentError("changed while it was read")
    documents = {}
    for parsed in found:
        whose = row_metadata(parsed["metadata"]).over(metadata) if parsed["metadata"] else metadata
        own_id = Document.make_id(tenant, parsed["content"].encode()) if parsed["content"] else document_id
        key = str(path.resolve()) + (f"{ROW}{parsed['key']}" if parsed["key"] else "")
        documents[key] = _document(path, tenant, parsed, whose, given, own_id, key)
    return list(documents.values())


def _written(path: Path) -> tuple[int, int]:
    """Size and time of the last change; raises DocumentError where the file has gone."""
    try:
        status = path.stat()
    except OSError as error:
        raise DocumentError(f"cannot be read: {error.strerror}") from error
    return status.st_size, status.st_mtime_ns


def load_document(path: Path, tenant: str, limits: Ingest) -> Document:
    """One file's only document, parsed in a child of its own; raises DocumentError."""
    with Parsers(limits, 1) as parsers:
        return load_documents(path, tenant, parsers, Metadata())[0]


def _document(path: Path, tenant: str, parsed: dict[str, Any], metadata: Metadata, given: Metadata, document_id: str, key: str) -> Document:
    text, starts = join_pages(parsed["pages"], parsed["joins"])
    return Document(
        id=document_id,
        source_key=key,
        source=metadata.source or path.name,
        title=metadata.title or parsed["title"] or path.stem,
        media_type=parsed["media_type"],
        pages=len(starts),
        text=text,
        page_starts=starts,
        page_labels=parsed["labels"],
        headings=[Heading(start=starts[page] + offset, level=level, title=title) for page, offset, level, title in parsed["headings"]],
        ingested_at=time.time(),
        valid_from=metadata.valid_from,
        valid_until=metadata.valid_until,
        tenant=tenant,
        tags=metadata.tags,
        boost=metadata.boost or 1.0,
        given=given.model_dump(exclude_defaults=True),
    )


def join_pages(pages: list[str], joins: list[str]) -> tuple[str, list[int]]:
    """One text and where each page starts in it; `joins[n]` stands before page n, where there is text on both sides."""
    parts: list[str] = []
    starts = []
    length = 0
    for page, join in zip(pages, joins, strict=True):
        if length and page:
            parts.append(join)
            length += len(join)
        starts.append(length)
        parts.append(page)
        length += len(page)
    return "".join(parts), starts
