"""`understudy serve` of a workspace as a process of its own, for the benchmarks that ask its gateway."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx

from serve.gateway.server import url_of
from understudy.workspace import Workspace

START_SECONDS, STOP_SECONDS = 600, 120


@contextlib.contextmanager
def serving(workspace: Workspace) -> Iterator[subprocess.Popen[bytes]]:
    """The serving process, ready; it ends with the block, in order. Exits where it does not become ready."""
    process = subprocess.Popen([sys.executable, "-m", "understudy.cli", "--workspace", str(workspace.root), "serve"])
    try:
        if not became_ready(process, url_of(workspace.config.gateway).removesuffix("/v1") + "/ready"):
            sys.exit("the gateway did not become ready")
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


def became_ready(process: subprocess.Popen[bytes], url: str) -> bool:
    """Wait until the gateway says that it is ready; False where the server ends before, or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url).status_code == 200:
                return True
        time.sleep(0.5)
    return False
