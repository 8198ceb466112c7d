"""The routes: each reads its request within bounds and hands it to the gateway. Nothing else of any server behind can be reached."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Send

from serve.gateway.call import GONE, Call
from serve.gateway.door import Door
from serve.gateway.errors import Refused
from serve.gateway.gateway import Gateway
from serve.gateway.observe import Log
from serve.gateway.relay import Live
from serve.gateway.requests import ChatRequest, CompletionRequest, EmbeddingRequest, FeedbackRequest, ResponseRequest
from serve.keys import KeyRing, keys_file
from understudy.config import explain_fault
from understudy.errors import UnderstudyError

BODY_SECONDS = 30.0  # in which a request has to be sent whole
TEXT_FORMAT = "text/plain; version=0.0.4; charset=utf-8"  # Prometheus
Body = TypeVar("Body", bound=BaseModel)
Answer = Callable[[Gateway, Any, Call, Send], Awaitable[None]]
POSTS: dict[str, tuple[type[BaseModel], Answer]] = {
    "/v1/chat/completions": (ChatRequest, Gateway.chat),
    "/v1/completions": (CompletionRequest, Gateway.complete),
    "/v1/responses": (ResponseRequest, Gateway.respond),
    "/v1/embeddings": (EmbeddingRequest, Gateway.embed),
    "/v1/feedback": (FeedbackRequest, Gateway.correct),
}


def build_app(gateway: Gateway, needs_key: bool = False) -> ASGIApp:
    """The gateway as an ASGI application. `needs_key`: also while no key was made yet."""
    app = FastAPI(title="Understudy gateway", version="1", docs_url=None, redoc_url=None)  # those pages load scripts from elsewhere
    _add_gets(app, gateway)
    for path, (model, answer) in POSTS.items():
        app.add_api_route(path, _post(gateway, model, answer), methods=["POST"], response_model=None, name=path, openapi_extra=_body_schema(model))
    app.openapi = partial(_openapi, app, app.openapi)  # type: ignore[method-assign]
    app.add_exception_handler(HTTPException, _refuse_route)
    app.add_exception_handler(UnderstudyError, partial(_refuse_fault, gateway.log))
    app.add_exception_handler(Exception, _refuse_bug)
    routes = frozenset(route.path for route in app.routes if isinstance(route, Route))
    return Door(app, KeyRing(keys_file(gateway.workspace)), gateway.workspace.config.tenant, needs_key, gateway.log, gateway.metrics, routes)


def _add_gets(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/health")
    async def health() -> dict[str, str]:
        """The gateway runs."""
        return {"status": "ok"}

    @app.get("/ready", response_model=None)
    async def ready() -> Response:
        """The engine answers too."""
        is_ready = await gateway.is_ready()
        away = "engine_paused" if gateway.names.is_paused else "engine_unavailable"
        return JSONResponse({"status": "ready" if is_ready else away}, 200 if is_ready else 503)

    @app.get("/metrics", response_model=None)
    async def metrics(request: Request) -> Response:
        """Figures in Prometheus' text format; needs the scope metrics."""
        request.state.call.require("metrics")
        return Response(gateway.metrics.page(), headers={"Content-Type": TEXT_FORMAT})

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        """The models that the caller may name."""
        return await gateway.models(request.state.call)

    @app.get("/v1/models/{name}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        """One of them."""
        rows: list[dict[str, Any]] = (await gateway.models(request.state.call))["data"]
        found = next((row for row in rows if row["id"] == name), None)
        if found is None:
            raise Refused(404, "model_not_found", f"the model `{name[:100]}` does not exist or may not be used", "model")
        return found


def _post(gateway: Gateway, model: type[BaseModel], answer: Answer) -> Callable[[Request], Awaitable[Response]]:
    limit = int(gateway.settings.max_body_mib * 2**20)

    async def handle(request: Request) -> Response:
        body = await read_body(request, model, limit)
        return Live(lambda send: answer(gateway, body, request.state.call, send))

    handle.__doc__ = model.__doc__
    return handle


async def read_body(request: Request, model: type[Body], limit: int) -> Body:
    """The request's JSON, of at most `limit` bytes, sent in time, with no field but the model's. Raises Refused."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "unsupported_media_type", "send Content-Type: application/json")  # also what a foreign page's form cannot send
    too_large = Refused(413, "request_too_large", f"a request may have {limit} bytes")
    if int(request.headers.get("content-length", "0")) > limit:
        raise too_large
    content = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                content += part
                if len(content) > limit:
                    raise too_large
    except TimeoutError as error:
        raise Refused(408, "request_timeout", f"the request was not sent within {BODY_SECONDS:g} s") from error
    except ClientDisconnect as error:
        raise Refused(GONE, "client_gone", "the client left") from error
    try:
        return model.model_validate_json(bytes(content))
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        param = ".".join(map(str, fault["loc"])) or None
        unknown = fault["type"] == "extra_forbidden" and len(fault["loc"]) == 1
        raise Refused(400, "unknown_parameter" if unknown else "invalid_request", explain_fault(fault, model)[:500], param) from error


def _refuse(request: Request, refused: Refused) -> Response:
    request.state.call.error = refused.reason
    return refused.response()


def _refuse_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = "not_found" if error.status_code == 404 else "invalid_request"
    return _refuse(request, Refused(error.status_code, code, f"there is nothing here: {error.detail}"))


def _refuse_fault(log: Log, request: Request, error: Exception) -> Response:
    """A refusal speaks for itself; of other errors of ours the log holds more than the client is told."""
    if isinstance(error, Refused):
        return _refuse(request, error)
    assert isinstance(error, UnderstudyError)
    log.write("fault", request_id=request.state.call.id, kind=type(error).__name__, message=error.message, remedy=error.remedy)
    return _refuse(request, Refused(503, error.code, "this cannot be answered now; the gateway's log says why"))


def _refuse_bug(request: Request, _: Exception) -> Response:
    """Starlette raises the error again afterwards: the door writes it down."""
    return _refuse(request, Refused(500, "internal_error", "the gateway failed; its log says how"))


def _body_schema(model: type[BaseModel]) -> dict[str, Any]:
    reference = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def _openapi(app: FastAPI, generate: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """FastAPI's description with the bodies that are read by hand."""
    if app.openapi_schema is None:
        described = generate()
        _, found = models_json_schema([(model, "validation") for model, _ in POSTS.values()], ref_template="#/components/schemas/{model}")
        described.setdefault("components", {}).setdefault("schemas", {}).update(found["$defs"])
        app.openapi_schema = described
    return app.openapi_schema
