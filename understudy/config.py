"""Typed configuration, said once: understudy.yaml < UNDERSTUDY_… environment < key=value on the command line."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError

from understudy.errors import UsageError
from understudy.settings.answers import Agent, Cache, Redaction, Telemetry
from understudy.settings.corpus import Ingest, Retrieval
from understudy.settings.evaluating import Cycle, Evaluate
from understudy.settings.section import Section
from understudy.settings.serving import Endpoint, Fireworks, Gateway, Releases, Serve
from understudy.store.urls import refuse_secret

FILE_NAME = "understudy.yaml"


class Models(Section):
    """Which weights the workspace uses: a name in models/, a path, or a hub id."""

    base: str = Field("smollm2-135m-instruct", description="the small model that learns the job")
    embedder: str = Field("all-minilm-l6-v2", description="the sentence-transformers model that embeds chunks and questions")
    embedder_precision: Literal["auto", "bfloat16", "float32"] = Field("auto", description="auto: bfloat16 where it is native and measured equal to float32")


class Config(Section):
    """Everything a workspace can set."""

    store: str = Field(
        "sqlite:///store.db",
        description="where records live: sqlite:///PATH inside the workspace, mongodb://HOST/DATABASE, or env:NAME, a variable that holds the URL",
    )
    tenant: str = Field("default", description="whose documents and traces commands work on")
    offline: bool = Field(False, description="refuse every one of `remotes`, and Fireworks, whatever asks for it")
    recipe: str = Field("default", description="the training recipe `train` takes when none is named")
    models: Models = Models()
    ingest: Ingest = Ingest()
    retrieval: Retrieval = Retrieval()
    agent: Agent = Agent()
    cache: Cache = Cache()
    serve: Serve = Serve()
    gateway: Gateway = Gateway()
    releases: Releases = Releases()
    fireworks: Fireworks = Fireworks()
    evaluate: Evaluate = Evaluate()
    cycle: Cycle = Cycle()
    redaction: Redaction = Redaction()
    telemetry: Telemetry = Telemetry()
    remotes: dict[str, Endpoint] = Field(default_factory=dict, description="named OpenAI-compatible endpoints, for --models and teachers")


def load_config(workspace: Path, overrides: list[str] | None = None) -> tuple[Config, dict[str, str]]:
    """The configuration in force and where each value that is not a default came from.

    Raises UsageError with every fault at once.
    """
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, values in (
        (FILE_NAME, _flatten(_read_file(workspace / FILE_NAME))),
        ("environment", _from_environment()),
        ("command line", parse_overrides(overrides or [])),
    ):
        for key, value in values.items():
            if key == "store" and origin != "environment" and isinstance(value, str):
                refuse_secret(value, origin)
            _assign(merged, key, value)
            origins[key] = origin
    try:
        return Config.model_validate(merged), origins
    except ValidationError as error:
        raise UsageError(
            "; ".join(explain_fault(fault, Config) for fault in error.errors()), "docs/settings.md lists every key, `understudy config show` what is in force"
        ) from error


def explain_fault(fault: Any, model: type[BaseModel]) -> str:
    """One pydantic error as a sentence, with the nearest right name for an unknown key."""
    path = [str(part) for part in fault["loc"]]
    key = ".".join(path)
    if fault["type"] != "extra_forbidden":
        return f"{key}: {fault['msg']}"
    near = difflib.get_close_matches(key, known_keys(model), n=1, cutoff=0.4)
    return f"unknown key {key}" + (f", did you mean {near[0]}?" if near else "")


def known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key of a settings model."""
    keys = []
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            keys += known_keys(annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """`a.b=1` arguments as {"a.b": 1}; values are YAML."""
    values = {}
    for argument in arguments:
        key, separator, value = argument.partition("=")
        if not separator or not key:
            raise UsageError(f"{argument!r} is not key=value", "write for example retrieval.k=4")
        values[key] = yaml.safe_load(value)
    return values


def _read_file(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {error}", "fix the file") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} is not a mapping of settings", "write `key: value` lines")
    return content


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value and f"{prefix}{key}" != "remotes":
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _from_environment() -> dict[str, Any]:
    """`UNDERSTUDY_RETRIEVAL__K=4` sets retrieval.k; variables that name no setting are other tools' business."""
    names = {f"UNDERSTUDY_{key.replace('.', '__').upper()}": key for key in known_keys(Config)}
    return {names[name]: yaml.safe_load(value) for name, value in os.environ.items() if name in names}


def _assign(target: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise UsageError(f"{parent} is not a section, in {key}", "docs/settings.md lists every key, `understudy config show` what is in force")
    target[last] = value
