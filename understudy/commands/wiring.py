"""From names to things that run: models, and the agent's tools."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from understudy.adapters import find_adapter, is_served, manifests, require_served
from understudy.client import Model, ModelClient, engine_model, remote_model
from understudy.digests import digest_of
from understudy.engines import RunningEngine
from understudy.errors import NotFoundError, UsageError
from understudy.workspace import Workspace

if TYPE_CHECKING:
    from rag.agent import Tools
    from rag.cache import Scope, SemanticCache
    from rag.cached import Cached
    from rag.retrieve import Retriever


def default_model(workspace: Workspace) -> str:
    """The newest adapter of the configured base that vLLM can apply, else the base."""
    served = [m for m, _ in manifests(workspace) if is_served(m.method) and m.base == workspace.config.models.base]
    return served[-1].served_name if served else "base"


def resolve_name(workspace: Workspace, name: str) -> str:
    """base and remotes as they are; an adapter's name as name@digest12. Raises NotFoundError, AdapterError where it cannot be served."""
    if name == "base" or name in workspace.config.remotes:
        return name
    manifest, _ = find_adapter(workspace, name)
    require_served(manifest)
    return manifest.served_name


def resolve(workspace: Workspace, name: str, engine: RunningEngine | None) -> Model:
    """A model by name: a configured remote, or what the engine serves. Raises NotFoundError."""
    if name in workspace.config.remotes:
        return remote_of(workspace, name)
    if engine is None:
        raise NotFoundError(f"no engine is running to serve {name}", "run `understudy serve`")
    return engine_model(engine, resolve_name(workspace, name))


def remote_of(workspace: Workspace, name: str) -> Model:
    """A configured remote. Raises NotFoundError without its key, UsageError where the workspace is offline."""
    if workspace.config.offline:
        raise UsageError(f"{name} is a remote, and this workspace is offline", "name a model that is served here, or set offline: false")
    return remote_model(name, workspace.config.remotes[name])


def calibration_folder(workspace: Workspace, name: str) -> Path:
    """Where a model's calibration lies: beside an adapter's weights, or under its name and digest."""
    if name in workspace.config.remotes:
        return workspace.calibrations / f"{name}-{digest_of(workspace.config.remotes[name].model_dump())[:12]}"
    if name == "base":
        return workspace.calibrations / f"base-{digest_of(workspace.config.models.base)[:12]}"
    return find_adapter(workspace, name)[1]


def tools_for(workspace: Workspace, model: Model, retriever: Retriever) -> Tools:
    """What the agent needs to measure a model by itself: in mode agentic, without a teacher, no trace kept.

    It brings its calibration where it has one.
    """
    from rag.agent import Tools
    from rag.validation import read_calibration

    calibration = read_calibration(calibration_folder(workspace, model.name))
    return Tools(ModelClient(model), retriever, workspace.config.agent.model_copy(update={"mode": "agentic"}), calibration)


def answering_tools(workspace: Workspace, model: Model, retriever: Retriever, mode: str | None, may_cache: bool) -> Tools:
    """What the agent needs to answer people: in the mode asked for or configured, with the configured teacher, every trace kept,
    and the cache in front where it is enabled.

    Raises NotFoundError where the teacher is no configured remote.
    """
    from rag.agent import Teacher
    from rag.answering import trace_keeper
    from rag.validation import read_calibration

    settings, name = workspace.config.agent, workspace.config.agent.escalate_to
    teacher = None
    if name and name != model.name:
        if name not in workspace.config.remotes:
            raise NotFoundError(f"agent.escalate_to = {name} is no configured remote", "name one of `remotes` in understudy.yaml, or unset it")
        remote = remote_of(workspace, name)
        teacher = Teacher(ModelClient(remote), read_calibration(calibration_folder(workspace, name)))
    settings = settings.model_copy(update={"mode": mode or settings.mode})
    cached = cached_answers(workspace, model.name, retriever, settings.mode) if may_cache and workspace.config.cache.enabled else None
    return replace(tools_for(workspace, model, retriever), settings=settings, teacher=teacher, cached=cached, keep=trace_keeper(workspace))


def cache_scope(workspace: Workspace, name: str, mode: str) -> Scope:
    """What a model's cached answers depend on besides the question; needs no running engine."""
    from rag.cache import Scope
    from rag.prompts import PROMPT_VERSION

    config = workspace.config
    if name in config.remotes:
        model = f"{name} {config.remotes[name].model} {config.remotes[name].base_url}"
    else:
        model = f"{config.models.base} {resolve_name(workspace, name)}"
    return Scope(tenant=config.tenant, model=model, prompt_version=PROMPT_VERSION, mode=mode)


def open_cache(workspace: Workspace, retriever: Retriever) -> SemanticCache:
    """The workspace's cache over its live corpus."""
    from rag.cache import SemanticCache
    from rag.cache_decision import read_parameters

    return SemanticCache(workspace.store, retriever, workspace.config.cache, read_parameters(workspace.calibrations))


def cached_answers(workspace: Workspace, name: str, retriever: Retriever, mode: str) -> Cached:
    """The workspace's cache as a model is asked through it. What redaction would change is not kept there."""
    from rag.cached import Cached
    from rag.redaction import redactor_of

    redactor = redactor_of(workspace.config.redaction)
    scope, accept_score = cache_scope(workspace, name, mode), workspace.config.agent.accept_score
    return Cached(open_cache(workspace, retriever), scope, name, accept_score, lambda trace: redactor.trace(trace) == trace)
