"""The engine's HTTP interface as the proof uses it, against a local server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from serve.served import Server
from understudy.chat import Encoded
from understudy.errors import EngineError
from understudy.records import Message


@contextmanager
def answering(replies: dict[str, tuple[int, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A local server of fixed (status, JSON or bytes) by path; yields its base URL and the requests it got."""
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            requests.append({"path": self.path, "body": json.loads(self.rfile.read(length) or "null")})
            status, reply = replies[self.path]
            content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}/v1", requests
        http.shutdown()
        thread.join()


MODELS = {"/v1/models": (200, {"data": [{"id": "base", "root": "/b", "max_model_len": 99}, {"id": "a@1", "root": "/a", "parent": "base"}]})}


def completions(logprobs: list[float]) -> tuple[int, Any]:
    entries: list[Any] = [None, *({str(10 + index): {"logprob": value, "rank": 1}} for index, value in enumerate(logprobs, 1))]
    return 200, {"choices": [{"prompt_logprobs": entries}]}


def test_the_server_is_asked_for_tokens_and_logprobs_of_the_adapter() -> None:
    replies = MODELS | {"/tokenize": (200, {"tokens": [1, 2]}), "/v1/completions": completions([-1.0, -2.0, -3.0])}
    with answering(replies) as (url, requests), Server(url, "base", "a@1") as server:
        assert server.max_tokens == 99
        assert server.tokenize([Message(role="user", content="Hi")]) == [1, 2]
        assert server.logprobs("a@1", Encoded([10, 11, 12, 13], 2)).tolist() == [-2.0, -3.0]
    assert requests[1] == {"path": "/tokenize", "body": {"model": "a@1", "messages": [{"role": "user", "content": "Hi"}], "add_generation_prompt": True}}
    assert requests[2]["body"] | {"prompt": [10, 11, 12, 13], "max_tokens": 1, "prompt_logprobs": 0, "temperature": 0} == requests[2]["body"]


def test_an_adapter_that_is_not_served_is_an_engine_error() -> None:
    with answering(MODELS) as (url, _), pytest.raises(EngineError, match="does not serve b@2"):
        Server(url, "base", "b@2")


@pytest.mark.parametrize("reply", [(500, {"error": "out of memory"}), (200, b"<html>"), completions([float("-inf"), -1.0, -1.0])])
def test_what_the_engine_cannot_answer_is_an_engine_error(reply: tuple[int, Any]) -> None:
    replies = MODELS | {"/v1/completions": reply}
    with answering(replies) as (url, _), Server(url, "base", "a@1") as server, pytest.raises(EngineError):
        server.logprobs("a@1", Encoded([10, 11, 12, 13], 1))


def test_no_engine_is_an_engine_error() -> None:
    with pytest.raises(EngineError, match="broke off"):
        Server("http://127.0.0.1:9/v1", "base", "a@1")
