"""Recall@k of embedders on questions about documents that none of them was tuned on."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rag.embed import Embedder, Precision
from rag.eval.resampling import paired_bootstrap
from rag.generations import live_generation
from rag.index import open_index
from rag.ranking import fuse
from train.recipe import RetrieverRecipe
from train.retriever import fit_pairs, load_model, make_pairs, save_model, split_traces
from understudy.errors import UsageError
from understudy.models import model_path
from understudy.progress import Progress
from understudy.records import Chunk, Trace
from understudy.workspace import Workspace

KS = (1, 2, 5, 10)
RANKINGS = ("dense", "fused")  # by cosine alone; and fused with BM25's, as `search` does

Recalls = dict[tuple[str, int], list[float]]  # (ranking, k) → one value a question: the share of its quotes in the first k passages


def compare_recall(
    workspace: Workspace, before: Path, after: Path, precision: Precision, traces: list[Trace], chunks: dict[str, Chunk]
) -> list[dict[str, Any]]:
    """Recall@k of two embedders on the traces' questions, paired: [{ranking, k, n, before, after, difference, low, high}]; none for no traces.

    Intervals are 95 %, by a bootstrap over documents and the questions inside.
    """
    if not traces:
        return []
    lexical = lexical_rankings(workspace, traces)
    recalls = [measure_recall(Embedder(folder, precision), traces, chunks, lexical, workspace) for folder in (before, after)]
    return summarise(recalls[0], recalls[1], traces)


def cross_validate(
    workspace: Workspace, recipe: RetrieverRecipe, folds: int, report: Callable[[str], None], progress: Callable[[str, int], Progress]
) -> dict[str, Any]:
    """The same over the training documents: each fold's are left out of the tuning, and asked about; no model is kept.

    Raises UsageError where there are fewer documents than folds.
    """
    from train.dataset import newest_dataset

    traces, _, documents = split_traces(workspace, newest_dataset(workspace))
    if not 2 <= folds <= len(documents):
        raise UsageError(f"{folds} folds of {len(documents)} documents", "--folds is at least 2, and at most the number of training documents")
    chunks = {chunk.id: chunk for chunk in workspace.store.chunks(workspace.config.tenant)}
    base, precision = model_path(workspace, workspace.config.models.embedder), workspace.config.models.embedder_precision
    held = [frozenset(sorted(documents)[fold::folds]) for fold in range(folds)]
    asked = [[trace for trace in traces if {citation.document_id for citation in trace.citations} <= own] for own in held]
    everything = [trace for own in asked for trace in own]
    before = measure_recall(Embedder(base, precision), everything, chunks, lexical_rankings(workspace, everything), workspace)
    after: Recalls = {key: [] for key in before}
    for fold, (without, own) in enumerate(zip(held, asked, strict=True), 1):
        pairs = make_pairs(traces, chunks, without)
        report(f"fold {fold} of {folds}: {len(pairs)} pairs, then {len(own)} questions about {len(without)} other documents")
        model = load_model(base)
        with tempfile.TemporaryDirectory() as scratch:
            fit_pairs(model, pairs, recipe, Path(scratch) / "run", report, progress)
            save_model(model, Path(scratch) / "tuned")
            tuned = Embedder(Path(scratch) / "tuned", precision)
            for key, values in measure_recall(tuned, own, chunks, lexical_rankings(workspace, own), workspace).items():
                after[key] += values
    return {"folds": folds, "documents": len(documents), "recall": summarise(before, after, everything)}


def lexical_rankings(workspace: Workspace, traces: list[Trace]) -> list[list[tuple[str, float]]]:
    """BM25's candidates for each question, from the live index; no embedder has a part in them."""
    index = open_index(workspace.index, live_generation(workspace.index, workspace.config.tenant))
    return [index.search_lexical(trace.question, workspace.config.retrieval.candidates) for trace in traces]


def measure_recall(embedder: Embedder, traces: list[Trace], chunks: dict[str, Chunk], lexical: list[list[tuple[str, float]]], workspace: Workspace) -> Recalls:
    """One embedder's recall on each question, over all the chunks."""
    ids, settings = sorted(chunks), workspace.config.retrieval
    windows = embedder.encode_windows([chunks[chunk_id].text for chunk_id in ids])
    owners = np.repeat(np.arange(len(ids)), [len(group) for group in windows])
    cosines = embedder.encode([trace.question for trace in traces]) @ np.concatenate(windows).T  # [questions, windows]
    recalls: Recalls = {(ranking, k): [] for ranking in RANKINGS for k in KS}
    for trace, row, words in zip(traces, cosines, lexical, strict=True):
        best = np.full(len(ids), -1.0, dtype=np.float32)
        np.maximum.at(best, owners, row)
        nearest = [(ids[i], float(best[i])) for i in np.argsort(-best, kind="stable")[: settings.candidates]]
        found = {
            "dense": [chunk_id for chunk_id, _ in nearest],
            "fused": [c.chunk_id for c in fuse([(trace.question, "dense", nearest), (trace.question, "lexical", words)], settings.rrf_k)],
        }
        for (ranking, k), values in recalls.items():
            values.append(share_found(trace, [chunks[c] for c in found[ranking][:k] if c in chunks]))
    return recalls


def share_found(trace: Trace, passages: list[Chunk]) -> float:
    """The share of a trace's quotes that stand whole in one of the passages."""
    found = [any(p.document_id == c.document_id and p.start <= c.start and c.end <= p.end for p in passages) for c in trace.citations]
    return sum(found) / len(found)


def summarise(before: Recalls, after: Recalls, traces: list[Trace]) -> list[dict[str, Any]]:
    """One row for each ranking and k."""
    clusters = [trace.citations[0].document_id for trace in traces]
    rows = []
    for (ranking, k), old in before.items():
        new = after[ranking, k]
        gain = paired_bootstrap(old, new, clusters)
        values = {"before": np.mean(old), "after": np.mean(new), "difference": gain.value, "low": gain.low, "high": gain.high}
        rows.append({"ranking": ranking, "k": k, "n": len(old), **{name: None if v is None else round(float(v), 4) for name, v in values.items()}})
    return rows
