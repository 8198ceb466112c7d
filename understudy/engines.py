"""The running engine, found through run/engine.json and verified before use."""

from __future__ import annotations

import os

import httpx
from pydantic import BaseModel

from understudy.errors import NotFoundError
from understudy.files import read_json
from understudy.workspace import Workspace


class RunningEngine(BaseModel):
    """Where an engine listens and what it serves."""

    url: str  # base URL, ending in /v1
    pid: int
    base: str  # id of the base, and its model name at the endpoint
    base_digest: str  # digest of the weights it serves
    models: list[str]  # every name it serves
    precision: str = "bfloat16"  # serve.dtype, or what serve.quantization makes of it
    merged: str = ""  # the served name of the adapter that its weights hold; then nothing else is served, the base neither


def is_alive(pid: int) -> bool:
    """Whether a process of ours runs."""
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def find_engine(workspace: Workspace) -> RunningEngine | None:
    """The engine of this workspace if it is alive and healthy; its models are asked anew."""
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


def require_engine(workspace: Workspace) -> RunningEngine:
    """The running engine, or NotFoundError saying how to start one."""
    engine = find_engine(workspace)
    if engine is None:
        raise NotFoundError("no server is running for this workspace", f"start one: understudy --workspace {workspace.root} serve")
    return engine
