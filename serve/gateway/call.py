"""One request on its way through the gateway: who asks, what for, and what came of it."""

from __future__ import annotations

import re
import time
import uuid
from dataclasses import dataclass, field

from serve.gateway.errors import Refused
from serve.keys import SCOPES, Key

TOKENS = re.compile(rb'"(prompt|completion)_tokens":\s*(\d+)')
REQUEST_ID = r"[A-Za-z0-9._-]{1,64}"


GONE = 499  # in logs and metrics: the client left before it was answered


@dataclass
class Call:
    """What is known of one request; the log line and the metrics are made of it."""

    id: str
    method: str
    path: str
    tenant: str
    key: Key | None = None  # None: no key is asked for
    model: str = ""  # resolved
    release: str | None = None  # that answers, where an alias was asked
    status: int = 0
    error: str = ""
    first_byte: float | None = None  # seconds from the beginning
    tokens: dict[str, int] = field(default_factory=dict)  # prompt and completion, where the reply says so
    began: float = field(default_factory=time.perf_counter)

    @property
    def scopes(self) -> frozenset[str]:
        """What the caller may do; everything where no key is asked for."""
        return frozenset(SCOPES if self.key is None else self.key.scopes)

    def require(self, scope: str) -> None:
        """Raises Refused (403) where the key does not reach that far."""
        if scope not in self.scopes:
            raise Refused(403, "insufficient_scope", f"this key may not use {SCOPES[scope]} (scope {scope})")

    def count_tokens(self, content: bytes) -> None:
        """Take the usage from a reply's bytes, where it stands in them."""
        if b'_tokens"' in content:
            for name, count in TOKENS.findall(content[-4096:]):
                self.tokens[name.decode()] = int(count)

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.perf_counter() - self.began


def request_id(given: str) -> str:
    """The client's id for a request where it is one that a log can hold, else a new one."""
    return given if re.fullmatch(REQUEST_ID, given) else uuid.uuid4().hex
