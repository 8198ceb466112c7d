"""The model client: OpenAI-compatible chat completions over HTTP; foreign errors become ours here and nowhere else.

A key is sent to its own host only (redirects are not followed) and stands in no message.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from understudy.completions import Completion, Draft
from understudy.config import Endpoint
from understudy.engines import RunningEngine
from understudy.errors import EndpointError, NotFoundError
from understudy.records import Message

NO_KEY = "none"
CONNECT_SECONDS = 10.0
MAX_REPLY_BYTES = 64 * 2**20
REFUSED = (400, 422)  # what an endpoint answers to a field it does not know
TRANSIENT = (408, 409, 425, 429)  # and everything from 500 on


@dataclass(frozen=True)
class Model:
    """A model that can be asked: its resolved name, and where it is served."""

    name: str  # base, name@digest12, or a configured remote's name
    served_name: str  # what the endpoint calls it
    base_url: str
    api_key: str = NO_KEY
    has_adapter: bool = False
    price_in: float = 0.0  # per million prompt tokens
    price_out: float = 0.0  # per million completion tokens


@dataclass(frozen=True)
class Patience:
    """How long a request may take, and how often it is made."""

    seconds: float = 120.0  # of one attempt, first byte to last: a slow drip ends here too
    attempts: int = 4
    first_pause: float = 0.5  # seconds; doubled each time, jittered
    longest_pause: float = 60.0  # a server that asks for a longer one is not asked again


def engine_model(engine: RunningEngine, name: str) -> Model:
    """The running engine's base or one of its adapters as a Model; raises NotFoundError."""
    if name == "base":
        return Model("base", engine.base, engine.url)
    if name not in engine.models:
        raise NotFoundError(f"the running engine does not serve {name}", "restart `understudy serve`, which loads every registered adapter")
    return Model(name, name, engine.url, has_adapter=True)


def remote_model(name: str, endpoint: Endpoint) -> Model:
    """A configured remote as a Model; raises NotFoundError where its key is not in the environment."""
    key = os.environ.get(endpoint.api_key_env, "") if endpoint.api_key_env else NO_KEY
    if not key:
        raise NotFoundError(f"no key for {name}", f"set the environment variable {endpoint.api_key_env}")
    return Model(name, endpoint.model, endpoint.base_url, key, False, endpoint.price_in, endpoint.price_out)


DEFAULT_PATIENCE = Patience()


class ModelClient:
    """One model, asked over HTTP; safe for many requests at once. Use as an async context manager."""

    def __init__(self, model: Model, patience: Patience = DEFAULT_PATIENCE) -> None:
        self.model, self.patience = model, patience
        self.gives_logprobs = True  # until the endpoint refuses them
        self._http = httpx.AsyncClient(
            base_url=f"{model.base_url.rstrip('/')}/",
            headers={} if model.api_key == NO_KEY else {"Authorization": f"Bearer {model.api_key}"},
            timeout=httpx.Timeout(patience.seconds, connect=CONNECT_SECONDS, pool=None),
            limits=httpx.Limits(max_connections=None),
            follow_redirects=False,
        )

    async def __aenter__(self) -> ModelClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def complete(
        self, messages: list[Message], max_tokens: int, temperature: float = 0.0, on_progress: Callable[[Completion], None] | None = None
    ) -> Completion:
        """One completion, greedy by default; with `on_progress` it is streamed, and passed on as far as it is after each chunk.

        Asked again after 429, 5xx, time-outs and resets, unless text was passed on already. Raises EndpointError; a reply that
        breaks off without a finish reason is one.
        """
        attempt = 0
        while True:
            attempt += 1
            draft = Draft(self.model.name, max_tokens)
            try:
                async with asyncio.timeout(self.patience.seconds):
                    return await self._ask(self.request(messages, max_tokens, temperature, on_progress is not None), draft, on_progress)
            except (_Transient, TimeoutError, httpx.HTTPError) as fault:
                failure = self._translate(fault)
                pause = pause_before(attempt, self.patience, fault.retry_after if isinstance(fault, _Transient) else None)
                if attempt >= self.patience.attempts or pause is None or (on_progress and draft.text):
                    raise failure from fault
            await asyncio.sleep(pause)

    def request(self, messages: list[Message], max_tokens: int, temperature: float, stream: bool) -> dict[str, Any]:
        """The request's body.

        No seed is sent: a seeded request with temperature ends vLLM 0.32's CPU engine ("CPU Generator does not use offset").
        """
        turns = [message.model_dump() for message in messages]
        body: dict[str, Any] = {"model": self.model.served_name, "messages": turns, "max_tokens": max_tokens, "temperature": temperature}
        if self.gives_logprobs:
            body |= {"logprobs": True, "top_logprobs": 5}
        return body | ({"stream": True, "stream_options": {"include_usage": True}} if stream else {})

    async def _ask(self, body: dict[str, Any], draft: Draft, on_progress: Callable[[Completion], None] | None) -> Completion:
        """One attempt; a request with log-probabilities that is refused is made once more without.

        An endpoint that refuses or ignores them is not asked for them again.
        """
        try:
            completion = await self._post(body, draft, on_progress)
        except _Refused as refusal:
            if "logprobs" not in body or refusal.status not in REFUSED:
                raise self._translate(refusal) from refusal
            plain = {name: value for name, value in body.items() if name not in ("logprobs", "top_logprobs")}
            try:
                completion = await self._post(plain, draft, on_progress)
            except _Refused as second:
                raise self._translate(second) from second
        self.gives_logprobs = self.gives_logprobs and (draft.has_logprobs or not draft.text)
        return completion

    async def _post(self, body: dict[str, Any], draft: Draft, on_progress: Callable[[Completion], None] | None) -> Completion:
        async with self._http.stream("POST", "chat/completions", json=body) as response:
            if response.status_code != 200:
                raise _fault(response, (await _read_whole(response))[:2000])
            if on_progress is None:
                draft.add(_parse(await _read_whole(response), self.model.name))
                return draft.finish()
            async for payload in _server_sent(response):
                draft.add(_parse(payload, self.model.name))
                on_progress(draft.so_far())
                if draft.is_too_long:
                    break
            return draft.finish()

    def _translate(self, fault: Exception) -> EndpointError:
        """A fault as an error that names the endpoint and not its key."""
        name = self.model.name
        if isinstance(fault, _BadStatus):
            detail = fault.detail.replace(self.model.api_key, "…") if self.model.api_key != NO_KEY else fault.detail
            return EndpointError(f"{name} answered {fault.status}: {detail}", "see the server's log")
        if isinstance(fault, TimeoutError | httpx.TimeoutException):
            return EndpointError(f"{name} did not answer within {self.patience.seconds:g} s", "is the server overloaded? see its log")
        if isinstance(fault, httpx.ReadError | httpx.RemoteProtocolError):
            return EndpointError(f"{name} broke the connection", "see the server's log")
        return EndpointError(f"cannot reach {name} at {self.model.base_url}", "is the server running? `understudy serve` starts one")


