"""Whether an engine still computes. Its server and its core are two processes: one may list models while the other is stuck."""

from __future__ import annotations

import re

import aiohttp

from understudy.engines import RunningEngine

ANSWER_SECONDS = 5.0
COUNTED = re.compile(r"^vllm:(?:prompt|generation)_tokens_total\{.*\} (\S+)$", re.MULTILINE)


class Pulse:
    """What is seen of one engine after the other."""

    def __init__(self, http: aiohttp.ClientSession) -> None:
        self._http = http
        self._seen: list[str] = []

    async def beats(self, engine: RunningEngine) -> bool:
        """Whether it has counted tokens since the last look, or writes one now: a full queue is no standstill, and an idle engine is asked."""
        try:
            seen = await self._count(engine)
            has_moved, self._seen = seen != self._seen, seen
            return has_moved or await self._writes(engine)
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False

    async def _count(self, engine: RunningEngine) -> list[str]:
        async with self._http.get(engine.url.removesuffix("/v1") + "/metrics", timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS)) as page:
            return COUNTED.findall(await page.text()) if page.status == 200 else []

    async def _writes(self, engine: RunningEngine) -> bool:
        body = {"model": engine.models[0], "prompt": "a", "max_tokens": 1}
        async with self._http.post(f"{engine.url}/completions", json=body, timeout=aiohttp.ClientTimeout(total=ANSWER_SECONDS)) as reply:
            return reply.status == 200
