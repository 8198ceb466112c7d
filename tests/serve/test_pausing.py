"""Lending the engine's memory: who may, what the serving process says meanwhile, and that nothing stays paused by accident."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from serve.gateway.observe import Log
from serve.gateway.run import Supervisor
from serve.pausing import announce, borrowed, find_serving, is_pause_wanted, pause, resume, wait_for_restart, withdraw
from serve.sleeping import Sleeper
from serve.supervise import Engine
from tests.scripted import Endpoint, status
from tests.serve.doors import ask, engine_of, opened
from tests.serve.test_gateway import error_of
from understudy.cycle_stages import Turn
from understudy.cycles import Seen
from understudy.errors import EngineError, NotFoundError
from understudy.progress import show_progress
from understudy.workspace import Workspace


@contextmanager
def someone_serves(workspace: Workspace) -> Iterator[list[bool]]:
    """A thread in the serving process's place; yields what it saw wanted, change by change."""
    seen: list[bool] = []
    ends = threading.Event()

    def serve() -> None:
        while not ends.wait(0.01):
            wanted = is_pause_wanted(workspace)
            if not seen or seen[-1] is not wanted:
                seen.append(wanted)
            announce(workspace, "http://gateway/v1", "paused" if wanted else "serving")
        withdraw(workspace)

    announce(workspace, "http://gateway/v1", "serving")
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        while not seen:
            time.sleep(0.001)
        yield seen
    finally:
        ends.set()
        thread.join()


def test_pause_and_resume_return_when_it_is_so(workspace: Workspace) -> None:
    with someone_serves(workspace) as seen:
        assert pause(workspace, print).state == "paused"
        assert pause(workspace, print).state == "paused"  # already
        with pytest.raises(EngineError, match="already"), borrowed(workspace, print):
            pass
        assert resume(workspace, print).state == "serving"
    assert seen == [False, True, False]
    assert find_serving(workspace) is None


def test_what_is_borrowed_is_given_back_also_on_failure(workspace: Workspace) -> None:
    with someone_serves(workspace) as seen:
        with pytest.raises(ZeroDivisionError), borrowed(workspace, print):
            1 // (not is_pause_wanted(workspace))
        deadline = time.monotonic() + 10
        while seen[-1] and time.monotonic() < deadline:
            time.sleep(0.01)
    assert seen[-1] is False


def test_a_pause_asked_for_outlasts_the_borrower_it_came_upon(workspace: Workspace) -> None:
    with someone_serves(workspace):
        with borrowed(workspace, print):
            pause(workspace, print)
        assert is_pause_wanted(workspace)


def test_after_a_loan_the_served_engine_comes_first(workspace: Workspace) -> None:
    """A command that needs an engine right after it borrowed the memory waits for the one that is served, and starts none in its place."""
    announce(workspace, "http://gateway/v1", "paused")  # the server has not yet seen that the pause is over
    back = threading.Timer(0.3, announce, (workspace, "http://gateway/v1", "serving"))
    back.start()
    wait_for_restart(workspace, print)
    serving = find_serving(workspace)
    assert serving is not None and serving.state == "serving"
    with someone_serves(workspace):
        pause(workspace, print)
        wait_for_restart(workspace, print)  # paused for somebody: nothing comes back by itself
        assert is_pause_wanted(workspace)


