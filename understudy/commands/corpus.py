"""ingest, documents ls/show/rm."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from understudy.commands import Outcome, printable, workspace_of
from understudy.errors import NotFoundError
from understudy.progress import show_progress


def ingest(args: Namespace) -> Outcome:
    """Load, chunk, embed and index."""
    from rag.ingest import ingest as run

    result = run(workspace_of(args), [Path(path) for path in args.paths], show_progress)
    documents, chunks = result["documents"], result["chunks"]
    lines = [
        f"{documents['added']} documents added, {documents['updated']} updated, {documents['unchanged']} unchanged"
        f" ({result['pages']} pages); {chunks['total']} chunks in generation {result['generation']}; {result['seconds']:.1f} s"
    ]
    lines += [f"quarantined {printable(q['source'])}: {printable(q['reason'])}" for q in documents["quarantined"]]
    return Outcome(result, lines)


def documents_ls(args: Namespace) -> Outcome:
    """List the documents."""
    workspace = workspace_of(args)
    documents = workspace.store.documents(workspace.config.tenant)
    rows = [{"id": d.id, "source": d.source, "title": d.title, "pages": d.pages} for d in documents]
    lines = [printable(f"{d.id[:12]}  {d.pages:>4} p.  {d.source}  {d.title}") for d in documents]
    return Outcome({"documents": rows}, lines or ["no documents yet"])


def documents_show(args: Namespace) -> Outcome:
    """A document's text by page."""
    workspace = workspace_of(args)
    found = [d for d in workspace.store.documents(workspace.config.tenant) if d.id.startswith(args.document) or d.source == args.document]
    if len(found) != 1:
        raise NotFoundError(f"no single document {args.document!r}", "`understudy documents ls` lists ids and names")
    document = found[0]
    ends = [*document.page_starts[1:], len(document.text)]
    pages = [document.text[start:end] for start, end in zip(document.page_starts, ends, strict=True)]
    lines = [line for number, page in enumerate(pages, 1) for line in (f"── page {number} ──", printable(page))]
    return Outcome(document.model_dump(exclude={"text", "page_starts"}) | {"text": pages}, lines)


def documents_rm(args: Namespace) -> Outcome:
    """Remove documents."""
    from rag.ingest import remove_documents

    result = remove_documents(workspace_of(args), args.documents)
    return Outcome(result, [f"{result['documents']} documents and their {result['chunks']} chunks are removed"])
