"""The gateway in front of a scripted model server: inside the test's process, or on a real socket."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
import uvicorn

from serve.gateway.agents import Wiring
from serve.gateway.app import build_app
from serve.gateway.gateway import Gateway
from serve.gateway.observe import Log
from serve.gateway.server import make_server, url_of
from serve.supervise import free_port
from tests.scripted import Endpoint
from understudy.commands.answers import answer_json
from understudy.commands.wiring import answering_tools
from understudy.engines import RunningEngine
from understudy.workspace import Workspace

BASE = "smollm2-135m-instruct"
WIRING = Wiring(partial(answering_tools, may_cache=True), answer_json)
TURNS = [{"role": "user", "content": "Who?"}]


def engine_of(endpoint: Endpoint, **changes: Any) -> RunningEngine:
    """The scripted server as the workspace's engine."""
    endpoint.listed.setdefault(BASE, ("", ""))
    return RunningEngine.model_validate(
        {"url": endpoint.model.base_url, "pid": os.getpid(), "base": BASE, "base_digest": "d" * 64, "models": [BASE], **changes}
    )


@asynccontextmanager
async def opened(workspace: Workspace, engine: RunningEngine | None, needs_key: bool = False) -> AsyncIterator[tuple[httpx.AsyncClient, Gateway]]:
    """A client whose requests go straight into the application."""
    log = Log(workspace.logs / "gateway.jsonl")
    gateway = Gateway(workspace, WIRING, log, "cpu")
    gateway.serve(engine)
    transport = httpx.ASGITransport(build_app(gateway, needs_key))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=20) as client:
        yield client, gateway
    await gateway.close()
    log.close()


def through(workspace: Workspace, engine: RunningEngine | None, use: Callable[[httpx.AsyncClient], Any], **options: Any) -> Any:
    """What a coroutine over a client returns."""

    async def run() -> Any:
        async with opened(workspace, engine, **options) as (client, _):
            return await use(client)

    return asyncio.run(run())


def ask(workspace: Workspace, engine: RunningEngine | None, path: str = "/v1/chat/completions", key: str = "", **body: Any) -> httpx.Response:
    """One request's answer; a chat completion by the base unless told."""
    if path == "/v1/chat/completions":
        body = {"model": "base", "messages": TURNS, **body}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    answer: httpx.Response = through(workspace, engine, lambda client: client.post(path, json=body, headers=headers))
    return answer


@dataclass
class Socket:
    """A gateway on a real socket."""

    url: str  # ends in /v1
    gateway: Gateway
    server: uvicorn.Server


@contextmanager
def on_socket(workspace: Workspace, engine: RunningEngine | None) -> Iterator[Socket]:
    """A gateway on a real socket, in a thread with a loop of its own."""
    settings = workspace.config.gateway.model_copy(update={"port": free_port("127.0.0.1"), "drain_seconds": 1})
    ready: list[Socket] = []
    up = threading.Event()

    async def serve() -> None:
        log = Log(workspace.logs / "gateway.jsonl")
        gateway = Gateway(workspace, WIRING, log, "cpu")
        gateway.serve(engine)
        server = make_server(build_app(gateway), settings)
        server.config.host, server.config.port = settings.host, settings.port
        ready.append(Socket(url_of(settings), gateway, server))
        task = asyncio.ensure_future(server.serve())
        while not server.started and not task.done():
            await asyncio.sleep(0.005)
        up.set()
        await task
        await gateway.close()
        log.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert up.wait(20)
    try:
        yield ready[0]
    finally:
        ready[0].server.should_exit = True
        thread.join(20)
