"""How often our 95 % intervals hold the truth, as simulated for numbers of documents and questions (scripts/bench_coverage.py)."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from understudy.files import read_json

TABLE = Path(__file__).with_name("coverage.json")  # rows {documents, questions_per_document, coverage, …}; documents 0: questions alone


def simulated_coverage(questions: int, documents: int, skewness: float | None = None) -> float | None:
    """The worst coverage simulated, over document effects, for no more documents and the numbers of questions of each on both sides; of
    differences that are as lopsided (between two that were simulated, on the line that joins them), of all where `skewness` is None.

    `documents` is how many are resampled, 0 where questions are drawn alone. None where nothing so small, or so lopsided, was simulated.
    """
    cells = _cells()
    known = [size for size, _, _ in cells if 0 < size <= documents] if documents else [0]
    shapes = sorted({shape for _, _, shape in cells})
    if not known or (skewness is not None and skewness > shapes[-1]):
        return None
    nearest = max(known)
    each = questions / max(1, documents)
    sizes = {per for size, per, _ in cells if size == nearest}
    below, above = [per for per in sizes if per <= each], [per for per in sizes if per >= each]
    if not documents and not below:
        return None
    between = (max(below, default=min(sizes)), min(above, default=max(sizes)))
    worst = np.minimum.accumulate([min(cells[nearest, per, shape] for per in between) for shape in shapes])
    return float(np.interp(shapes[-1] if skewness is None else skewness, shapes, worst))


@lru_cache(maxsize=1)
def _cells() -> dict[tuple[int, int, float], float]:
    """(documents, questions of each, skewness of the differences) → the worst coverage."""
    cells: dict[tuple[int, int, float], float] = {}
    for row in read_json(TABLE)["coverage"]:
        key = (row["documents"], row["questions_per_document"], row["skewness"])
        cells[key] = min(cells.get(key, 1.0), row["coverage"])
    return cells
