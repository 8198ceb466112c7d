"""Put a load on an engine and measure it: what tuning, merging, speculative decoding and the benchmarks rest on.

Every request of a run asks for the same number of tokens whatever the model would like to say (`ignore_eos`), so that two settings
do the same work; prompts are the workspace's own, and a salt keeps a run from the prefix cache of the run before.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import statistics
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from rag.prompts import answer_messages
from serve.proof_rows import read_rows
from understudy.errors import EngineError, NotFoundError
from understudy.records import Message
from understudy.workspace import Workspace

TOKENS = 40  # of each answer; those of the demo's adapter have 30 to 60
CONCURRENCY = 8
SECONDS = 300.0  # for one request

Prompt = list[Message]


@dataclass(frozen=True)
class Reply:
    """What came of one request; times are seconds from its beginning."""

    text: str
    tokens: int
    first_token: float
    seconds: float
    fault: str = ""


@dataclass(frozen=True)
class Load:
    """One run: so many requests at once until all were answered."""

    seconds: float
    replies: list[Reply]

    @property
    def faults(self) -> list[str]:
        """What went wrong, a line a request."""
        return [reply.fault for reply in self.replies if reply.fault]

    @property
    def tokens_per_second(self) -> float:
        """Completion tokens of all requests over the wall time."""
        return sum(reply.tokens for reply in self.replies) / self.seconds

    @property
    def first_token(self) -> float:
        """Median seconds to the first token."""
        return statistics.median(reply.first_token for reply in self.replies)

    @property
    def latency(self) -> float:
        """Median seconds of a whole answer."""
        return statistics.median(reply.seconds for reply in self.replies)

    @property
    def texts(self) -> list[str]:
        """The answers, in the order of the prompts."""
        return [reply.text for reply in self.replies]


def read_prompts(workspace: Workspace, count: int) -> list[Prompt]:
    """Up to `count` distinct prompts as inference renders them: of the newest dataset's answer rows, else made of the corpus.

    The same workspace gives the same prompts. Raises NotFoundError where there is neither.
    """
    datasets = sorted(workspace.datasets.glob("*/examples.jsonl"), key=lambda file: file.stat().st_mtime)
    if datasets:
        prompts = [row.messages for row in read_rows(datasets[-1].parent, "the workspace")]
    else:
        texts = [chunk.text for chunk in workspace.store.chunks(workspace.config.tenant)]
        prompts = [answer_messages(" ".join(first.split()[:12]), [first, second]) for first, second in itertools.pairwise(texts)]
    if not prompts:
        raise NotFoundError("there are no prompts to measure with", "run `understudy ingest PATH` first")
    random.Random(0).shuffle(prompts)
    return prompts[:count]


def measure(url: str, models: Sequence[str], prompts: Sequence[Prompt], concurrency: int = CONCURRENCY, to_the_end: bool = False) -> Load:
    """Ask each prompt once, `concurrency` at a time, the models in turn; `to_the_end`: answers end where the model ends them.

    Raises EngineError where every request failed.
    """
    load = asyncio.run(run_load(url, models, prompts, concurrency, to_the_end))
    if len(load.faults) == len(load.replies):
        raise EngineError(f"no request to {url} was answered: {load.faults[0]}", "see logs/engine.log")
    return load


async def run_load(url: str, models: Sequence[str], prompts: Sequence[Prompt], concurrency: int, to_the_end: bool = False) -> Load:
    """The same inside an event loop; a request that fails is a reply with a fault."""
    salt, gate = uuid.uuid4().hex, asyncio.Semaphore(concurrency)
    timeout, connector = aiohttp.ClientTimeout(total=SECONDS), aiohttp.TCPConnector(limit=0, keepalive_timeout=3)  # vLLM closes idle ones after 5 s
    options = {"max_tokens": 2 * TOKENS} if to_the_end else {"max_tokens": TOKENS, "ignore_eos": True}
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:

        async def ask(number: int) -> Reply:
            async with gate:
                return await stream(http, url, models[number % len(models)], prompts[number], {**options, "cache_salt": salt})

        began = time.perf_counter()
        replies = await asyncio.gather(*(ask(number) for number in range(len(prompts))))
        return Load(time.perf_counter() - began, list(replies))


async def stream(http: aiohttp.ClientSession, url: str, model: str, prompt: Prompt, options: Mapping[str, Any]) -> Reply:
    """One greedy, streamed answer."""
    turns = [message.model_dump() for message in prompt]
    body = {"model": model, "messages": turns, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}, **options}
    began, first, text, count = time.perf_counter(), 0.0, "", 0
    try:
        async with http.post(f"{url}/chat/completions", json=body) as reply:
            if reply.status != 200:
                return Reply("", 0, 0.0, time.perf_counter() - began, f"{reply.status}: {(await reply.text())[:200]}")
            async for line in reply.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                for choice in event.get("choices", ()):
                    piece = choice["delta"].get("content") or ""
                    first = first or (time.perf_counter() - began if piece else 0.0)
                    text += piece
                count = (event.get("usage") or {}).get("completion_tokens", count)
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError) as error:
        return Reply(text, count, first, time.perf_counter() - began, f"{type(error).__name__}: {error}")
    return Reply(text, count, first or time.perf_counter() - began, time.perf_counter() - began, "" if count else "the stream broke off")
