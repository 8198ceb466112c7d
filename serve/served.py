"""What the engine says over HTTP about the adapter it serves, and the checks of its answers."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import httpx
import numpy as np
from numpy.typing import NDArray

from serve.check import Check
from serve.proof_rows import Row
from understudy.chat import Encoded, encode_prompt
from understudy.errors import EngineError
from understudy.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CANARY_TOKENS = 32
TIMEOUT_SECONDS = 300.0


class Server:
    """The engine's HTTP interface as the proof needs it. Use as a context manager; raises EngineError."""

    def __init__(self, url: str, base: str, adapter: str, key: str = "", timeout: float = TIMEOUT_SECONDS) -> None:
        self.url, self.base, self.adapter = url, base, adapter
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(headers=headers, timeout=timeout, limits=httpx.Limits(max_keepalive_connections=0))  # the server ends idle ones
        self.listed: dict[str, dict[str, Any]] = {row["id"]: row for row in self._ask("GET", f"{url}/models")["data"]}
        if adapter not in self.listed:
            raise EngineError(f"the engine at {url} does not serve {adapter}", "restart it: `understudy serve` loads every registered adapter")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._http.close()

    @property
    def max_tokens(self) -> int:
        """The longest prompt plus completion."""
        return int(self.listed[self.base].get("max_model_len") or 2**31)

    def tokenize(self, messages: list[Message]) -> list[int]:
        """Token ids of a prompt as the server builds it for the adapter."""
        body = {"model": self.adapter, "messages": [message.model_dump() for message in messages], "add_generation_prompt": True}
        return [int(token) for token in self._ask("POST", self.url.removesuffix("/v1") + "/tokenize", body)["tokens"]]

    def logprobs(self, model: str, row: Encoded) -> NDArray[np.float64]:
        """Log-probability of each token of the row's completion. Raises EngineError where one is missing or not finite."""
        body = {"model": model, "prompt": row.ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        entries = self._ask("POST", f"{self.url}/completions", body)["choices"][0]["prompt_logprobs"][row.completion :]
        scores = np.array([entry[str(token)]["logprob"] for entry, token in zip(entries, row.ids[row.completion :], strict=True)], dtype=float)
        if not np.isfinite(scores).all():
            raise EngineError(f"{model} gives log-probabilities that are not finite", "see logs/engine.log; another serve.dtype may help")
        return scores

    def answer(self, messages: list[Message], salt: str) -> str:
        """A greedy answer of the adapter; `salt` keeps it apart from the prefix cache of others."""
        turns = [message.model_dump() for message in messages]
        body = {"model": self.adapter, "messages": turns, "max_tokens": CANARY_TOKENS, "temperature": 0, "cache_salt": salt}
        return str(self._ask("POST", f"{self.url}/chat/completions", body)["choices"][0]["message"]["content"] or "")

    def _ask(self, method: str, url: str, body: dict[str, Any] | None = None) -> Any:
        try:
            answer = self._http.request(method, url, json=body)
            answer.raise_for_status()
            return answer.json()
        except httpx.HTTPStatusError as error:
            raise EngineError(f"the engine answered {error.response.status_code} to {url}: {error.response.text[:300]}", "see logs/engine.log") from error
        except (httpx.HTTPError, ValueError) as error:
            raise EngineError(f"the engine at {url} broke off: {error!r}", "is it still running? see logs/engine.log") from error


def check_listing(server: Server, folder: Path | None) -> Check:
    """The engine says that it loaded the adapter from this folder, onto this base; None: an engine elsewhere, whose folders are its own."""
    began = time.monotonic()
    listed = server.listed[server.adapter]
    faults = []
    if folder is not None and Path(listed.get("root") or "").resolve() != folder.resolve():
        faults.append(f"the engine loaded it from {listed.get('root')}")
    if listed.get("parent") != (server.base if server.adapter != server.base else None):  # merged, it is the base
        faults.append(f"the engine put it on {listed.get('parent')}")
    return Check.of_faults("listed", faults, "the engine loaded it from its folder" if folder else "the engine lists it on its base", began)


def check_token_ids(server: Server, tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> Check:
    """The server turns real prompts into the same token ids as training; value = rows that differ."""
    began = time.monotonic()
    different = sum(server.tokenize(row.messages) != encode_prompt(tokenizer, row.messages) for row in rows)
    return Check("token_ids", different, 0, f"{len(rows) - different} of {len(rows)} prompts tokenised as in training", time.monotonic() - began)


def check_canaries(server: Server, rows: list[Row]) -> Check:
    """The served adapter answers real prompts, greedily, the same twice; value = prompts where it does not."""
    began = time.monotonic()
    answers = [[server.answer(row.messages, f"proof-{began}-{attempt}") for attempt in range(2)] for row in rows]
    faults = [f"{first!r} then {second!r}" for first, second in answers if first != second or not first.strip()]
    return Check.of_faults("canary", faults, "; ".join(repr(first) for first, _ in answers), began)
