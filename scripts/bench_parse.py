"""Pages a second of parsing, on the sample library and on a generated PDF of 5,000 pages: scripts/bench parse

Ours: the kept children of rag.parsers. The peer: the same parser in a child of its own for each file, one after the other.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from rag.load import find_files
from rag.parsers import Parsers
from tests.rag.pdfs import five_thousand_pages
from understudy.settings.corpus import Ingest

SAMPLE = Path("samples/ai-governance/pdf")
REPEATS = 5


def kept_children(files: list[Path], processes: int) -> int:
    """Parse with `processes` children; returns the number of pages."""
    with Parsers(Ingest(), processes) as parsers, ThreadPoolExecutor(processes) as pool:
        return sum(len(document["pages"]) for found in pool.map(parsers.parse, files) for document in found)


def child_a_file(files: list[Path]) -> int:
    """Parse each file in an interpreter of its own; returns the number of pages."""
    found = (subprocess.run([sys.executable, "-m", "rag.parse", str(file)], capture_output=True, check=True).stdout for file in files)
    return sum(len(document["pages"]) for output in found for document in json.loads(output))


def rates(run: Callable[[], int], repeats: int) -> list[float]:
    """Pages a second of each repeat."""
    result = []
    for _ in range(repeats):
        began = time.perf_counter()
        pages = run()
        result.append(pages / (time.perf_counter() - began))
    return result


def main() -> None:
    """One JSON line for each corpus; spread: slowest and fastest of our repeats."""
    with tempfile.TemporaryDirectory() as folder:
        register = Path(folder) / "register.pdf"
        register.write_bytes(five_thousand_pages())
        for name, files, processes, repeats in (("sample", find_files([SAMPLE]), 2, REPEATS), ("5,000 pages in one file", [register], 1, 3)):
            ours = rates(lambda f=files, p=processes: kept_children(f, p), repeats)  # type: ignore[misc]
            peer = rates(lambda f=files: child_a_file(f), repeats)  # type: ignore[misc]
            row = {"bench": f"parsing, {name}", "ours": round(median(ours), 1), "peer": round(median(peer), 1), "peer_name": "one child a file, one at a time"}
            row |= {"ratio": round(median(ours) / median(peer), 2), "unit": "pages/s", "n": repeats, "spread": [round(min(ours), 1), round(max(ours), 1)]}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
