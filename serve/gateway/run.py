"""The engine and the gateway in front of it, for as long as they are wanted: an engine that ends or hangs is started again."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Protocol

import uvloop

from serve.gateway.agents import Wiring
from serve.gateway.app import build_app
from serve.gateway.gateway import Gateway
from serve.gateway.observe import Log
from serve.gateway.server import is_loopback, make_server, url_of
from serve.pausing import announce, is_pause_wanted
from serve.sleeping import Sleeper
from serve.supervise import Engine, died
from understudy.errors import EngineError, UnderstudyError
from understudy.workspace import Workspace

WATCH_SECONDS = 0.5
CHECK_SECONDS, HUNG_SECONDS = 5.0, 120.0  # how often the engine is asked whether it computes, and how long it may not
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before a restart, doubled each time
STEADY_SECONDS = 300.0  # an engine that ran this long starts the pauses anew


class Supervisor:
    """Holds the engine, starts another when it ends or hangs, and lends its memory while a pause is wanted."""

    def __init__(self, workspace: Workspace, engine: Engine, start: Callable[[], Engine], log: Log, report: Callable[[str], None]) -> None:
        self.engine = engine
        self._workspace, self._start, self._log, self._report = workspace, start, log, report
        self._url = url_of(workspace.config.gateway)

    async def watch(self, gateway: Gateway) -> None:
        """Give the gateway its engine, for ever; while there is none, its requests are answered 503."""
        pause, loop = FIRST_PAUSE, asyncio.get_running_loop()
        while True:
            gateway.serve(self.engine.running)
            announce(self._workspace, self._url, "serving")
            began = loop.time()
            fault = await self._end(gateway)
            gateway.serve(None, is_paused=fault is None)
            if fault is None and await self._lend(gateway):
                continue
            announce(self._workspace, self._url, "starting")
            pause = FIRST_PAUSE if loop.time() - began > STEADY_SECONDS else pause
            pause = await self._restart(gateway, fault, pause)

    async def _end(self, gateway: Gateway) -> UnderstudyError | None:
        """Wait until the engine ends or hangs, and return what happened to it; None where a pause is wanted."""
        clock = asyncio.get_running_loop().time
        answered = asked = clock()
        while self.engine.poll() is None:
            await asyncio.sleep(WATCH_SECONDS)
            if is_pause_wanted(self._workspace):
                return None
            if clock() - asked > CHECK_SECONDS:
                asked = clock()
                answered = clock() if self.engine.running and await gateway.pulse.beats(self.engine.running) else answered
                if clock() - answered > HUNG_SECONDS:
                    return EngineError(f"the engine has computed nothing for {clock() - answered:.0f} s")
        return died(self.engine)

    async def _lend(self, gateway: Gateway) -> bool:
        """Free the engine's memory for as long as the pause lasts; whether the same engine is back, awake."""
        announce(self._workspace, self._url, "pausing")
        self._log.write("engine_pausing")
        await gateway.drain()
        sleeper = await self._put_to_sleep()
        if sleeper is None:
            await asyncio.to_thread(self.engine.stop)
        self._report("the engine is paused")
        await self._wait_for_resume()
        self._log.write("engine_resuming")
        if sleeper is None:
            return False
        try:
            await asyncio.to_thread(sleeper.wake)
        except EngineError as error:
            self._report(f"{error.message}; starting it again")
            return False
        return True

    async def _put_to_sleep(self) -> Sleeper | None:
        if not self._workspace.config.serve.sleep or self.engine.running is None:
            return None
        sleeper = Sleeper(self.engine.running)
        try:
            await asyncio.to_thread(sleeper.sleep)
        except EngineError as error:
            self._report(f"{error.message}; it is stopped instead")
            return None
        return sleeper

    async def _wait_for_resume(self) -> None:
        while is_pause_wanted(self._workspace):
            announce(self._workspace, self._url, "paused")
            await asyncio.sleep(WATCH_SECONDS)
        announce(self._workspace, self._url, "starting")

    async def _restart(self, gateway: Gateway, fault: UnderstudyError | None, pause: float) -> float:
        """Try until an engine is up, at once after a pause and after a wait where it failed; returns the wait before the next try."""
        await asyncio.to_thread(self.engine.stop)
        while True:
            if fault is not None:
                self._log.write("engine_ended", message=fault.message, retry_seconds=pause)
                self._report(f"{fault.message}; starting it again in {pause:g} s")
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                gateway.metrics.engine_restarts.inc()
            await self._wait_for_resume()
            try:
                self.engine = await _in_daemon(self._start)
            except (UnderstudyError, OSError) as error:
                fault = error if isinstance(error, UnderstudyError) else EngineError(f"the engine cannot be started: {error}")
                continue
            self._log.write("engine_started", pid=self.engine.pid)
            return pause


async def _in_daemon(start: Callable[[], Engine]) -> Engine:
    """The result of `start`, run in a thread that keeps nobody from leaving: an engine under way ends with this process."""
    loop = asyncio.get_running_loop()
    started: asyncio.Future[Engine] = loop.create_future()

    def settle(engine: Engine | None, fault: Exception | None) -> None:
        if started.cancelled():
            return
        if engine is not None:
            started.set_result(engine)
        elif fault is not None:
            started.set_exception(fault)

    def work() -> None:
        engine, fault = None, None
        try:
            engine = start()
        except Exception as error:
            fault = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: we are leaving
            loop.call_soon_threadsafe(settle, engine, fault)

    threading.Thread(target=work, daemon=True).start()
    return await started


class Watcher(Protocol):
    """What tells a gateway which engine there is."""

    async def watch(self, gateway: Gateway) -> None:
        """For ever."""


def run_gateway(workspace: Workspace, wiring: Wiring, supervisor: Watcher, listening: socket.socket, device: str, log: Log) -> None:
    """Serve on a listening socket, which is closed in the end, until SIGINT or SIGTERM; what runs then is given time to end."""

    async def serve() -> None:
        gateway = Gateway(workspace, wiring, log, device)
        settings = workspace.config.gateway
        server = make_server(build_app(gateway, needs_key=not is_loopback(settings.host)), settings)
        tasks = [asyncio.ensure_future(supervisor.watch(gateway)), asyncio.ensure_future(_warm_up(gateway, workspace.config.tenant))]
        try:
            await server.serve([listening])
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await gateway.close()

    with listening, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())


async def _warm_up(gateway: Gateway, tenant: str) -> None:
    """Load the embedder and the corpus ahead of the first question, where there are any."""
    with contextlib.suppress(UnderstudyError):
        await gateway.agents.retriever(tenant)
