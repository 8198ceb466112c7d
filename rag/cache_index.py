"""Nearest entries in memory, for one scope of the semantic cache: appended to as entries come, never rebuilt on a look-up.

Below EXACT_BELOW vectors every cosine is computed. Beyond, the signs of the components pick candidates by Hamming distance
(faiss, 48 bytes a vector at 384 dimensions) and their cosines are computed. `scripts/bench cache` measures both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

EXACT_BELOW = 4096
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

    def __contains__(self, entry_id: str) -> bool:
        return entry_id in self._rows

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
            rows = np.arange(total)
        else:
            _, found = self._signs.search(np.packbits(vector.reshape(1, -1) > 0, axis=1), min(CANDIDATES, total))
            rows = found[0]
        cosines = self._vectors[rows] @ vector
        best = rows[np.argsort(-cosines)], np.sort(cosines)[::-1]
        alive = [(self._ids[row], float(cosine)) for row, cosine in zip(best[0][: 4 * count], best[1], strict=False) if self._is_alive(row)]
        return alive[:count]

    def _is_alive(self, row: int) -> bool:
        return self._rows.get(self._ids[row]) == row

    def _add_signs(self, start: int, end: int) -> None:
        if end < EXACT_BELOW:
            return
        if self._signs is None:
            import faiss

            self._signs = faiss.IndexBinaryFlat(8 * ((self._vectors.shape[1] + 7) // 8))
        self._signs.add(np.packbits(self._vectors[start:end] > 0, axis=1))
