"""The model client: OpenAI's SDK against any base URL; foreign errors become ours here and nowhere else.

A key is sent to its own host only (redirects are not followed) and stands in no message.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import httpx2
import openai
from pydantic import BaseModel

from understudy.completions import Completion, Draft
from understudy.engines import RunningEngine
from understudy.errors import EndpointError, NotFoundError
from understudy.patience import Patience, pause_before, seconds_asked
from understudy.records import Message
from understudy.settings.serving import Endpoint

NO_KEY = "none"
CONNECT_SECONDS = 10.0
MAX_REPLY_BYTES = 64 * 2**20
LONGEST_MESSAGE = 400  # characters of an error, cut after a key in it is blotted out
NOT_JSON = (json.JSONDecodeError, UnicodeDecodeError, RecursionError)  # what the SDK lets pass
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
    continues: bool = False  # whether the endpoint goes on from an assistant's message that it is given (vLLM's continue_final_message)


@dataclass(frozen=True)
class StepModels:
    """Which model each step of a run asks: one for all of them, or those of a release."""

    answer: Model
    plan: Model
    validate: Model
    release: str | None = None  # alias@digest12

    @staticmethod
    def alike(model: Model) -> StepModels:
        """One model for every step."""
        return StepModels(model, model, model)


def engine_model(engine: RunningEngine, name: str) -> Model:
    """The running engine's base or one of its adapters as a Model; raises NotFoundError."""
    if name == "base":
        if engine.merged:
            raise NotFoundError(f"the running engine serves {engine.merged} merged into the base, which it does not serve alone", "set serve.merge: never")
        return served_model(engine, "base", engine.base)
    if name not in engine.models:
        raise NotFoundError(f"the running engine does not serve {name}", "restart `understudy serve`, which loads every registered adapter")
    return served_model(engine, name, name)


def served_model(engine: RunningEngine, name: str, served_name: str) -> Model:
    """What an engine serves, as a Model. Raises NotFoundError where the engine needs a key and it is not in the environment."""
    continues = engine.capabilities is None or engine.capabilities.kind == "vllm"
    return Model(name, served_name, engine.url, engine.api_key or NO_KEY, has_adapter=name != "base", continues=continues)


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
        self.takes_stream_options = True  # likewise
        http = httpx2.AsyncClient(
            timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),
            limits=httpx2.Limits(max_connections=None),
            follow_redirects=False,
            event_hooks={"response": [_bound]},
        )
        self._sdk = _Sdk(base_url=model.base_url, api_key=model.api_key, max_retries=0, http_client=http)

    async def __aenter__(self) -> ModelClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._sdk.close()

    async def complete(
        self, messages: list[Message], max_tokens: int, temperature: float = 0.0, on_progress: Callable[[Completion], None] | None = None
    ) -> Completion:
        """One completion, greedy by default; with `on_progress` it is streamed, and passed on as far as it is after each chunk.

        Asked again after 429, 5xx, time-outs and resets, unless text was passed on already; and while a deployment wakes. Raises
        EndpointError; a reply that breaks off without a finish reason is one.
        """
        attempt, awake_by = 0, time.monotonic() + self.patience.wake_seconds
        while True:
            attempt += 1
            draft = Draft(self.model.name, max_tokens)
            try:
                async with asyncio.timeout(self.patience.seconds):
                    return await self._ask(self.request(messages, max_tokens, temperature, on_progress is not None), draft, on_progress)
            except (openai.APIError, TimeoutError, EndpointError, *NOT_JSON) as fault:
                pause = pause_before(attempt, self.patience, _retry_after(fault)) if _may_pass(fault) else None
                is_waking = _is_waking(fault) and time.monotonic() < awake_by
                if (attempt >= self.patience.attempts and not is_waking) or pause is None or (on_progress and draft.text):
                    raise self._translate(fault) from fault
            await asyncio.sleep(pause)

    def request(self, messages: list[Message], max_tokens: int, temperature: float, stream: bool) -> dict[str, Any]:
        """The arguments of the SDK's chat.completions.create; a last message of the assistant's is gone on from.

        No seed is sent: a seeded request with temperature ends vLLM 0.32's CPU engine ("CPU Generator does not use offset").
        """
        turns = [message.model_dump() for message in messages]
        body: dict[str, Any] = {"model": self.model.served_name, "messages": turns, "max_tokens": max_tokens, "temperature": temperature}
        if self.model.api_key == NO_KEY:
            body["extra_headers"] = {"Authorization": openai.Omit()}
        if messages[-1].role == "assistant":
            body["extra_body"] = {"continue_final_message": True, "add_generation_prompt": False}
        if self.gives_logprobs:
            body |= {"logprobs": True, "top_logprobs": 5}
        if stream and self.takes_stream_options:
            body["stream_options"] = {"include_usage": True}
        return body | ({"stream": True} if stream else {})

    async def _ask(self, body: dict[str, Any], draft: Draft, on_progress: Callable[[Completion], None] | None) -> Completion:
        """One attempt; a request with log-probabilities or stream options that is refused is made again without.

        An endpoint that refuses or ignores them is not asked for them again. Fireworks has refused `stream_options` for some models
        ("Extra inputs are not permitted, field: 'stream_options'"), and counts no tokens without for others.
        """
        try:
            completion = await self._send(body, draft, on_progress)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as refusal:
            without = _refused_fields(refusal, body)
            if not without:
                raise
            self.takes_stream_options = self.takes_stream_options and "stream_options" not in without
            plain = {name: value for name, value in body.items() if name not in without}
            return await self._ask(plain, draft, on_progress)
        self.gives_logprobs = self.gives_logprobs and (draft.has_logprobs or not draft.text)
        return completion

    async def _send(self, body: dict[str, Any], draft: Draft, on_progress: Callable[[Completion], None] | None) -> Completion:
        reply = await self._sdk.chat.completions.create(**body)
        if on_progress is None:
            draft.add(_payload(reply))
            return draft.finish()
        async with reply:
            async for chunk in reply:
                draft.add(_payload(chunk))
                on_progress(draft.so_far())
                if draft.is_too_long:
                    break
        return draft.finish()

    def _translate(self, fault: Exception) -> EndpointError:
        """A fault as an error that names the endpoint and not its key."""
        name, remedy = self.model.name, "see the server's log"
        match fault:
            case EndpointError():
                message, remedy = fault.message, fault.remedy
            case openai.APIStatusError():
                detail = "a redirect, which is not followed" if fault.response.has_redirect_location else _detail(fault)
                message = f"{name} answered {fault.status_code}: {detail}"
            case openai.APITimeoutError() | TimeoutError():
                message, remedy = f"{name} did not answer within {self.patience.seconds:g} s", "is the server overloaded? see its log"
            case openai.APIConnectionError(__cause__=httpx2.ReadError() | httpx2.RemoteProtocolError()):
                message = f"{name} broke the connection"
            case openai.APIConnectionError():
                message, remedy = f"cannot reach {name} at {self.model.base_url}", "is the server running? `understudy serve` starts one"
            case openai.APIError():
                message = f"{name} failed: {_detail(fault)}"
            case _:
                message, remedy = f"{name} answered with something that is not JSON", "is its base_url right, with /v1?"
        shown = message if self.model.api_key == NO_KEY else message.replace(self.model.api_key, "…")
        return EndpointError(shown[:LONGEST_MESSAGE], remedy)


