"""`understudy serve` as a process, with a small server in vLLM's place: restarts, signals, and what is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.gateway.server import url_of
from serve.supervise import free_port
from tests.conftest import BASE, MODELS
from tests.serve.test_gateway_streams import UPSTREAM
from understudy.engines import find_engine
from understudy.files import read_json
from understudy.workspace import Workspace, create_workspace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

ENGINE = UPSTREAM.replace("app.add_routes([", 'app.add_routes([web.get("/health", models), web.post("/v1/completions", models), ')
SERVE = """
import sys
import serve.engine, serve.gateway.names, serve.gateway.run
from understudy.cli import main
serve.gateway.names.LISTING_SECONDS = serve.gateway.run.CHECK_SECONDS = serve.gateway.run.HUNG_SECONDS = 1
serve.engine.build_command = lambda spec: [sys.executable, "-c", sys.argv[2], str(spec.port), "20", "0.2"]
sys.exit(main(["--workspace", sys.argv[1], "serve", *sys.argv[3:]]))
"""
BODY = {"model": "base", "stream": True, "messages": [{"role": "user", "content": "x"}]}


@dataclass
class Running:
    """A served workspace."""

    workspace: Workspace
    process: subprocess.Popen[str]

    @property
    def url(self) -> str:
        return url_of(self.workspace.config.gateway)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            assert self.process.poll() is None
            try:
                if httpx.get(self.url.removesuffix("/v1") + "/ready").status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.05)
        raise AssertionError("never ready")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Running]:
    ports = f"gateway: {{port: {free_port('127.0.0.1')}}}\nserve: {{port: {free_port('127.0.0.1')}}}\n"
    workspace = create_workspace(str(tmp_path / "w"), ports)
    workspace.models.mkdir()
    (workspace.models / BASE).symlink_to((MODELS / BASE).resolve())
    process = subprocess.Popen([sys.executable, "-c", SERVE, str(workspace.root), ENGINE], stderr=subprocess.PIPE, text=True)
    running = Running(workspace, process)
    try:
        running.wait_until_ready()
        yield running
    finally:
        process.kill()
        process.wait()


def test_a_killed_engine_comes_back_and_sigterm_lets_what_runs_end(served: Running) -> None:
    first = find_engine(served.workspace)
    assert first is not None
    with httpx.stream("POST", f"{served.url}/chat/completions", json=BODY, timeout=30) as cut:
        lines = cut.iter_lines()
        next(lines)
        os.killpg(first.pid, signal.SIGKILL)
        rest = list(lines)
    assert "upstream_broke_off" in "".join(rest) and "data: [DONE]" not in rest
    away = httpx.post(f"{served.url}/chat/completions", json=BODY)
    assert away.status_code == 503 and away.headers["retry-after"]
    served.wait_until_ready()
    again = find_engine(served.workspace)
    assert again is not None and again.pid != first.pid
    with httpx.stream("POST", f"{served.url}/chat/completions", json=BODY, timeout=30) as whole:
        lines = whole.iter_lines()
        next(lines)
        served.process.send_signal(signal.SIGTERM)
        assert "data: [DONE]" in list(lines)
    _, said = served.process.communicate(timeout=30)
    assert served.process.returncode == 0 and said.endswith("stopped\n") and "starting it again" in said
    assert not served.workspace.engine_file.exists()
    with pytest.raises(ProcessLookupError):
        os.killpg(again.pid, 0)


def test_an_engine_that_hangs_is_ended_and_started_again(served: Running) -> None:
    first = find_engine(served.workspace)
    assert first is not None
    [child] = [int(pid) for pid in Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()]
    os.kill(child, signal.SIGSTOP)
    ready = served.url.removesuffix("/v1") + "/ready"
    deadline = time.monotonic() + 30
    while httpx.get(ready, timeout=10).status_code != 503:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert httpx.post(f"{served.url}/chat/completions", json=BODY).status_code == 503
    served.wait_until_ready()
    again = find_engine(served.workspace)
    assert again is not None and again.pid != first.pid
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_a_second_server_is_refused_and_ctrl_c_ends_the_first(served: Running) -> None:
    other = subprocess.run([sys.executable, "-m", "understudy.cli", "--workspace", str(served.workspace.root), "serve"], capture_output=True, text=True)
    assert other.returncode == 1 and "served already" in other.stderr
    guardian = read_json(served.workspace.engine_file)["pid"]
    served.process.send_signal(signal.SIGINT)
    _, said = served.process.communicate(timeout=30)
    assert served.process.returncode == 0 and said.endswith("stopped\n")
    with pytest.raises(ProcessLookupError):
        os.killpg(guardian, 0)


def command(served: Running, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "understudy.cli", "--workspace", str(served.workspace.root), *words], capture_output=True, text=True)


def test_a_pause_lets_what_runs_end_and_frees_the_engine_until_it_is_resumed(served: Running) -> None:
    first = find_engine(served.workspace)
    assert first is not None
    with httpx.stream("POST", f"{served.url}/chat/completions", json=BODY, timeout=30) as running:
        lines = running.iter_lines()
        next(lines)
        paused = command(served, "serve", "pause")
        assert "data: [DONE]" in list(lines)
    assert paused.returncode == 0, paused.stderr
    with pytest.raises(ProcessLookupError):
        os.killpg(first.pid, 0)
    away = httpx.post(f"{served.url}/chat/completions", json=BODY)
    assert (away.status_code, away.json()["error"]["code"], bool(away.headers["retry-after"])) == (503, "engine_paused", True)
    assert command(served, "serve", "resume").returncode == 0
    served.wait_until_ready()
    again = find_engine(served.workspace)
    assert again is not None and again.pid != first.pid
    assert httpx.get(f"{served.url.removesuffix('/v1')}/metrics").text.count("understudy_engine_restarts_total 0.0") == 1
    command(served, "serve", "pause")
    served.process.send_signal(signal.SIGTERM)
    served.process.communicate(timeout=30)
    assert served.process.returncode == 0
    assert command(served, "serve", "resume").returncode == 1
    assert not [file.name for file in served.workspace.engine_file.parent.glob("*.json")]


def test_ctrl_c_while_tuning_leaves_no_engine_behind(tmp_path: Path, make_document: Callable[..., Any]) -> None:
    workspace = create_workspace(str(tmp_path / "w"), f"serve: {{port: {free_port('127.0.0.1')}}}\n")
    workspace.store.add_document(*make_document("notes.txt", [f"The kiln number {number} is fired." for number in range(6)]))
    workspace.models.mkdir()
    (workspace.models / BASE).symlink_to((MODELS / BASE).resolve())
    process = subprocess.Popen([sys.executable, "-c", SERVE, str(workspace.root), ENGINE, "--tune"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (guardians := children.read_text().split()) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(2)  # its requests are under way
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "goes on where it stopped" in said
    with pytest.raises(ProcessLookupError):
        os.killpg(int(guardians[0]), 0)
    assert (workspace.root / "understudy.yaml").read_text().startswith("serve: {port")
