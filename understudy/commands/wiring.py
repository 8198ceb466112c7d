"""From names to things that run: models, and the agent's tools."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from understudy.adapters import find_adapter, is_served, manifests, require_served
from understudy.client import Model, ModelClient, StepModels, engine_model, remote_model
from understudy.digests import digest_of
from understudy.engines import RunningEngine
from understudy.errors import NotFoundError, UsageError
from understudy.records import StepName
from understudy.releases import ENGINE, Release, find_release, is_alias, standing
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


def usual_model(workspace: Workspace) -> str:
    """What answers people where they name nothing: the live release of the tenant's alias, else the default model. Raises NotFoundError."""
    alias = workspace.config.releases.alias_of(workspace.config.tenant)
    if alias and standing(workspace, alias).live is None:
        raise NotFoundError(f"nothing is live under {alias}, which answers here (releases.default)", f"`understudy release promote {alias}`, or name a --model")
    return alias or default_model(workspace)


def resolve_name(workspace: Workspace, name: str) -> str:
    """base and remotes as they are; an adapter's name, or a release's alias, as name@digest12.

    Raises NotFoundError, AdapterError where it cannot be served.
    """
    if name == "base" or name in workspace.config.remotes:
        return name
    if is_alias(workspace, name):
        return find_release(workspace, name).name
    manifest, _ = find_adapter(workspace, name)
    require_served(manifest)
    return manifest.served_name


def release_of(workspace: Workspace, name: str) -> Release | None:
    """The release that a name means, if it means one. Raises NotFoundError."""
    is_other = name == "base" or name in workspace.config.remotes or not is_alias(workspace, name)
    return None if is_other else find_release(workspace, name)


def adapters_of(workspace: Workspace, name: str) -> list[str]:
    """The adapters behind a resolved name, the answering one first: a release may have several, the base and remotes have none."""
    if name in ("base", "teacher") or name in workspace.config.remotes:
        return []
    release = release_of(workspace, name)
    named = [release.adapters["answer"], *release.adapters.values()] if release else [name]
    return [adapter for adapter in dict.fromkeys(named) if adapter != "base"]


def answering_name(workspace: Workspace, name: str) -> str:
    """The model behind a resolved name that writes the answers."""
    release = release_of(workspace, name)
    if release is None:
        return name
    return release.adapters["answer"] if release.endpoint == ENGINE else release.endpoint


def needs_engine(workspace: Workspace, name: str) -> bool:
    """Whether the workspace's own engine serves a name."""
    return answering_name(workspace, name) not in workspace.config.remotes


def resolve(workspace: Workspace, name: str, engine: RunningEngine | None) -> Model:
    """One model by name: a configured remote, or what the engine serves. Raises NotFoundError, UsageError for a release."""
    if name in workspace.config.remotes:
        return remote_of(workspace, name)
    if release := release_of(workspace, name):
        raise UsageError(f"{release.name} is a release, and one model is wanted here", f"name one of its adapters: {', '.join(release.adapters.values())}")
    if engine is None:
        raise NotFoundError(f"no engine is running to serve {name}", "run `understudy serve`")
    return engine_model(engine, resolve_name(workspace, name))


def resolve_steps(workspace: Workspace, name: str, engine: RunningEngine | None) -> StepModels:
    """Which model each step asks, by the name of a model or of a release. Raises NotFoundError."""
    release = release_of(workspace, name)
    if release is None:
        return StepModels.alike(resolve(workspace, name, engine))
    if release.endpoint != ENGINE:
        return replace(StepModels.alike(remote_of(workspace, release.endpoint)), release=release.name)
    models = {step: resolve(workspace, adapter, engine) for step, adapter in release.adapters.items()}
    return StepModels(models["answer"], models["plan"], models["validate"], release.name)


