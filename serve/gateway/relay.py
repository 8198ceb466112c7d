"""From a model's server to the client: bytes as they come, nothing parsed anew, nothing held back.

A stream's bytes are only looked at, to tell a whole answer from one that broke off: the second ends in an error, never in [DONE].
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from serve.gateway.call import GONE, Call
from serve.gateway.errors import Refused, broken_off, too_slow, unavailable
from understudy.client import NO_KEY, Model
from understudy.patience import seconds_asked

MAX_REPLY_BYTES = 64 * 2**20
MAX_ERROR_BYTES = 2**16
CONNECT_SECONDS = 5.0
KEPT_SECONDS = 3.0  # an idle connection is kept; vLLM closes it after 5, and a request must not meet that
CLIENT_SECONDS = 60.0  # a client that takes nothing for so long is given up
OVERLAP = 64  # bytes kept of a chunk, in which the next may complete a mark
FINISHED = re.compile(rb'"finish_reason":\s*"')  # inside a string it would be escaped
DONE = re.compile(rb"^data: \[DONE\]", re.MULTILINE)
ERROR = re.compile(rb'^data: \{"error":', re.MULTILINE)
PASSED_ON = (400, 404, 413, 422, 429)  # what a client can do something about
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]
JSON = [(b"content-type", b"application/json")]


class ClientGone(Exception):
    """The client has left, or reads nothing any more."""


class Live(Response):
    """A response that is produced while the client is there: when it leaves, the producing task is cancelled and waited for."""

    def __init__(self, produce: Callable[[Send], Awaitable[None]]) -> None:
        self.background, self._produce = None, produce

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Produce; raises what the producing raises."""

        async def patient(message: Message) -> None:
            try:
                async with asyncio.timeout(CLIENT_SECONDS):
                    await send(message)
            except TimeoutError as error:
                raise ClientGone from error

        work = asyncio.ensure_future(self._produce(patient))
        leaving = asyncio.ensure_future(_has_left(receive))
        try:
            await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientGone
            await work
        except ClientGone:
            call: Call = scope["state"]["call"]
            call.status, call.error = GONE, "client_gone"
        finally:
            leaving.cancel()
            work.cancel()
            await asyncio.gather(work, leaving, return_exceptions=True)


async def _has_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def open_session() -> aiohttp.ClientSession:
    """The connections to model servers: no limit of their own (the gates are it), no cookies, no proxies from the environment."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEPT_SECONDS)
    return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False, trust_env=False)


class Upstream:
    """How model servers are asked."""

    def __init__(self, session: aiohttp.ClientSession, request_seconds: float, silence_seconds: float) -> None:
        self._session = session
        self._timeout = aiohttp.ClientTimeout(total=request_seconds, sock_connect=CONNECT_SECONDS, sock_read=silence_seconds)

    async def relay(self, model: Model, route: str, body: dict[str, Any], call: Call, send: Send) -> None:
        """Send the body to the model's server and its reply to the client. Raises Refused where the client was told nothing yet."""
        began = False
        try:
            async with self._post(model, route, body) as reply:
                if reply.status != 200:
                    raise await refusal_of(reply, model)
                if not body.get("stream"):
                    await _send_whole(await _read(reply, model), call, send)
                    return
                await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
                began = True
                await _relay_stream(reply, model, call, send)
        except Refused as refused:
            if not began:
                raise
            await _end_with(refused, call, send)
        except (aiohttp.ClientError, OSError, TimeoutError) as fault:
            told = translate(fault, model, began)
            if not began:
                raise told from fault
            await _end_with(told, call, send)

    def _post(self, model: Model, route: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", "User-Agent": "understudy"}
        if model.api_key != NO_KEY:
            headers["Authorization"] = f"Bearer {model.api_key}"
        content = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        return self._session.post(f"{model.base_url.rstrip('/')}{route}", data=content, headers=headers, timeout=self._timeout, allow_redirects=False)


async def _relay_stream(reply: aiohttp.ClientResponse, model: Model, call: Call, send: Send) -> None:
    tail, finished = b"", False
    async for chunk in reply.content.iter_any():
        seen = tail + chunk
        finished = finished or FINISHED.search(seen) is not None
        if (end := DONE.search(seen)) is not None:
            if not finished:
                await send({"type": "http.response.body", "body": chunk[: max(0, end.start() - len(tail))], "more_body": True})
                raise broken_off(model.name)
            call.count_tokens(seen)
            await send({"type": "http.response.body", "body": chunk, "more_body": False})
            return
        if ERROR.search(seen):
            call.error = "upstream_error"
        call.count_tokens(seen)
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
        tail = seen[-OVERLAP:]
    raise broken_off(model.name)


async def _send_whole(content: bytes, call: Call, send: Send) -> None:
    call.count_tokens(content)
    headers = [*JSON, (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": content})


async def _end_with(refused: Refused, call: Call, send: Send) -> None:
    call.error = refused.reason
    await send({"type": "http.response.body", "body": b"\n\n" + refused.event(), "more_body": False})


async def _read(reply: aiohttp.ClientResponse, model: Model) -> bytes:
    content = bytearray()
    async for chunk in reply.content.iter_any():
        content += chunk
        if len(content) > MAX_REPLY_BYTES:
            raise Refused(502, "upstream_error", f"{model.name} answered with more than {MAX_REPLY_BYTES >> 20} MiB")
    if not content.lstrip().startswith(b"{"):
        raise Refused(502, "upstream_error", f"{model.name} answered with something that is not JSON")
    return bytes(content)


async def refusal_of(reply: aiohttp.ClientResponse, model: Model) -> Refused:
    """What a model server's error becomes: its own message where the client can do something about it, never our key."""
    content = await reply.content.read(MAX_ERROR_BYTES)
    if reply.status not in PASSED_ON:
        return Refused(502, "upstream_error", f"{model.name} answered {reply.status}")
    try:
        error = json.loads(content)["error"]
        message, param, code = str(error["message"]), error.get("param"), error.get("code")
    except (ValueError, KeyError, TypeError, AttributeError):
        message, param, code = f"{model.name} answered {reply.status}", None, None
    shown = message if model.api_key == NO_KEY else message.replace(model.api_key, "…")
    asked = seconds_asked(reply.headers.get("Retry-After")) or 1.0
    reason = code if isinstance(code, str) and code else "upstream_refused"
    return Refused(reply.status, reason, shown[:1000], param if isinstance(param, str) else None, asked if reply.status == 429 else None)


def translate(fault: Exception, model: Model, began: bool) -> Refused:
    """A connection's fault as what the client is told."""
    if isinstance(fault, TimeoutError):
        return too_slow(model.name)
    if isinstance(fault, aiohttp.ClientConnectorError):
        return unavailable(model.name)
    if isinstance(fault, aiohttp.ServerDisconnectedError) and not began:
        return unavailable(model.name)
    return broken_off(model.name)
