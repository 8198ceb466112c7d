"""Embedding the sample's chunks: ours against sentence-transformers' default (`model.encode(texts)`, float32), in turns.

Recall@10 is that of the sample's questions over each one's own vectors: the share of questions whose quote is in a chunk of the first ten.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np
from sentence_transformers import SentenceTransformer

from rag.embed import Embedder
from scripts.bench_corpus import MODEL, gold, sample_chunks, sample_questions


def recall(chunks: np.ndarray, questions: np.ndarray, golds: list[set[int]], k: int = 10) -> float:
    """Share of questions with a gold chunk among the k nearest."""
    nearest = np.argsort(-(questions @ chunks.T), axis=1)[:, :k]
    return float(np.mean([bool(set(row.tolist()) & own) for row, own in zip(nearest, golds, strict=True)]))


def main() -> None:
    """Print one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunks", type=int, help="only the first so many")
    rounds, limit = parser.parse_args().rounds, parser.parse_args().chunks
    texts = [chunk["text"] for chunk in sample_chunks()][:limit]
    asked, golds = gold(sample_questions(), sample_chunks()[:limit])
    ours, peer = Embedder(MODEL), SentenceTransformer(str(MODEL), device="cpu", local_files_only=True)
    ours.encode(texts[:32]), peer.encode(texts[:32])
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    worked: dict[str, list[float]] = {"ours": [], "peer": []}  # processor seconds, which a busy machine moves less
    for _ in range(rounds):  # in turns, so that a slow minute of the machine hits both
        began, before = time.perf_counter(), time.process_time()
        vectors = np.concatenate(ours.encode_windows(texts))
        seconds["ours"].append(time.perf_counter() - began)
        worked["ours"].append(time.process_time() - before)
        began, before = time.perf_counter(), time.process_time()
        theirs = peer.encode(texts)
        seconds["peer"].append(time.perf_counter() - began)
        worked["peer"].append(time.process_time() - before)
    rates = {name: [len(texts) / s for s in taken] for name, taken in seconds.items()}
    ratios = [mine / theirs_ for mine, theirs_ in zip(rates["ours"], rates["peer"], strict=True)]
    row = {
        "bench": "embed",
        "ours": round(statistics.median(rates["ours"]), 1),
        "peer": round(statistics.median(rates["peer"]), 1),
        "peer_name": "sentence-transformers encode(texts), float32",
        "ratio": round(statistics.median(ratios), 2),
        "unit": "chunks/s",
        "n": len(texts),
        "spread": [round(min(ratios), 2), round(max(ratios), 2)],
        "processor_seconds": {name: round(statistics.median(taken), 2) for name, taken in worked.items()},
        "precision": ours.precision,
        "lowest_cosine": round(float((vectors * theirs).sum(axis=1).min()), 6),
        "recall_at_10": {"ours": recall(vectors, ours.encode(asked), golds), "peer": recall(theirs, peer.encode(asked), golds)},
        "questions": len(asked),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
