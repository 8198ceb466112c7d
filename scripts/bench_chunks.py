"""Recall at a fixed budget of context tokens, by chunk size: scripts/bench chunks [--sizes 64,96,…]

The sample library is parsed once, cut at every size by our chunker and by semantic-text-splitter (the peer), embedded, and ranked for each
train and calibration question by cosine, BM25 and their reciprocal rank fusion. Passages are taken from the top until the next one would
exceed the budget; recall is the share of the experts' quotes that stand whole in one passage taken. A fixed number of passages would favour
large chunks, which show more text. The held-out questions are not touched.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import bm25s
import numpy as np
import Stemmer

from rag.chunk import Chunker, load_tokenizer, make_splitter
from rag.citations import find_quote
from rag.embed import Embedder
from rag.load import find_files, load_document
from understudy.records import Document
from understudy.settings.corpus import Ingest

MODEL = Path("workspace/models/all-minilm-l6-v2")
SAMPLE = Path("samples/ai-governance")
SIZES = {32: 8, 64: 8, 96: 16, 128: 16, 192: 24, 256: 32, 512: 64}  # tokens: overlap
BUDGETS = (192, 384, 768)  # tokens of context
RRF_K, DEPTH = 60, 50
Passage = tuple[str, str, int]  # document, text, tokens


def questions() -> list[tuple[str, list[tuple[str, str]]]]:
    """(question, [(document, quote)]) of the answerable train and calibration questions."""
    rows = [json.loads(line) for name in ("train", "calibration") for line in (SAMPLE / "questions" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(row["question"], list(zip(row["documents"], row["quotes"], strict=True))) for row in rows if row.get("quotes")]


def cut(documents: list[Document], size: int, overlap: int, ours: bool) -> list[Passage]:
    """The passages of one chunker at one size."""
    tokenizer = load_tokenizer(MODEL / "tokenizer.json")
    if ours:
        chunker = Chunker(MODEL / "tokenizer.json", size, overlap)
        texts = [(chunk.document, chunk.text) for document in documents for chunk in chunker.chunks(document)]
    else:
        splitter = make_splitter(MODEL / "tokenizer.json", size, overlap)
        texts = [(document.source, text) for document in documents for text in splitter.chunks(document.text)]
    return [(name, text, len(tokenizer.encode(text, add_special_tokens=False))) for name, text in texts]


def rankings(passages: list[Passage], embedder: Embedder, asked: list[str], vectors: np.ndarray) -> Iterator[list[int]]:
    """Places of the best passages for each question, by reciprocal rank fusion of cosine and BM25."""
    texts = [text for _, text, _ in passages]
    windows = embedder.encode_windows(texts)
    scores = np.stack([(vectors @ own.T).max(axis=1) for own in windows], axis=1)  # [questions, passages]
    stem = Stemmer.Stemmer("english")
    lexical = bm25s.BM25()
    lexical.index(bm25s.tokenize(texts, stopwords="en", stemmer=stem, return_ids=False, show_progress=False), show_progress=False)
    for question, row in zip(asked, scores, strict=True):
        tokens = bm25s.tokenize([question], stopwords="en", stemmer=stem, return_ids=False, show_progress=False)
        found = lexical.retrieve(tokens, k=min(DEPTH, len(texts)), show_progress=False)[0][0]
        fused: dict[int, float] = {}
        for ranking in (np.argsort(-row)[:DEPTH], found):
            for rank, place in enumerate(ranking, 1):
                fused[int(place)] = fused.get(int(place), 0.0) + 1 / (RRF_K + rank)
        yield sorted(fused, key=lambda place: -fused[place])


def recalls(passages: list[Passage], ranked: list[list[int]], gold: list[list[tuple[str, str]]], budget: int) -> np.ndarray:
    """Share of each question's quotes within the budget, [questions]."""
    result = []
    for places, quotes in zip(ranked, gold, strict=True):
        taken, used = [], 0
        for place in places:
            if used + passages[place][2] > budget:
                break
            taken.append(passages[place])
            used += passages[place][2]
        result.append(np.mean([any(name == document and find_quote(quote, text) is not None for name, text, _ in taken) for document, quote in quotes]))
    return np.array(result)


def main() -> None:
    """One JSON line for each size and budget; spread: a 95 % bootstrap interval of the difference, ours less the peer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    sizes = [int(size) for size in parser.parse_args().sizes.split(",")]
    embedder = Embedder(MODEL)
    documents = [load_document(file, "default", Ingest()) for file in find_files([SAMPLE / "pdf"])]
    asked, gold = zip(*questions(), strict=True)
    vectors = embedder.encode(list(asked))
    random = np.random.default_rng(0)
    for size in sizes:
        found = {}
        for ours in (True, False):
            passages = cut(documents, size, SIZES[size], ours)
            found[ours] = (passages, list(rankings(passages, embedder, list(asked), vectors)))
        for budget in BUDGETS:
            mine, theirs = (recalls(*found[ours], list(gold), budget) for ours in (True, False))
            draws = random.integers(0, len(asked), (2000, len(asked)))
            low, high = np.percentile((mine - theirs)[draws].mean(axis=1), [2.5, 97.5])
            row = {"bench": f"chunks of {size}/{SIZES[size]} tokens", "ours": round(mine.mean(), 4), "peer": round(theirs.mean(), 4)}
            row |= {"peer_name": "semantic-text-splitter", "ratio": round(mine.mean() / max(theirs.mean(), 1e-9), 3)}
            row |= {"unit": f"recall in {budget} tokens of context", "n": len(asked), "spread": [round(low, 4), round(high, 4)]}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
