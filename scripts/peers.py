"""The environment that the benchmarks' peers run in, apart from ours: scripts/bench_peers.txt, made on first use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".bench" / "peers"


def peers_python(package: str) -> str:
    """The environment's Python, in which `package` can be imported."""
    python = FOLDER / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(FOLDER)], check=True)
    if subprocess.run([str(python), "-c", f"import {package}"], capture_output=True).returncode:
        subprocess.run([str(python), "-m", "pip", "install", "-q", "-r", str(ROOT / "scripts" / "bench_peers.txt")], check=True)
    return str(python)
