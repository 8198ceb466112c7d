"""The local index: one immutable folder per corpus generation, holding vectors, BM25 and what filters need.

A generation's id is the digest of what it holds, so an index that is there is right, and the same
corpus indexed twice is one generation. Files are checked against their digests when opened.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from rag.filters import Facts, IndexedDocument
from understudy.digests import digest_of, digest_of_file
from understudy.errors import NotFoundError, StorageError
from understudy.files import read_json, read_jsonl, whole_folder, write_json, write_jsonl
from understudy.records import Chunk, Document

if TYPE_CHECKING:
    import bm25s
    import faiss

VERSION = 2
META = "index.json"  # a generation's own account: what made it, and its files' digests
EXACT_UP_TO = 10_000  # windows; beyond, 8-bit codes are searched and the best rescored exactly (docs/benchmarks.md)
RESCORED = 4  # windows rescored for each one wanted
REBUILD = "run `understudy index rebuild`: it makes the index anew from the store"


class Searcher(Protocol):
    """What retrieval asks of an index, local or a database's. `allowed` are the only chunk ids that may be found; None: all."""

    def search_dense(self, vector: np.ndarray, count: int, allowed: frozenset[str] | None = None) -> list[tuple[str, float]]:
        """(chunk id, cosine) of the nearest chunks to a unit vector [dim], best first."""

    def search_lexical(self, query: str, count: int, allowed: frozenset[str] | None = None) -> list[tuple[str, float]]:
        """(chunk id, score) of the chunks that share words with the query, best first."""


@dataclass(frozen=True, eq=False)
class Index:
    """An opened generation; row i of `vectors` is a window of the chunk at place `owners[i]`."""

    generation: str
    embedder: str
    chunker: str
    facts: Facts
    owners: np.ndarray  # [windows] int32
    vectors: np.ndarray  # [windows, dim] float32, mapped from the disk
    dense: faiss.Index
    lexical: bm25s.BM25
    _selected: Any = field(init=False)  # chunk ids → (mask [chunks], faiss selector of windows)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_selected", lru_cache(maxsize=16)(self._select))

    def search_dense(self, vector: np.ndarray, count: int, allowed: frozenset[str] | None = None) -> list[tuple[str, float]]:
        """See Searcher; a chunk counts by its best window."""
        windows = count
        while True:
            windows = min(len(self.owners), windows * 3)
            best: dict[str, float] = {}
            rows, scores = self._nearest(vector, windows, allowed)
            for row, score in zip(rows.tolist(), scores.tolist(), strict=True):
                best.setdefault(self.facts.chunk_ids[self.owners[row]], score)
            if len(best) >= count or len(rows) < windows or windows == len(self.owners):
                return list(best.items())[:count]

    def search_lexical(self, query: str, count: int, allowed: frozenset[str] | None = None) -> list[tuple[str, float]]:
        """See Searcher; the score is BM25's."""
        tokens = tokenize([query])[0]
        if not tokens:
            return []
        scores = self.lexical.get_scores(tokens, weight_mask=None if allowed is None else self._selected(allowed)[0])  # [chunks]
        places = np.flatnonzero(scores > 0)  # few: choosing among all chunks, most of them tied at 0, takes ten times as long
        if len(places) > count:
            places = np.sort(places[np.argpartition(-scores[places], count - 1)[:count]])
        places = places[np.argsort(scores[places], kind="stable")[::-1]]  # of equals the later one first, as bm25s has it
        return [(self.facts.chunk_ids[place], score) for place, score in zip(places.tolist(), scores[places].tolist(), strict=True)]

    def _nearest(self, vector: np.ndarray, windows: int, allowed: frozenset[str] | None) -> tuple[np.ndarray, np.ndarray]:
        """Rows and cosines of at most so many windows, best first."""
        import faiss

        is_exact = len(self.owners) <= EXACT_UP_TO
        options = None if allowed is None else faiss.SearchParameters(sel=self._selected(allowed)[1])  # type: ignore[call-arg]
        wanted = windows if is_exact else min(len(self.owners), windows * RESCORED)
        scores, rows = self.dense.search(vector.reshape(1, -1), wanted, params=options)
        found = rows[0][rows[0] >= 0]
        if is_exact:
            return found, scores[0][: len(found)]
        exact = self.vectors[np.sort(found)] @ vector  # in the disk's order
        order = np.argsort(-exact, kind="stable")[:windows]
        return np.sort(found)[order], exact[order]

    def _select(self, allowed: frozenset[str]) -> tuple[np.ndarray, faiss.IDSelector]:
        import faiss

        mask = np.zeros(len(self.facts.chunk_ids), dtype=np.float32)
        mask[[place for chunk_id in allowed if (place := self.facts.place.get(chunk_id)) is not None]] = 1
        return mask, faiss.IDSelectorBitmap(np.packbits(mask[self.owners] > 0, bitorder="little"))  # type: ignore[call-arg, arg-type]


def tokenize(texts: Iterable[str]) -> list[list[str]]:
    """Lower-cased, stop-word-free, stemmed words; the same for chunks and queries."""
    import bm25s
    import Stemmer

    return bm25s.tokenize(list(texts), stopwords="en", stemmer=Stemmer.Stemmer("english"), return_ids=False, show_progress=False)  # type: ignore[no-any-return]


