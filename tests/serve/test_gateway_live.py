"""The gateway of `understudy serve`, before the session's real vLLM: what passes, what is refused, and an engine that is killed."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from serve.gateway.server import url_of
from tests.conftest import BASE, EMBEDDER, Served
from tests.processes import session_of
from tests.serve.test_gateway import HOSTILE
from understudy.adapters import find_adapter
from understudy.engines import RunningEngine, find_engine
from understudy.files import write_json

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

TURNS: Any = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture
def url(engine_session: Served) -> str:
    """The gateway's base URL, when it is ready."""
    made = url_of(engine_session.workspace.config.gateway)
    deadline = time.monotonic() + 60
    while True:
        try:
            if httpx.get(made.removesuffix("/v1") + "/ready").status_code == 200:
                return made
        except httpx.HTTPError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def test_the_sdk_reaches_the_base_whole_and_streamed(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="base", messages=TURNS, max_tokens=16, temperature=0, logprobs=True, top_logprobs=5)
    text = whole.choices[0].message.content
    assert text and "Paris" in text and whole.model == BASE and whole.choices[0].logprobs
    stream = client.chat.completions.create(model="base", messages=TURNS, max_tokens=16, temperature=0, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    counted, whole_counted = chunks[-1].usage, whole.usage
    assert counted and whole_counted and (counted.prompt_tokens, counted.completion_tokens) == (whole_counted.prompt_tokens, whole_counted.completion_tokens)
    assert client.completions.create(model=BASE, prompt="The capital of France is", max_tokens=4, temperature=0).choices[0].text
    response = client.responses.create(model="base", input="What is the capital of France?", max_output_tokens=16, temperature=0)
    assert response.output_text == text
    assert len(client.embeddings.create(model=EMBEDDER, input="kiln").data[0].embedding) == 384


def test_structured_output_and_tools_pass(client: openai.OpenAI) -> None:
    schema: Any = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"], "additionalProperties": False}
    form: Any = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(model="base", messages=TURNS, max_tokens=24, temperature=0, response_format=form)
    written = answer.choices[0].message.content or ""
    assert answer.choices[0].finish_reason == "length" or isinstance(json.loads(written)["yes"], bool)
    tools: Any = [{"type": "function", "function": {"name": "verdict", "parameters": schema}}]
    with pytest.raises(openai.BadRequestError, match="tool"):  # the engine's own message: this base has no parser of tool calls
        client.chat.completions.create(model="base", messages=TURNS, max_tokens=8, tools=tools)


def test_an_adapter_takes_traffic_once_it_is_proven(client: openai.OpenAI, engine_session: Served) -> None:
    """The record of a proof is what counts here; proofs themselves are tested in test_prove_live.py."""
    name = engine_session.adapter
    with pytest.raises(openai.NotFoundError, match="not proven"):
        client.chat.completions.create(model=name, messages=TURNS, max_tokens=2)
    manifest, folder = find_adapter(engine_session.workspace, name)
    write_json(folder / "proof.json", {"digest": manifest.digest, "passed": True, "engine": {"base_digest": manifest.served_base_digest}})
    try:
        assert client.chat.completions.create(model=manifest.name, messages=TURNS, max_tokens=2).model == name
        assert name in [model.id for model in client.models.list()]
    finally:
        (folder / "proof.json").unlink()
        time.sleep(1.1)


def test_hostile_requests_leave_the_engine_alive(client: openai.OpenAI, url: str) -> None:
    for body in HOSTILE:
        assert httpx.post(f"{url}/chat/completions", json={"model": "base", "messages": TURNS, **body}).status_code == 400
    for route in ("/load_lora_adapter", "/unload_lora_adapter", "/../tokenize"):
        assert httpx.post(f"{url}{route}", json={}).status_code == 404
    assert client.chat.completions.create(model="base", messages=TURNS, max_tokens=2).choices


def test_an_engine_that_is_killed_under_load_is_started_again(client: openai.OpenAI, engine_session: Served, url: str) -> None:
    """What comes after asks the session's second engine."""
    stream = client.chat.completions.create(model="base", messages=TURNS, max_tokens=500, stream=True)
    next(iter(stream))
    [vllm] = [int(pid) for pid in Path(f"/proc/{engine_session.running.pid}/task/{engine_session.running.pid}/children").read_text().split()]
    os.kill(vllm, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="broke off"):
        list(stream)
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="base", messages=TURNS, max_tokens=2)
    assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"]
    deadline = time.monotonic() + 180
    while httpx.get(url.removesuffix("/v1") + "/ready").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert client.chat.completions.create(model="base", messages=TURNS, max_tokens=2).choices
    engine_session.running = succeed(engine_session)


def succeed(session: Served) -> RunningEngine:
    """The engine that took the place of the one known; it serves all that it did."""
    again = find_engine(session.workspace)
    assert again is not None and again.pid != session.running.pid and set(session.running.models) <= set(again.models)
    return again


def test_an_engine_whose_core_is_stuck_is_ended_and_started_again(client: openai.OpenAI, engine_session: Served, url: str) -> None:
    """vLLM's server goes on listing models and calling itself healthy; what comes after asks the session's third engine."""
    [core] = [pid for pid, name in session_of(engine_session.running.pid).items() if "Engine" in name]
    os.kill(core, signal.SIGSTOP)
    time.sleep(1)
    assert httpx.get(engine_session.running.url.removesuffix("/v1") + "/health").status_code == 200
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="base", messages=TURNS, max_tokens=2)
    assert caught.value.status_code in (502, 503, 504)
    deadline = time.monotonic() + 180
    while find_engine(engine_session.workspace) is None or httpx.get(url.removesuffix("/v1") + "/ready").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert client.chat.completions.create(model="base", messages=TURNS, max_tokens=2).choices
    engine_session.running = succeed(engine_session)
    with pytest.raises(ProcessLookupError):
        os.kill(core, 0)
