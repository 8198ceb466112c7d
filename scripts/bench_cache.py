"""The semantic cache against other rules, over labelled pairs and replayed streams of them.

    scripts/bench cache [--orders 5] [--skip pairs,stream,gptcache]

Ours is the real cache over a real SQLite store and real embeddings; what a run would have answered comes from the labels (questions that
ask the same have the same answer), and reaches the cache as a run's trace does. Parameters are fitted on calibration.jsonl, the guard was
written against calibration.jsonl and development.jsonl; test.jsonl is only measured.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from rag.cache import Scope, SemanticCache
from rag.cache_calibrate import calibrate, hits_among, measure_pairs, wilson
from rag.cache_calibrate import read_pairs as read_labelled
from rag.cache_decision import DEFAULT, Parameters
from rag.embed import Embedder
from scripts.peers import peers_python
from understudy.digests import digest_of
from understudy.files import read_jsonl
from understudy.records import Chunk, Citation, Document, Step, Trace
from understudy.settings.answers import Cache
from understudy.store.sqlite import SqliteStore

ROOT = Path(__file__).parents[1]
PAIRS = ROOT / "samples" / "cache-pairs"
EMBEDDER = ROOT / "workspace" / "models" / "all-minilm-l6-v2"
SCOPE = Scope(tenant="default", model="bench", prompt_version="bench")
STATIC = (0.90, 0.95, 0.99)  # cosine
LANGCHAIN = {"default (no score_threshold)": -1.0, "score_threshold 0.95": 0.90, "score_threshold 0.975": 0.95}  # its score is (1 + cosine) / 2
GPTCACHE = (0.8, 0.9, 0.95)  # similarity_threshold; 0.8 is its default
Hits = list[tuple[str, str]]  # (question of the entry, question asked)


@dataclass(frozen=True)
class Questions:
    """A split as a stream: questions, and which of them ask the same."""

    meaning: dict[str, str]
    kind: dict[str, str]

    def wrong(self, hits: Hits) -> Hits:
        """The hits whose two questions do not ask the same."""
        return [(cached, asked) for cached, asked in hits if self.meaning[cached] != self.meaning[asked]]

    def ordinary(self, share: float, seed: int) -> list[str]:
        """The questions with near-misses thinned out to a share of all."""
        near = [question for question, kind in self.kind.items() if kind != "paraphrase"]
        rest = [question for question in self.meaning if question not in set(near)]
        return rest + random.Random(seed).sample(near, round(share / (1 - share) * len(rest)))


def read_split(split: str) -> Questions:
    """The questions of one split."""
    meaning: dict[str, str] = {}
    kind: dict[str, str] = {}
    for row in read_jsonl(PAIRS / f"{split}.jsonl"):
        meaning[row["a"]] = row["a"]
        meaning[row["b"]], kind[row["b"]] = (row["a"] if row["same"] else row.get("asks", row["b"])), row["kind"]
    return Questions(meaning, kind)


def every_question() -> list[str]:
    """The questions of all splits."""
    return sorted({question for split in ("calibration", "development", "test") for question in read_split(split).meaning})


def embeddings(questions: list[str], model: Path) -> dict[str, np.ndarray]:
    """Every question's vector; kept in .bench for the next run."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    embedder, path = Embedder(model), ROOT / ".bench" / "cache-vectors.npz"
    kept: dict[str, np.ndarray] = {}
    if path.exists() and (stored := np.load(path, allow_pickle=False))["embedder"] == embedder.fingerprint:
        kept = dict(zip(stored["questions"].tolist(), stored["vectors"], strict=True))
    new = [question for question in questions if question not in kept]
    sys.stderr.write(f"  embedding {len(new)} questions\n")
    if new:
        kept |= dict(zip(new, embedder.encode(new), strict=True))
        path.parent.mkdir(exist_ok=True)
        np.savez(path, embedder=np.array(embedder.fingerprint), questions=np.array(list(kept)), vectors=np.stack(list(kept.values())))
    return {question: kept[question] for question in questions}


def bench_store(folder: str) -> tuple[SqliteStore, Chunk]:
    """A store with the one document that every answer cites."""
    store = SqliteStore(Path(folder) / "store.db")
    text = "Every answer of this benchmark cites this sentence."
    document = Document(
        id=Document.make_id("default", text.encode()), source_key="/bench", source="bench.txt", title="bench", media_type="text/plain", pages=1,
        text=text, page_starts=[0], ingested_at=0.0,
    )  # fmt: skip
    chunk = Chunk(
        id=Chunk.make_id(document.id, "bench", 0, len(text)),
        document_id=document.id,
        document="bench.txt",
        text=text,
        start=0,
        end=len(text),
        pages=[1],
        ordinal=0,
    )
    store.add_document(document, [chunk])
    return store, chunk


