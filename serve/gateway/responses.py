"""POST /v1/responses, as far as text goes: a chat completion in the shape of OpenAI's responses, whole or as events."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.types import Message, Send

from serve.gateway.call import Call
from serve.gateway.errors import Refused
from serve.gateway.relay import EVENTS
from serve.gateway.requests import ResponseRequest


def response_json(request: ResponseRequest, call: Call, text: str, status: str, usage: dict[str, Any] | None, more: dict[str, Any]) -> dict[str, Any]:
    """A response; `more` holds extension fields."""
    item = {"id": f"msg_{call.id}", "type": "message", "role": "assistant", "status": status}
    content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
    counted = usage and {
        "input_tokens": usage.get("prompt_tokens", 0),
        "input_tokens_details": {"cached_tokens": (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0, "cache_write_tokens": 0},
        "output_tokens": usage.get("completion_tokens", 0),
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.get("total_tokens", 0),
    }
    return {
        "id": f"resp_{call.id}", "object": "response", "created_at": int(time.time()), "status": status, "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None, "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens, "model": request.model, "output": [] if status == "in_progress" else [{**item, "content": content}],
        "parallel_tool_calls": False, "previous_response_id": None, "store": False, "temperature": request.temperature, "top_p": request.top_p,
        "text": {"format": {"type": "text"}}, "tool_choice": "none", "tools": [], "truncation": "disabled", "metadata": request.metadata or {},
        "usage": counted, **more,
    }  # fmt: skip


def from_completion(request: ResponseRequest, call: Call, completion: dict[str, Any]) -> dict[str, Any]:
    """A chat completion as a response."""
    try:
        choice = completion["choices"][0]
        status = "incomplete" if choice["finish_reason"] == "length" else "completed"
        text = choice["message"]["content"] or ""
    except (KeyError, IndexError, TypeError) as error:
        raise Refused(502, "upstream_error", f"{request.model} answered with something that is no chat completion") from error
    more = {"understudy": completion["understudy"]} if "understudy" in completion else {}
    return response_json(request, call, text, status, completion.get("usage"), more)


async def stream_response(request: ResponseRequest, call: Call, send: Send, run: Callable[[Send], Awaitable[None]]) -> None:
    """Run what streams a chat completion, and send its chunks on as a response's events. Raises Refused before the first."""
    events = _Events(request, call, send)
    await run(events.take)


class _Events:
    """Reads a chat completion's stream, as `run` sends it, and writes a response's."""

    def __init__(self, request: ResponseRequest, call: Call, send: Send) -> None:
        self._request, self._call, self._send = request, call, send
        self._rest, self._text, self._finish, self._number = b"", "", "", 0
        self._usage: dict[str, Any] | None = None
        self._more: dict[str, Any] = {}
        self._place = {"item_id": f"msg_{call.id}", "output_index": 0, "content_index": 0}

    async def take(self, message: Message) -> None:
        """The `send` that the chat completion is streamed to."""
        if message["type"] == "http.response.start":
            await self._send({"type": "http.response.start", "status": 200, "headers": EVENTS})
            await self._begin()
            return
        *lines, self._rest = (self._rest + message.get("body", b"")).split(b"\n")
        for line in lines:
            if line.startswith(b"data: "):
                await self._line(line[6:])
        if not message.get("more_body", False):
            await self._send({"type": "http.response.body", "body": b""})

    async def _line(self, content: bytes) -> None:
        if content.strip() == b"[DONE]":
            await self._end()
            return
        chunk = json.loads(content)
        if error := chunk.get("error"):
            await self._emit("error", {"message": error.get("message"), "code": error.get("code"), "param": error.get("param")})
            return
        self._usage = chunk.get("usage") or self._usage
        if "understudy" in chunk:
            self._more = {"understudy": chunk["understudy"]}
        for choice in chunk["choices"][:1]:
            self._finish = choice.get("finish_reason") or self._finish
            if text := (choice.get("delta") or {}).get("content"):
                self._text += text
                await self._emit("response.output_text.delta", {**self._place, "delta": text, "logprobs": []})

    async def _begin(self) -> None:
        started = response_json(self._request, self._call, "", "in_progress", None, {})
        await self._emit("response.created", {"response": started})
        await self._emit("response.in_progress", {"response": started})
        item = {"id": self._place["item_id"], "type": "message", "role": "assistant", "status": "in_progress", "content": []}
        await self._emit("response.output_item.added", {"output_index": 0, "item": item})
        await self._emit("response.content_part.added", {**self._place, "part": {"type": "output_text", "text": "", "annotations": [], "logprobs": []}})

    async def _end(self) -> None:
        status = "incomplete" if self._finish == "length" else "completed"
        whole = response_json(self._request, self._call, self._text, status, self._usage, self._more)
        item = whole["output"][0]
        await self._emit("response.output_text.done", {**self._place, "text": self._text, "logprobs": []})
        await self._emit("response.content_part.done", {**self._place, "part": item["content"][0]})
        await self._emit("response.output_item.done", {"output_index": 0, "item": item})
        await self._emit(f"response.{status}", {"response": whole})

    async def _emit(self, kind: str, fields: dict[str, Any]) -> None:
        payload = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        body = f"event: {kind}\ndata: {json.dumps(payload)}\n\n".encode()
        await self._send({"type": "http.response.body", "body": body, "more_body": True})
