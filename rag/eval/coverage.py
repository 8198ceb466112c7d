"""How often our 95 % intervals hold the truth, as simulated for numbers of documents and questions (scripts/bench_coverage.py)."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from understudy.files import read_json

TABLE = Path(__file__).with_name("coverage.json")  # rows {documents, questions_per_document, coverage, …}; documents 0: questions alone


def simulated_coverage(questions: int, documents: int) -> float | None:
    """The worst coverage simulated, over rates and document effects, for no more documents and the numbers of questions of each on both sides.

    `documents` is how many are resampled, 0 where questions are drawn alone. None where nothing so small was simulated.
    """
    cells = _cells()
    known = [size for size, _ in cells if 0 < size <= documents] if documents else [0]
    if not known:
        return None
    nearest = max(known)
    each = questions / max(1, documents)
    sizes = [per for size, per in cells if size == nearest]
    below, above = [per for per in sizes if per <= each], [per for per in sizes if per >= each]
    if not documents and not below:
        return None
    return min(cells[nearest, max(below, default=min(sizes))], cells[nearest, min(above, default=max(sizes))])


@lru_cache(maxsize=1)
def _cells() -> dict[tuple[int, int], float]:
    """(documents, questions of each) → the worst coverage."""
    cells: dict[tuple[int, int], float] = {}
    for row in read_json(TABLE)["coverage"]:
        key = (row["documents"], row["questions_per_document"])
        cells[key] = min(cells.get(key, 1.0), row["coverage"])
    return cells
