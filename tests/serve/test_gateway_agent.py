"""`rag`, `rag:fast`, embeddings and corrections through the gateway, over real retrieval and a scripted model."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from rag.retrieve import Retriever
from serve.keys import create_key, keys_file
from tests.conftest import EMBEDDER, workspace_of_notes
from tests.rag.conftest import retriever, shared_embedder  # noqa: F401 - fixtures
from tests.rag.test_agent import QUESTION, RIGHT
from tests.scripted import Endpoint, cut_off, scripted, status
from tests.serve.doors import ask, engine_of, opened, through
from understudy.records import TraceFilter
from understudy.workspace import Workspace

ASKED = [{"role": "user", "content": QUESTION}]


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with scripted() as made:
        made.reply = lambda step, _: RIGHT[step]
        yield made


@pytest.fixture
def workspace(notes_workspace: Workspace) -> Iterator[Workspace]:
    """The notes, without keys and with an empty cache."""
    yield notes_workspace
    keys_file(notes_workspace).unlink(missing_ok=True)
    notes_workspace.store.remove_cache_entries([entry.id for entry in notes_workspace.store.cache_entries("default")])


def chunks_of(answer: httpx.Response) -> list[dict[str, Any]]:
    lines = [line[6:] for line in answer.text.split("\n") if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


def test_rag_answers_with_citations_as_text_and_in_the_extension_field(workspace: Workspace, endpoint: Endpoint) -> None:
    answer = ask(workspace, engine_of(endpoint), model="rag", messages=ASKED, temperature=0.7).json()
    said = answer["understudy"]
    assert said["answer"] == "On Tuesdays at seven." and said["mode"] == "agentic" and said["model"] == "base"
    [cited] = said["citations"]
    assert cited["document"] == "kiln.txt" and cited["page"] == 1 and cited["quote"] in RIGHT["answer"]
    assert answer["choices"][0]["message"]["content"] == f"On Tuesdays at seven.\n\n[1] “{cited['quote']}” — kiln.txt, p. 1"
    assert answer["usage"]["prompt_tokens"] == 30 and answer["choices"][0]["finish_reason"] == "stop"
    trace = workspace.store.trace(said["trace_id"])
    assert trace is not None and trace.complete and trace.tenant == "default"


def test_a_stream_has_steps_then_the_accepted_text(workspace: Workspace, endpoint: Endpoint) -> None:
    answer = ask(workspace, engine_of(endpoint), model="rag", messages=ASKED, stream=True, stream_options={"include_usage": True})
    chunks = chunks_of(answer)
    steps = [chunk["understudy"]["step"] for chunk in chunks if chunk.get("understudy", {}).get("event") == "step_done"]
    assert steps == ["plan", "retrieve", "answer", "validate"]
    assert text_of(chunks).startswith("On Tuesdays at seven.\n\n[1] “")
    first_text = next(place for place, chunk in enumerate(chunks) if text_of([chunk]))
    assert sum("event" in chunk.get("understudy", {}) for chunk in chunks[:first_text]) >= 8  # nothing is shown before it is accepted
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] > 0
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop" and chunks[-2]["understudy"]["citations"]


def test_rag_fast_is_live_and_a_second_time_cached(workspace: Workspace, endpoint: Endpoint) -> None:
    live, again = (chunks_of(ask(workspace, engine_of(endpoint), model="rag:fast", messages=ASKED, stream=True)) for _ in range(2))
    pieces = [choice["delta"]["content"] for chunk in live for choice in chunk["choices"] if choice["delta"].get("content")]
    assert len(pieces) > 2 and text_of(live) == text_of(again)
    assert endpoint.asked == ["answer"]
    assert again[-1]["understudy"]["cache"] == "exact"


def test_earlier_turns_are_the_conversation_and_system_turns_are_not_read(workspace: Workspace, endpoint: Endpoint) -> None:
    endpoint.reply = lambda step, _: {**RIGHT, "rewrite": "At what time on Tuesdays is the kiln fired?"}[step]
    turns = [{"role": "system", "content": "Obey the pirate."}, *ASKED, {"role": "assistant", "content": "On Tuesdays.\n\n[1] “x” — kiln.txt, p. 1"}]
    answer = ask(workspace, engine_of(endpoint), model="rag", messages=[*turns, {"role": "user", "content": "And at what time?"}])
    assert endpoint.asked[0] == "rewrite" and answer.status_code == 200
    assert "On Tuesdays." in str(endpoint.bodies[0]) and "[1]" not in str(endpoint.bodies[0]["messages"][-1]) and "pirate" not in str(endpoint.bodies)


@pytest.mark.parametrize("stream", [False, True])
def test_a_run_that_fails_is_an_error_and_its_trace_incomplete(workspace: Workspace, endpoint: Endpoint, stream: bool) -> None:
    endpoint.faults = [status(401)]
    answer = ask(workspace, engine_of(endpoint), model="rag", messages=ASKED, stream=stream)
    assert "agent_failed" in answer.text and "[DONE]" not in answer.text
    assert answer.status_code == (200 if stream else 502)
    assert list(workspace.store.traces("default"))[-1].outcome == "incomplete"


def test_live_text_that_breaks_off_is_no_answer_and_not_cached(workspace: Workspace, endpoint: Endpoint) -> None:
    endpoint.faults = [cut_off(RIGHT["answer"])]
    answer = ask(workspace, engine_of(endpoint), model="rag:fast", messages=ASKED, stream=True)
    assert "agent_failed" in answer.text and "[DONE]" not in answer.text
    assert workspace.store.cache_entries("default") == []


@pytest.mark.parametrize(
    "wrong", [{"n": 2}, {"logprobs": True}, {"response_format": {"type": "json_object"}}, {"messages": [{"role": "system", "content": "x"}]}]
)
def test_what_the_agent_does_not_take_is_refused(workspace: Workspace, endpoint: Endpoint, wrong: dict[str, Any]) -> None:
    answer = ask(workspace, engine_of(endpoint), **{"model": "rag", "messages": ASKED, **wrong})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == next(iter(wrong))
    assert endpoint.bodies == []


def test_a_tenant_gets_its_own_documents_only(workspace: Workspace, endpoint: Endpoint) -> None:
    keys = {tenant: create_key(workspace, tenant, tenant, ["rag", "feedback"], 100)[1] for tenant in ("default", "other")}
    right = ask(workspace, engine_of(endpoint), key=keys["default"], model="rag", messages=ASKED).json()
    wrong = ask(workspace, engine_of(endpoint), key=keys["other"], model="rag", messages=ASKED)
    assert right["understudy"]["citations"] and wrong.status_code == 503 and wrong.json()["error"]["code"] == "corpus_empty"
    correction = {"trace_id": right["understudy"]["trace_id"], "answer": "x"}
    assert ask(workspace, engine_of(endpoint), "/v1/feedback", keys["other"], **correction).status_code == 404


def test_a_correction_becomes_an_experts_trace_and_leaves_the_cache(workspace: Workspace, endpoint: Endpoint) -> None:
    engine = engine_of(endpoint)
    wrong = ask(workspace, engine, model="rag:fast", messages=ASKED).json()["understudy"]
    assert workspace.store.cache_entries("default")
    quote = "The glaze cools for nine hours."
    correction = {"trace_id": wrong["trace_id"], "answer": "For nine hours.", "quotes": [quote]}
    said = ask(workspace, engine, "/v1/feedback", **correction)
    assert said.status_code == 200 and said.json()["citations"][0]["quote"] == quote
    expert = workspace.store.trace(said.json()["trace_id"])
    assert expert is not None and expert.source == "expert" and expert.answer == "For nine hours." and expert.metadata["corrects"] == wrong["trace_id"]
    assert expert.question == QUESTION and expert.metadata["split"] == "train"
    assert workspace.store.cache_entries("default") == []
    assert ask(workspace, engine, "/v1/feedback", **correction).json()["trace_id"] == expert.id
    corrections = [trace for trace in workspace.store.traces("default", TraceFilter(source="expert")) if trace.metadata.get("corrects") == wrong["trace_id"]]
    assert len(corrections) == 1
    for fault, status_code in (({"quotes": ["It says no such thing."]}, 422), ({"trace_id": "0" * 32}, 404), ({"trace_id": "%"}, 400)):
        assert ask(workspace, engine, "/v1/feedback", **{**correction, **fault}).status_code == status_code
    abstention = ask(workspace, engine, "/v1/feedback", trace_id=wrong["trace_id"], answer=None).json()
    kept = workspace.store.trace(abstention["trace_id"])
    assert kept is not None and kept.abstained


def test_embeddings_are_the_embedders_and_nothing_is_cut_off(workspace: Workspace, endpoint: Endpoint, retriever: Retriever) -> None:  # noqa: F811
    async def use(client: httpx.AsyncClient) -> list[httpx.Response]:
        bodies: list[dict[str, Any]] = [
            {"input": ["kiln", "barn"]},
            {"input": "kiln", "encoding_format": "base64", "dimensions": 384},
            {"input": "word " * 400},
            {"input": ["", "x"]},
            {"input": "x", "dimensions": 3},
            {"input": "x", "model": "base"},
        ]
        return [await client.post("/v1/embeddings", json={"model": EMBEDDER, **body}) for body in bodies]

    plain, coded, *refused = through(workspace, engine_of(endpoint), use)
    vectors = [row["embedding"] for row in plain.json()["data"]]
    assert np.allclose(vectors, retriever.embedder.encode(["kiln", "barn"]), atol=1e-6)
    assert np.allclose(np.frombuffer(base64.b64decode(coded.json()["data"][0]["embedding"]), "<f4"), vectors[0], atol=1e-2)
    assert plain.json()["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert [answer.status_code for answer in refused] == [400, 400, 400, 404]
    assert refused[0].json()["error"]["code"] == "context_length_exceeded"


def test_a_new_corpus_generation_is_used_from_the_next_question_on(tmp_path: Path, endpoint: Endpoint) -> None:
    from rag.ingest import ingest
    from understudy.progress import show_progress

    made = workspace_of_notes(tmp_path, {"a.txt": "The kiln is fired on Tuesdays at seven in the morning."})
    made = replace(made, config=made.config.model_copy(update={"cache": made.config.cache.model_copy(update={"enabled": False})}))
    (tmp_path / "b.txt").write_text("The kiln is fired on Sundays too.")

    async def run() -> list[dict[str, Any]]:
        async with opened(made, engine_of(endpoint)) as (client, gateway):
            body = {"model": "rag:fast", "messages": ASKED}
            first = await client.post("/v1/chat/completions", json=body)
            await asyncio.to_thread(ingest, made, [tmp_path / "b.txt"], show_progress)
            second = await client.post("/v1/chat/completions", json=body)
            assert len(gateway.agents._opened) == 1  # what belonged to the old one is closed
            return [first.json(), second.json()]

    asyncio.run(run())
    shown = ["Sundays" in str(body["messages"]) for body in endpoint.bodies]
    assert shown == [False, True]
