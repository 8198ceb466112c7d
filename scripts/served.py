"""`understudy serve` of a workspace, for as long as a measurement needs it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from serve.gateway.server import url_of
from understudy.workspace import Workspace

START_SECONDS = 600


@contextmanager
def served(workspace: Workspace) -> Iterator[subprocess.Popen[bytes]]:
    """The serving process, its gateway ready; it is interrupted and waited for at the end. Exits where it does not become ready."""
    process = subprocess.Popen([sys.executable, "-m", "understudy.cli", "--workspace", str(workspace.root), "serve"])
    try:
        _wait_until_ready(process, url_of(workspace.config.gateway).removesuffix("/v1") + "/ready")
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    sys.exit("the gateway did not become ready")
