"""Refusals, in OpenAI's error shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

from understudy.errors import UnderstudyError

KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refused(UnderstudyError):
    """A request that is not answered: its HTTP status, OpenAI's error code, and what the client is told."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status, self.reason, self.param, self.retry_after = status, code, param, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The error as OpenAI's SDKs read it."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.reason}}

    def response(self) -> Response:
        """The error as a response; a 401 says how to authenticate, a 429 and a 503 when to come again."""
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, round(self.retry_after)))
        return Response(json.dumps(self.body), self.status, headers, "application/json")

    def event(self) -> bytes:
        """The error inside a stream that has begun: OpenAI's SDKs raise it. No [DONE] follows."""
        return b"data: " + json.dumps(self.body).encode() + b"\n\n"


def broken_off(name: str) -> Refused:
    """A reply that ended before it was whole."""
    return Refused(502, "upstream_broke_off", f"{name} broke off before its answer was whole")


def unavailable(name: str) -> Refused:
    """Nothing answers at a model's endpoint."""
    return Refused(503, "upstream_unavailable", f"{name} cannot be reached now", retry_after=5)


def too_slow(name: str) -> Refused:
    """A model took longer than the gateway waits."""
    return Refused(504, "upstream_timeout", f"{name} took too long")


def paused() -> Refused:
    """The engine's memory is lent to something else."""
    return Refused(503, "engine_paused", "the engine is paused, for now", retry_after=30)
