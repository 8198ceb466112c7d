"""`scripts/bench gateway`: the gateway against the same engine asked directly, in one run.

`understudy serve` runs in a process of its own. Rounds of 16 streams at once go to the engine and through the gateway in turn, the order
changing from round to round: throughput, and time to the first token under load. Then one request at a time, in turn: what the gateway
adds to the first token where nothing else waits. Prompts are of one length and each is new, so that neither side reads the other's
prefix cache. `ratio` is ours over the peer's; `spread` the quartiles over rounds (of single differences, alone).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass
from typing import Any

import aiohttp

from scripts.serving import serving
from serve.gateway.server import url_of
from understudy.engines import find_engine
from understudy.progress import show_progress
from understudy.workspace import open_workspace

STREAMS, WAVES, TOKENS = 16, 3, 64
WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "haven", "inlet", "jetty", "knoll", "larch", "marsh", "north", "ocean", "plain"]


@dataclass(frozen=True)
class Side:
    """An endpoint to ask."""

    url: str
    model: str


@dataclass(frozen=True)
class Load:
    """What one round of streams measured."""

    tokens_per_second: float
    first_token: float  # median, seconds


def prompt() -> list[dict[str, str]]:
    """A prompt that no request had before, of always the same number of words."""
    label = " ".join(random.choices(WORDS, k=24))
    return [{"role": "user", "content": f"{label}. Write the numbers from one to one hundred as words, one after another, without stopping."}]


async def stream(http: aiohttp.ClientSession, side: Side, tokens: int) -> tuple[float, int]:
    """(seconds to the first token, tokens) of one stream."""
    body = {"model": side.model, "messages": prompt(), "max_tokens": tokens, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    began, first, tail = time.perf_counter(), 0.0, b""
    async with http.post(f"{side.url}/chat/completions", json=body) as reply:
        reply.raise_for_status()
        async for chunk in reply.content.iter_any():
            if not first and b'"content":"' in chunk.replace(b'"content":""', b""):
                first = time.perf_counter() - began
            tail = (tail + chunk)[-2000:]
    usage = next(json.loads(line[6:]) for line in tail.split(b"\n") if line.startswith(b"data: {") and b'"usage":{' in line)["usage"]
    return first, int(usage["completion_tokens"])


async def load(http: aiohttp.ClientSession, side: Side) -> Load:
    """STREAMS workers, WAVES requests each."""

    async def work() -> list[tuple[float, int]]:
        return [await stream(http, side, TOKENS) for _ in range(WAVES)]

    began = time.perf_counter()
    done = [each for worker in await asyncio.gather(*(work() for _ in range(STREAMS))) for each in worker]
    return Load(sum(tokens for _, tokens in done) / (time.perf_counter() - began), statistics.median(first for first, _ in done))


async def measure(direct: Side, ours: Side, rounds: int, alone: int) -> list[dict[str, Any]]:
    """The lines to print."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=3)) as http:
        for side in (direct, ours):
            await load(http, side)
        loads: list[tuple[Load, Load]] = []
        with show_progress("rounds", rounds) as bar:
            for number in range(rounds):
                order = (direct, ours) if number % 2 else (ours, direct)
                measured = {side.url: await load(http, side) for side in order}
                loads.append((measured[ours.url], measured[direct.url]))
                bar.advance()
        firsts: list[tuple[float, float]] = []
        with show_progress("requests", alone) as bar:
            for number in range(alone):
                order = (direct, ours) if number % 2 else (ours, direct)
                taken = {side.url: (await stream(http, side, 2))[0] for side in order}
                firsts.append((taken[ours.url], taken[direct.url]))
                bar.advance()
    return [
        line("tokens/s", f"{STREAMS} streams", [(a.tokens_per_second, b.tokens_per_second) for a, b in loads], "ratio"),
        line("ms to the first token, p50", f"{STREAMS} streams", [(1e3 * a.first_token, 1e3 * b.first_token) for a, b in loads], "difference"),
        line("ms to the first token, p50", "alone", [(1e3 * a, 1e3 * b) for a, b in firsts], "difference"),
    ]


def line(unit: str, what: str, pairs: list[tuple[float, float]], spread_of: str) -> dict[str, Any]:
    """One comparison as scripts/bench prints it; `added` is the median difference of a pair."""
    ours, peer = (statistics.median(side) for side in zip(*pairs, strict=True))
    compared = [a / b if spread_of == "ratio" else a - b for a, b in pairs]
    low, middle, high = statistics.quantiles(compared, n=4)
    return {
        "bench": f"gateway: {what}", "ours": round(ours, 2), "peer": round(peer, 2), "peer_name": "vLLM directly", "ratio": round(ours / peer, 4),
        ("median_ratio" if spread_of == "ratio" else "added"): round(middle, 4), "unit": unit, "n": len(pairs), "spread": [round(low, 4), round(high, 4)],
    }  # fmt: skip


def main() -> None:
    """Measure the base of a workspace."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workspace", default="workspace")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--alone", type=int, default=100, help="requests of each side, one at a time")
    args = parser.parse_args()
    workspace = open_workspace(args.workspace)
    with serving(workspace):
        engine = find_engine(workspace)
        assert engine is not None  # ready says so
        time.sleep(10)  # the gateway loads its corpus after the start
        direct, ours = Side(engine.url, engine.base), Side(url_of(workspace.config.gateway), "base")
        for printed in asyncio.run(measure(direct, ours, args.rounds, args.alone)):
            print(json.dumps(printed), flush=True)


if __name__ == "__main__":
    main()
