"""search, and index ls/rebuild/snapshot/restore/warm."""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from understudy.commands import Outcome, workspace_of
from understudy.progress import show_progress
from understudy.terminal import figure, printable

if TYPE_CHECKING:
    from rag.ranking import Explained


def search(args: Namespace) -> Outcome:
    """Passages for a query, with every score; with --explain, with what made them so."""
    from rag.filters import parse_conditions
    from rag.retrieve import open_retriever

    conditions = parse_conditions(args.where)
    retriever = open_retriever(workspace_of(args))
    began = time.perf_counter()
    found = retriever.explain([args.query], args.k, where=conditions)
    seconds = time.perf_counter() - began
    rows, lines = [], []
    for explained in found:
        p = explained.passage
        scores = f"fused {p.scores.fused:.4f}, dense {figure(p.scores.dense)}, lexical {figure(p.scores.lexical)}"
        scores += f", reranked {p.scores.reranked:.3f}" if p.scores.reranked is not None else ""
        lines.append(printable(f"{p.rank}. {p.chunk.document}, p. {p.chunk.pages[0]}  ({scores})"))
        row = {"rank": p.rank, "chunk_id": p.chunk.id, "document": p.chunk.document, "pages": p.chunk.pages, "text": p.chunk.text}
        row["scores"] = p.scores.model_dump()
        if args.explain:
            row["explanation"] = explanation(explained)
            lines += [printable(f"   {line}") for line in explanation_lines(explained)]
        rows.append(row)
        lines += ["   " + printable(" ".join(p.chunk.text.split())), ""]
    return Outcome({"passages": rows, "generation": retriever.generation, "seconds": round(seconds, 4)}, lines or ["nothing found"])


def explanation(explained: Explained) -> dict[str, Any]:
    """Why a passage is where it is, as JSON."""
    candidate = explained.candidate
    return {
        "findings": [{"query": f.query, "ranking": f.ranking, "rank": f.rank, "score": f.score, "share": f.share} for f in candidate.findings],
        "fused": candidate.fused,
        "boost": candidate.boost,
        "stale_weight": candidate.stale_weight,
        "reranked": candidate.reranked,
        "score": candidate.score,
        "novelty_penalty": candidate.novelty_penalty,
        "candidates": explained.considered,
        "allowed": explained.allowed,
    }


def explanation_lines(explained: Explained) -> list[str]:
    """Why a passage is where it is, for people."""
    candidate = explained.candidate
    lines = [f"{f.ranking} rank {f.rank}, score {f.score:.3f}: adds {f.share:.5f}" for f in candidate.findings]
    base = f"fused {candidate.fused:.5f}" if candidate.reranked is None else f"reranked {candidate.reranked:.3f} (fused {candidate.fused:.5f})"
    lines.append(f"{base} × boost {candidate.boost:g} × stale {candidate.stale_weight:g} = {candidate.score:.5f}, of {explained.considered} candidates")
    if candidate.novelty_penalty is not None:
        lines.append(f"MMR: {candidate.novelty_penalty:.3f} taken off for likeness to what was chosen before")
    if explained.allowed is not None:
        lines.append(f"filters let {explained.allowed} chunks through")
    return lines


def index_ls(args: Namespace) -> Outcome:
    """The live generation and the snapshots."""
    from rag.generations import live_generation, snapshots
    from rag.index import read_meta
    from understudy.errors import NotFoundError, StorageError

    workspace = workspace_of(args)
    root, tenant = workspace.index, workspace.config.tenant
    try:
        named = [("live", live_generation(root, tenant), None)]
    except NotFoundError:
        named = []
    named += [(name, entry["generation"], entry["created_at"]) for name, entry in snapshots(root, tenant).items()]
    rows, lines = [], []
    for name, generation, created_at in named:
        try:
            meta = {key: value for key, value in read_meta(root, generation).items() if key in ("chunks", "documents", "embedder", "chunker")}
        except StorageError as error:
            meta = {"fault": error.message}
        rows.append({"name": name, "generation": generation, "created_at": created_at, **meta})
        lines.append(printable(f"{name:<20} {generation}  " + ", ".join(f"{key} {value}" for key, value in meta.items())))
    return Outcome({"generations": rows}, lines or ["the corpus is empty"])


def index_rebuild(args: Namespace) -> Outcome:
    """Make the live index anew from the store, as configured."""
    from rag.reindex import open_embedder, reindex

    workspace = workspace_of(args)
    done = reindex(workspace, open_embedder(workspace), show_progress)
    result = {"generation": done.generation, "chunks": done.chunks, "embedded": done.embedded, "removed": done.removed}
    return Outcome(result, [f"generation {done.generation} of {done.chunks} chunks is live ({done.embedded} texts embedded)"])


def index_snapshot(args: Namespace) -> Outcome:
    """Keep the live generation under a name."""
    from rag.generations import snapshot

    workspace = workspace_of(args)
    generation = snapshot(workspace.index, workspace.config.tenant, args.name)
    return Outcome({"snapshot": args.name, "generation": generation}, [f"{args.name} keeps generation {generation}"])


def index_restore(args: Namespace) -> Outcome:
    """Make a snapshot live."""
    from rag.reindex import open_embedder, restore_snapshot

    workspace = workspace_of(args)
    result = restore_snapshot(workspace, open_embedder(workspace), args.name, show_progress)
    return Outcome(result, [f"generation {result['generation']} of {result['chunks']} chunks is live; the next ingest indexes every document again"])


def index_warm(args: Namespace) -> Outcome:
    """Embed common queries ahead."""
    from rag.eval.questions import read_questions
    from rag.retrieve import warm
    from understudy.files import require_file

    path = require_file(Path(args.file))
    if path.suffix == ".jsonl":
        queries = [text for question in read_questions(path) for text in (question.question, question.query)]
    else:
        queries = path.read_text(encoding="utf-8").splitlines()
    kept = warm(workspace_of(args), queries)
    return Outcome({"warmed": kept}, [f"{kept} queries are embedded ahead for this generation"])
