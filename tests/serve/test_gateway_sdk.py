"""The gateway on a real socket, as its users call it: OpenAI's Python and Node SDKs, LangChain, and clients that leave."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from serve.keys import create_key, keys_file
from tests.conftest import EMBEDDER
from tests.rag.conftest import shared_embedder  # noqa: F401 - a fixture
from tests.rag.test_agent import QUESTION, RIGHT
from tests.scripted import Endpoint, endless, scripted
from tests.serve.doors import Socket, engine_of, on_socket
from understudy.workspace import Workspace

NODE_SDK = "openai@6"
SAYS = "It is Paris, of course."


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with scripted() as made:
        made.reply = lambda step, prompt: RIGHT[step] if "kiln" in prompt else SAYS
        yield made


@pytest.fixture(scope="module")
def gateway(notes_workspace: Workspace, endpoint: Endpoint) -> Iterator[tuple[Socket, str]]:
    """A gateway on a real socket, and a key to it."""
    _, key = create_key(notes_workspace, "sdk", "default", ["chat", "rag", "embeddings", "feedback"], 10_000)
    uncached = notes_workspace.config.cache.model_copy(update={"enabled": False})
    with on_socket(replace(notes_workspace, config=notes_workspace.config.model_copy(update={"cache": uncached})), engine_of(endpoint)) as made:
        yield made, key
    keys_file(notes_workspace).unlink()


@pytest.fixture
def client(gateway: tuple[Socket, str]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=gateway[0].url, api_key=gateway[1], max_retries=0) as made:
        yield made


TURNS: Any = [{"role": "user", "content": "What is the capital of France?"}]
ASKED: Any = [{"role": "user", "content": QUESTION}]


def test_openais_python_sdk_works_unmodified(client: openai.OpenAI, endpoint: Endpoint) -> None:
    assert {"base", "rag", "rag:fast", EMBEDDER} == {model.id for model in client.models.list()}
    assert client.models.retrieve("rag:fast").id == "rag:fast"
    whole = client.chat.completions.create(model="base", messages=TURNS, max_completion_tokens=9, logprobs=True)
    assert whole.choices[0].message.content == SAYS and whole.usage and whole.usage.prompt_tokens == 10
    stream = client.chat.completions.create(model="base", messages=TURNS, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == SAYS
    assert chunks[-1].usage is not None
    schema: Any = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": {"type": "object"}}}
    tools: Any = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}]
    client.chat.completions.create(model="base", messages=TURNS, response_format=schema, tools=tools, tool_choice="auto")
    assert endpoint.bodies[-1]["tools"] == tools and endpoint.bodies[-1]["response_format"] == schema
    assert client.completions.create(model="base", prompt="The", max_tokens=3).choices[0].text == SAYS
    vectors = client.embeddings.create(model=EMBEDDER, input=["kiln", "barn"])  # the SDK asks for base64
    assert len(vectors.data) == 2 and len(vectors.data[0].embedding) == 384


def test_the_responses_api_works_as_far_as_text_goes(client: openai.OpenAI) -> None:
    whole = client.responses.create(model="base", input="Capital of France?", instructions="Be short.", max_output_tokens=9)
    assert whole.output_text == SAYS and whole.status == "completed" and whole.usage and whole.usage.input_tokens == 10
    events = list(client.responses.create(model="base", input=[{"role": "user", "content": "Hm?"}], stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == SAYS
    last = events[-1]
    assert last.type == "response.completed" and last.response.output_text == SAYS
    with client.responses.stream(model="rag", input=QUESTION) as stream:  # the SDK's own accumulator reads every event
        final = stream.get_final_response()
    assert final.output_text.startswith("On Tuesdays at seven.") and final.model_extra and final.model_extra["understudy"]["citations"]


def test_the_agent_reads_as_a_model_to_the_sdk(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="rag", messages=ASKED)
    assert answer.model_extra and answer.model_extra["understudy"]["citations"][0]["document"] == "kiln.txt"
    chunks = list(client.chat.completions.create(model="rag:fast", messages=ASKED, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).startswith("On Tuesdays at seven.")


def test_errors_are_the_sdks_own_classes(client: openai.OpenAI, endpoint: Endpoint) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="gpt-4o", messages=TURNS)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="base", messages=TURNS, logit_bias={"1": 1})
    assert caught.value.code == "unknown_parameter" and caught.value.param == "logit_bias"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="us-wrong").models.list()
    endpoint.finish = None
    try:
        with pytest.raises(openai.APIError, match="broke off"):
            list(client.chat.completions.create(model="base", messages=TURNS, stream=True))
    finally:
        endpoint.finish = "stop"


def wait_for(condition: Any, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


@pytest.mark.parametrize("model", ["base", "rag:fast"])
def test_when_the_client_leaves_the_model_is_stopped(client: openai.OpenAI, gateway: tuple[Socket, str], endpoint: Endpoint, model: str) -> None:
    endpoint.faults = [partial(endless, words=1, pause=0.02)]  # so slowly that the agent's own limit is far away
    endpoint.gone.clear()
    question: Any = [{"role": "user", "content": f"Something else for {model}?"}]
    asked = len(endpoint.bodies)
    stream = client.chat.completions.create(model=model, messages=question, stream=True)
    next(iter(stream))
    assert wait_for(lambda: len(endpoint.bodies) > asked)
    assert not endpoint.gone.is_set()
    stream.response.close()
    assert wait_for(endpoint.gone.is_set)
    assert wait_for(lambda: gateway[0].gateway.gate("engine").running == 0)
    endpoint.gone.clear()


@pytest.mark.parametrize("leaves", [True, False])
def test_a_client_that_leaves_unanswered_or_reads_nothing_stops_its_request(
    gateway: tuple[Socket, str], endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, leaves: bool
) -> None:
    monkeypatch.setattr("serve.gateway.relay.CLIENT_SECONDS", 0.2)
    made, key = gateway
    endpoint.faults = [endless]
    endpoint.gone.clear()
    body = json.dumps({"model": "base", "messages": TURNS, "stream": not leaves}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    asked = len(endpoint.bodies)
    with socket.create_connection(("127.0.0.1", made.server.config.port)) as raw:
        raw.sendall(head.encode() + body)
        assert wait_for(lambda: len(endpoint.bodies) > asked)
        if not leaves:
            assert wait_for(endpoint.gone.is_set)
    assert wait_for(endpoint.gone.is_set)
    assert wait_for(lambda: made.gateway.gate("engine").running == 0)


def test_langchain_works_unmodified(gateway: tuple[Socket, str]) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    model = langchain.ChatOpenAI(base_url=gateway[0].url, api_key=gateway[1], model="base")
    assert model.invoke("Capital of France?").content == SAYS
    assert "".join(chunk.content for chunk in model.stream("Capital of France?")) == SAYS


def test_open_webuis_way_of_calling_works(gateway: tuple[Socket, str]) -> None:
    """The requests that its server makes (backend/open_webui/routers/openai.py): the model list, a streamed chat, a title for it."""
    headers = {"Authorization": f"Bearer {gateway[1]}", "Content-Type": "application/json", "X-OpenWebUI-User-Name": "Ada", "X-OpenWebUI-Chat-Id": "1"}
    with httpx.Client(base_url=gateway[0].url, headers=headers) as http:
        assert {"base", "rag"} <= {row["id"] for row in http.get("/models").json()["data"]}
        turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": QUESTION}]
        told = http.post("/chat/completions", json={"stream": True, "model": "rag", "messages": turns, "stream_options": {"include_usage": True}})
        assert "text/event-stream" in told.headers["Content-Type"] and told.text.rstrip().endswith("data: [DONE]")
        chunks = [json.loads(line[6:]) for line in told.text.splitlines() if line.startswith("data: {")]
        assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"]).startswith("On Tuesdays at seven.")
        title = http.post("/chat/completions", json={"model": "base", "messages": TURNS, "stream": False, "max_completion_tokens": 1000})
        assert title.json()["choices"][0]["message"]["content"] == SAYS


NODE = """
import OpenAI from 'openai';
import assert from 'node:assert';
const [url, key, embedder] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url, apiKey: key, maxRetries: 0 });
const messages = [{ role: 'user', content: 'What is the capital of France?' }];
const says = 'It is Paris, of course.';
const names = []; for await (const model of client.models.list()) names.push(model.id);
assert(names.includes('rag:fast'));
const whole = await client.chat.completions.create({ model: 'base', messages });
assert.equal(whole.choices[0].message.content, says);
let text = '';
for await (const chunk of await client.chat.completions.create({ model: 'base', messages, stream: true })) text += chunk.choices[0]?.delta?.content ?? '';
assert.equal(text, says);
const rag = await client.chat.completions.create({ model: 'rag', messages: [{ role: 'user', content: 'When is the kiln fired?' }] });
assert.equal(rag.understudy.citations[0].document, 'kiln.txt');
const vectors = await client.embeddings.create({ model: embedder, input: ['kiln'] });
assert.equal(vectors.data[0].embedding.length, 384);
const response = await client.responses.create({ model: 'base', input: 'Capital of France?' });
assert.equal(response.output_text, says);
text = '';
for await (const event of await client.responses.create({ model: 'base', input: 'Capital?', stream: true }))
  if (event.type === 'response.output_text.delta') text += event.delta;
assert.equal(text, says);
await assert.rejects(client.chat.completions.create({ model: 'gpt-4o', messages }), OpenAI.NotFoundError);
await assert.rejects(new OpenAI({ baseURL: url, apiKey: 'us-wrong', maxRetries: 0 }).models.list(), OpenAI.AuthenticationError);
console.log('conforms');
"""


@pytest.mark.slow
def test_openais_node_sdk_works_unmodified(gateway: tuple[Socket, str], tmp_path: Path) -> None:
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("node and npm are not here")
    options = ["--no-audit", "--no-fund", "--ignore-scripts", "--no-update-notifier"]
    installed = subprocess.run(["npm", "install", *options, NODE_SDK], cwd=tmp_path, capture_output=True, text=True, timeout=180)
    if installed.returncode:
        pytest.skip(f"npm cannot install {NODE_SDK}: {installed.stderr[-300:]}")
    (tmp_path / "conform.mjs").write_text(NODE)
    ran = subprocess.run(["node", "conform.mjs", gateway[0].url, gateway[1], EMBEDDER], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0 and ran.stdout.strip() == "conforms", ran.stderr
