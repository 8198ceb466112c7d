"""The semantic cache's latency in a store of many entries: both tiers, and its search against computing every cosine.

    scripts/bench cache_latency [--entries 100000]

The entries' vectors are mixtures of the labelled questions' real ones; the questions asked are real.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rag.cache_decision import DEFAULT, Parameters
from rag.cache_guard import question_digest
from rag.cache_index import VectorIndex
from scripts.bench_cache import EMBEDDER, SCOPE, bench_store, embeddings, every_question, make_cache, run_of
from understudy.cache_records import CacheEntry
from understudy.records import Chunk, Trace


def bench_latency(vectors: dict[str, np.ndarray], parameters: Parameters, entries: int) -> None:
    """Seconds of a look-up without the embedding of the question, in a store of so many entries."""
    drawn = np.random.default_rng(0)
    real = np.stack(list(vectors.values()))
    made = real[drawn.integers(len(real), size=entries)] + real[drawn.integers(len(real), size=entries)]
    made = made + drawn.normal(scale=0.02, size=made.shape)
    made = (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)
    asked = drawn.permutation(list(vectors))[:500].tolist()
    with tempfile.TemporaryDirectory() as folder:
        store, chunk = bench_store(folder)
        store._connection.pragma("synchronous", False)
        trace = run_of("?", "?", chunk)
        for place, vector in enumerate(made):
            text = asked[place] if place < len(asked) else f"question {place}?"
            entry = _entry(text, trace, chunk)
            store.put_cache_entry(entry, "e", vectors[text] if place < len(asked) else vector)
        cache = make_cache(store, vectors, parameters, 0.01, 0)
        began = time.perf_counter()
        cache.candidates(asked[0], vectors[asked[0]], SCOPE)
        print(json.dumps({"bench": "cache latency", "peer_name": "opening the scope's index", "ours": time.perf_counter() - began, "unit": "s", "n": entries}))
        exact = [_timed(lambda q=q: cache.lookup(q, SCOPE)) for q in asked]
        near = [_timed(lambda q=q: cache.candidates(q, vectors[q], SCOPE)) for q in asked]
        for name, seconds in (("exact tier", exact), ("semantic tier without the embedding", near)):
            p50, p95 = np.quantile(seconds, [0.5, 0.95]) * 1e3
            print(
                json.dumps({"bench": "cache latency", "peer_name": name, "ours": round(p50, 3), "unit": "ms p50", "n": entries, "spread": f"p95 {p95:.3f}"}),
                flush=True,
            )
        store.close()
    report_search(made, real[:200])


def report_search(made: np.ndarray, queries: np.ndarray) -> None:
    """The index against computing every cosine and faiss' flat index: time, and how often it finds the same nearest and the same eight."""
    import faiss

    index, flat = VectorIndex(), faiss.IndexFlatIP(made.shape[1])
    index.add([str(row) for row in range(len(made))], made)
    flat.add(made)
    found = [[int(entry_id) for entry_id, _ in index.nearest(query, 8)] for query in queries]
    right = [np.argsort(-(made @ query))[:8].tolist() for query in queries]
    seconds = {
        "ours": [_timed(lambda q=q: index.nearest(q, 8)) for q in queries],
        "numpy": [_timed(lambda q=q: made @ q) for q in queries],
        "faiss flat": [_timed(lambda q=q: flat.search(q.reshape(1, -1), 8)) for q in queries],
    }
    recall = float(np.mean([len(set(a) & set(b)) / 8 for a, b in zip(found, right, strict=True)]))
    first = float(np.mean([a[0] == b[0] for a, b in zip(found, right, strict=True)]))
    ours = float(np.median(seconds["ours"])) * 1e3
    for name in ("numpy", "faiss flat"):
        peer = float(np.median(seconds[name])) * 1e3
        line = {
            "bench": "cache search",
            "ours": round(ours, 3),
            "peer": round(peer, 3),
            "peer_name": name,
            "ratio": round(peer / ours, 2),
            "unit": "ms p50",
            "n": len(made),
        }
        print(json.dumps(line | {"spread": {"recall_at_8": recall, "same_nearest": first}}), flush=True)


def _entry(question: str, trace: Trace, chunk: Chunk) -> CacheEntry:
    digest = question_digest(question)
    return CacheEntry(
        id=CacheEntry.make_id(SCOPE.digest, digest), scope=SCOPE.digest, question=question, question_digest=digest, answer=trace.answer,
        citations=trace.citations, score=0.9, document_ids=[chunk.document_id],
        chunk_ids=[chunk.id], generation="g", trace_id="t", seconds=1.0, created_at=1.0, used_at=1.0,
    )  # fmt: skip


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    """Measure both tiers, then the search alone."""
    parser = argparse.ArgumentParser("bench cache_latency")
    parser.add_argument("--entries", type=int, default=100_000, help="entries of one scope")
    parser.add_argument("--embedder", type=Path, default=EMBEDDER)
    options = parser.parse_args()
    bench_latency(embeddings(every_question(), options.embedder), DEFAULT, options.entries)


if __name__ == "__main__":
    main()
