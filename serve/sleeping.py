"""vLLM's sleep mode: the process stays, its GPU memory is freed (weights go to main memory, the KV cache is dropped). Not run live here.

Routes and query parameters as vLLM 0.32 has them (vllm/entrypoints/serve/dev/sleep/api_router.py), which `serve.sleep` opens.
"""

from __future__ import annotations

from typing import Any

import httpx

from understudy.engines import RunningEngine
from understudy.errors import EngineError

SLEEP_SECONDS = 300.0
CANARY_TOKENS = 16

Canary = dict[str, str]  # model → its greedy answer


class Sleeper:
    """An engine that can be put to sleep; an engine that wakes up must answer as it did before."""

    def __init__(self, engine: RunningEngine) -> None:
        self._engine, self._root = engine, engine.url.removesuffix("/v1")
        self._before: Canary = {}

    def sleep(self) -> None:
        """Free the engine's memory. Raises EngineError where it cannot."""
        self._before = self._answers()
        self._ask("POST", "/sleep?level=1")
        if self._ask("GET", "/is_sleeping").get("is_sleeping") is not True:
            raise EngineError("the engine does not sleep", "set serve.sleep: false; a pause then stops it")

    def wake(self) -> None:
        """Bring it back; raises EngineError where it does not come, or answers otherwise than before (its weights are then not to be trusted)."""
        self._ask("POST", "/wake_up")
        if self._answers() != self._before:
            raise EngineError("the engine answers otherwise than before its sleep")

    def _answers(self) -> Canary:
        body = {"prompt": "The quick brown", "max_tokens": CANARY_TOKENS, "temperature": 0}
        return {name: self._ask("POST", "/v1/completions", {"model": name, **body})["choices"][0]["text"] for name in self._engine.models}

    def _ask(self, method: str, route: str, body: dict[str, Any] | None = None) -> Any:
        try:
            answer = httpx.request(method, self._root + route, json=body, timeout=SLEEP_SECONDS)
            answer.raise_for_status()
            return answer.json()
        except (httpx.HTTPError, ValueError) as error:
            raise EngineError(f"the engine cannot be put to sleep or woken: {error!r}", "set serve.sleep: false; a pause then stops it") from error