def test_a_cycle_borrows_the_memory_of_a_gpu(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    turn = Turn(workspace, [], None, workspace.root, Seen(), print, show_progress, ExitStack())
    for has_gpu in (False, True):
        monkeypatch.setattr("torch.cuda.is_available", lambda has_gpu=has_gpu: has_gpu)
        with someone_serves(workspace), turn.lent_memory():
            assert is_pause_wanted(workspace) is has_gpu


def test_a_borrower_that_is_killed_holds_nothing(workspace: Workspace) -> None:
    holder = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with someone_serves(workspace):
        pause(workspace, print, holder.pid)
        assert is_pause_wanted(workspace)
        holder.kill()
        holder.wait()
        assert not is_pause_wanted(workspace)


def test_without_a_server_nothing_is_paused(workspace: Workspace) -> None:
    with pytest.raises(NotFoundError, match="nothing is served"):
        pause(workspace, print)
    with borrowed(workspace, lambda _: pytest.fail("there is nothing to say")):
        pass
    announce(workspace, "http://gateway/v1", "serving")
    file = workspace.engine_file.with_name("serve.json")
    file.write_text(file.read_text().replace(str(os.getpid()), "999999999"))
    assert find_serving(workspace) is None  # killed


def test_requests_meanwhile_are_told_to_come_again(workspace: Workspace, endpoint: Endpoint) -> None:
    engine = engine_of(endpoint)

    async def run() -> tuple[Any, ...]:
        async with opened(workspace, engine) as (client, gateway):
            gateway.serve(None, is_paused=True)
            body = {"model": "base", "messages": [{"role": "user", "content": "x"}]}
            away = await client.post("/v1/chat/completions", json=body), await client.get("/ready")
            gateway.serve(engine)
            return *away, await client.post("/v1/chat/completions", json=body)

    refused, ready, answered = asyncio.run(run())
    assert (refused.status_code, error_of(refused)["code"], ready.json()["status"], answered.status_code) == (503, "engine_paused", "engine_paused", 200)
    assert int(refused.headers["retry-after"]) > 0


def test_a_known_adapter_is_unavailable_and_not_unknown_while_the_engine_is_away(workspace: Workspace, endpoint: Endpoint) -> None:
    from tests.serve.test_gateway_names import register

    name = register(workspace, "right", endpoint, {}, ["default"])
    assert ask(workspace, None, model=name).status_code == 503
    assert ask(workspace, None, model="wrong").status_code == 404


class FakeEngine:
    """In place of a vLLM process: it runs until it is stopped."""

    def __init__(self, running: object) -> None:
        self.running, self.pid, self.stops, self.log_file = running, 1, 0, Path("/dev/null")

    def poll(self) -> int | None:
        return 0 if self.stops else None

    def stop(self) -> None:
        self.stops += 1


def test_the_supervisor_frees_the_engine_and_starts_another(workspace: Workspace, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.gateway.run.WATCH_SECONDS", 0.01)
    engines = [FakeEngine(engine_of(endpoint)) for _ in range(2)]
    left = list(engines[1:])

    async def run() -> None:
        async with opened(workspace, None) as (client, gateway):
            start: Callable[[], Engine] = lambda: left.pop()  # type: ignore[assignment,return-value] # noqa: E731
            supervisor = Supervisor(workspace, engines[0], start, Log(workspace.logs / "g.jsonl"), print)  # type: ignore[arg-type]
            watching = asyncio.ensure_future(supervisor.watch(gateway))
            await asyncio.sleep(0.05)
            await asyncio.to_thread(pause, workspace, print)
            assert (engines[0].stops, gateway.names.engine) == (1, None)
            assert (await client.get("/ready")).json()["status"] == "engine_paused"
            await asyncio.to_thread(resume, workspace, print)
            assert gateway.names.engine is not None and not left
            assert gateway.metrics.engine_restarts._value.get() == 0  # nothing failed
            watching.cancel()

    asyncio.run(run())
    withdraw(workspace)


# ---- vLLM's sleep mode, scripted


def test_an_engine_that_sleeps_must_wake_as_it_was(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(endpoint)
    asked: list[str] = []
    sleeper = Sleeper(engine)

    def answer(route: str) -> dict[str, Any]:
        asked.append(route)
        return {"is_sleeping": True} if route == "/is_sleeping" else {"choices": [{"text": texts[-1]}]}

    texts = ["the same"]
    monkeypatch.setattr(sleeper, "_ask", lambda _method, route, _body=None: answer(route))
    sleeper.sleep()
    assert asked == ["/v1/completions", "/sleep?level=1", "/is_sleeping"]
    sleeper.wake()
    texts.append("something else")
    with pytest.raises(EngineError, match="otherwise than before"):
        sleeper.wake()


def test_an_engine_without_sleep_mode_is_told_apart(endpoint: Endpoint) -> None:
    answered = {"choices": [{"text": "x"}]}
    endpoint.faults = [lambda handler: handler.send(200, answered), status(404)]
    with pytest.raises(EngineError, match="cannot be put to sleep"):
        Sleeper(engine_of(endpoint)).sleep()
