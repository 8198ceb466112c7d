"""The gateway before a scripted model server: what passes, what is refused, and how a failure reads."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.scripted import Endpoint, cut_off, drip, reset, status
from tests.serve.doors import BASE, TURNS, ask, engine_of, opened, through
from understudy.workspace import Workspace, create_workspace


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def test_a_chat_completion_passes_with_the_fields_that_were_set(workspace: Workspace, endpoint: Endpoint) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    body = {
        "temperature": 0,
        "max_tokens": 5,
        "logprobs": True,
        "top_logprobs": 2,
        "stop": ["x"],
        "tools": [{"type": "function", "function": {"name": "find", "parameters": schema}}],
        "tool_choice": {"type": "function", "function": {"name": "find"}},
        "response_format": {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}},
    }
    answer = ask(workspace, engine_of(endpoint), **body, user="ada", metadata={"a": "b"})
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == "It is Paris."
    assert answer.json()["choices"][0]["logprobs"]["content"]
    assert endpoint.bodies == [{"model": BASE, "messages": TURNS, **body}]
    assert endpoint.keys == [None]


def test_a_stream_passes_byte_for_byte(workspace: Workspace, endpoint: Endpoint) -> None:
    answer = ask(workspace, engine_of(endpoint), stream=True, stream_options={"include_usage": True})
    direct = httpx.post(f"{endpoint.model.base_url}/chat/completions", json=endpoint.bodies[0])
    assert answer.content == direct.content
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.content.endswith(b"data: [DONE]\n\n")


def test_plain_completions_pass(workspace: Workspace, endpoint: Endpoint) -> None:
    assert ask(workspace, engine_of(endpoint), "/v1/completions", model=BASE, prompt="The", max_tokens=3).status_code == 200
    assert endpoint.bodies == [{"model": BASE, "prompt": "The", "max_tokens": 3}]


@pytest.mark.parametrize("drop", [False, True])
def test_a_stream_that_breaks_off_ends_in_an_error_and_never_in_done(workspace: Workspace, endpoint: Endpoint, drop: bool) -> None:
    endpoint.faults = [cut_off("It is", drop)]
    answer = ask(workspace, engine_of(endpoint), stream=True)
    assert b"It is" in answer.content and b"[DONE]" not in answer.content
    last = [line for line in answer.text.split("\n") if line.startswith("data: ")][-1]
    assert json.loads(last[6:])["error"]["code"] == "upstream_broke_off"


def test_done_without_a_finish_reason_is_an_error_too(workspace: Workspace, endpoint: Endpoint) -> None:
    endpoint.finish = None
    answer = ask(workspace, engine_of(endpoint), stream=True)
    assert b"[DONE]" not in answer.content and b"upstream_broke_off" in answer.content


@pytest.mark.parametrize(
    ("fault", "code", "status_code"),
    [
        (status(400, "too long"), "upstream_refused", 400),
        (status(429, "busy", Retry_After="7"), "upstream_refused", 429),
        (status(500, "boom"), "upstream_error", 502),
        (status(307, "there", Location="http://elsewhere"), "upstream_error", 502),
        (reset, "upstream_", (502, 503)),
    ],
)
def test_a_failing_server_reads_as_a_clean_error(workspace: Workspace, endpoint: Endpoint, fault: Any, code: str, status_code: Any) -> None:
    endpoint.faults = [fault]
    answer = ask(workspace, engine_of(endpoint))
    assert error_of(answer)["code"].startswith(code)
    assert answer.status_code in (status_code if isinstance(status_code, tuple) else (status_code,))
    assert "boom" not in answer.text
    if status_code == 429:
        assert answer.headers["retry-after"] == "7"


def test_no_server_and_no_engine_are_503_with_retry_after(workspace: Workspace, endpoint: Endpoint) -> None:
    engine = engine_of(endpoint, url="http://127.0.0.1:9/v1")
    for running in (engine, None):
        answer = ask(workspace, running)
        assert answer.status_code == 503 and error_of(answer)["code"] == "upstream_unavailable"
        assert int(answer.headers["retry-after"]) >= 1


def test_a_slow_drip_ends_at_the_time_limit(tmp_path: Path, endpoint: Endpoint) -> None:
    made = create_workspace(str(tmp_path / "w"), "gateway: {request_seconds: 0.3}\n")
    endpoint.faults = [drip]
    assert ask(made, engine_of(endpoint)).status_code == 504
    assert endpoint.gone.wait(5)


HOSTILE: list[dict[str, Any]] = [
    {"n": 5000},
    {"logit_bias": {"1": 100}},
    {"chat_template": "{{ 1 }}"},
    {"guided_regex": "(a+)+$"},
    {"structured_outputs": {"regex": "(a+)+$"}},
    {"prompt_logprobs": 20},
    {"cache_salt": "x"},
    {"vllm_xargs": {}},
    {"seed": 1},
    {"temperature": 1e9},
    {"top_logprobs": 100},
    {"stop": ["a"] * 100},
    {"max_tokens": 0},
    {"max_tokens": 10**30},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://10.0.0.1/"}}]}]},
    {"messages": [{"role": "root", "content": "x"}]},
    {"messages": []},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string", "pattern": "(a+)+$"}}}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array", "maxItems": 10**9}}}},
    {"tools": [{"type": "function", "function": {"name": "x", "parameters": {"properties": {"a": {"patternProperties": {"(a+)+$": {}}}}}}}]},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "http://10.0.0.1/schema"}}}},
]


def test_hostile_fields_never_reach_the_engine(workspace: Workspace, endpoint: Endpoint) -> None:
    async def send_all(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.post("/v1/chat/completions", json={"model": "base", "messages": TURNS, **body}) for body in HOSTILE]

    for body, answer in zip(HOSTILE, through(workspace, engine_of(endpoint), send_all), strict=True):
        assert answer.status_code == 400, body
        assert error_of(answer)["type"] == "invalid_request_error"
        assert next(iter(body)) in (error_of(answer)["param"] or ""), answer.text
    assert endpoint.bodies == []


def test_hostile_prompts_never_reach_the_engine(workspace: Workspace, endpoint: Endpoint) -> None:
    for prompt in ([-1], [2**40], ["x"] * 100, [[1]], {"url": "http://10.0.0.1/"}, None):
        assert ask(workspace, engine_of(endpoint), "/v1/completions", model="base", prompt=prompt).status_code == 400
    assert endpoint.bodies == []


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b'{"model": NaN}', b"[" * 50_000, b'{"a":' * 10_000])
def test_what_is_no_request_is_400(workspace: Workspace, endpoint: Endpoint, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    answer = through(workspace, engine_of(endpoint), lambda client: client.post("/v1/chat/completions", content=content, headers=headers))
    assert answer.status_code == 400 and error_of(answer)["code"] == "invalid_request"


def test_a_large_body_is_refused_with_and_without_its_length(workspace: Workspace, endpoint: Endpoint) -> None:
    async def pieces() -> Any:
        for _ in range(200):
            yield b"x" * 1000

    headers = {"Content-Type": "application/json"}
    for content in (b"x" * 200_000, pieces()):
        answer = through(workspace, engine_of(endpoint), lambda client, c=content: client.post("/v1/chat/completions", content=c, headers=headers))
        assert answer.status_code == 413 and error_of(answer)["code"] == "request_too_large"


def test_a_form_and_a_foreign_host_are_refused_without_keys(workspace: Workspace, endpoint: Endpoint) -> None:
    async def send(client: httpx.AsyncClient) -> tuple[httpx.Response, httpx.Response]:
        body = json.dumps({"model": "base", "messages": TURNS})
        form = await client.post("/v1/chat/completions", content=body, headers={"Content-Type": "text/plain"})
        return form, await client.get("/v1/models", headers={"Host": "evil.example"})

    form, foreign = through(workspace, engine_of(endpoint), send)
    assert (form.status_code, foreign.status_code) == (415, 403)
    assert endpoint.bodies == []


@pytest.mark.parametrize("route", ["/v1/load_lora_adapter", "/invocations", "/tokenize", "/metrics/../pause", "/docs", "/v1/audio/speech", "/"])
def test_no_other_route_of_the_engine_is_reachable(workspace: Workspace, endpoint: Endpoint, route: str) -> None:
    for method in ("GET", "POST"):
        answer = through(workspace, engine_of(endpoint), lambda client, m=method: client.request(m, route, json={}))
        assert answer.status_code == 404 and error_of(answer)["code"] == "not_found"
    assert endpoint.bodies == []


def test_unknown_models_are_404_in_openais_shape(workspace: Workspace, endpoint: Endpoint) -> None:
    for name in ("gpt-4o", "handbooks", "base@0123", "../base", "x" * 200):
        error = error_of(answer := ask(workspace, engine_of(endpoint), model=name))
        assert answer.status_code == 404
        assert (error["code"], error["type"], error["param"]) == ("model_not_found", "invalid_request_error", "model")
    assert endpoint.bodies == []


def test_health_readiness_metrics_log_and_request_ids(workspace: Workspace, endpoint: Endpoint) -> None:
    async def use(client: httpx.AsyncClient) -> list[httpx.Response]:
        asked = await client.post("/v1/chat/completions", json={"model": "base", "messages": TURNS}, headers={"X-Request-Id": "mine-1"})
        forged = await client.get("/v1/models", headers={"X-Request-Id": 'a"b\tc'})
        return [asked, forged, await client.get("/health"), await client.get("/ready"), await client.get("/metrics"), await client.get("/openapi.json")]

    asked, forged, health, ready, metrics, described = through(workspace, engine_of(endpoint), use)
    assert asked.headers["x-request-id"] == "mine-1" and len(forged.headers["x-request-id"]) == 32
    assert (health.status_code, ready.status_code) == (200, 200)
    assert through(workspace, None, lambda client: client.get("/ready")).status_code == 503
    assert 'understudy_requests_total{model="base",route="/v1/chat/completions",status="200",tenant="default"} 1.0' in metrics.text
    assert 'understudy_tokens_total{kind="prompt",model="base",tenant="default"} 10.0' in metrics.text
    assert "understudy_engine_up 1.0" in metrics.text
    line = json.loads((workspace.logs / "gateway.jsonl").read_text().splitlines()[0])
    assert (line["request_id"], line["model"], line["status"], line["tenant"], line["prompt_tokens"]) == ("mine-1", "base", 200, "default", 10)
    assert "Who?" not in (workspace.logs / "gateway.jsonl").read_text()
    routes = described.json()["paths"]
    assert {"/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/feedback"} <= routes.keys()
    assert "ChatRequest" in described.json()["components"]["schemas"]


def test_a_full_queue_is_429_with_retry_after_and_the_slot_comes_back(tmp_path: Path, endpoint: Endpoint) -> None:
    made = create_workspace(str(tmp_path / "w"), "gateway: {max_running: 1, max_waiting: 1, request_seconds: 0.4}\n")
    endpoint.faults = [drip]

    async def use() -> list[httpx.Response]:
        async with opened(made, engine_of(endpoint)) as (client, _):
            body = {"model": "base", "messages": TURNS}
            return list(await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for _ in range(3))))

    answers = asyncio.run(use())
    assert sorted(answer.status_code for answer in answers) == [200, 429, 504]
    [busy] = [answer for answer in answers if answer.status_code == 429]
    assert error_of(busy)["code"] == "overloaded" and int(busy.headers["retry-after"]) >= 1
