"""Retrieval alone, without a model: how often, and how high, it finds what the questions need. Takes seconds, and so compares embedders and settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from rag.citations import find_quote
from rag.eval.estimators import rounded
from rag.eval.evidence import Corpus, locate_gold, relevant_chunks
from rag.eval.ranked import ndcg_at_k, precision_at_k, recall_at_k, reciprocal_rank
from rag.eval.resampling import paired_bootstrap
from rag.eval.stats import cluster_of
from rag.retrieve import Retriever
from understudy.errors import UsageError
from understudy.records import Chunk, Question

METRICS = ("recall_at_k", "precision_at_k", "mrr", "ndcg_at_k")


def evaluate_retrieval(questions: Sequence[Question], retriever: Retriever, k: int, resamples: int, seed: int) -> dict[str, Any]:
    """{k, questions, left_out, generation, metrics: {name: {value, low, high}}, breakdown, missed} of the questions that say what they need.

    A quote is found where a passage holds it; a question with documents and no quotes finds a document where a passage is of it, each
    document once, as BEIR judges. Raises UsageError where no question says what it needs.
    """
    chunks = Corpus.of(retriever.chunks)
    judged = [question for question in questions if question.quotes or (question.documents and (question.answerable or not question.has_answer_key))]
    if not judged:
        raise UsageError("no question has quotes or documents to be found", "give `quotes`, or `documents` for questions without an answer key")
    rows = [score_retrieval(question, [passage.chunk for passage in retriever.search([question.question], k)], chunks, k) for question in judged]
    clusters = [cluster_of(question) for question in judged]
    zeros = [0.0] * len(rows)
    groups = {"document": [question.documents[0] if question.documents else "" for question in judged], "type": [question.type for question in judged]}
    metrics = {}
    for name in METRICS:
        found = paired_bootstrap(zeros, [row[name] for row in rows], clusters, resamples, seed)
        metrics[name] = {"value": rounded(found.value), "low": rounded(found.low), "high": rounded(found.high)}
    return {
        "k": k,
        "questions": len(judged),
        "left_out": len(questions) - len(judged),
        "generation": retriever.generation,
        "metrics": metrics,
        "breakdown": [entry for by, values in groups.items() for entry in _group(by, values, rows)],
        "missed": [question.id for question, row in zip(judged, rows, strict=True) if row["recall_at_k"] == 0],
    }


def score_retrieval(question: Question, passages: list[Chunk], chunks: dict[str, Chunk], k: int) -> dict[str, float]:
    """One ranking's metrics, of passages best first."""
    if question.quotes:
        gold = locate_gold(question, passages, chunks)
        found = [any(find_quote(wanted.text, chunk.text) for wanted in gold) for chunk in passages]
        relevant = len(relevant_chunks(gold, chunks) | {chunk.id for chunk, is_relevant in zip(passages, found, strict=True) if is_relevant})
        recall = sum(any(find_quote(wanted.text, chunk.text) for chunk in passages[:k]) for wanted in gold) / len(gold) if gold else 0.0
    else:
        wanted_documents = {PurePath(name).name for name in question.documents}
        ranked = list(dict.fromkeys(PurePath(chunk.document).name for chunk in passages))
        found, relevant = [name in wanted_documents for name in ranked], len(wanted_documents)
        recall = recall_at_k(found, relevant)
    return {
        "recall_at_k": recall,
        "precision_at_k": precision_at_k(found, k if question.quotes else len(found)),
        "mrr": reciprocal_rank(found),
        "ndcg_at_k": ndcg_at_k(found, relevant, k),
    }


def retrieval_lines(result: dict[str, Any]) -> list[str]:
    """The metrics with their intervals, then by document and type."""
    lines = [f"{result['questions']} questions, k = {result['k']}" + (f"; {result['left_out']} say nothing to be found" if result["left_out"] else "")]
    for name, found in result["metrics"].items():
        interval = "" if found["low"] is None else f" [{found['low']:.3f}, {found['high']:.3f}]"
        lines.append(f"{name:16} {found['value']:.3f}{interval}")
    for entry in result["breakdown"]:
        shown = ", ".join(f"{name} {entry['metrics'][name]:.2f}" for name in METRICS)
        lines.append(f"  {entry['by']} {entry['value']} ({entry['n']}): {shown}")
    return lines


def _group(by: str, values: list[str], rows: list[dict[str, float]]) -> list[dict[str, Any]]:
    entries = []
    for value in sorted({value for value in values if value}):
        members = [row for row, other in zip(rows, values, strict=True) if other == value]
        means = {name: rounded(float(np.mean([row[name] for row in members]))) for name in METRICS}
        entries.append({"by": by, "value": value, "n": len(members), "metrics": means})
    return entries