def remote_of(workspace: Workspace, name: str) -> Model:
    """A configured remote. Raises NotFoundError without its key or where it is none, UsageError where the workspace is offline."""
    if name not in workspace.config.remotes:
        raise NotFoundError(f"{name} is no configured remote", "name one of `remotes` in understudy.yaml")
    if workspace.config.offline:
        raise UsageError(f"{name} is a remote, and this workspace is offline", "name a model that is served here, or set offline: false")
    return remote_model(name, workspace.config.remotes[name])


def calibration_folder(workspace: Workspace, name: str) -> Path:
    """Where a model's calibration lies: beside an adapter's weights, or under its name and digest. A release's is its answering model's."""
    name = answering_name(workspace, name)
    if name in workspace.config.remotes:
        return workspace.calibrations / f"{name}-{digest_of(workspace.config.remotes[name].model_dump())[:12]}"
    if name == "base":
        return workspace.calibrations / f"base-{digest_of(workspace.config.models.base)[:12]}"
    return find_adapter(workspace, name)[1]


def tools_for(workspace: Workspace, models: StepModels, retriever: Retriever) -> Tools:
    """What the agent needs to measure a model, or a release, by itself: in mode agentic, without a teacher, no trace kept.

    It brings the answering model's calibration where that has one.
    """
    from rag.agent import Tools
    from rag.validation import read_calibration

    clients = {model: ModelClient(model) for model in dict.fromkeys((models.answer, models.plan, models.validate))}
    by_step: dict[StepName, Model] = {"rewrite": models.plan, "plan": models.plan, "validate": models.validate}
    apart = {step: clients[model] for step, model in by_step.items() if model != models.answer}
    calibration = read_calibration(calibration_folder(workspace, models.answer.name))
    settings = workspace.config.agent.model_copy(update={"mode": "agentic"})
    return Tools(clients[models.answer], retriever, settings, calibration, by_step=apart, release=models.release)


def answering_tools(workspace: Workspace, models: StepModels, retriever: Retriever, mode: str | None, may_cache: bool) -> Tools:
    """What the agent needs to answer people: in the mode asked for or configured, with the configured teacher, every trace kept,
    and the cache in front where it is enabled.

    Raises NotFoundError where the teacher is no configured remote.
    """
    from rag.agent import Teacher
    from rag.answering import trace_keeper
    from rag.validation import read_calibration

    settings, name = workspace.config.agent, workspace.config.agent.escalate_to
    teacher = None
    if name and name != models.answer.name:
        if name not in workspace.config.remotes:
            raise NotFoundError(f"agent.escalate_to = {name} is no configured remote", "name one of `remotes` in understudy.yaml, or unset it")
        remote = remote_of(workspace, name)
        teacher = Teacher(ModelClient(remote), read_calibration(calibration_folder(workspace, name)))
    settings = settings.model_copy(update={"mode": mode or settings.mode})
    cached = cached_answers(workspace, models.release or models.answer.name, retriever, settings.mode) if may_cache and workspace.config.cache.enabled else None
    return replace(tools_for(workspace, models, retriever), settings=settings, teacher=teacher, cached=cached, keep=trace_keeper(workspace))


def cache_scope(workspace: Workspace, name: str, mode: str) -> Scope:
    """What the cached answers of a model, or of a release, depend on besides the question; needs no running engine."""
    from rag.cache import Scope
    from rag.prompts import PROMPT_VERSION

    config, release = workspace.config, release_of(workspace, name)
    answering = answering_name(workspace, name)
    if answering in config.remotes:
        model = f"{answering} {config.remotes[answering].model} {config.remotes[answering].base_url}"
    else:
        model = f"{config.models.base} {resolve_name(workspace, answering)}"
    return Scope(tenant=config.tenant, model=model, prompt_version=PROMPT_VERSION, mode=mode, release=release.name if release else None)


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
    answering = resolve_name(workspace, answering_name(workspace, name))
    return Cached(open_cache(workspace, retriever), scope, answering, accept_score, lambda trace: redactor.trace(trace) == trace)
