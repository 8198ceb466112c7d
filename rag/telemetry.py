"""OpenTelemetry spans of finished traces, with the GenAI semantic conventions' names, to any OTLP endpoint (HTTP, protobuf).

A span tree is made from a Trace after the run, with the run's own times: a run is neither slowed nor failed by telemetry,
and an endpoint that is away or slow costs spans, nothing else. The Trace's id is the id of the OpenTelemetry trace.
Questions, prompts and answers are sent only where `telemetry.content` says so.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import threading
from functools import lru_cache
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from understudy import __version__
from understudy.records import Message, Step, Trace
from understudy.settings.answers import Telemetry

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.trace import SpanContext

REQUEST_SECONDS = 2.0  # for one export, its retries included
EXIT_SECONDS = 3.0  # waited for at the process' end
AGENT = "understudy"

Attributes = dict[str, str | int | float | bool | list[str]]

_log = logging.getLogger(__name__)


def send_trace(settings: Telemetry, trace: Trace) -> None:
    """Hand a trace's spans to the exporter's queue and return at once; does nothing without an endpoint, and never raises."""
    if not settings.otlp_endpoint:
        return
    try:
        processor = _processor(traces_url(settings.otlp_endpoint))
        for span in spans_of(trace, settings.content):
            processor.on_end(span)
    except Exception:  # telemetry never fails a run, whatever the exporter does
        _log.debug("spans of trace %s were not sent", trace.id, exc_info=True)


def traces_url(endpoint: str) -> str:
    """The URL that spans are posted to: an endpoint without a path gets OTLP's own."""
    return endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + "/v1/traces"


def spans_of(trace: Trace, content: bool) -> list[ReadableSpan]:
    """The agent's span, then one for each step, and for the embedding of a retrieval's queries where its time is known."""
    root = _context(trace, "")
    ended = max([trace.created_at, *(step.started_at + step.seconds for step in trace.steps)])
    error = trace.metadata.get("error") or next((step.error for step in trace.steps if step.error), "")
    spans = [_span(f"invoke_agent {AGENT}", root, None, trace.created_at, ended, _agent_attributes(trace, content), error if not trace.complete else "")]
    for number, step in enumerate(trace.steps):
        context = _context(trace, str(number))
        if step.name != "retrieve":
            spans.append(
                _span(f"chat {step.model}", context, root, step.started_at, step.started_at + step.seconds, _chat_attributes(step, content), step.error)
            )
            continue
        ended = step.started_at + step.seconds
        spans.append(_span(f"retrieval {trace.generation}", context, root, step.started_at, ended, _retrieval_attributes(trace, step, content), step.error))
        embedding = step.parsed.get("embedding_seconds")
        if isinstance(embedding, float):
            attributes: Attributes = {"gen_ai.operation.name": "embeddings", "gen_ai.provider.name": AGENT}
            spans.append(_span("embeddings", _context(trace, f"{number}e"), context, step.started_at, step.started_at + embedding, attributes, ""))
    return spans


def _agent_attributes(trace: Trace, content: bool) -> Attributes:
    attributes: Attributes = {
        "gen_ai.operation.name": "invoke_agent",
        "gen_ai.provider.name": AGENT,
        "gen_ai.agent.name": AGENT,
        "gen_ai.agent.version": trace.release or __version__,
        "gen_ai.request.model": trace.model,
        "gen_ai.data_source.id": trace.generation,
        "gen_ai.usage.input_tokens": sum(step.usage.prompt_tokens for step in trace.steps),
        "gen_ai.usage.output_tokens": sum(step.usage.completion_tokens for step in trace.steps),
        "understudy.tenant": trace.tenant,
        "understudy.outcome": trace.outcome,
        "understudy.cache": trace.cache,
        "understudy.citations": len(trace.citations),
    }
    if trace.score is not None:
        attributes["understudy.score"] = trace.score
    if content:
        attributes["gen_ai.input.messages"] = _messages([Message(role="user", content=trace.question)])
        attributes["gen_ai.output.messages"] = _messages([Message(role="assistant", content=trace.answer)])
    return attributes


