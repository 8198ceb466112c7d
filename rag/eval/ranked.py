"""Metrics of one ranking, as trec_eval has them: `found` says of each retrieved passage, best first, whether it is relevant.

`relevant` counts the relevant passages there are, retrieved or not. The cutoff k is the length of `found`, unless given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def precision_at_k(found: Sequence[bool], k: int | None = None) -> float:
    """Share of the first k places that hold a relevant passage; an empty place holds none."""
    places = len(found) if k is None else k
    return sum(found[:places]) / places if places else 0.0


def recall_at_k(found: Sequence[bool], relevant: int, k: int | None = None) -> float:
    """Share of the relevant passages that are among the first k."""
    return sum(found[:k]) / relevant if relevant else 0.0


def reciprocal_rank(found: Sequence[bool]) -> float:
    """1 ÷ the place of the first relevant passage; 0 where there is none."""
    return next((1 / place for place, is_relevant in enumerate(found, 1) if is_relevant), 0.0)


def ndcg_at_k(found: Sequence[bool], relevant: int, k: int | None = None) -> float:
    """Discounted gain of the first k against the best order of all relevant ones (Järvelin and Kekäläinen 2002), gains of 0 or 1."""
    places = len(found) if k is None else k
    best = sum(_discount(place) for place in range(min(places, relevant)))
    return sum(_discount(place) for place, is_relevant in enumerate(found[:places]) if is_relevant) / best if best else 0.0


def _discount(place: int) -> float:
    """Of a 0-based place."""
    return 1 / math.log2(place + 2)
