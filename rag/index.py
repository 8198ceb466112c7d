"""The local index: one immutable folder per corpus generation (faiss exact + BM25), swapped by a pointer.

A generation's id is the digest of what it holds, so an index that is there is right, and the same
corpus indexed twice is one generation. Files are checked against their digests when opened.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from understudy.digests import digest_of, digest_of_file
from understudy.errors import NotFoundError, StorageError
from understudy.files import read_json, whole_folder, write_json
from understudy.records import Chunk

if TYPE_CHECKING:
    import bm25s
    import faiss

VERSION = 1
POINTER = "live.json"


@dataclass(frozen=True)
class Index:
    """An opened generation; rows of `faiss` are windows, `owners[row]` is the chunk's place in `chunk_ids`."""

    generation: str
    embedder: str
    chunk_ids: list[str]
    owners: np.ndarray
    dense: faiss.Index
    lexical: bm25s.BM25

    def search_dense(self, vector: np.ndarray, count: int) -> list[tuple[str, float]]:
        """(chunk id, cosine) of the nearest chunks, best first; a chunk counts by its best window."""
        windows = min(self.dense.ntotal, count * 3)
        scores, rows = self.dense.search(vector.reshape(1, -1), windows)
        best: dict[str, float] = {}
        for score, row in zip(scores[0], rows[0], strict=True):
            if row >= 0:
                best.setdefault(self.chunk_ids[self.owners[row]], float(score))
        return list(best.items())[:count]

    def search_lexical(self, query: str, count: int) -> list[tuple[str, float]]:
        """(chunk id, BM25 score) of the best chunks that share a word with the query."""
        tokens = tokenize([query])
        if not tokens[0]:
            return []
        rows, scores = self.lexical.retrieve(tokens, k=min(count, len(self.chunk_ids)), show_progress=False)
        return [(self.chunk_ids[row], float(score)) for row, score in zip(rows[0], scores[0], strict=True) if score > 0]


def tokenize(texts: Iterable[str]) -> list[list[str]]:
    """Lower-cased, stop-word-free, stemmed words; the same for chunks and queries."""
    import bm25s
    import Stemmer

    return bm25s.tokenize(list(texts), stopwords="en", stemmer=Stemmer.Stemmer("english"), return_ids=False, show_progress=False)  # type: ignore[no-any-return]


def generation_of(chunks: list[Chunk], embedder: str) -> str:
    """The id of the index that these chunks and this embedder make."""
    return digest_of([VERSION, embedder, sorted(chunk.id for chunk in chunks)])[:16]


def build_index(root: Path, chunks: list[Chunk], vectors: dict[str, np.ndarray], embedder: str) -> str:
    """Write the generation's folder unless it is there whole; returns its id. Raises StorageError."""
    import bm25s
    import faiss

    generation = generation_of(chunks, embedder)
    folder = root / generation
    if folder.exists() and _is_whole(folder):
        return generation
    with whole_folder(folder) as scratch:
        owners = np.repeat(np.arange(len(chunks)), [len(vectors[c.id]) for c in chunks])
        stacked = np.concatenate([vectors[chunk.id] for chunk in chunks])
        dense = faiss.IndexFlatIP(stacked.shape[1])
        dense.add(np.ascontiguousarray(stacked))
        faiss.write_index(dense, str(scratch / "dense.faiss"))
        lexical = bm25s.BM25()
        lexical.index(tokenize(chunk.text for chunk in chunks), show_progress=False)
        lexical.save(str(scratch / "bm25"))
        np.save(scratch / "owners.npy", owners)
        write_json(scratch / "chunks.json", [chunk.id for chunk in chunks])
        files = {str(f.relative_to(scratch)): digest_of_file(f) for f in sorted(scratch.rglob("*")) if f.is_file()}
        write_json(scratch / "index.json", {"version": VERSION, "generation": generation, "embedder": embedder, "files": files})
    return generation


def open_index(root: Path, generation: str) -> Index:
    """Open a generation after checking every file's digest; raises StorageError where it is damaged."""
    import bm25s
    import faiss

    folder = root / generation
    if not _is_whole(folder):
        raise StorageError(f"the index {generation} is missing or damaged", "run `understudy ingest` on any file: it rebuilds the index from the store")
    meta = read_json(folder / "index.json")
    return Index(
        generation=generation,
        embedder=meta["embedder"],
        chunk_ids=read_json(folder / "chunks.json"),
        owners=np.load(folder / "owners.npy", allow_pickle=False),
        dense=faiss.read_index(str(folder / "dense.faiss")),
        lexical=bm25s.BM25.load(str(folder / "bm25"), load_corpus=False, allow_pickle=False),
    )


def live_generation(root: Path, tenant: str) -> str:
    """The tenant's live generation; raises NotFoundError while nothing has been ingested."""
    generation = _pointers(root).get(tenant)
    if not generation:
        raise NotFoundError("the corpus is empty", "run `understudy ingest PATH` first")
    return str(generation)


def make_live(root: Path, tenant: str, generation: str | None) -> None:
    """Point the tenant at a generation (None: at nothing) and delete folders that no tenant points at."""
    pointers = _pointers(root) | {tenant: generation}
    write_json(root / POINTER, pointers)
    for folder in root.iterdir():
        if folder.is_dir() and not folder.name.startswith(".") and folder.name not in pointers.values():
            shutil.rmtree(folder, ignore_errors=True)


def _pointers(root: Path) -> dict[str, Any]:
    return dict(read_json(root / POINTER)) if (root / POINTER).exists() else {}


def _is_whole(folder: Path) -> bool:
    try:
        files = read_json(folder / "index.json")["files"]
        return all(digest_of_file(folder / name) == digest for name, digest in files.items())
    except (NotFoundError, StorageError, OSError, KeyError):
        return False
