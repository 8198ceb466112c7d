"""What every request passes: its id, its key, its rate; and what is written down of it when it ends."""

from __future__ import annotations

import re
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.gateway.call import Call, request_id
from serve.gateway.errors import Refused
from serve.gateway.limits import RateLimits
from serve.gateway.observe import Log, Metrics
from serve.keys import KeyRing

OPEN = ("/health", "/ready")  # need no key
LOCAL = re.compile(r"^(localhost|127\.0\.0\.1|\[::1\])(:\d+)?$", re.IGNORECASE)


class Door:
    """Stands before the application as plain ASGI: a stream's chunks pass without a copy."""

    def __init__(self, app: ASGIApp, keys: KeyRing, tenant: str, needs_key: bool, log: Log, metrics: Metrics, routes: frozenset[str]) -> None:
        self._app, self._keys, self._tenant, self._needs_key = app, keys, tenant, needs_key
        self._log, self._metrics, self._routes = log, metrics, routes
        self._rates = RateLimits()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the application's lifespan; nothing else is spoken here (no WebSockets)."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        headers = _headers(scope)
        call = Call(request_id(headers.get("x-request-id", "")), scope["method"], scope["path"], self._tenant)
        scope.setdefault("state", {})["call"] = call

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", call.id.encode())]
            elif call.first_byte is None:
                call.first_byte = call.seconds
            await send(message)

        try:
            self._admit(call, headers)
            await self._app(scope, receive, noted)
        except Refused as refused:
            call.error = refused.reason
            await refused.response()(scope, receive, noted)
        except Exception as fault:
            told, call.error = call.status != 0, "internal_error"
            self._log.write("fault", request_id=call.id, kind=type(fault).__name__, message=str(fault)[:1000])
            if not told:
                await Refused(500, "internal_error", "the gateway failed; its log says how").response()(scope, receive, noted)
        finally:
            if call.path not in OPEN or call.status != 200:
                self._log.request(call)
            self._metrics.count(call, call.path if call.path in self._routes else "other")

    def _admit(self, call: Call, headers: dict[str, str]) -> None:
        if call.path in OPEN:
            return
        if not (self._needs_key or self._keys.are_required):
            self._require_local(headers)
            return
        scheme, _, text = headers.get("authorization", "").partition(" ")
        key = self._keys.find(text.strip())
        if key is None or scheme.lower() != "bearer":
            raise Refused(401, "invalid_api_key", "a valid key is needed: Authorization: Bearer KEY")
        call.key, call.tenant = key, key.tenant
        self._rates.take(key.id, key.requests_per_minute)

    def _require_local(self, headers: dict[str, str]) -> None:
        """Without keys, a page in someone's browser must not reach in by a name that it made resolve to this machine (DNS rebinding)."""
        if not LOCAL.match(headers.get("host", "")):
            raise Refused(403, "foreign_host", "without keys the gateway answers to localhost only; make one with `understudy keys create`")


def _headers(scope: Scope) -> dict[str, Any]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