class _BadStatus(Exception):
    """A status other than 200."""

    def __init__(self, status: int, detail: str, retry_after: float | None) -> None:
        super().__init__(status)
        self.status, self.detail, self.retry_after = status, detail, retry_after


class _Transient(_BadStatus):
    """It may pass."""


class _Refused(_BadStatus):
    """The request will not do, now or later."""


def pause_before(attempt: int, patience: Patience, retry_after: float | None) -> float | None:
    """Seconds to wait after this many attempts: doubling, jittered down to half, never less than the server asks; None where it asks too much."""
    if retry_after is not None and retry_after > patience.longest_pause:
        return None
    pause = min(patience.first_pause * 2.0 ** (attempt - 1), patience.longest_pause) * random.uniform(0.5, 1.0)
    return max(pause, (retry_after or 0.0) * random.uniform(1.0, 1.1))


def seconds_asked(retry_after: str | None) -> float | None:
    """A Retry-After header, seconds or a date (RFC 9110), as seconds from now; None where it is neither."""
    if not retry_after:
        return None
    if retry_after.strip().isdigit():
        return float(retry_after)
    try:
        at: float = parsedate_to_datetime(retry_after).timestamp()
    except ValueError:
        return None
    return max(0.0, at - time.time())


def _fault(response: httpx.Response, content: bytes) -> Exception:
    status, detail = response.status_code, _detail(content)
    if status in TRANSIENT or status >= 500:
        return _Transient(status, detail, seconds_asked(response.headers.get("Retry-After")))
    return _Refused(status, "a redirect, which is not followed" if response.has_redirect_location else detail, None)


def _detail(content: bytes) -> str:
    """The message of an error body, or its first words."""
    text = content.decode(errors="replace")
    try:
        body = json.loads(text)
        error = body.get("error", body)
        text = str(error.get("message") or error) if isinstance(error, dict) else str(error)
    except (ValueError, AttributeError):
        pass
    return text[:300].strip() or "no message"


def _parse(content: bytes, name: str) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise EndpointError(f"{name} answered with something that is not JSON", "is its base_url right, with /v1?") from error


async def _read_whole(response: httpx.Response) -> bytes:
    content = bytearray()
    async for part in _bounded(response):
        content += part
    return bytes(content)


async def _server_sent(response: httpx.Response) -> AsyncIterator[bytes]:
    """The `data:` lines of a stream of server-sent events, up to [DONE]."""
    rest = b""
    async for part in _bounded(response):
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                payload = line.removeprefix(b"data:").strip()
                if payload == b"[DONE]":
                    return
                yield payload


async def _bounded(response: httpx.Response) -> AsyncIterator[bytes]:
    size = 0
    async for part in response.aiter_bytes():
        size += len(part)
        if size > MAX_REPLY_BYTES:
            raise EndpointError(f"a reply from {response.url.host} is longer than {MAX_REPLY_BYTES >> 20} MiB", "see the server's log")
        yield part
