"""The running engine: our own, found through run/engine.json and verified before use, or one elsewhere, by its URL."""

from __future__ import annotations

import ipaddress
import os
from typing import Any
from urllib.parse import urlsplit

import httpx
from pydantic import BaseModel, ValidationError

from understudy.capabilities import Capabilities, probe
from understudy.digests import digest_of
from understudy.errors import EndpointError, NotFoundError, StorageError, UsageError
from understudy.files import read_json, write_json
from understudy.workspace import Workspace


class RunningEngine(BaseModel):
    """Where an engine listens and what it serves."""

    url: str  # base URL, ending in /v1
    pid: int
    base: str  # id of the base, and its model name at the endpoint
    base_digest: str  # digest of the weights it serves; elsewhere: of those it has to serve, which a proof shows
    models: list[str]  # every name it serves
    precision: str = "bfloat16"  # serve.dtype, or what serve.quantization makes of it
    capabilities: Capabilities | None = None  # of an engine elsewhere; None: our own vLLM, which has them all
    api_key_env: str = ""  # elsewhere: the variable that holds its key
    merged: str = ""  # the served name of the adapter that its weights hold; then nothing else is served, the base neither

    @property
    def api_key(self) -> str:
        """The key to it; empty where none is needed. Raises NotFoundError where it is not in the environment."""
        if not self.api_key_env:
            return ""
        key = os.environ.get(self.api_key_env, "")
        if not key:
            raise NotFoundError(f"no key for the engine at {self.url}", f"set the environment variable {self.api_key_env}")
        return key


def is_alive(pid: int) -> bool:
    """Whether a process of ours runs."""
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def find_engine(workspace: Workspace) -> RunningEngine | None:
    """The engine of this workspace if it is alive and healthy; its models are asked anew."""
    if workspace.config.serve.url:
        return find_engine_elsewhere(workspace)
    if not workspace.engine_file.exists():
        return None
    engine = RunningEngine.model_validate(read_json(workspace.engine_file))
    if not is_alive(engine.pid):
        return None
    try:
        answer = httpx.get(f"{engine.url}/models", timeout=5)
        answer.raise_for_status()
    except httpx.HTTPError:
        return None
    return engine.model_copy(update={"models": [row["id"] for row in answer.json()["data"]]})


def find_engine_elsewhere(workspace: Workspace) -> RunningEngine | None:
    """The engine at `serve.url` with what it can do, probed once for its address and the models it lists; None where nothing answers.

    Its base_digest is empty: no server tells. Raises UsageError where the workspace is offline and it is not on this machine,
    NotFoundError without its key or where it does not list `serve.model`, EndpointError where it does not chat.
    """
    settings = workspace.config.serve
    if workspace.config.offline and not is_local(settings.url):
        raise UsageError(
            f"the engine at {settings.url} is on another machine, and this workspace is offline", "set offline: false, or serve.url to a local one"
        )
    engine = RunningEngine(
        url=settings.url, pid=0, base=settings.model, base_digest="", models=[], precision=f"as at {settings.url}", api_key_env=settings.api_key_env
    )
    listed = _listed(engine)
    if listed is None:
        return None
    bases = [row["id"] for row in listed if not row.get("parent")]
    base = settings.model or next(iter(bases), "")
    if base not in bases:
        raise NotFoundError(f"the engine at {settings.url} does not serve {base or 'any model'}", f"serve.model is one of: {', '.join(bases) or 'none yet'}")
    models = [base, *(row["id"] for row in listed if row.get("parent") == base)]
    return engine.model_copy(update={"base": base, "models": models, "capabilities": _capabilities(workspace, engine, base, bases)})


def is_local(url: str) -> bool:
    """Whether a URL stays on this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listed(engine: RunningEngine) -> list[dict[str, Any]] | None:
    """What GET /models says; None where nothing answers. Raises EndpointError where the server refuses us."""
    headers = {"Authorization": f"Bearer {engine.api_key}"} if engine.api_key_env else {}
    try:
        answer = httpx.get(f"{engine.url}/models", headers=headers, timeout=10)
        if answer.status_code in (401, 403):
            raise EndpointError(f"the engine at {engine.url} refuses the key", "set serve.api_key_env to the variable that holds it")
        answer.raise_for_status()
        return [row for row in answer.json()["data"] if isinstance(row, dict) and isinstance(row.get("id"), str)]
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None


def _capabilities(workspace: Workspace, engine: RunningEngine, base: str, bases: list[str]) -> Capabilities:
    """Probed, or as probed before for the same address, base and list of bases."""
    file, key = workspace.engine_file.with_name("capabilities.json"), digest_of([engine.url, base, sorted(bases)])
    try:
        kept = read_json(file)
        if kept["key"] == key:
            return Capabilities.model_validate(kept["capabilities"])
    except (NotFoundError, StorageError, ValidationError, KeyError, TypeError):
        pass
    found = probe(engine.url, base, engine.api_key)
    write_json(file, {"key": key, "capabilities": found.model_dump()})
    return found


def require_engine(workspace: Workspace) -> RunningEngine:
    """The running engine, or NotFoundError saying how to start one."""
    engine = find_engine(workspace)
    if engine is None and workspace.config.serve.url:
        raise NotFoundError(f"nothing answers at {workspace.config.serve.url}", "start that server, or unset serve.url to run vLLM here")
    if engine is None:
        raise NotFoundError("no server is running for this workspace", f"start one: understudy --workspace {workspace.root} serve")
    return engine