class _Sdk(openai.AsyncOpenAI):
    """The SDK without headers from the environment (OPENAI_ORG_ID, OPENAI_CUSTOM_HEADERS), which are meant for another host."""

    @property
    def default_headers(self) -> dict[str, str | openai.Omit]:
        """What every request carries; no compression, so that a reply is as long as it is on the wire."""
        return {"Accept": "application/json", "Accept-Encoding": "identity", "Content-Type": "application/json", "User-Agent": "understudy"}


def _may_pass(fault: Exception) -> bool:
    if isinstance(fault, openai.APIStatusError):
        return fault.status_code in TRANSIENT or fault.status_code >= 500
    return isinstance(fault, openai.APIConnectionError | TimeoutError)


def _is_waking(fault: Exception) -> bool:
    """Whether a deployment has no replica yet: Fireworks' answer while one that was idle starts, which takes minutes."""
    return isinstance(fault, openai.APIStatusError) and fault.status_code == 503 and fault.code == "DEPLOYMENT_SCALING_UP"


def _refused_fields(refusal: openai.APIStatusError, body: dict[str, Any]) -> tuple[str, ...]:
    """Which optional fields of a refused request to leave out: those that the refusal names, else log-probabilities."""
    named = "stream_options" in _detail(refusal) and "stream_options" in body
    return ("stream_options",) if named else ("logprobs", "top_logprobs") if "logprobs" in body else ()


def _retry_after(fault: Exception) -> float | None:
    return seconds_asked(fault.response.headers.get("Retry-After")) if isinstance(fault, openai.APIStatusError) else None


def _detail(error: openai.APIError) -> str:
    """The message of an error body, or the body."""
    body = error.body
    return str(body.get("message") or body if isinstance(body, dict) else body or "").strip() or "no message"


def _payload(reply: object) -> Any:
    """What the SDK read, as JSON; it checks no shapes, and hands on as it is what is no object."""
    return reply.model_dump(warnings=False) if isinstance(reply, BaseModel) else reply


async def _bound(response: httpx2.Response) -> None:
    """Event hook: a reply that is or becomes too long is an error."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise EndpointError(f"{response.url.host} compressed its reply unasked", "turn compression off there")
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    response.stream = _BoundedStream(response.stream, response.url.host)


class _BoundedStream(httpx2.AsyncByteStream):
    """A reply's bytes, up to MAX_REPLY_BYTES."""

    def __init__(self, stream: httpx2.AsyncByteStream, host: str) -> None:
        self._stream, self._host = stream, host

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for part in self._stream:
            size += len(part)
            if size > MAX_REPLY_BYTES:
                raise EndpointError(f"a reply from {self._host} is longer than {MAX_REPLY_BYTES >> 20} MiB", "see the server's log")
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()
