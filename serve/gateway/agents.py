"""`rag` and `rag:fast`: the agent as a model. What it needs is opened once for each tenant and corpus generation, and shared."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from starlette.types import Send

from serve.gateway.call import Call
from serve.gateway.catalogue import AgentModel
from serve.gateway.errors import Refused
from serve.gateway.relay import EVENTS
from serve.gateway.requests import ChatRequest
from understudy.client import StepModels
from understudy.errors import NotFoundError
from understudy.records import Trace
from understudy.workspace import Workspace

if TYPE_CHECKING:
    from rag.chat import Conversation
    from rag.events import Event
    from rag.retrieve import Retriever
    from rag.run import Tools
    from serve.gateway.embedding import SharedEmbedder

KEPT = 8  # tools that stay open while nobody uses them
REOPENED_SECONDS = 300  # tools are put together anew, with what was calibrated since
UNSUPPORTED = ("tools", "tool_choice", "response_format", "logprobs", "top_logprobs")
SOURCES = "\n\n[1] “"  # begins the list of quotes below an answer
WITHDRAWN = "\n\nThe text above was withdrawn. The answer is:\n\n"

OpenTools = Callable[[Workspace, StepModels, "Retriever", str], "Tools"]


@dataclass(frozen=True)
class Wiring:
    """How the agent is put together, and how one of its answers reads as JSON: given by the command, which knows both."""

    open_tools: OpenTools  # (the tenant's workspace, models, retriever, mode)
    describe: Callable[[Trace], dict[str, object]]


@dataclass
class _Opened:
    tools: Tools
    users: int = 0


class Agents:
    """The tools of every tenant that asks; a new corpus generation, release, model or engine gets new ones, and running answers keep theirs."""

    def __init__(self, workspace: Workspace, wiring: Wiring, embedder: SharedEmbedder) -> None:
        self._workspace, self._embedder = workspace, embedder
        self.wiring = wiring
        self._workspaces: dict[str, Workspace] = {workspace.config.tenant: workspace}
        self._retrievers: dict[str, Retriever] = {}
        self._opened: dict[tuple[object, ...], _Opened] = {}  # the last used last
        self._opening = asyncio.Lock()

    def workspace_of(self, tenant: str) -> Workspace:
        """The workspace as this tenant's commands would see it."""
        if tenant not in self._workspaces:
            config = self._workspace.config.model_copy(update={"tenant": tenant})
            self._workspaces[tenant] = replace(self._workspace, config=config)
        return self._workspaces[tenant]

    async def retriever(self, tenant: str) -> Retriever:
        """The tenant's live corpus. Raises Refused while there is none."""
        async with self._opening:
            return await self._retriever(tenant)

    @asynccontextmanager
    async def tools(self, tenant: str, models: StepModels, mode: str) -> AsyncIterator[Tools]:
        """What a run works with, for the block. Raises Refused."""
        async with self._opening:
            retriever = await self._retriever(tenant)
            key = (tenant, models, mode, time.monotonic() // REOPENED_SECONDS, retriever.generation)
            opened = self._opened.pop(key, None)
            if opened is None:
                opened = _Opened(await asyncio.to_thread(self.wiring.open_tools, self.workspace_of(tenant), models, retriever, mode))
            self._opened[key] = opened
            opened.users += 1
        try:
            yield opened.tools
        finally:
            opened.users -= 1
            await self._trim(KEPT)

    async def close(self) -> None:
        """Close what nobody uses."""
        await self._trim(0)

    async def _retriever(self, tenant: str) -> Retriever:
        from rag.generations import live_generation
        from rag.retrieve import open_retriever

        workspace = self.workspace_of(tenant)
        try:
            generation = await asyncio.to_thread(live_generation, workspace.index, tenant)
            found = self._retrievers.get(tenant)
            if found is None or found.generation != generation:
                found = await asyncio.to_thread(open_retriever, workspace, await self._embedder.get())
                self._retrievers[tenant] = found
        except NotFoundError as error:
            raise Refused(503, "corpus_empty", f"there is nothing to answer from: {error.message}") from error
        return found

    async def _trim(self, kept: int) -> None:
        """Close the tools that nobody uses, of corpora that are no longer live, then the least recently used beyond `kept`."""
        live = {retriever.generation for retriever in self._retrievers.values()}
        idle = [key for key, opened in self._opened.items() if not opened.users]
        over = max(0, len(self._opened) - kept)
        for key in [key for place, key in enumerate(idle) if place < over or key[-1] not in live]:
            await self._opened.pop(key).tools.__aexit__()


def read_question(request: ChatRequest) -> tuple[str, Conversation]:
    """The question, and the conversation before it. System turns are not read: the agent's prompts are its own. Raises Refused."""
    from rag.chat import TURNS, Conversation

    unsupported = [name for name in UNSUPPORTED if getattr(request, name)]
    if unsupported or (request.n or 1) > 1:
        raise Refused(400, "unsupported_parameter", f"{request.model} does not take `{(unsupported or ['n'])[0]}`", (unsupported or ["n"])[0])
    turns = [message for message in request.messages if message.role in ("user", "assistant")]
    if not turns or turns[-1].role != "user" or not turns[-1].text.strip():
        raise Refused(400, "no_question", "the last message must be the user's question", "messages")
    pairs = [(asked.text, answered.text) for asked, answered in pairwise(turns) if (asked.role, answered.role) == ("user", "assistant")]
    talk = Conversation()
    for asked, answered in pairs[-TURNS:]:
        talk.add(asked, answered.rpartition(WITHDRAWN)[2].partition(SOURCES)[0])
    return turns[-1].text.strip(), talk


def plain_text(trace: Trace) -> str:
    """The answer with its quotes below, for clients that show nothing else."""
    return trace.answer + sources_text(trace)


def sources_text(trace: Trace) -> str:
    """The quotes with document and page; empty where there are none."""
    lines = [f"[{number}] “{' '.join(cited.quote.split())}” — {cited.document}, p. {cited.page}" for number, cited in enumerate(trace.citations, 1)]
    return "\n\n" + "\n".join(lines) if lines else ""


def usage_of(trace: Trace) -> dict[str, Any]:
    """Tokens of every step together; none where the cache answered."""
    prompt, completion = (sum(getattr(step.usage, f"{kind}_tokens") for step in trace.steps) for kind in ("prompt", "completion"))
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def require_answer(trace: Trace) -> Trace:
    """The trace where there is an answer in it; raises Refused."""
    if not trace.complete and not trace.answer:
        raise Refused(502, "agent_failed", f"no answer: {trace.metadata.get('error', 'the run did not finish')}; trace {trace.id}")
    return trace


def finish_reason(trace: Trace) -> str:
    """`length` where a budget cut the run off."""
    return "stop" if trace.complete else "length"


def completion_json(trace: Trace, agent: AgentModel, described: dict[str, object], call: Call) -> dict[str, Any]:
    """The answer as a chat completion; `understudy` is the documented extension field."""
    choice = {"index": 0, "message": {"role": "assistant", "content": plain_text(trace)}, "logprobs": None, "finish_reason": finish_reason(trace)}
    shape = {"id": f"chatcmpl-{call.id}", "object": "chat.completion", "created": int(trace.created_at), "model": agent.name}
    return {**shape, "choices": [choice], "usage": usage_of(trace), "understudy": described}


async def send_events(
    events: AsyncGenerator[Event, None], agent: AgentModel, request: ChatRequest, describe: Callable[[Trace], dict[str, object]], call: Call, send: Send
) -> Trace:
    """Stream a run: its steps in the field `understudy` of empty chunks, text as it may be shown, quotes, and the whole in the last chunk."""
    from rag.events import AnswerText, Done, StepDone, StepStarted

    shape = {"id": f"chatcmpl-{call.id}", "object": "chat.completion.chunk", "created": int(time.time()), "model": agent.name}

    async def emit(delta: dict[str, str], finish: str | None = None, **more: object) -> None:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        payload = {**shape, "choices": [choice], **more}
        await send({"type": "http.response.body", "body": b"data: " + json.dumps(payload).encode() + b"\n\n", "more_body": True})

    await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
    await emit({"role": "assistant", "content": ""})
    shown, done = "", None
    async with aclosing(events):
        async for event in events:
            if isinstance(event, StepStarted):
                await emit({}, understudy={"event": "step_started", "step": event.name, "model": event.model})
            elif isinstance(event, StepDone):
                await emit({}, understudy={"event": "step_done", "step": event.step.name, "seconds": round(event.step.seconds, 3)})
            elif isinstance(event, AnswerText):
                shown += event.text
                await emit({"content": event.text})
            elif isinstance(event, Done):
                done = event.trace
    assert done is not None  # Done is always the last event
    try:
        trace = require_answer(done)
    except Refused as refused:
        call.error = refused.reason
        await send({"type": "http.response.body", "body": refused.event()})
        return done
    rest = "" if shown == trace.answer else (WITHDRAWN if shown else "") + trace.answer
    if rest + sources_text(trace):
        await emit({"content": rest + sources_text(trace)})
    await emit({}, finish_reason(trace), understudy=describe(trace))
    if request.stream_options and request.stream_options.include_usage:
        usage = {**shape, "choices": [], "usage": usage_of(trace)}
        await send({"type": "http.response.body", "body": b"data: " + json.dumps(usage).encode() + b"\n\n", "more_body": True})
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
    return trace
