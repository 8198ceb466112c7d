"""What a model wrote, read from the wire: one reply, or the chunks of a stream, of the OpenAI chat completions API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from understudy.errors import EndpointError
from understudy.records import Usage

CHARACTERS_PER_TOKEN = 32  # text beyond this times the completion limit comes from an endpoint that ignores the limit, and is cut
TOKENS_PER_CHARACTER = 0.25  # estimate, where an endpoint does not count tokens
THINK, THOUGHT = "<think>", "</think>"


@dataclass(frozen=True)
class Completion:
    """What a model wrote. Log-probabilities are of what follows a think block, where there is one."""

    text: str  # a think block included
    usage: Usage
    finish_reason: str
    tokens: list[str]  # the completion's tokens, as text, where the endpoint gives log-probabilities
    logprobs: list[float]  # of each completion token, nats
    first_alternatives: dict[str, float]  # log-probabilities of the likeliest first tokens

    @property
    def mean_logprob(self) -> float | None:
        """Mean log-probability of the completion's tokens."""
        return sum(self.logprobs) / len(self.logprobs) if self.logprobs else None

    def after(self, before: Completion, text: str) -> Completion:
        """Both as one completion: `before`, put as `text`, gone on with by this one. Tokens are those that were written."""
        if not text:
            return self
        first = before.first_alternatives or self.first_alternatives
        tokens, logprobs = [*before.tokens, *self.tokens], [*before.logprobs, *self.logprobs]
        return Completion(text + self.text, before.usage + self.usage, self.finish_reason, tokens, logprobs, first)


class Draft:
    """A completion while it comes in: add each payload, then finish."""

    def __init__(self, name: str, max_tokens: int) -> None:
        self._name, self._longest = name, max_tokens * CHARACTERS_PER_TOKEN
        self._thought, self._said, self._finish = "", "", ""
        self._usage: Usage | None = None
        self._tokens: list[tuple[str, float, dict[str, float]]] = []
        self.is_too_long = False  # whether the endpoint writes on beyond its limit

    def add(self, payload: Any) -> None:
        """Take one reply or one chunk of a stream; raises EndpointError where it is an error or no chat completion."""
        try:
            if payload.get("error"):
                error = payload["error"]
                raise EndpointError(f"{self._name} failed: {error.get('message') if isinstance(error, dict) else error}", "see the server's log")
            if payload.get("usage"):
                self._usage = _usage(payload["usage"])
            for choice in payload["choices"][:1]:
                written = choice.get("message") or choice.get("delta") or {}
                self._thought += written.get("reasoning_content") or written.get("reasoning") or ""
                self._said += written.get("content") or ""
                self._finish = choice.get("finish_reason") or self._finish
                for token in (choice.get("logprobs") or {}).get("content") or []:
                    alternatives = {other["token"]: float(other["logprob"]) for other in token.get("top_logprobs") or []}
                    self._tokens.append((token["token"], float(token["logprob"]), alternatives))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise EndpointError(f"{self._name} answered with something that is not a chat completion", "is its base_url right, with /v1?") from error
        if max(len(self._thought), len(self._said)) > self._longest:
            self._thought, self._said = self._thought[: self._longest], self._said[: self._longest]
            self._finish, self.is_too_long = "length", True

    @property
    def text(self) -> str:
        """What was written so far; reasoning that came apart stands in front as a think block."""
        return f"{THINK}{self._thought}{THOUGHT}{self._said}" if self._thought else self._said

    @property
    def has_logprobs(self) -> bool:
        """Whether log-probabilities came with it."""
        return bool(self._tokens)

    def so_far(self) -> Completion:
        """The completion as far as it is known."""
        tokens = self._tokens[answer_start([token for token, _, _ in self._tokens]) :]
        counted = self._usage or Usage(completion_tokens=len(self._tokens) or round(len(self.text) * TOKENS_PER_CHARACTER))
        first = tokens[0][2] if tokens else {}
        return Completion(self.text, counted, self._finish, [token for token, _, _ in tokens], [logprob for _, logprob, _ in tokens], first)

    def finish(self) -> Completion:
        """The whole completion; raises EndpointError where it broke off without a finish reason."""
        if not self._finish:
            raise EndpointError(f"{self._name} broke off without a finish reason", "ask again; see the server's log")
        return self.so_far()


def answer_start(tokens: list[str]) -> int:
    """Index of the first token after a think block; 0 without one, all tokens where it was cut off."""
    text = "".join(tokens)
    end = text.rfind(THOUGHT)
    if end < 0:
        return len(tokens) if THINK in text else 0
    position = 0
    for index, token in enumerate(tokens):
        if position >= end + len(THOUGHT) and token.strip():
            return index
        position += len(token)
    return len(tokens)


def _usage(counts: dict[str, Any]) -> Usage:
    return Usage(
        prompt_tokens=counts.get("prompt_tokens") or 0,
        cached_tokens=(counts.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        completion_tokens=counts.get("completion_tokens") or 0,
    )
