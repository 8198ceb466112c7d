"""Retrieval over 100,000 passages on one core: ours against rank-bm25, LangChain's in-memory store and LanceDB on the same vectors.

Latencies leave out the query's embedding. Peers run in an environment of their own (scripts/bench_peers.txt), best of three
settings each; a setting with Recall@10 below 0.99 does not count while one above it does. See scripts/bench_corpus.py for the data.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rag.embed import Embedder
from rag.index import RESCORED, build_index, open_index, tokenize
from rag.retrieve import Retriever
from scripts.bench_corpus import BENCH, MODEL, corpus, gold, sample_chunks, sample_questions
from scripts.peers import peers_python
from understudy.records import Chunk, Document
from understudy.settings.corpus import Retrieval
from understudy.store.sqlite import SqliteStore

K = 10
PER_DOCUMENT = 500
CHOICES: list[dict[str, float]] = [{"k": 2}, {"k": 3}, {"k": 4}, {"k_min": 1, "k_max": 4}, {"k_min": 2, "k_max": 6}, {"k": 3, "mmr": 0.7}, {"k": 3, "mmr": 0.9}]


@dataclass(frozen=True)
class Asked:
    """The labelled questions: texts, unit vectors [n, dim], and the places of the passages that answer each."""

    texts: list[str]
    vectors: np.ndarray
    golds: list[set[int]]


def main() -> None:
    """Print one line a comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--sweep", action="store_true", help="time exact against quantised search at growing sizes, and nothing else")
    parser.add_argument("--no-peers", action="store_true")
    options = parser.parse_args()
    texts, vectors = corpus(options.count)
    questions, golds = gold(sample_questions(), sample_chunks())
    embedder = Embedder(MODEL)
    every = Asked(questions, embedder.encode(questions), golds)
    step = max(1, len(questions) // options.queries)
    asked = Asked(every.texts[::step], every.vectors[::step], every.golds[::step])
    one_core()
    if options.sweep:
        sweep(vectors, asked.vectors)
        return
    shutil.rmtree(BENCH / "retrieval", ignore_errors=True)
    ours = measure(texts, vectors, embedder, asked)
    on_the_sample(embedder, every)
    if not options.no_peers:
        compare(ours, texts, vectors, asked)


def measure(texts: list[str], vectors: np.ndarray, embedder: Embedder, asked: Asked) -> dict[str, dict[str, float]]:
    """Ours: latencies, recall, nDCG, cost of building and opening; returns the latencies of each part."""
    retriever, built = build(BENCH / "retrieval" / "large", texts, vectors, embedder, asked)
    index = retriever.searcher
    queries = list(range(len(asked.texts)))
    found = [[retriever.facts.place[chunk_id] for chunk_id, _ in index.search_dense(asked.vectors[i], K)] for i in queries]
    taken = {
        "hybrid": latencies(lambda i: retriever.search([asked.texts[i]], K), queries),
        "dense": latencies(lambda i: index.search_dense(asked.vectors[i], K), queries),
        "lexical": latencies(lambda i: index.search_lexical(asked.texts[i], K), queries),
    }
    row = {"bench": "retrieval", "what": "ours: dense, BM25, fusion, passages from the store", "ours": taken["hybrid"]["p50"], "peer": None, "peer_name": None}
    row |= {"ratio": None, "unit": "ms p50", "n": len(texts), "spread": taken, "queries": len(queries), "recall_at_10": recall(vectors, asked.vectors, found)}
    print(json.dumps(row | built), flush=True)
    return taken


def one_core() -> None:
    """Pin this process to one core."""
    import faiss
    import torch

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)


