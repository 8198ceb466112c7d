"""What tells an engine that computes from one whose core is stuck behind a server that answers."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from serve.gateway import pulse
from tests.conftest import BASE
from understudy.engines import RunningEngine


class Core:
    """A server's other half."""

    def __init__(self) -> None:
        self.is_stuck, self.tokens, self.asked = False, 0, 0

    async def metrics(self, _: web.Request) -> web.Response:
        return web.Response(text=f'# TYPE x counter\nvllm:generation_tokens_total{{engine="0"}} {self.tokens}.0\n')

    async def complete(self, _: web.Request) -> web.Response:
        self.asked += 1
        if self.is_stuck:
            await asyncio.sleep(60)
        self.tokens += 1
        return web.json_response({})


def test_a_core_that_is_stuck_has_no_pulse_and_a_busy_one_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "ANSWER_SECONDS", 0.2)

    async def look() -> None:
        core, app = Core(), web.Application()
        app.add_routes([web.get("/metrics", core.metrics), web.post("/v1/completions", core.complete)])
        async with aiohttp.ClientSession() as http, TestServer(app) as server:
            engine = RunningEngine(url=str(server.make_url("/v1")), pid=1, base=BASE, base_digest="d" * 64, models=[BASE])
            seen = pulse.Pulse(http)
            assert [await seen.beats(engine) for _ in range(5)] == [True] * 5 and core.asked < 5  # idle
            core.is_stuck = True
            await seen.beats(engine)  # what it wrote since the last look
            asked = core.asked
            assert [await seen.beats(engine) for _ in range(2)] == [False, False] and core.asked == asked + 2
            core.tokens += 100  # it only looked stuck: a full queue
            assert await seen.beats(engine)
            await server.close()
            assert not await seen.beats(engine)

    asyncio.run(look())