def build_index(root: Path, documents: list[Document], chunks: list[Chunk], vectors: dict[str, np.ndarray], embedder: str, chunker: str) -> str:
    """Write the generation's folder unless it is there whole; returns its id. Raises StorageError.

    `vectors` holds [windows, dim] of each chunk; documents without a chunk are left out.
    """
    used = {chunk.document_id for chunk in chunks}
    kept = [IndexedDocument(**document.model_dump(include=set(IndexedDocument.model_fields))) for document in documents if document.id in used]
    place = {document.id: number for number, document in enumerate(kept)}
    generation = digest_of([VERSION, embedder, chunker, sorted(c.id for c in chunks), [d.model_dump() for d in sorted(kept, key=lambda d: d.id)]])[:16]
    folder = root / generation
    if folder.exists() and _is_whole(folder):
        return generation
    with whole_folder(folder) as scratch:
        np.save(scratch / "owners.npy", np.repeat(np.arange(len(chunks), dtype=np.int32), [len(vectors[c.id]) for c in chunks]))
        np.save(scratch / "document_of.npy", np.array([place[c.document_id] for c in chunks], dtype=np.int32))
        np.save(scratch / "pages.npy", np.array([[min(c.pages), max(c.pages)] for c in chunks], dtype=np.int32))
        write_json(scratch / "documents.json", [document.model_dump() for document in kept])
        write_json(scratch / "chunks.json", [chunk.id for chunk in chunks])
        write_jsonl(scratch / "records.jsonl", [chunk.model_dump(exclude={"text"}) for chunk in chunks])
        _write_dense(scratch, np.concatenate([vectors[chunk.id] for chunk in chunks]))
        _write_lexical(scratch, chunks)
        files = {str(f.relative_to(scratch)): digest_of_file(f) for f in sorted(scratch.rglob("*")) if f.is_file()}
        meta = {"version": VERSION, "generation": generation, "embedder": embedder, "chunker": chunker, "chunks": len(chunks), "documents": len(kept)}
        write_json(scratch / META, _sealed({**meta, "files": files}))
    return generation


def read_meta(root: Path, generation: str) -> dict[str, Any]:
    """A generation's own account: version, embedder, chunker, counts. Raises StorageError where it is missing, damaged or of another version."""
    try:
        meta = dict(read_json(root / generation / META))
    except (NotFoundError, StorageError) as error:
        raise StorageError(f"the index {generation} is missing or damaged", REBUILD) from error
    if meta.get("version") != VERSION:
        raise StorageError(f"the index {generation} was made by another version of understudy", REBUILD)
    return meta


def open_index(root: Path, generation: str) -> Index:
    """Open a generation after checking every file's digest; raises StorageError where it is damaged."""
    import bm25s
    import faiss

    folder, meta = root / generation, read_meta(root, generation)
    if not _is_whole(folder):
        raise StorageError(f"the index {generation} is missing or damaged", REBUILD)
    vectors = np.load(folder / "vectors.npy", allow_pickle=False, mmap_mode="r")
    if (folder / "dense.faiss").exists():
        dense = faiss.read_index(str(folder / "dense.faiss"))
    else:
        dense = faiss.IndexFlatIP(vectors.shape[1])
        dense.add(vectors)
    facts = Facts(
        chunk_ids=read_json(folder / "chunks.json"),
        documents=[IndexedDocument.model_validate(row) for row in read_json(folder / "documents.json")],
        document_of=np.load(folder / "document_of.npy", allow_pickle=False),
        pages=np.load(folder / "pages.npy", allow_pickle=False),
    )
    owners = np.load(folder / "owners.npy", allow_pickle=False)
    lexical = bm25s.BM25.load(str(folder / "bm25"), load_corpus=False, allow_pickle=False)
    return Index(generation, meta["embedder"], meta["chunker"], facts, owners, vectors, dense, lexical)


def indexed_chunks(root: Path, generation: str, documents: dict[str, Document]) -> list[Chunk]:
    """The generation's chunks of these documents (by id), their texts cut from the documents again."""
    rows = [row for row in read_jsonl(root / generation / "records.jsonl") if row["document_id"] in documents]
    return [Chunk.model_validate(row | {"text": documents[row["document_id"]].text[row["start"] : row["end"]]}) for row in rows]


def vectors_by_chunk(index: Index) -> dict[str, np.ndarray]:
    """The vectors [windows, dim] of each chunk of an index."""
    ends = np.searchsorted(index.owners, np.arange(len(index.facts.chunk_ids) + 1))
    return {chunk_id: index.vectors[ends[place] : ends[place + 1]] for place, chunk_id in enumerate(index.facts.chunk_ids)}


def _write_dense(folder: Path, stacked: np.ndarray) -> None:
    import faiss

    np.save(folder / "vectors.npy", stacked)
    if len(stacked) > EXACT_UP_TO:
        dense = faiss.IndexScalarQuantizer(stacked.shape[1], faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
        dense.train(stacked)
        dense.add(stacked)
        faiss.write_index(dense, str(folder / "dense.faiss"))


def _write_lexical(folder: Path, chunks: list[Chunk]) -> None:
    import bm25s

    lexical, words = bm25s.BM25(), tokenize(chunk.text for chunk in chunks)
    lexical.index(words if any(words) else [[""]] * len(words), show_progress=False)  # bm25s cannot index stop words alone
    lexical.save(str(folder / "bm25"))


def _sealed(meta: dict[str, Any]) -> dict[str, Any]:
    """The account with the digest of all the rest of it."""
    rest = {key: value for key, value in meta.items() if key != "digest"}
    return rest | {"digest": digest_of(rest)}


def _is_whole(folder: Path) -> bool:
    try:
        meta = read_json(folder / META)
        return bool(_sealed(meta) == meta) and all(digest_of_file(folder / name) == digest for name, digest in meta["files"].items())
    except (NotFoundError, StorageError, OSError, KeyError):
        return False