def build(folder: Path, texts: list[str], vectors: np.ndarray, embedder: Embedder, asked: Asked) -> tuple[Retriever, dict[str, float]]:
    """A store and an index of the texts, opened, with the questions' vectors in its cache; and what index and opening cost."""
    folder.mkdir(parents=True)
    store, documents, chunks = SqliteStore(folder / "store.db"), [], []
    for start in range(0, len(texts), PER_DOCUMENT):
        document, own = document_of(f"{start}.txt", texts[start : start + PER_DOCUMENT])
        store.add_document(document, own)
        documents.append(document)
        chunks += own
    by_id = {chunk.id: vectors[place : place + 1] for place, chunk in enumerate(chunks)}
    began = time.perf_counter()
    generation = build_index(folder / "index", documents, chunks, by_id, embedder.fingerprint, "bench")
    built = time.perf_counter()
    before = resident_bytes()
    index = open_index(folder / "index", generation)
    cost = {"build_seconds": round(built - began, 1), "open_seconds": round(time.perf_counter() - built, 2), "open_bytes": resident_bytes() - before}
    cost["disk_bytes"] = sum(file.stat().st_size for file in (folder / "index").rglob("*") if file.is_file())
    cost["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    retriever = Retriever(generation, index, index.facts, embedder, store, Retrieval(), "default")
    for question, vector in zip(asked.texts, asked.vectors, strict=True):
        retriever.vectors.put(question, vector)
    return retriever, cost


def document_of(source: str, texts: list[str]) -> tuple[Document, list[Chunk]]:
    """A document of the texts, a line each, and a chunk a line."""
    text, at, chunks = "\n".join(texts), 0, []
    document_id = Document.make_id("bench", text.encode())
    for ordinal, piece in enumerate(texts):
        end = at + len(piece)
        chunk_id = Chunk.make_id(document_id, "bench", at, end)
        chunks.append(Chunk(id=chunk_id, document_id=document_id, document=source, text=piece, start=at, end=end, pages=[1], ordinal=ordinal))
        at = end + 1
    facts = {"source_key": source, "source": source, "title": source, "media_type": "text/plain", "pages": 1, "page_starts": [0], "ingested_at": 0.0}
    return Document.model_validate({"id": document_id, "text": text, **facts}), chunks


def resident_bytes() -> int:
    """Memory of this process that no file stands behind, plus what it has mapped and touched."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize()


def latencies(search: Callable[[int], object], queries: list[int]) -> dict[str, float]:
    """p50 and p95 in milliseconds, after five queries to warm up; and p50 of processor time, which a busy machine moves less."""
    taken, worked = [], []
    for i in queries:
        began, before = time.perf_counter(), time.thread_time()
        search(i)
        worked.append((time.thread_time() - before) * 1e3)
        taken.append((time.perf_counter() - began) * 1e3)
    p50, cpu = statistics.median(taken[5:]), statistics.median(worked[5:])
    return {"p50": round(p50, 3), "p95": round(float(np.quantile(taken[5:], 0.95)), 3), "cpu_p50": round(cpu, 3)}


def recall(vectors: np.ndarray, queries: np.ndarray, found: list[list[int]]) -> float:
    """Recall@10 against brute force; a passage as near as the tenth counts as one of the ten."""
    shares = []
    for query, own in zip(queries, found, strict=True):
        scores = vectors @ query
        tenth = np.partition(scores, -K)[-K]
        shares.append(float((scores[own[:K]] >= tenth - 1e-6).sum()) / K)
    return round(float(np.mean(shares)), 4)


def ndcg_of(retriever: Retriever, asked: Asked) -> dict[str, float]:
    """nDCG@10 (Järvelin and Kekäläinen, 2002; binary relevance) of the whole, and of its two rankings alone."""
    index, place = retriever.searcher, retriever.facts.place
    ranked = {
        "hybrid": [[place[passage.chunk.id] for passage in retriever.search([question], K)] for question in asked.texts],
        "dense": [[place[chunk_id] for chunk_id, _ in index.search_dense(vector, K)] for vector in asked.vectors],
        "lexical": [[place[chunk_id] for chunk_id, _ in index.search_lexical(question, K)] for question in asked.texts],
    }
    return {name: round(float(np.mean([_ndcg(own, order) for own, order in zip(asked.golds, orders, strict=True)])), 4) for name, orders in ranked.items()}


def _ndcg(own: set[int], order: list[int]) -> float:
    gain = sum(1 / math.log2(rank + 1) for rank, item in enumerate(order[:K], 1) if item in own)
    return gain / sum(1 / math.log2(rank + 1) for rank in range(1, min(len(own), K) + 1))


def on_the_sample(embedder: Embedder, asked: Asked) -> None:
    """nDCG@10 on the sample library alone: the labelled set."""
    texts = [chunk["text"] for chunk in sample_chunks()]
    vectors = embedder.encode(texts)
    retriever, _ = build(BENCH / "retrieval" / "sample", texts, vectors, embedder, asked)
    retriever.store.put_embeddings(embedder.fingerprint, {chunk_id: vectors[i : i + 1] for i, chunk_id in enumerate(retriever.facts.chunk_ids)})
    scores = ndcg_of(retriever, asked)
    single = max(scores["dense"], scores["lexical"])
    row = {"bench": "retrieval", "what": "the sample's questions", "ours": scores["hybrid"], "peer": single, "peer_name": "the better of dense and BM25 alone"}
    row |= {"ratio": round(scores["hybrid"] / single, 3), "unit": "nDCG@10", "n": len(texts), "spread": scores, "queries": len(asked.texts)}
    print(json.dumps(row), flush=True)
    for settings in CHOICES:
        shown = [[passage.chunk.id for passage in chosen] for chosen in (having(retriever, settings).search([question]) for question in asked.texts)]
        right = [any(retriever.facts.place[chunk_id] in own for chunk_id in ids) for own, ids in zip(asked.golds, shown, strict=True)]
        row = {"bench": "retrieval", "what": f"passages shown with {settings}", "ours": round(float(np.mean(right)), 4), "peer": None, "peer_name": None}
        row |= {"ratio": None, "unit": "share of questions whose quote is shown", "n": len(texts), "spread": None, "queries": len(right)}
        print(json.dumps(row | {"passages": round(float(np.mean([len(ids) for ids in shown])), 2)}), flush=True)


def having(retriever: Retriever, settings: dict[str, float]) -> Retriever:
    """The same corpus and query vectors under other settings."""
    opened = retriever.searcher, retriever.facts, retriever.embedder, retriever.store
    return Retriever(retriever.generation, *opened, Retrieval.model_validate(settings), retriever.tenant, vectors=retriever.vectors)


def compare(ours: dict[str, dict[str, float]], texts: list[str], vectors: np.ndarray, asked: Asked) -> None:
    """Run the peers on the same vectors and tokens, and print their ratios."""
    python = peers_python("lancedb")
    given = BENCH / "peers-input"
    given.mkdir(exist_ok=True)
    np.save(given / "vectors.npy", vectors)
    np.save(given / "queries.npy", asked.vectors)
    (given / "tokens.json").write_text(json.dumps({"corpus": tokenize(texts), "queries": tokenize(asked.texts)}), encoding="utf-8")
    quiet = {**os.environ, "RUST_LOG": "error", "LANCE_LOG": "error"}
    for name, kind in (("rank-bm25", "lexical"), ("langchain", "dense"), ("lancedb", "dense")):
        done = subprocess.run([python, "scripts/bench_retrieval_peers.py", name, str(given)], check=True, stdout=subprocess.PIPE, text=True, env=quiet)
        settings = json.loads(done.stdout.splitlines()[-1])
        for row in settings:
            found = row.pop("found")
            row["recall_at_10"] = recall(vectors, asked.vectors[: len(found)], found) if kind == "dense" else None
        best = min([row for row in settings if (row["recall_at_10"] or 1) >= 0.99] or settings, key=lambda row: row["p50"])
        row = {"bench": "retrieval", "what": kind, "ours": ours[kind]["p50"], "peer": best["p50"], "peer_name": f"{name}: {best['setting']}"}
        row |= {"ratio": round(best["p50"] / ours[kind]["p50"], 1), "unit": "ms p50", "n": len(texts), "spread": {"ours": ours[kind], "peers": settings}}
        print(json.dumps(row), flush=True)


def sweep(vectors: np.ndarray, queries: np.ndarray) -> None:
    """p50 of exact search against 8-bit codes rescored exactly, at growing sizes."""
    import faiss

    for count in (5_000, 10_000, 20_000, 50_000, len(vectors)):
        part = vectors[:count]
        flat, codes = faiss.IndexFlatIP(part.shape[1]), faiss.IndexScalarQuantizer(part.shape[1], faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
        codes.train(part)
        for index in (flat, codes):
            index.add(part)
        found: dict[int, list[int]] = {}

        def exact(i: int, flat: faiss.Index = flat) -> None:
            flat.search(queries[i : i + 1], 60)

        def rescored(i: int, codes: faiss.Index = codes, part: np.ndarray = part, found: dict[int, list[int]] = found) -> None:
            rows = np.sort(codes.search(queries[i : i + 1], 60 * RESCORED)[1][0])
            found[i] = rows[np.argsort(-(part[rows] @ queries[i]))].tolist()

        peer, ours = (latencies(search, list(range(len(queries)))) for search in (exact, rescored))
        row = {"bench": "retrieval", "what": "8-bit codes, rescored", "ours": ours["p50"], "peer": peer["p50"], "peer_name": "faiss exact"}
        row |= {"ratio": round(peer["p50"] / ours["p50"], 2), "unit": "ms p50", "n": count, "spread": [ours["p95"], peer["p95"]]}
        print(json.dumps(row | {"recall_at_10": recall(part, queries, [found[i] for i in sorted(found)])}), flush=True)


if __name__ == "__main__":
    main()
