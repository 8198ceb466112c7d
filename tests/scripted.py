"""An OpenAI-compatible server on a local socket that replays written answers, records what it was asked, and fails as told."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from understudy.client import Model
from understudy.patience import Patience

Reply = Callable[[str, str], str]  # (step, prompt) -> text
Fault = Callable[["Handler"], None]
HASTY = Patience(seconds=5, attempts=4, first_pause=0.01)


class Endpoint:
    """A server whose `reply` writes the text for a step; each of `faults` is what happens to one request instead."""

    def __init__(self, name: str = "base", api_key: str = "none") -> None:
        self.reply: Reply = lambda _step, _prompt: ""
        self.finish: str | None = "stop"
        self.logprob = -0.1
        self.prompt_tokens = 10
        self.refuses_logprobs = False
        self.keeps_limits = False  # whether a completion ends at max_tokens, of four characters each
        self.faults: list[Fault] = []
        self.listing_seconds = 0.0  # how long GET /models takes
        self.listed: dict[str, tuple[str, str]] = {}  # what GET /models says: name → (root, parent)
        self.asked: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Message] = []
        self.gone = threading.Event()  # a client went away while it was being answered
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"endpoint": self}))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.model = Model(name, "m", f"http://127.0.0.1:{self.server.server_port}/v1", api_key)

    @property
    def keys(self) -> list[str | None]:
        """The Authorization header of each request."""
        return [headers.get("Authorization") for headers in self.headers]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@contextmanager
def scripted(name: str = "base", api_key: str = "none") -> Iterator[Endpoint]:
    made = Endpoint(name, api_key)
    try:
        yield made
    finally:
        made.close()


class Handler(BaseHTTPRequestHandler):
    endpoint: Endpoint

    def do_GET(self) -> None:
        time.sleep(self.endpoint.listing_seconds)
        self.send(200, {"data": [{"id": name, "root": root, "parent": parent} for name, (root, parent) in self.endpoint.listed.items()]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        continued, prompt = "", str(body.get("prompt"))
        if "messages" in body:
            last = body["messages"][-1]
            continued = last["content"] if last["role"] == "assistant" else ""
            prompt = next(message["content"] for message in reversed(body["messages"]) if message["role"] == "user")
        step = step_of(prompt)
        self.endpoint.asked.append(step)
        self.endpoint.bodies.append(body)
        self.endpoint.headers.append(self.headers)
        if self.endpoint.faults:
            self.endpoint.faults.pop(0)(self)
        elif self.endpoint.refuses_logprobs and "logprobs" in body:
            self.send(400, {"error": {"message": "Unrecognized request argument supplied: logprobs"}})
        else:
            text = self.endpoint.reply(step, prompt)
            self.answer(text[len(continued) :] if text.startswith(continued) else text.rpartition("Answer:")[2], body)

    def answer(self, text: str, body: dict[str, Any]) -> None:
        finish = self.endpoint.finish
        if self.endpoint.keeps_limits and len(text) > 4 * body["max_tokens"]:
            text, finish = text[: 4 * body["max_tokens"]], "length"
        usage = {"prompt_tokens": self.endpoint.prompt_tokens, "completion_tokens": max(1, len(text) // 4)}
        if body.get("stream"):
            self.start_stream()
            for piece in pieces(text):
                self.event({"choices": [{"index": 0, "delta": {"content": piece}, "logprobs": self.logprobs(piece, body), "finish_reason": None}]})
            self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
            self.event({"choices": [], "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")
        else:
            written = {"text": text} if "prompt" in body else {"message": {"role": "assistant", "content": text}}
            choice = {"index": 0, **written, "finish_reason": finish, "logprobs": self.logprobs(text, body)}
            self.send(200, {"object": "chat.completion", "choices": [choice], "usage": usage})

    def logprobs(self, text: str, body: dict[str, Any]) -> dict[str, Any] | None:
        if "logprobs" not in body:
            return None
        first = text[: len(text) - len(text.lstrip()) + 1] if text.strip() else text
        tokens = [token for token in (first, text[len(first) :]) if token]
        made = [
            {"token": token, "logprob": self.endpoint.logprob, "top_logprobs": [{"token": token, "logprob": self.endpoint.logprob}] * (place == 0)}
            for place, token in enumerate(tokens)
        ]
        return {"content": made}

    def start_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()

    def event(self, payload: dict[str, Any]) -> None:
        try:
            self.wfile.write(b"data: " + json.dumps(payload).encode() + b"\n\n")
            self.wfile.flush()
        except OSError:
            self.endpoint.gone.set()
            raise

    def send(self, status: int, payload: object, **headers: str) -> None:
        content = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        try:
            self.end_headers()
            self.wfile.write(content)
        except OSError:
            self.endpoint.gone.set()
            raise

    def handle(self) -> None:
        with suppress(OSError):  # a kept connection that is reset between requests leaves nobody unanswered
            super().handle()

    def log_message(self, *_: object) -> None:
        pass


def step_of(prompt: str) -> str:
    """Which step's prompt this is."""
    marks = {"stands alone": "rewrite", "search query": "plan", "Proposed answer": "validate"}
    return next((step for mark, step in marks.items() if mark in prompt), "answer")


def pieces(text: str, size: int = 7) -> list[str]:
    """The text as a stream's chunks."""
    return [text[start : start + size] for start in range(0, len(text), size)]


def status(code: int, message: str = "not now", **headers: str) -> Fault:
    """Answer with an error status."""
    return lambda handler: handler.send(code, {"error": {"message": message}}, **headers)


def reset(handler: Handler) -> None:
    """Drop the connection with a TCP reset."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def drip(handler: Handler) -> None:
    """Send a byte of a reply now and then, without end."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.02)
    except OSError:
        handler.endpoint.gone.set()


def cut_off(text: str, drop: bool = False) -> Fault:
    """Stream a text and stop without a finish reason: in order, or by dropping the connection."""

    def fault(handler: Handler) -> None:
        handler.start_stream()
        for piece in pieces(text):
            handler.event({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
        if drop:
            time.sleep(0.05)
            reset(handler)

    return fault


def endless(handler: Handler, words: int = 20, pause: float = 0.0) -> None:
    """Stream words without end, so many at once."""
    handler.start_stream()
    while not handler.endpoint.gone.is_set():
        handler.event({"choices": [{"index": 0, "delta": {"content": "word " * words}, "finish_reason": None}]})
        time.sleep(pause)
