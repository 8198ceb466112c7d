"""The passages and vectors that the retrieval benchmarks run on; made once, kept in .bench/.

Texts are real and distinct: every chunk of the sample library, then paragraphs of the documentation strings of the installed
Python packages. The first EMBEDDED of them are embedded; the vectors of the rest are mixtures v_a + v_b / 2 of two embedded
ones, normalised (cosine to v_a about 0.9), so that quantised search meets close neighbours as in a real corpus.
"""

from __future__ import annotations

import json
import os
import re
import sysconfig
from pathlib import Path

import numpy as np

from rag.embed import Embedder

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line has it, for peers in this process too
BENCH = Path(".bench")
MODEL = Path("workspace/models/all-minilm-l6-v2")
SAMPLE = Path("samples/ai-governance")
EMBEDDED = 8_000
WORDS = (14, 90)  # of a documentation paragraph


def sample_chunks() -> list[dict[str, str]]:
    """The sample library's chunks {id, document, text}, as `ingest` cuts them by default."""
    from rag.chunk import Chunker
    from rag.load import find_files, load_document
    from understudy.settings.corpus import Ingest

    kept = BENCH / "sample.json"
    if not kept.exists():
        BENCH.mkdir(exist_ok=True)
        settings = Ingest()
        chunker = Chunker(MODEL / "tokenizer.json", settings.chunk_tokens, settings.overlap_tokens)
        chunks = [chunk for file in find_files([SAMPLE / "pdf"]) for chunk in chunker.chunks(load_document(file, "default", settings))]
        kept.write_text(json.dumps([{"id": c.id, "document": c.document, "text": c.text} for c in chunks]), encoding="utf-8")
    return list(json.loads(kept.read_text(encoding="utf-8")))


def sample_questions() -> list[dict[str, object]]:
    """The sample's train and calibration questions; the held-out ones are for reporting alone."""
    files = (SAMPLE / "questions" / f"{name}.jsonl" for name in ("train", "calibration"))
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def gold(questions: list[dict[str, object]], chunks: list[dict[str, str]]) -> tuple[list[str], list[set[int]]]:
    """The questions whose quotes stand in chunks, and for each the places of the chunks of its documents that hold a quote, whole or its larger half."""
    asked, golds = [], []
    for row in questions:
        documents = row.get("documents") or [row.get("document")]
        own: set[int] = set()
        for quote in row.get("quotes") or []:
            words = str(quote).split()
            halves = [" ".join(words), " ".join(words[: len(words) * 2 // 3]), " ".join(words[len(words) // 3 :])]
            inside = [(i, " ".join(c["text"].split())) for i, c in enumerate(chunks) if c["document"] in documents]
            own |= next((found for part in halves if (found := {i for i, text in inside if part in text})), set())
        if own:
            asked.append(str(row["question"]))
            golds.append(own)
    return asked, golds


def corpus(count: int) -> tuple[list[str], np.ndarray]:
    """`count` texts, and unit vectors [count, dim] float32."""
    kept = BENCH / f"corpus-{count}.json"
    if not kept.exists():
        texts = [chunk["text"] for chunk in sample_chunks()]
        texts += _documentation(count - len(texts), set(texts))
        vectors = _mixtures(_embedded(texts[:EMBEDDED]), count)
        np.save(BENCH / f"corpus-{count}.npy", vectors)
        kept.write_text(json.dumps(texts), encoding="utf-8")
    return list(json.loads(kept.read_text(encoding="utf-8"))), np.load(BENCH / f"corpus-{count}.npy")


def _documentation(count: int, known: set[str]) -> list[str]:
    found: dict[str, None] = {}
    for file in sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py")):
        for docstring in re.findall(r'"""(.*?)"""', file.read_text(encoding="utf-8", errors="ignore"), re.DOTALL):
            for paragraph in re.split(r"\n\s*\n", docstring):
                text = " ".join(paragraph.split())
                if WORDS[0] <= text.count(" ") + 1 <= WORDS[1] and text not in known:
                    found[text] = None
                    if len(found) == count:
                        return list(found)
    raise SystemExit(f"only {len(found)} of {count} paragraphs found in the installed packages")


def _embedded(texts: list[str]) -> np.ndarray:
    embedder, parts = Embedder(MODEL), BENCH / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(texts), 2_000):
        if not (parts / f"{start}.npy").exists():
            np.save(parts / f"{start}.npy", embedder.encode(texts[start : start + 2_000]))
    return np.concatenate([np.load(parts / f"{start}.npy") for start in range(0, len(texts), 2_000)])


def _mixtures(real: np.ndarray, count: int) -> np.ndarray:
    random, more = np.random.default_rng(0), count - len(real)
    mixed = real[random.integers(len(real), size=more)] + 0.5 * real[random.integers(len(real), size=more)]
    mixed /= np.linalg.norm(mixed, axis=1, keepdims=True)
    return np.concatenate([real, mixed]).astype(np.float32)
