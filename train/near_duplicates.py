"""Near-duplicate questions by MinHash (Broder 1997) with banding (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets, chapter 3).

Two questions are near-duplicates where the Jaccard similarity of their sets of character shingles is at least THRESHOLD. Banding proposes
pairs and the similarity itself decides, so every pair that is found is one. Of the pairs of similarity s, 1 − (1 − s^ROWS)^BANDS are found:
99.98 % at 0.7, all but 5 in 10⁸ at 0.8.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Hashable, Iterable

import numpy as np

from rag.same_questions import normalised
from rag.same_questions import shingles as shingles_of

THRESHOLD = 0.7
BANDS, ROWS = 32, 4

_DRAWN = np.random.default_rng(0).integers(0, 1 << 63, size=(2, BANDS * ROWS, 1), dtype=np.uint64)
_FACTORS, _OFFSETS = _DRAWN[0] | np.uint64(1), _DRAWN[1]


def shingles(question: str) -> frozenset[str]:
    """Those of the normalised question with a space at either end."""
    return shingles_of(f" {normalised(question)} ")


def similarity(a: frozenset[str], b: frozenset[str]) -> float:
    """Jaccard similarity of two non-empty sets, in [0, 1]."""
    return len(a & b) / len(a | b)


def near_duplicate_pairs(questions: list[str]) -> list[tuple[int, int]]:
    """The pairs (i, j), i < j, of near-duplicate questions, by position."""
    sets = [shingles(question) for question in questions]
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    pairs: set[tuple[int, int]] = set()
    for index, own in enumerate(sets):
        signature = _signature(own).reshape(BANDS, ROWS)
        proposed = {other for band in range(BANDS) for other in buckets[band, signature[band].tobytes()]}
        pairs |= {(other, index) for other in proposed if similarity(sets[other], own) >= THRESHOLD}
        for band in range(BANDS):
            buckets[band, signature[band].tobytes()].append(index)
    return sorted(pairs)


def joined(count: int, pairs: Iterable[tuple[int, int]], keys: list[list[Hashable]] | None = None) -> list[int]:
    """For each of `count` items the first item of its class, where pairs, and items with a key in common, are of one class (union-find)."""
    parents = list(range(count))

    def root(item: int) -> int:
        while parents[item] != item:
            parents[item] = item = parents[parents[item]]
        return item

    def join(a: int, b: int) -> None:
        a, b = sorted((root(a), root(b)))
        parents[b] = a

    for a, b in pairs:
        join(a, b)
    holders: dict[Hashable, int] = {}
    for item, own in enumerate(keys or []):
        for key in own:
            join(holders.setdefault(key, item), item)
    return [root(item) for item in range(count)]


def _signature(own: frozenset[str]) -> np.ndarray:
    """[BANDS × ROWS] (uint32) minima of so many multiply-shift hashes (Dietzfelbinger et al. 1997) of a set."""
    hashes = np.fromiter((zlib.crc32(shingle.encode("utf-8", "surrogatepass")) for shingle in own), dtype=np.uint64, count=len(own))
    minima: np.ndarray = ((_FACTORS * hashes + _OFFSETS) >> np.uint64(32)).astype(np.uint32).min(axis=1)
    return minima