def _chat_attributes(step: Step, content: bool) -> Attributes:
    server = urlsplit(step.endpoint)
    attributes: Attributes = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai" if (server.hostname or "").endswith("openai.com") else AGENT,
        "gen_ai.request.model": step.model,
        "gen_ai.response.model": step.model,
        "gen_ai.response.finish_reasons": [step.finish_reason] if step.finish_reason else [],
        "gen_ai.usage.input_tokens": step.usage.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": step.usage.cached_tokens,
        "gen_ai.usage.output_tokens": step.usage.completion_tokens,
        "understudy.step": step.name,
    }
    if server.hostname:
        attributes |= {"server.address": server.hostname, "server.port": server.port or (443 if server.scheme == "https" else 80)}
    if content:
        attributes["gen_ai.input.messages"] = _messages(step.messages)
        attributes["gen_ai.output.messages"] = _messages([Message(role="assistant", content=step.text)])
    return attributes


def _retrieval_attributes(trace: Trace, step: Step, content: bool) -> Attributes:
    attributes: Attributes = {
        "gen_ai.operation.name": "retrieval",
        "gen_ai.provider.name": AGENT,
        "gen_ai.data_source.id": trace.generation,
        "gen_ai.retrieval.documents": json.dumps([{"id": chunk_id} for chunk_id in step.passage_ids]),
    }
    if content:
        attributes["gen_ai.retrieval.query.text"] = str(step.parsed.get("query", ""))
    return attributes


def _messages(messages: list[Message]) -> str:
    """Messages in the conventions' JSON form."""
    return json.dumps([{"role": m.role, "parts": [{"type": "text", "content": m.content}]} for m in messages], ensure_ascii=False)


def _context(trace: Trace, part: str) -> SpanContext:
    """Ids from the trace's own, so that a trace sent twice is one."""
    from opentelemetry.trace import SpanContext, TraceFlags

    digest = hashlib.sha256(f"{trace.id}/{part}".encode()).digest()
    try:
        trace_id = int(trace.id, 16) % 2**128
    except ValueError:
        trace_id = 0
    own = trace_id or int.from_bytes(hashlib.sha256(trace.id.encode()).digest()[:16], "big")
    return SpanContext(own, int.from_bytes(digest[:8], "big"), is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))


def _span(name: str, context: SpanContext, parent: SpanContext | None, began: float, ended: float, attributes: Attributes, error: str) -> ReadableSpan:
    """One finished span; times in seconds since the epoch."""
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.status import Status, StatusCode

    return ReadableSpan(
        name=name.strip(),
        context=context,
        parent=parent,
        resource=_resource(),
        attributes={**attributes, **({"error.type": "run_failed"} if error else {})},
        kind=SpanKind.CLIENT if attributes["gen_ai.operation.name"] == "chat" else SpanKind.INTERNAL,
        status=Status(StatusCode.ERROR) if error else Status(StatusCode.UNSET),
        start_time=int(began * 1e9),
        end_time=int(ended * 1e9),
        instrumentation_scope=InstrumentationScope(AGENT, __version__),
    )


@lru_cache(maxsize=1)
def _resource() -> Resource:
    from opentelemetry.sdk.resources import Resource

    return Resource.create({"service.name": AGENT, "service.version": __version__})


@lru_cache(maxsize=4)
def _processor(url: str) -> BatchSpanProcessor:
    """The queue and exporter of one endpoint; what is queued at the process' end is given a short while."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # an endpoint that is away is not the user's concern
    processor = BatchSpanProcessor(OTLPSpanExporter(endpoint=url, timeout=REQUEST_SECONDS), schedule_delay_millis=500)

    def finish() -> None:
        ending = threading.Thread(target=processor.shutdown, daemon=True)
        ending.start()
        ending.join(EXIT_SECONDS)

    atexit.register(finish)
    return processor
