"""Spans to a real OTLP receiver: a small HTTP server that decodes the protobuf."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue

from rag.telemetry import _processor, send_trace, traces_url
from rag.traces import keep_trace
from understudy.records import Message, Step, Trace, Usage
from understudy.settings.answers import Telemetry
from understudy.workspace import create_workspace

TRACE_ID = "0123456789abcdef0123456789abcdef"
SECRET = "the question of ada"


class Receiver:
    """An OTLP collector that keeps the spans it was sent."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.paths: list[str] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
                receiver.paths.append(self.path)
                receiver.spans += [span for resource in request.resource_spans for scope in resource.scope_spans for span in scope.spans]
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def received(self) -> list[Any]:
        """Everything sent until now."""
        assert _processor(traces_url(self.endpoint)).force_flush()
        return self.spans


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.server.shutdown()


@pytest.fixture
def trace(make_trace: Callable[..., Trace]) -> Trace:
    asked = [Message(role="user", content=SECRET)]
    steps = [
        Step(name="plan", messages=asked, text="ada", model="tiny", endpoint="http://127.0.0.1:8300/v1", started_at=100.0, seconds=0.5, finish_reason="stop"),
        Step(name="retrieve", passage_ids=["c1", "c2"], parsed={"query": SECRET, "embedding_seconds": 0.1}, started_at=100.5, seconds=0.25),
        Step(
            name="answer",
            messages=asked,
            text=SECRET,
            model="tiny",
            endpoint="https://models.example/v1",
            usage=Usage(prompt_tokens=40, cached_tokens=30, completion_tokens=7),
            started_at=100.75,
            seconds=1.0,
            finish_reason="stop",
        ),
    ]
    values = {"id": TRACE_ID, "steps": steps, "source": "model", "model": "tiny@0123", "score": 0.75, "created_at": 100.0, "generation": "gen1"}
    return make_trace(SECRET, SECRET, None, "", [], **values)


def attributes(span: Any) -> dict[str, Any]:
    def plain(value: AnyValue) -> Any:
        kind = value.WhichOneof("value")
        return [plain(item) for item in value.array_value.values] if kind == "array_value" else getattr(value, kind)

    return {pair.key: plain(pair.value) for pair in span.attributes}


def test_a_run_is_a_tree_of_spans_with_its_own_times_and_no_content(receiver: Receiver, trace: Trace, tmp_path: Path) -> None:
    workspace = create_workspace(str(tmp_path / "w"), f"telemetry: {{otlp_endpoint: '{receiver.endpoint}'}}\n")
    keep_trace(workspace, trace)
    agent, plan, retrieval, embeddings, answer = receiver.received()
    assert receiver.paths == ["/v1/traces"]
    assert [s.name for s in receiver.spans] == ["invoke_agent understudy", "chat tiny", "retrieval gen1", "embeddings", "chat tiny"]
    assert {span.trace_id.hex() for span in receiver.spans} == {TRACE_ID}
    assert len({span.span_id for span in receiver.spans}) == 5
    assert agent.parent_span_id == b""
    assert {s.parent_span_id for s in (plan, retrieval, answer)} == {agent.span_id}
    assert embeddings.parent_span_id == retrieval.span_id
    times = [((s.start_time_unix_nano - 100e9) / 1e9, (s.end_time_unix_nano - 100e9) / 1e9) for s in receiver.spans]
    assert times == [pytest.approx(t) for t in [(0, 1.75), (0, 0.5), (0.5, 0.75), (0.5, 0.6), (0.75, 1.75)]]
    said = attributes(answer)
    assert (
        said
        | {
            "gen_ai.operation.name": "chat",
            "gen_ai.request.model": "tiny",
            "gen_ai.usage.input_tokens": 40,
            "gen_ai.usage.cache_read.input_tokens": 30,
            "gen_ai.usage.output_tokens": 7,
            "gen_ai.response.finish_reasons": ["stop"],
            "server.address": "models.example",
            "server.port": 443,
        }
        == said
    )
    assert attributes(agent)["understudy.outcome"] == "answered"
    assert json.loads(attributes(retrieval)["gen_ai.retrieval.documents"]) == [{"id": "c1"}, {"id": "c2"}]
    assert not any(SECRET in str(span) for span in receiver.spans)


def test_content_goes_out_where_it_is_asked_for(receiver: Receiver, trace: Trace) -> None:
    send_trace(Telemetry(otlp_endpoint=receiver.endpoint, content=True), trace)
    agent, plan, retrieval, _, _ = receiver.received()
    assert json.loads(attributes(agent)["gen_ai.output.messages"]) == [{"role": "assistant", "parts": [{"type": "text", "content": SECRET}]}]
    assert SECRET in attributes(plan)["gen_ai.input.messages"]
    assert attributes(retrieval)["gen_ai.retrieval.query.text"] == SECRET


def test_a_failed_run_is_a_failed_span(receiver: Receiver, trace: Trace) -> None:
    send_trace(Telemetry(otlp_endpoint=receiver.endpoint), trace.model_copy(update={"complete": False, "metadata": {"error": "broke off"}}))
    assert receiver.received()[0].status.code == 2
    assert attributes(receiver.spans[0])["understudy.outcome"] == "incomplete"


def test_expert_answers_send_nothing_and_no_endpoint_starts_nothing(receiver: Receiver, trace: Trace, tmp_path: Path) -> None:
    keep_trace(create_workspace(str(tmp_path / "a")), trace)
    workspace = create_workspace(str(tmp_path / "b"), f"telemetry: {{otlp_endpoint: '{receiver.endpoint}'}}\n")
    keep_trace(workspace, trace.model_copy(update={"source": "expert"}))
    assert receiver.received() == []


def test_an_endpoint_that_is_away_or_never_answers_neither_blocks_nor_fails(trace: Trace) -> None:
    with socket.socket() as silent, socket.socket() as closed:
        for place in (silent, closed):
            place.bind(("127.0.0.1", 0))
        silent.listen()
        code = (
            "import sys; from rag.telemetry import send_trace; from understudy.config import Telemetry; from understudy.records import Trace\n"
            "trace = Trace.model_validate_json(sys.stdin.read())\n"
            "for endpoint in sys.argv[1:]: send_trace(Telemetry(otlp_endpoint=endpoint), trace)\n"
        )
        command = [sys.executable, "-c", code, *(f"http://127.0.0.1:{place.getsockname()[1]}" for place in (silent, closed))]
        done = subprocess.run(command, input=trace.model_dump_json(), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
