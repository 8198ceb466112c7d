"""The agent against a local OpenAI-compatible server that replays written answers and records what it was asked."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rag.agent import Tools, run_agent
from rag.ingest import ingest
from rag.prompts import ABSTENTION
from rag.retrieve import Retriever, open_retriever
from rag.validation import SIGNALS, Calibration, Logistic
from understudy.client import Model, ModelClient
from understudy.config import Agent
from understudy.progress import show_progress
from understudy.records import Trace
from understudy.workspace import Workspace

Reply = Callable[[str, str], str]  # (step, prompt) -> text


class Endpoint:
    """A server whose `reply` writes the text for a step, or raises to break off."""

    def __init__(self) -> None:
        self.reply: Reply = lambda _step, _prompt: ""
        self.finish: str | None = "stop"
        self.asked: list[str] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][-1]["content"]
                step = "plan" if "search query" in prompt else "validate" if "Proposed answer" in prompt else "answer"
                endpoint.asked.append(step)
                text = endpoint.reply(step, prompt)
                tokens = [{"token": text[:1], "logprob": -0.1, "bytes": None, "top_logprobs": [{"token": text[:1], "logprob": -0.1, "bytes": None}]}]
                choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": endpoint.finish, "logprobs": {"content": tokens}}
                usage = {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}
                reply: dict[str, Any] = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
                content = json.dumps(reply).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.model = Model("base", "m", f"http://127.0.0.1:{self.server.server_port}/v1")


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    yield made
    made.server.shutdown()


@pytest.fixture
def retriever(corpus_workspace: Workspace, tmp_path: Path) -> Retriever:
    notes = {
        "kiln.txt": "The kiln is fired on Tuesdays at seven in the morning. The glaze cools for nine hours.",
        "barn.txt": "The barn doors are painted green every third summer by the village school.",
        "pond.txt": "The pond is stocked with forty carp in April, never later than the tenth.",
    }
    for name, text in notes.items():
        (tmp_path / name).write_text(text)
    ingest(corpus_workspace, [tmp_path / name for name in notes], show_progress)
    return open_retriever(corpus_workspace)


def ask(endpoint: Endpoint, retriever: Retriever, calibration: Calibration | None = None, **settings: object) -> Trace:
    async def run() -> Trace:
        async with ModelClient(endpoint.model) as client:
            return await run_agent("When is the kiln fired?", Tools(client, retriever, Agent.model_validate(settings), calibration))

    return asyncio.run(run())


def test_a_right_answer_is_cited_with_its_place(endpoint: Endpoint, retriever: Retriever) -> None:
    written = {"plan": "kiln firing", "answer": "Quote: fired on Tuesdays at seven\nAnswer: On Tuesdays at seven.", "validate": "1"}
    endpoint.reply = lambda step, _: written[step]
    trace = ask(endpoint, retriever)
    assert endpoint.asked == ["plan", "answer", "validate"]
    assert trace.complete
    assert trace.answer == "On Tuesdays at seven."
    [citation] = trace.citations
    assert (citation.document, citation.page, citation.quote) == ("kiln.txt", 1, "fired on Tuesdays at seven")
    assert trace.score is not None
    assert trace.score > 0.5
    assert [step.name for step in trace.steps] == ["plan", "retrieve", "answer", "validate"]


def test_an_invented_quote_is_not_a_citation_and_is_tried_again(endpoint: Endpoint, retriever: Retriever) -> None:
    endpoint.reply = lambda step, _: {"plan": "kiln", "answer": "Quote: fired on Sundays at noon\nAnswer: Sundays.", "validate": "0"}[step]
    trace = ask(endpoint, retriever, max_rounds=3)
    assert endpoint.asked[:5] == ["plan", "answer", "validate", "answer", "validate"]
    assert trace.citations == []
    assert trace.quotes == ["fired on Sundays at noon"]
    assert trace.score is not None
    assert trace.score < 0.5


def test_a_low_score_plans_again_over_other_passages_within_bounds(endpoint: Endpoint, retriever: Retriever) -> None:
    endpoint.reply = lambda step, _: {"plan": "kiln", "answer": ABSTENTION, "validate": "0"}[step]
    trace = ask(endpoint, retriever, max_rounds=2)
    shown = [step.passage_ids for step in trace.steps if step.name == "retrieve"]
    assert len(shown) == 2
    assert not set(shown[0]) & set(shown[1])
    assert trace.abstained
    assert trace.complete


@pytest.mark.parametrize("is_answerable", [True, False])
def test_the_calibration_decides_whether_an_answer_becomes_an_abstention(endpoint: Endpoint, retriever: Retriever, is_answerable: bool) -> None:
    endpoint.reply = lambda step, _: {"plan": "kiln", "answer": "Quote: fired on Tuesdays at seven\nAnswer: On Tuesdays at seven.", "validate": "1"}[step]
    zeros, ones = [0.0] * len(SIGNALS), [1.0] * len(SIGNALS)
    answerable = Logistic(signals=list(SIGNALS), means=zeros, scales=ones, weights=zeros, bias=2.0 if is_answerable else -2.0)
    calibration = Calibration(key="k", model="base", questions=9, right=None, answerable=answerable, auroc=None, abstention_accuracy=None)
    trace = ask(endpoint, retriever, calibration)
    assert trace.complete
    assert endpoint.asked == ["plan", "answer", "validate"]  # a sure abstention is accepted at once
    assert trace.abstained == (not is_answerable)
    assert [citation.document for citation in trace.citations] == (["kiln.txt"] if is_answerable else [])
    assert trace.steps[2].parsed["answer"] == "On Tuesdays at seven."  # what the model wrote stays in the trace
    if not is_answerable:
        assert (trace.answer, trace.quotes) == (ABSTENTION, [])
        assert trace.score == pytest.approx(0.88, abs=0.01)


@pytest.mark.parametrize("text", ["", "\x00\x07 garbage", "Answer:", "Quote:\nAnswer:", "word " * 5000])
def test_nonsense_ends_within_bounds(endpoint: Endpoint, retriever: Retriever, text: str) -> None:
    endpoint.reply = lambda _step, _prompt: text
    trace = ask(endpoint, retriever)
    assert trace.complete
    assert trace.citations == []
    assert len(endpoint.asked) <= 6


def test_a_reply_without_a_finish_reason_is_an_incomplete_trace(endpoint: Endpoint, retriever: Retriever) -> None:
    endpoint.finish = None
    trace = ask(endpoint, retriever)
    assert not trace.complete
    assert "finish reason" in trace.metadata["error"]


def test_a_run_ends_at_its_time_limit(endpoint: Endpoint, retriever: Retriever) -> None:
    stopped = threading.Event()

    def slow(_step: str, _prompt: str) -> str:
        stopped.wait(3)
        return "kiln"

    endpoint.reply = slow
    trace = ask(endpoint, retriever, max_seconds=0.3)
    stopped.set()
    assert not trace.complete
    assert "max_seconds" in trace.metadata["error"]


def test_no_server_is_an_incomplete_trace_that_says_so(endpoint: Endpoint, retriever: Retriever) -> None:
    endpoint.server.shutdown()
    endpoint.server.server_close()
    trace = ask(endpoint, retriever)
    assert not trace.complete
    assert "cannot reach" in trace.metadata["error"]
