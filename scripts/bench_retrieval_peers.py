"""The peers of bench_retrieval.py, run in their own environment: `bench_retrieval_peers.py NAME FOLDER` prints a JSON list of settings."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

K = 10
Search = Callable[[int], list[int]]


def rank_bm25(folder: Path) -> Iterator[tuple[str, Search, float, int]]:
    """BM25Okapi, BM25L and BM25Plus over the same stemmed tokens."""
    import rank_bm25 as package

    given = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
    for name in ("BM25Okapi", "BM25L", "BM25Plus"):
        began = time.perf_counter()
        made = getattr(package, name)(given["corpus"])
        built = time.perf_counter() - began

        def search(i: int, made: object = made) -> list[int]:
            scores = made.get_scores(given["queries"][i])  # type: ignore[attr-defined]
            return np.argpartition(-scores, K)[:K].tolist()

        yield name, search, built, min(20, len(given["queries"]))


def langchain(folder: Path) -> Iterator[tuple[str, Search, float, int]]:
    """InMemoryVectorStore with its vectors as lists (its default), as float64 rows and as float32 rows."""
    from langchain_core.embeddings import DeterministicFakeEmbedding
    from langchain_core.vectorstores import InMemoryVectorStore

    vectors, queries = np.load(folder / "vectors.npy"), np.load(folder / "queries.npy")
    for name, rows in (("lists", None), ("float64 rows", vectors.astype(np.float64)), ("float32 rows", vectors)):
        began = time.perf_counter()
        store = InMemoryVectorStore(DeterministicFakeEmbedding(size=vectors.shape[1]))
        for i, row in enumerate(vectors.tolist() if rows is None else rows):
            store.store[str(i)] = {"id": str(i), "vector": row, "text": "", "metadata": {}}
        built = time.perf_counter() - began

        def search(i: int, store: InMemoryVectorStore = store, as_list: bool = rows is None) -> list[int]:
            query = queries[i].tolist() if as_list else queries[i]
            return [int(document.id) for document, _ in store.similarity_search_with_score_by_vector(query, k=K)]

        yield name, search, built, min(6, len(queries))


def lancedb(folder: Path) -> Iterator[tuple[str, Search, float, int]]:
    """A flat scan, IVF_PQ refined, and IVF_HNSW_SQ refined."""
    import lancedb as package
    import pyarrow

    vectors, queries = np.load(folder / "vectors.npy"), np.load(folder / "queries.npy")
    column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.reshape(-1)), vectors.shape[1])
    table = pyarrow.table({"id": pyarrow.array(range(len(vectors)), pyarrow.int64()), "vector": column})
    for name, index, tune in (
        ("flat", None, lambda q: q),
        ("IVF_PQ, nprobes 64, refine 40", "IVF_PQ", lambda q: q.nprobes(64).refine_factor(40)),
        ("IVF_HNSW_SQ, nprobes 16, ef 200, refine 4", "IVF_HNSW_SQ", lambda q: q.nprobes(16).ef(200).refine_factor(4)),
    ):
        began = time.perf_counter()
        made = package.connect(str(folder / "lance")).create_table("t", data=table, mode="overwrite")
        if index:
            made.create_index(metric="cosine", vector_column_name="vector", index_type=index)
        built = time.perf_counter() - began

        def search(i: int, made: object = made, tune: Callable[[object], object] = tune) -> list[int]:
            query = made.search(queries[i], vector_column_name="vector").distance_type("cosine").limit(K).select(["id"])  # type: ignore[attr-defined]
            return tune(query).to_arrow()["id"].to_pylist()  # type: ignore[attr-defined]

        yield name, search, built, len(queries)


def main() -> None:
    """Measure one peer."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rows = []
    for setting, search, built, count in {"rank-bm25": rank_bm25, "langchain": langchain, "lancedb": lancedb}[name](folder):
        search(0)
        taken, found = [], []
        for i in range(count):
            began = time.perf_counter()
            found.append(search(i))
            taken.append((time.perf_counter() - began) * 1e3)
        row = {"setting": setting, "p50": round(statistics.median(taken), 3), "p95": round(float(np.quantile(taken, 0.95)), 3)}
        rows.append(row | {"build_seconds": round(built, 1), "queries": count, "found": found})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
