"""`understudy serve`, and the engine that other commands borrow or start for their duration."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from serve.engine import EngineSpec, load_adapter, plan_engine, served_models, start_engine
from serve.supervise import Engine, died, free_port, require_free_port
from understudy.adapters import is_served, manifests
from understudy.engines import RunningEngine, find_engine
from understudy.errors import EngineError
from understudy.files import locked
from understudy.workspace import Workspace

WATCH_SECONDS = 0.5


class _Terminated(BaseException):
    """SIGTERM arrived; not an Exception, so that nothing on the way swallows it."""


def run_serve(workspace: Workspace) -> None:
    """Serve in the foreground until Ctrl-C or SIGTERM, which end it in order.

    Raises EngineError when the engine cannot start, when one already runs for this workspace, or when it dies.
    """
    spec = plan_engine(workspace)
    for manifest, _ in manifests(workspace):
        if not is_served(manifest.method):
            _say(f"not served: {manifest.served_name}, trained by {manifest.method}; vLLM serves LoRA adapters only")
    previous = signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        with _start(workspace, spec) as engine:
            _say(_welcome(engine))
            while engine.poll() is None:
                time.sleep(WATCH_SECONDS)
            raise died(engine)
    except (KeyboardInterrupt, _Terminated):
        _say("stopped")
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def engine_for(workspace: Workspace, progress: Callable[[str], None]) -> Iterator[RunningEngine]:
    """The workspace's running engine if it serves the right weights, with every registered adapter loaded; else one of our own.

    Our own listens on the configured port, or on a free one where that is taken, and ends with the block.
    """
    spec = plan_engine(workspace)
    with _starting(workspace):
        running = find_engine(workspace)
        if running is not None and running.base_digest == spec.base_digest:
            engine, shared = None, _with_adapters(running, spec)
        else:
            engine = start_engine(_on_free_port(spec), log_path(workspace), progress, None if running else workspace.engine_file)
            shared = _announced(engine)
    if engine is None:
        yield shared
        return
    with engine:
        yield shared


def log_path(workspace: Workspace) -> Path:
    """Where the engine writes."""
    return workspace.logs / "engine.log"


def _start(workspace: Workspace, spec: EngineSpec) -> Engine:
    with _starting(workspace):
        running = find_engine(workspace)
        if running is not None:
            raise EngineError(f"this workspace is served already, at {running.url} (process {running.pid})", f"use it, or stop it: kill {running.pid}")
        return start_engine(spec, log_path(workspace), _say, workspace.engine_file)


@contextmanager
def _starting(workspace: Workspace) -> Iterator[None]:
    """Commands that start at the same time start one engine, not two."""
    with locked(workspace.engine_file.with_name("engine.lock")):
        yield


def _on_free_port(spec: EngineSpec) -> EngineSpec:
    try:
        require_free_port(spec.host, spec.port)
    except EngineError:
        return dataclasses.replace(spec, port=free_port(spec.host))
    return spec


def _with_adapters(running: RunningEngine, spec: EngineSpec) -> RunningEngine:
    """The running engine with every adapter of the plan loaded."""
    for adapter in spec.adapters:
        if adapter.name not in running.models:
            load_adapter(running.url, adapter)
    return running.model_copy(update={"models": list(served_models(running.url))})


def _announced(engine: Engine) -> RunningEngine:
    assert engine.running is not None  # start_engine returns healthy engines only
    return engine.running


def _welcome(engine: Engine) -> str:
    running = _announced(engine)
    newest = running.models[-1]
    question = json.dumps({"model": newest, "messages": [{"role": "user", "content": "What is the capital of France?"}], "max_tokens": 32})
    lines = [f"serving at {running.url}", *(f"  {name}" for name in running.models)]
    return "\n".join([*lines, f"try: curl -s {running.url}/chat/completions -H 'Content-Type: application/json' -d '{question}'", "Ctrl-C stops it"])


def _raise_terminated(_number: int, _frame: FrameType | None) -> None:
    raise _Terminated


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