def make_cache(store: SqliteStore, vectors: dict[str, np.ndarray], parameters: Parameters, bound: float, seed: int) -> SemanticCache:
    """The real cache; its embeddings were computed before."""
    retriever: Any = SimpleNamespace(embed=lambda texts: np.stack([vectors[text] for text in texts]), embedder=SimpleNamespace(fingerprint="e"), generation="g")
    return SemanticCache(store, retriever, Cache(error_bound=bound), parameters, chance=random.Random(seed).random)


def run_of(question: str, meaning: str, chunk: Chunk) -> Trace:
    """What the agent would have answered: one text for each meaning, all of its words its own."""
    quote = Citation(chunk_id=chunk.id, document_id=chunk.document_id, document=chunk.document, quote=chunk.text, page=1, start=0, end=chunk.end)
    answer = " ".join(f"w{digest_of([meaning, place])[:8].translate(str.maketrans('0123456789', 'ghijklmnop'))}" for place in range(6))
    return Trace(
        id=digest_of(question)[:32], question=question, steps=[Step(name="answer", finish_reason="stop")], answer=answer, abstained=False, citations=[quote],
        quotes=[quote.quote], score=0.9, source="model", generation="g", prompt_version="bench", created_at=0.0,
    )  # fmt: skip


def replay_ours(order: Sequence[str], questions: Questions, vectors: dict[str, np.ndarray], parameters: Parameters, bound: float, seed: int) -> Hits:
    """The real cache, asked every question once."""
    hits: Hits = []
    with tempfile.TemporaryDirectory() as folder:
        store, chunk = bench_store(folder)
        store._connection.pragma("synchronous", False)  # the disk is not what is measured
        cache = make_cache(store, vectors, parameters, bound, seed)
        for question in order:
            lookup = cache.lookup(question, SCOPE)
            if lookup.entry:
                hits.append((lookup.entry.question, question))
            else:
                cache.keep(run_of(question, questions.meaning[question], chunk), SCOPE, lookup, 0.5, 1.0)
        store.close()
    return hits


def replay_static(order: Sequence[str], vectors: dict[str, np.ndarray], threshold: float) -> Hits:
    """One threshold on the cosine of the nearest entry; a miss becomes an entry."""
    stored: list[str] = []
    matrix = np.empty((len(order), len(next(iter(vectors.values())))), np.float32)
    hits: Hits = []
    for question in order:
        if stored:
            cosines = matrix[: len(stored)] @ vectors[question]
            nearest = int(cosines.argmax())
            if cosines[nearest] >= threshold:
                hits.append((stored[nearest], question))
                continue
        matrix[len(stored)] = vectors[question]
        stored.append(question)
    return hits


def replay_gptcache(orders: list[list[str]], vectors: dict[str, np.ndarray], threshold: float) -> list[Hits]:
    """GPTCache itself, in an environment of its own, given the same embeddings."""
    with tempfile.TemporaryDirectory() as folder:
        names = list(vectors)
        np.savez(Path(folder) / "vectors.npz", names=np.array(names), vectors=np.stack([vectors[name] for name in names]))
        Path(folder, "orders.json").write_text(json.dumps(orders))
        done = subprocess.run(
            [peers_python("gptcache"), str(ROOT / "scripts" / "bench_cache_peers.py"), folder, str(threshold)], capture_output=True, text=True, cwd=folder
        )
        if done.returncode:
            raise SystemExit(f"GPTCache did not run: {done.stderr[-800:]}")
        return [[(cached, asked) for cached, asked in hits] for hits in json.loads(Path(folder, "hits.json").read_text())]


def report_stream(name: str, setting: str, questions: Questions, runs: list[Hits], asked: int, ours: float | None) -> float:
    """Print one line; returns the mean number of hits an order. Intervals are of the distinct decisions over all orders."""
    distinct = sorted({hit for hits in runs for hit in hits})
    wrong = len(questions.wrong(distinct))
    low, high = wilson(wrong, len(distinct))
    hits = float(np.mean([len(run) for run in runs]))
    wrongs = [len(questions.wrong(run)) for run in runs]
    line = {
        "bench": "cache stream", "peer_name": f"{name}, {setting}", "ours": ours, "peer": hits, "ratio": ours / hits if ours and hits else None,
        "unit": "hits an order", "n": asked, "spread": [len(run) for run in runs], "wrong_an_order": wrongs,
        "wrong_share": sum(wrongs) / max(1, sum(len(run) for run in runs)), "distinct_hits": len(distinct), "distinct_wrong": wrong,
        "distinct_wrong_share_95": [round(low, 4), round(high, 4)],
    }  # fmt: skip
    print(json.dumps(line), flush=True)
    if name == "ours":
        kinds = Counter(next(k for q in (b, a) if (k := questions.kind.get(q, "paraphrase")) != "paraphrase" or q == a) for a, b in questions.wrong(distinct))
        print(json.dumps({"bench": "cache stream", "peer_name": "ours, wrong hits by kind", **kinds}), flush=True)
    return hits


