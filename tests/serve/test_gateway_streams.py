"""A thousand streams open at once: model server, gateway and clients in processes of their own."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import httpx
import pytest

from serve.supervise import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

STREAMS, CHUNKS, PAUSE = 1000, 12, 0.5  # seconds between chunks
UPSTREAM = """
import asyncio, json, sys
from aiohttp import web

async def chat(request):
    body = await request.json()
    reply = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await reply.prepare(request)
    for number in range(int(sys.argv[2])):
        chunk = {"choices": [{"index": 0, "delta": {"content": f"{body['messages'][0]['content']}-{number} "}, "finish_reason": None}]}
        await reply.write(b"data: " + json.dumps(chunk).encode() + b"\\n\\n")
        await asyncio.sleep(float(sys.argv[3]))
    await reply.write(b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\\n\\ndata: [DONE]\\n\\n')
    return reply

async def models(request):
    return web.json_response({"data": [{"id": "smollm2-135m-instruct"}]})

app = web.Application()
app.add_routes([web.post("/v1/chat/completions", chat), web.get("/v1/models", models)])
web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), backlog=2048, print=None)
"""
GATEWAY = """
import sys, time
from tests.serve.doors import BASE, on_socket
from understudy.engines import RunningEngine
from understudy.workspace import create_workspace

workspace = create_workspace(sys.argv[1], f"gateway: {{max_running: 2000, max_waiting: 2000}}\\n")
engine = RunningEngine(url=sys.argv[2], pid=1, base=BASE, base_digest="d" * 64, models=[BASE])
with on_socket(workspace, engine) as made:
    print(made.url, flush=True)
    sys.stdin.read()
"""


@contextmanager
def process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    made = subprocess.Popen([sys.executable, "-c", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield made
    finally:
        made.kill()
        made.wait()


def resident(pid: int) -> int:
    """MiB."""
    return int(next(line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))) >> 10


def seconds_used(pid: int) -> float:
    """Processor time so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_thousand_open_streams_all_end_whole(tmp_path: Path) -> None:
    port = free_port("127.0.0.1")
    with process(UPSTREAM, str(port), str(CHUNKS), str(PAUSE)), process(GATEWAY, str(tmp_path / "w"), f"http://127.0.0.1:{port}/v1") as gateway:
        assert gateway.stdout is not None
        url = gateway.stdout.readline().strip()
        while httpx.get(url.removesuffix("/v1") + "/ready").status_code != 200:
            time.sleep(0.1)
        before, used = resident(gateway.pid), seconds_used(gateway.pid)
        healths: list[float] = []

        async def stream(http: aiohttp.ClientSession, number: int) -> str:
            body = {"model": "base", "stream": True, "messages": [{"role": "user", "content": f"s{number}"}]}
            async with http.post(f"{url}/chat/completions", json=body) as reply:
                lines = (await reply.text()).split("\n")
            assert reply.status == 200 and "data: [DONE]" in lines, (reply.status, lines[:2])
            chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)

        async def run() -> tuple[list[str], int]:
            connector = aiohttp.TCPConnector(limit=0)
            async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=200)) as http:
                tasks = [asyncio.ensure_future(stream(http, number)) for number in range(STREAMS)]
                await asyncio.sleep(CHUNKS * PAUSE / 2)
                page = await (await http.get(f"{url.removesuffix('/v1')}/metrics")).text()
                for _ in range(10):
                    began = time.perf_counter()
                    assert (await http.get(f"{url.removesuffix('/v1')}/health")).status == 200
                    healths.append(time.perf_counter() - began)
                return await asyncio.gather(*tasks), int(float(page.split('understudy_running_requests{server="engine"} ')[1].split()[0]))

        began = time.perf_counter()
        texts, running = asyncio.run(run())
        taken = time.perf_counter() - began
        assert running == STREAMS
        assert texts == ["".join(f"s{number}-{chunk} " for chunk in range(CHUNKS)) for number in range(STREAMS)]
        after, used = resident(gateway.pid), seconds_used(gateway.pid) - used
        print(f"{STREAMS} streams of {CHUNKS} chunks in {taken:.1f} s (paced at {CHUNKS * PAUSE:g} s), health p50 {sorted(healths)[5] * 1e3:.1f} ms,")
        print(f"gateway {before} -> {after} MiB, {used / STREAMS / CHUNKS * 1e6:.0f} µs of processor time a chunk, requests included")
