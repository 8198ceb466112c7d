"""Nearest entries in memory, for one scope of the semantic cache: appended to as entries come, never rebuilt on a look-up.

Below EXACT_BELOW vectors every cosine is computed. Beyond, the signs of the components pick candidates by Hamming distance
(faiss, 48 bytes a vector at 384 dimensions) and their cosines are computed. `scripts/bench cache_latency` measures both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

EXACT_BELOW = 1024
CANDIDATES = 128  # by signs, before cosines


class VectorIndex:
    """Unit vectors by entry id."""

    def __init__(self) -> None:
        self._ids: list[str] = []
        self._rows: dict[str, int] = {}
        self._vectors = np.empty((0, 0), np.float32)  # [capacity, dim]
        self._signs: Any = None  # faiss.IndexBinaryFlat over the same rows, once there are EXACT_BELOW of them

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> int:
        """Vectors in memory, those of forgotten entries included."""
        return len(self._ids)

    def add(self, ids: Sequence[str], vectors: np.ndarray) -> None:
        """Append the entries that are not there yet; vectors are float32 [n, dim] of unit length."""
        new = [place for place, entry_id in enumerate(ids) if entry_id not in self._rows]
        if not new:
            return
        start, end = len(self._ids), len(self._ids) + len(new)
        if end > len(self._vectors):
            grown = np.empty((max(end, 2 * len(self._vectors), 64), vectors.shape[1]), np.float32)
            grown[:start] = self._vectors[:start] if start else 0
            self._vectors = grown
        self._vectors[start:end] = vectors[new]
        for row, place in enumerate(new, start):
            self._ids.append(ids[place])
            self._rows[ids[place]] = row
        self._add_signs(start if self._signs is not None else 0, end)

    def discard(self, entry_id: str) -> None:
        """Forget an entry; its row stays unused until the index is made anew."""
        self._rows.pop(entry_id, None)

    def nearest(self, vector: np.ndarray, count: int) -> list[tuple[str, float]]:
        """(entry id, cosine) of the nearest entries, best first."""
        total = len(self._ids)
        if not self._rows:
            return []
        if self._signs is None:
            rows, near = np.arange(total), self._vectors[:total]
        else:
            rows = self._nearest_signs(vector, min(CANDIDATES, total))
            near = self._vectors[rows]
        cosines = np.einsum("rd,d->r", near, vector)  # one thread, where BLAS takes all
        order = np.argsort(-cosines)[: 4 * count]
        alive = [(self._ids[rows[place]], float(cosines[place])) for place in order if self._is_alive(rows[place])]
        return alive[:count]

    def _nearest_signs(self, vector: np.ndarray, count: int) -> np.ndarray:
        """Rows by Hamming distance, on one thread: a search of 0.3 ms gains nothing from more, and where cores are busy they wait for one another."""
        import faiss

        threads = faiss.omp_get_max_threads()  # of this thread of ours
        faiss.omp_set_num_threads(1)
        try:
            return np.asarray(self._signs.search(np.packbits(vector.reshape(1, -1) > 0, axis=1), count)[1][0])
        finally:
            faiss.omp_set_num_threads(threads)

    def _is_alive(self, row: int) -> bool:
        return self._rows.get(self._ids[row]) == row

    def _add_signs(self, start: int, end: int) -> None:
        if end < EXACT_BELOW:
            return
        if self._signs is None:
            import faiss

            self._signs = faiss.IndexBinaryFlat(8 * ((self._vectors.shape[1] + 7) // 8))
        self._signs.add(np.packbits(self._vectors[start:end] > 0, axis=1))