def bench_streams(vectors: dict[str, np.ndarray], parameters: Parameters, options: argparse.Namespace) -> None:
    """Every rule over the test questions, each asked once, in random orders."""
    questions = read_split("test")
    for label, chosen in (("as written", list(questions.meaning)), ("near-misses one in ten", questions.ordinary(0.1, 0))):
        orders = [random.Random(seed).sample(chosen, len(chosen)) for seed in range(options.orders)]
        rules: list[tuple[str, str, Callable[[int, list[str]], Hits]]] = [
            ("ours", f"error_bound {bound:g}", lambda seed, order, bound=bound: replay_ours(order, questions, vectors, parameters, bound, seed))
            for bound in (0.01, 0.02, 0.05)
        ]
        rules += [("one threshold", f"cosine {t:g}", lambda _, order, t=t: replay_static(order, vectors, t)) for t in STATIC]
        rules += [("LangChain MongoDB rule", s, lambda _, order, t=t: replay_static(order, vectors, t)) for s, t in LANGCHAIN.items()]
        first: float | None = None
        for name, setting, replay in rules:
            hits = report_stream(
                name,
                f"{setting}, {label}",
                questions,
                [replay(seed, order) for seed, order in enumerate(orders)],
                len(chosen),
                None if name == "ours" else first,
            )
            first = first or hits
        if "gptcache" not in options.skip:
            for threshold in GPTCACHE:
                runs = replay_gptcache(orders, vectors, threshold)
                report_stream("GPTCache 0.1.44", f"similarity_threshold {threshold:g}, {label}", questions, runs, len(chosen), first)
        report_equal_error(questions, orders, vectors, first or 0.0, label)


def report_equal_error(questions: Questions, orders: list[list[str]], vectors: dict[str, np.ndarray], ours: float, label: str) -> None:
    """The most hits that any one threshold reaches at no more than 1 % wrong."""
    best = (0.0, 1.0)
    for threshold in np.arange(0.80, 1.0, 0.0025):
        runs = [replay_static(order, vectors, float(threshold)) for order in orders]
        hits, wrong = sum(map(len, runs)), sum(len(questions.wrong(run)) for run in runs)
        if hits and wrong / hits <= 0.01:
            best = max(best, (hits / len(orders), float(threshold)))
    name = f"the best single threshold with at most 1 % of hits wrong, {label}"
    ratio = ours / best[0] if best[0] else None
    line = {
        "bench": "cache stream",
        "peer_name": name,
        "ours": ours,
        "peer": best[0],
        "ratio": ratio,
        "unit": "hits an order",
        "n": len(orders[0]),
        "spread": None,
    }
    print(json.dumps(line), flush=True)


def bench_pairs(embed: Callable[[list[str]], np.ndarray], parameters: Parameters) -> None:
    """Hits and wrong hits among the pairs, each against an entry of which nothing has been observed."""
    for split in ("calibration", "development", "test"):
        measured = measure_pairs(read_labelled(PAIRS / f"{split}.jsonl"), embed)
        hits = hits_among(measured, parameters, 0.01)
        wrong = Counter(one.pair.kind for one in hits if not one.pair.same)
        low, high = wilson(wrong.total(), len(hits))
        same = sum(one.pair.same for one in measured)
        guard = Counter(one.pair.kind for one in measured if one.comparison.findings)
        of_kind = Counter(one.pair.kind for one in measured)
        stopped = {kind: f"{guard[kind]}/{of_kind[kind]}" for kind in sorted(of_kind)}
        line = {"bench": "cache pairs", "split": split, "n": len(measured), "same": same, "hits": len(hits), "wrong": dict(wrong)}
        print(json.dumps(line | {"wrong_share_95": [round(low, 4), round(high, 4)], "stopped_by_the_guard": stopped}), flush=True)


def main() -> None:
    """Run what is not skipped."""
    parser = argparse.ArgumentParser("bench cache")
    parser.add_argument("--orders", type=int, default=5, help="random orders of a stream")
    parser.add_argument("--skip", type=lambda text: text.split(","), default=[], help="of pairs, stream, gptcache")
    parser.add_argument("--embedder", type=Path, default=EMBEDDER)
    options = parser.parse_args()
    vectors = embeddings(every_question(), options.embedder)

    def embed(texts: list[str]) -> np.ndarray:
        return np.stack([vectors[text] for text in texts])

    parameters = calibrate(measure_pairs(read_labelled(PAIRS / "calibration.jsonl"), embed), DEFAULT.entry_sd)
    sys.stderr.write(f"  fitted on calibration.jsonl: {parameters}\n  in force: {DEFAULT}\n")
    if "pairs" not in options.skip:
        bench_pairs(embed, DEFAULT)
    if "stream" not in options.skip:
        bench_streams(vectors, DEFAULT, options)


if __name__ == "__main__":
    main()
