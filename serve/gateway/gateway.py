"""What requests share, and how each kind is answered: by a model's server, in its caller's turn, or by the agent."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Message, Send

from rag.answering import answer_question, stream_answer
from rag.chat import Conversation
from serve.arguments import CPU_SEQS
from serve.gateway import agents as rag
from serve.gateway.agents import Agents, Wiring
from serve.gateway.call import Call
from serve.gateway.catalogue import AgentModel
from serve.gateway.embedding import SharedEmbedder
from serve.gateway.errors import Refused
from serve.gateway.feedback import find_corrected, take_correction
from serve.gateway.limits import FairGate
from serve.gateway.names import Names
from serve.gateway.observe import Log, Metrics
from serve.gateway.pulse import Pulse
from serve.gateway.relay import Upstream, open_session
from serve.gateway.requests import ChatRequest, CompletionRequest, EmbeddingRequest, FeedbackRequest, ResponseRequest, Sampling
from serve.gateway.responses import from_completion, stream_response
from serve.gateway.routing import Route, conversation_of
from serve.gateway.trials import Trials
from understudy.client import Model, StepModels
from understudy.engines import RunningEngine
from understudy.records import Trace
from understudy.releases import Release
from understudy.workspace import Workspace

DRAIN_POLL_SECONDS = 0.05
GPU_SEQS = 256  # what vLLM runs at once on a GPU unless told


class Gateway:
    """Everything that requests share. Made inside a running event loop; `close` ends it."""

    def __init__(self, workspace: Workspace, wiring: Wiring, log: Log, device: str) -> None:
        self.workspace, self.log, self.metrics = workspace, log, Metrics()
        self.settings = workspace.config.gateway
        self._takes_seeds = device != "cpu"
        self._at_once = self.settings.max_running or 2 * (workspace.config.serve.max_num_seqs or (CPU_SEQS if device == "cpu" else GPU_SEQS))
        self._session = open_session()
        self.upstream = Upstream(self._session, self.settings.request_seconds, self.settings.silence_seconds)
        self.names = Names(workspace, self._session, log)
        self.pulse = Pulse(self._session)
        self.embedder = SharedEmbedder(workspace)
        self.agents = Agents(workspace, wiring, self.embedder)
        self.trials = Trials(workspace, log, self.metrics)
        self._gates: dict[str, FairGate] = {}

    def gate(self, server: str) -> FairGate:
        """The queue before a model server: `engine`, `embedder`, or a remote's name."""
        if server not in self._gates:
            at_once = 1 if server == "embedder" else self._at_once
            made = self._gates[server] = FairGate(at_once, self.settings.max_waiting, self.settings.wait_seconds)
            self.metrics.running.labels(server).set_function(lambda: made.running)
            self.metrics.waiting.labels(server).set_function(lambda: made.waiting)
        return self._gates[server]

    def serve(self, engine: RunningEngine | None, is_paused: bool = False) -> None:
        """Send requests to this engine from now on; None while there is none, or while it is paused."""
        self.names.engine, self.names.is_paused = engine, is_paused
        self.metrics.engine_up.set(engine is not None)

    async def drain(self) -> None:
        """Wait until no request is at the engine, at most `drain_seconds`."""
        deadline = time.monotonic() + self.settings.drain_seconds
        while self.gate("engine").running and time.monotonic() < deadline:
            await asyncio.sleep(DRAIN_POLL_SECONDS)

    async def close(self) -> None:
        """Close every connection."""
        await self.trials.close()
        await self.agents.close()
        await self._session.close()

    async def find(self, name: str, call: Call) -> Model | AgentModel:
        """What answers under a name, if this caller may use it. Raises Refused."""
        try:
            found = (await self.names.catalogue()).find(name, call.tenant)
        except Refused:  # it may be there since
            found = (await self.names.fresh()).find(name, call.tenant)
        if isinstance(found, StepModels):
            call.release, found = found.release, found.answer
        call.require("rag" if isinstance(found, AgentModel) else "remotes" if found.name in self.workspace.config.remotes else "chat")
        call.model = found.name
        return found

    async def ask_model(self, model: Model, route: str, request: Sampling, call: Call, send: Send) -> None:
        """Relay a request to the server of a model, in its turn."""
        is_remote = model.name in self.workspace.config.remotes
        if request.seed is not None and not is_remote and not self._takes_seeds:
            raise Refused(400, "unsupported_parameter", "this engine takes no `seed`", "seed")  # one ends vLLM 0.32's CPU engine
        if not is_remote:
            self._require_capable(request)
        async with self.gate(model.name if is_remote else "engine").slot(call.tenant):
            try:
                await self.upstream.relay(model, route, request.forwarded(model.served_name), call, send)
                if call.release:
                    self.metrics.count_release(call.release, "live", "relayed")
            except Refused as refused:
                if refused.status == 503:
                    self.names.expire()
                raise

    def _require_capable(self, request: Sampling) -> None:
        """Raises Refused where the request needs what an engine elsewhere was found not to have: it might take the field and ignore it."""
        able = self.names.engine.capabilities if self.names.engine else None
        if able is None:
            return
        form = getattr(request, "response_format", None)
        asked = {"tools": getattr(request, "tools", None), "response_format": form and form.type != "text", "logprobs": getattr(request, "logprobs", None)}
        has = {"tools": able.tools, "response_format": able.structured_output, "logprobs": able.logprobs}
        for field in asked:
            if asked[field] and not has[field]:
                raise Refused(400, "unsupported_parameter", f"the engine behind this gateway has no {field.replace('_', ' ')}", field)

    async def ask_agent(self, agent: AgentModel, request: ChatRequest, call: Call, send: Send) -> None:
        """Answer from the documents, in the caller's turn."""
        question, talk = rag.read_question(request)
        describe = self.agents.wiring.describe
        async with self.gate("engine").slot(call.tenant):
            before = Conversation(list(talk.turns))
            models, route = await self._answering(request, call)
            async with self.agents.tools(call.tenant, models, agent.mode) as tools:
                if request.stream:
                    trace = await rag.send_events(stream_answer(question, tools, talk), agent, request, describe, call, send)
                else:
                    trace = await answer_question(question, tools, conversation=talk)
        call.tokens = {name.removesuffix("_tokens"): count for name, count in rag.usage_of(trace).items() if name != "total_tokens"}
        self.metrics.count_answer(trace)
        if route is not None:
            await self.trials.take(route, trace)
            self.trials.ask_in_shadow(route, trace, lambda: self._ask_unseen(route, question, before, agent, call.tenant))
        if not request.stream:
            await send_json(rag.completion_json(rag.require_answer(trace), agent, describe(trace), call), send)

    async def _answering(self, request: ChatRequest, call: Call) -> tuple[StepModels, Route | None]:
        """What answers a question: a release of the tenant's alias, where it has one, else the newest proven adapter. Raises Refused."""
        alias = self.workspace.config.releases.alias_of(call.tenant)
        if not alias:
            return StepModels.alike((await self.names.catalogue()).answering(call.tenant)), None
        conversation = conversation_of(request, f"{call.tenant}/{call.key.id if call.key else ''}")
        route = self.names.releases.route(alias, call.tenant, conversation)
        if route is None:
            raise Refused(503, "nothing_live", f"nothing is live under `{alias}`, which answers here; `understudy release promote` it")
        try:
            models = await self._models(route.answers, call.tenant)
        except Refused as refused:
            if route.canary is None or not route.is_canary or self.names.engine is None:
                raise
            if refused.status == 503:  # for everybody, not this tenant alone
                await self.trials.stop(alias, route.canary, f"it cannot answer: {refused.message}", {})
            route = Route(alias, route.live, route.live)
            models = await self._models(route.answers, call.tenant)
        call.release = models.release
        return models, route

    async def _models(self, release: Release, tenant: str) -> StepModels:
        """The models of a release. Raises Refused."""
        try:
            return (await self.names.catalogue()).models_of(release, tenant)
        except Refused:  # it may be there since
            return (await self.names.fresh()).models_of(release, tenant)

    async def _ask_unseen(self, route: Route, question: str, talk: Conversation, agent: AgentModel, tenant: str) -> Trace:
        """The answer of a route's shadow, kept as a trace and shown to nobody; never from the cache or kept there."""
        assert route.shadow is not None
        models = await self._models(route.shadow, tenant)
        async with self.gate("engine").slot(tenant), self.agents.tools(tenant, models, agent.mode) as tools:

            def keep(trace: Trace) -> None:
                tools.keep(trace.model_copy(update={"metadata": {**trace.metadata, "shadow": "true"}}))

            return await answer_question(question, replace(tools, cached=None, teacher=None, keep=keep), conversation=talk)

    async def chat(self, request: ChatRequest, call: Call, send: Send) -> None:
        """A chat completion by whatever its model's name means."""
        found = await self.find(request.model, call)
        if isinstance(found, AgentModel):
            await self.ask_agent(found, request, call, send)
        else:
            await self.ask_model(found, "/chat/completions", request, call, send)

    async def complete(self, request: CompletionRequest, call: Call, send: Send) -> None:
        """A plain completion."""
        found = await self.find(request.model, call)
        if isinstance(found, AgentModel):
            raise Refused(400, "unsupported_model", f"{found.name} answers chat completions only", "model")
        await self.ask_model(found, "/completions", request, call, send)

    async def respond(self, request: ResponseRequest, call: Call, send: Send) -> None:
        """A response, made of a chat completion."""
        chat = request.as_chat()
        if request.stream:
            await stream_response(request, call, send, lambda taken: self.chat(chat, call, taken))
            return
        parts: list[bytes] = []

        async def gather(message: Message) -> None:
            parts.append(message.get("body", b""))

        await self.chat(chat, call, gather)
        await send_json(from_completion(request, call, json.loads(b"".join(parts))), send)

    async def embed(self, request: EmbeddingRequest, call: Call, send: Send) -> None:
        """Vectors of texts."""
        call.require("embeddings")
        if request.model != self.workspace.config.models.embedder:
            raise Refused(404, "model_not_found", f"the model `{request.model[:100]}` does not exist or gives no embeddings", "model")
        call.model = request.model
        async with self.gate("embedder").slot(call.tenant):
            made = await self.embedder.embed(request)
        call.tokens = {"prompt": made["usage"]["prompt_tokens"]}
        await send_json(made, send)

    async def correct(self, request: FeedbackRequest, call: Call, send: Send) -> None:
        """A person's correction."""
        call.require("feedback")
        workspace = self.agents.workspace_of(call.tenant)
        corrected = await asyncio.to_thread(find_corrected, workspace, request.trace_id)
        retriever = await self.agents.retriever(call.tenant)
        by = call.key.name if call.key else "local"
        await send_json(await asyncio.to_thread(take_correction, workspace, retriever, corrected, request, by), send)

    async def models(self, call: Call) -> dict[str, Any]:
        """Every model that the caller may name, in OpenAI's shape."""
        catalogue = await self.names.fresh()
        owner = "understudy"
        rows = [{"id": name, "object": "model", "created": 0, "owned_by": owner} for name in catalogue.names(call.tenant, call.scopes)]
        return {"object": "list", "data": rows}

    async def is_ready(self) -> bool:
        """Whether the engine answers."""
        return (await self.names.fresh()).engine is not None


async def send_json(value: dict[str, Any], send: Send) -> None:
    """Answer 200 with JSON."""
    content = JSONResponse(value)
    await send({"type": "http.response.start", "status": 200, "headers": content.raw_headers})
    await send({"type": "http.response.body", "body": content.body})
