"""init, doctor, config show and set, models add and ls."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
from argparse import Namespace
from typing import Any

from understudy import models
from understudy.commands import Outcome, report, workspace_of
from understudy.config import FILE_NAME, Config, known_keys, parse_overrides
from understudy.engines import find_engine
from understudy.errors import UnderstudyError
from understudy.settings_file import set_values
from understudy.store.urls import resolve_url, shown_url
from understudy.workspace import Workspace, create_workspace, open_workspace


def init(args: Namespace) -> Outcome:
    """Make a workspace; an existing one is left as it is."""
    workspace = create_workspace(args.workspace, "".join(f"{setting.replace('=', ': ', 1)}\n" for setting in args.set))
    return Outcome({"workspace": str(workspace.root)}, [f"workspace {workspace.root} is ready"])


def config_show(args: Namespace) -> Outcome:
    """Every setting, its value and its origin."""
    workspace = workspace_of(args)
    values = {}
    for key in known_keys(Config):
        value: Any = workspace.config
        for part in key.split("."):
            value = getattr(value, part)
        value = shown_url(value) if key == "store" else value
        value = {name: endpoint.model_dump() for name, endpoint in value.items()} if key == "remotes" else value
        values[key] = {"value": value, "origin": workspace.origins.get(key, "default")}
    return Outcome({"config": values}, [f"{key} = {entry['value']}  ({entry['origin']})" for key, entry in values.items()])


def config_set(args: Namespace) -> Outcome:
    """Write settings into understudy.yaml, all or none; comments stay."""
    workspace = open_workspace(args.workspace, [*args.set, *args.settings])  # raises UsageError where one is wrong
    values = parse_overrides(args.settings)
    set_values(workspace.root / FILE_NAME, values)
    return Outcome({"set": values, "file": str(workspace.root / FILE_NAME)}, [f"{key} = {value}" for key, value in values.items()])


def models_add(args: Namespace) -> Outcome:
    """Bring weights into the workspace."""
    workspace = workspace_of(args)
    folder = models.add_model(workspace, args.model, report)
    return Outcome({"model": folder.name, "path": workspace.relative(folder)}, [f"{folder.name} is in {folder}"])


def models_ls(args: Namespace) -> Outcome:
    """List the weights in the workspace."""
    cards = models.list_models(workspace_of(args))
    return Outcome({"models": cards}, [f"{card['id']}  {card['weights_digest'][:12]}  from {card['origin']}" for card in cards] or ["no models yet"])


def doctor(args: Namespace) -> Outcome:
    """Check what the commands need; exit 1 where something is missing."""
    workspace = workspace_of(args)
    checks = [*_machine_checks(workspace), *_package_checks(), *_model_checks(workspace), *_state_checks(workspace)]
    marks = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}
    lines = [f"{marks[c['status']]} {c['name']}: {c['detail']}" + (f"  → {c['remedy']}" if c["remedy"] else "") for c in checks]
    return Outcome({"checks": checks}, lines, 1 if any(c["status"] == "fail" for c in checks) else 0)


def _check(name: str, status: str, detail: str, remedy: str = "") -> dict[str, str]:
    return {"name": name, "status": status, "detail": detail, "remedy": remedy}


def _machine_checks(workspace: Workspace) -> list[dict[str, str]]:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    free = shutil.disk_usage(workspace.root).free / 2**30
    gpu = shutil.which("nvidia-smi")
    return [
        _check("memory", "ok" if memory >= 8 else "warn", f"{memory:.0f} GiB", "" if memory >= 8 else "8 GiB are advised"),
        _check("disk", "ok" if free >= 5 else "warn", f"{free:.0f} GiB free", "" if free >= 5 else "free at least 5 GiB"),
        _check("gpu", "ok", "found" if gpu else f"none: {os.cpu_count()} CPU cores are used"),
    ]


def _package_checks() -> list[dict[str, str]]:
    checks = []
    for name in ("torch", "transformers", "peft", "bitsandbytes", "sentence-transformers", "faiss-cpu", "langgraph", "httpx"):
        try:
            checks.append(_check(name, "ok", importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            checks.append(_check(name, "fail", "not installed", "run scripts/setup"))
    has_vllm = importlib.util.find_spec("vllm") is not None
    checks.append(_check("vllm", "ok" if has_vllm else "fail", "installed" if has_vllm else "not installed", "" if has_vllm else "run scripts/setup"))
    stray = [name for name in ("torchvision", "torchaudio", "torchcodec") if importlib.util.find_spec(name) and shutil.which("nvidia-smi") is None]
    return [*checks, *(_check(name, "warn", "beside a CPU torch it can break transformers", f"pip uninstall {name}") for name in stray)]


def _model_checks(workspace: Workspace) -> list[dict[str, str]]:
    checks = []
    for role, name in (("base", workspace.config.models.base), ("embedder", workspace.config.models.embedder)):
        try:
            checks.append(_check(role, "ok", workspace.relative(models.model_path(workspace, name))))
        except UnderstudyError as error:
            checks.append(_check(role, "fail", error.message, error.remedy))
    return checks


def _state_checks(workspace: Workspace) -> list[dict[str, str]]:
    if workspace.config.serve.url:
        return [*_store_checks(workspace), _elsewhere_check(workspace)]
    engine = find_engine(workspace)
    server = _check("server", "ok" if engine else "warn", engine.url if engine else "not running", "" if engine else "run `understudy serve`")
    return [*_store_checks(workspace), server]


def _elsewhere_check(workspace: Workspace) -> dict[str, str]:
    """The engine at `serve.url` and what it can do."""
    url = workspace.config.serve.url
    try:
        engine = find_engine(workspace)
    except UnderstudyError as error:
        return _check("engine", "fail", error.message, error.remedy)
    if engine is None or engine.capabilities is None:
        return _check("engine", "fail", f"nothing answers at {url}", "start that server, or unset serve.url to run vLLM here")
    able = engine.capabilities
    remedy = "" if able.can_prove else "adapters cannot be proven there and take no traffic: serve them with vLLM"
    return _check("engine", "ok" if able.can_prove else "warn", f"{url}, model {engine.base}: {able.describe()}", remedy)


def _store_checks(workspace: Workspace) -> list[dict[str, str]]:
    shown = shown_url(workspace.config.store)
    try:
        count = len(workspace.store.document_ids(workspace.config.tenant))
        search = _search_in_use(workspace)
    except UnderstudyError as error:
        return [_check("store", "fail", f"{shown}: {error.message}", error.remedy)]
    corpus = _check("corpus", "ok" if count else "warn", f"{count} documents", "" if count else "run `understudy ingest PATH`")
    return [_check("store", "ok", shown), _check("search", "ok", search), corpus, _cache_check(workspace)]


def _cache_check(workspace: Workspace) -> dict[str, str]:
    from rag.cache_decision import EMBEDDER, FILE, read_parameters

    settings, count = workspace.config.cache, workspace.store.count_cache_entries(workspace.config.tenant)
    if not settings.enabled:
        return _check("cache", "ok", f"switched off, {count} entries", "set cache.enabled: true to answer from it")
    is_calibrated = (workspace.calibrations / FILE).exists()
    origin = f"calibrated on {read_parameters(workspace.calibrations).pairs} pairs" if is_calibrated else "the calibration that ships"
    detail = f"{count} of at most {settings.max_entries} entries, kept {settings.ttl_days:g} days; {origin}"
    if not is_calibrated and workspace.config.models.embedder != EMBEDDER:
        return _check("cache", "warn", f"{detail}, made with {EMBEDDER}", "label pairs of questions and run `understudy cache calibrate PAIRS.jsonl`")
    if count >= settings.max_entries:
        return _check("cache", "warn", f"{detail}: the least recently used go", "raise cache.max_entries")
    return _check("cache", "ok", detail)


def _search_in_use(workspace: Workspace) -> str:
    """What searches the corpus, and why."""
    if not resolve_url(workspace.config.store).startswith("mongodb"):
        return "the local index, because the store is a file"
    if not workspace.config.retrieval.server_search:
        return "the local index, because retrieval.server_search is false"
    from rag.vector_search import support_of

    support = support_of(workspace.store)
    return f"{'$vectorSearch and $search' if support.available else 'the local index'}, because {support.reason}"
