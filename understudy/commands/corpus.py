"""ingest, documents ls/show/rm."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from understudy.commands import Outcome, report, workspace_of
from understudy.errors import UsageError
from understudy.progress import show_progress
from understudy.records import Document
from understudy.terminal import printable
from understudy.workspace import Workspace

if TYPE_CHECKING:
    from rag.metadata import Metadata


def ingest(args: Namespace) -> Outcome:
    """Load, chunk, embed and index; with --watch for as long as it runs."""
    from rag.ingest import ingest as run
    from rag.metadata import from_arguments

    workspace = workspace_of(args)
    given = from_arguments(tags=args.tag or [], valid_from=args.valid_from, valid_until=args.valid_until, boost=args.boost)
    if args.watch:
        return _watch(workspace, args, given)
    if args.mirror:
        raise UsageError("--mirror is for --watch", "add --watch, or remove documents with `understudy documents rm`")
    result = run(workspace, args.paths, show_progress, given)
    return Outcome(result, _ingested(result))


def _watch(workspace: Workspace, args: Namespace, given: Metadata) -> Outcome:
    """Report each round on stderr (with --json: as a line of JSON on stdout) until Ctrl-C."""
    from rag.watch import watch

    if len(args.paths) != 1:
        raise UsageError("--watch takes one folder", "name the folder alone")
    for result in watch(workspace, Path(args.paths[0]), given, args.mirror, show_progress):
        if args.json:
            print(json.dumps({"schema_version": 1, **result}, ensure_ascii=False), flush=True)
            continue
        lines = [f"{printable(result['error']['message'])}"] if "error" in result else _ingested(result) if "chunks" in result else []
        if result["removed"]:
            lines.append(_removed(result["removed"]))
        lines += [f"{printable(source)} is gone; its document stays{'' if args.mirror else ' (--mirror would remove it)'}" for source in result["gone"]]
        for line in lines or ["watching"]:
            report(line)
    return Outcome({}, [])


def _ingested(result: dict[str, Any]) -> list[str]:
    documents, chunks = result["documents"], result["chunks"]
    lines = [
        f"{documents['added']} documents added, {documents['updated']} updated, {documents['unchanged']} unchanged"
        f" ({result['pages']} pages); {chunks['total']} chunks in generation {result['generation']}; {result['seconds']:.1f} s"
    ]
    lines += [f"quarantined {printable(q['source'])}: {printable(q['reason'])}" for q in documents["quarantined"]]
    lines += [f"{printable(d['source'])} has the same bytes as {printable(d['of'])}, which is kept" for d in documents["duplicates"]]
    lines += [f"{printable(d['source'])}: no text on pages {_pages(d['pages'])} (scans?)" for d in documents["without_text"]]
    return lines


def _pages(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:10])) + (" …" if len(numbers) > 10 else "")


def documents_ls(args: Namespace) -> Outcome:
    """List the documents."""
    workspace = workspace_of(args)
    chunks = Counter(chunk.document_id for chunk in workspace.store.chunks(workspace.config.tenant))
    rows, lines = [], []
    for d in workspace.store.documents(workspace.config.tenant):
        if args.tag and args.tag not in d.tags:
            continue
        shown = d.model_dump(include={"id", "source", "title", "media_type", "pages", "tags", "boost", "valid_from", "valid_until", "ingested_at"})
        rows.append(shown | {"chunks": chunks[d.id], "stale": d.is_stale(time.time())})
        notes = [*(f"#{tag}" for tag in d.tags), *([f"boost {d.boost:g}"] if d.boost != 1 else []), *_validity(d)]
        lines.append(printable(f"{d.id[:12]}  {d.pages:>4} p. {chunks[d.id]:>5} chunks  {d.source}  {d.title}" + (f"  [{', '.join(notes)}]" if notes else "")))
    return Outcome({"documents": rows}, lines or ["no documents yet" if not args.tag else f"no documents with the tag {printable(args.tag)}"])


def _validity(document: Document) -> list[str]:
    moments = [
        f"{word} {datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M}" for word, at in (("from", document.valid_from), ("until", document.valid_until)) if at
    ]
    return [*moments, "STALE"] if document.is_stale(time.time()) else moments


def documents_show(args: Namespace) -> Outcome:
    """A document's text by page."""
    from rag.documents import find_documents

    found = find_documents(workspace_of(args), args.document)
    if len(found) != 1:
        raise UsageError(f"{args.document} names {len(found)} documents", "give the id that `understudy documents ls` shows")
    document = found[0]
    ends = [*document.page_starts[1:], len(document.text)]
    pages = [document.text[start:end] for start, end in zip(document.page_starts, ends, strict=True)]
    labels = document.page_labels or [""] * len(pages)
    lines = [
        line
        for number, (page, label) in enumerate(zip(pages, labels, strict=True), 1)
        for line in (f"── page {number}{f' ({printable(label)})' if label else ''} ──", printable(page))
    ]
    return Outcome(document.model_dump(exclude={"text", "page_starts"}) | {"text": pages}, lines)


def documents_rm(args: Namespace) -> Outcome:
    """Remove documents."""
    from rag.ingest import remove_documents

    result = remove_documents(workspace_of(args), args.documents, args.purge)
    learnt = result["learnt"]
    lines = [_removed(result) + (", and the store's files are rewritten without them" if args.purge else "")]
    if learnt["adapters"]:
        lines.append(f"learnt from them, and still there: adapters {', '.join(learnt['adapters'])}")
    if learnt["embedders"]:
        lines.append(f"embedders tuned on them, and still there: {', '.join(learnt['embedders'])}")
    if learnt["unknown"]:
        lines.append(f"imported adapters that may have learnt from them: {', '.join(learnt['unknown'])}")
    if learnt["datasets"]:
        lines.append(f"datasets that hold their text: {', '.join(digest[:12] for digest in learnt['datasets'])}")
    if learnt["traces"]:
        lines.append(f"{learnt['traces']} traces cite them")
    return Outcome(result, lines)


def _removed(result: dict[str, Any]) -> str:
    return f"{result['documents']} documents and their {result['chunks']} chunks are removed"
