"""The model client: OpenAI's SDK against any base URL; foreign errors become ours here and nowhere else."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import openai

from understudy.config import Endpoint
from understudy.engines import RunningEngine
from understudy.errors import EndpointError, NotFoundError
from understudy.records import Message, Usage

TIMEOUT_SECONDS = 120.0
RETRIES = 3


@dataclass(frozen=True)
class Model:
    """A model that can be asked: its resolved name, and where it is served."""

    name: str  # base, name@digest12, or a configured remote's name
    served_name: str  # what the endpoint calls it
    base_url: str
    api_key: str = "none"
    has_adapter: bool = False
    price_in: float = 0.0  # per million prompt tokens
    price_out: float = 0.0  # per million completion tokens


@dataclass(frozen=True)
class Completion:
    """What a model wrote."""

    text: str
    usage: Usage
    finish_reason: str
    tokens: list[str]  # the completion's tokens, as text, where the endpoint gives log-probabilities
    logprobs: list[float]  # of each completion token, nats
    first_alternatives: dict[str, float]  # log-probabilities of the likeliest first tokens

    @property
    def mean_logprob(self) -> float | None:
        """Mean log-probability of the completion's tokens."""
        return sum(self.logprobs) / len(self.logprobs) if self.logprobs else None


def engine_model(engine: RunningEngine, name: str) -> Model:
    """The running engine's base or one of its adapters as a Model; raises NotFoundError."""
    if name == "base":
        return Model("base", engine.base, engine.url)
    if name not in engine.models:
        raise NotFoundError(f"the running engine does not serve {name}", "restart `understudy serve`, which loads every registered adapter")
    return Model(name, name, engine.url, has_adapter=True)


def remote_model(name: str, endpoint: Endpoint) -> Model:
    """A configured remote as a Model; raises NotFoundError where its key is not in the environment."""
    key = os.environ.get(endpoint.api_key_env, "") if endpoint.api_key_env else "none"
    if not key:
        raise NotFoundError(f"no key for {name}", f"set the environment variable {endpoint.api_key_env}")
    return Model(name, endpoint.model, endpoint.base_url, key, False, endpoint.price_in, endpoint.price_out)


class ModelClient:
    """One model, asked over HTTP; safe for many requests at once. Use as an async context manager."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._sdk = openai.AsyncOpenAI(base_url=model.base_url, api_key=model.api_key, timeout=TIMEOUT_SECONDS, max_retries=RETRIES)

    async def __aenter__(self) -> ModelClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._sdk.close()

    async def complete(self, messages: list[Message], max_tokens: int, temperature: float = 0.0) -> Completion:
        """One completion, greedy by default. Raises EndpointError; a reply without a finish reason is one.

        No seed is sent: a seeded request with temperature ends vLLM 0.32's CPU engine ("CPU Generator does not use offset").
        """
        turns: Any = [message.model_dump() for message in messages]
        try:
            reply = await self._sdk.chat.completions.create(
                model=self.model.served_name, messages=turns, max_tokens=max_tokens, temperature=temperature, logprobs=True, top_logprobs=5
            )
        except openai.APIStatusError as error:
            raise EndpointError(f"{self.model.name} answered {error.status_code}: {_detail(error)}", "see the server's log") from error
        except openai.APITimeoutError as error:
            raise EndpointError(f"{self.model.name} did not answer within {TIMEOUT_SECONDS:g} s", "is the server overloaded? see its log") from error
        except openai.APIConnectionError as error:
            raise EndpointError(f"cannot reach {self.model.name} at {self.model.base_url}", "is the server running? `understudy serve` starts one") from error
        return _read(reply, self.model.name)


def _read(reply: Any, name: str) -> Completion:
    if not reply.choices or not reply.choices[0].finish_reason:
        raise EndpointError(f"{name} broke off without a finish reason", "ask again; see the server's log")
    choice = reply.choices[0]
    details = getattr(reply.usage, "prompt_tokens_details", None)
    usage = Usage(
        prompt_tokens=reply.usage.prompt_tokens if reply.usage else 0,
        cached_tokens=(details.cached_tokens or 0) if details else 0,
        completion_tokens=reply.usage.completion_tokens if reply.usage else 0,
    )
    tokens = (choice.logprobs.content or []) if choice.logprobs else []
    first = {alternative.token: alternative.logprob for alternative in tokens[0].top_logprobs} if tokens else {}
    return Completion(choice.message.content or "", usage, choice.finish_reason, [t.token for t in tokens], [t.logprob for t in tokens], first)


def _detail(error: openai.APIStatusError) -> str:
    body = error.body if isinstance(error.body, dict) else {}
    return str(body.get("message") or error.message)[:300]
