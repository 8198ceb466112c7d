"""`understudy serve`, and the engine that other commands borrow or start for their duration."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from serve.arguments import EngineSpec
from serve.engine import load_adapter, plan_engine, served_models, start_engine
from serve.pausing import announce, wait_for_restart, withdraw
from serve.supervise import Engine, free_port, require_free_port
from understudy.adapters import is_served, manifests
from understudy.engines import RunningEngine, find_engine
from understudy.errors import EngineError, UsageError
from understudy.files import locked
from understudy.workspace import Workspace

if TYPE_CHECKING:
    from serve.gateway.agents import Wiring
    from serve.merge import Merger
    from understudy.progress import Progress


class _Terminated(BaseException):
    """SIGTERM arrived; not an Exception, so that nothing on the way swallows it."""


def run_serve(workspace: Workspace, wiring: Wiring, merge: Merger) -> None:
    """Serve in the foreground until Ctrl-C or SIGTERM, which end it in order: the engine, and the gateway in front of it.

    An engine that ends later is started again. `merge` writes an adapter merged into its base (`serve.merge`).
    Raises EngineError when it cannot start at first or one already runs for this workspace, or when the gateway's port is taken;
    UsageError where the gateway would be open to a network without a key.
    """
    from serve.gateway.observe import Log
    from serve.gateway.run import Supervisor, run_gateway
    from serve.gateway.server import listen, url_of

    if workspace.config.serve.url:
        _serve_elsewhere(workspace, wiring)
        return
    _require_unserved(workspace)
    spec, listening = plan_engine(workspace), listen(workspace)
    for manifest, _ in manifests(workspace):
        if not is_served(manifest.method):
            _say(f"not served: {manifest.served_name}, trained by {manifest.method}; vLLM serves LoRA adapters only")
    previous = signal.signal(signal.SIGTERM, _raise_terminated)
    supervisor = None
    try:
        log = Log(workspace.logs / "gateway.jsonl")
        withdraw(workspace)
        announce(workspace, url_of(workspace.config.gateway), "starting")
        first = decided(workspace, spec, merge)
        supervisor = Supervisor(
            workspace, _start(workspace, first), lambda: _start(workspace, decided(workspace, plan_engine(workspace), merge, may_measure=False)), log, _say
        )
        _say(_welcome(workspace, _announced(supervisor.engine)))
        run_gateway(workspace, wiring, supervisor, listening, spec.device, log)
        _say("stopped")
    except (KeyboardInterrupt, _Terminated):
        _say("stopped")
    finally:
        listening.close()
        withdraw(workspace)
        if supervisor is not None:
            supervisor.engine.stop()
        signal.signal(signal.SIGTERM, previous)


def _serve_elsewhere(workspace: Workspace, wiring: Wiring) -> None:
    """The gateway in front of an engine that somebody else runs. Raises NotFoundError where it is not there at first."""
    from serve.elsewhere import Elsewhere, require_elsewhere
    from serve.gateway.observe import Log
    from serve.gateway.run import run_gateway
    from serve.gateway.server import listen

    listening = listen(workspace)
    try:
        engine = require_elsewhere(workspace, _say)
        assert engine.capabilities is not None
        _say(f"the engine elsewhere is {engine.capabilities.describe()}")
        _say(_welcome(workspace, engine))
        log = Log(workspace.logs / "gateway.jsonl")
        run_gateway(workspace, wiring, Elsewhere(workspace, log, _say), listening, "elsewhere", log)
        _say("stopped")
    except KeyboardInterrupt:
        _say("stopped")
    finally:
        listening.close()


def decided(workspace: Workspace, spec: EngineSpec, merge: Merger, may_measure: bool = True) -> EngineSpec:
    """The spec with what `serve.merge` and `serve.speculative_tokens` leave to measurement decided, by a kept one where nothing has changed."""
    if spec.settings.merge == "never" and not spec.settings.speculative_tokens:
        return spec
    from serve.merge import decide_merge
    from serve.speculate import decide_speculation

    spec = decide_merge(workspace, spec, merge, _say, may_measure=may_measure)
    return decide_speculation(workspace, spec, _say, may_measure=may_measure)


def run_tune(workspace: Workspace, progress: Callable[[str, int], Progress], write: bool) -> dict[str, Any]:
    """Measure engine settings; the result is the command's JSON. Raises EngineError where an engine runs already, or none can."""
    from serve.tune import tune

    if workspace.config.serve.url:
        raise UsageError("the engine at serve.url is not ours to tune", "unset serve.url to tune vLLM here")
    _require_unserved(workspace)
    previous = signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        return tune(workspace, plan_engine(workspace), _say, progress, write)
    except _Terminated:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def engine_for(workspace: Workspace, progress: Callable[[str], None], only: str = "") -> Iterator[RunningEngine]:
    """The workspace's running engine if it serves the right weights, with every registered adapter loaded; else one of our own.

    Our own listens on the configured port, or on a free one where that is taken, and ends with the block. With `serve.url` it is
    always that one. `only`: the one adapter that is asked, so that an engine in which it is merged will do.
    """
    if workspace.config.serve.url:
        from serve.elsewhere import require_elsewhere

        yield require_elsewhere(workspace, progress)
        return
    spec = plan_engine(workspace)
    wait_for_restart(workspace, progress)
    with _starting(workspace):
        running = find_engine(workspace)
        if running is not None and running.merged and running.merged == only:
            engine, shared = None, running
        elif running is not None and running.base_digest == spec.base_digest and not running.merged:
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
        _require_unserved(workspace)
        return start_engine(spec, log_path(workspace), _say, workspace.engine_file)


def _require_unserved(workspace: Workspace) -> None:
    running = find_engine(workspace)
    if running is not None:
        raise EngineError(f"this workspace is served already, at {running.url} (process {running.pid})", "use it, or end the command that runs it")


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


def _welcome(workspace: Workspace, running: RunningEngine) -> str:
    from serve.gateway.server import url_of

    url = url_of(workspace.config.gateway)
    question = json.dumps({"model": "rag", "messages": [{"role": "user", "content": "Who signs the acceptance report?"}]})
    lines = [f"serving at {url}; the engine behind it, at {running.url}, has loaded", *(f"  {name}" for name in running.models)]
    return "\n".join([*lines, f"try: curl -s {url}/chat/completions -H 'Content-Type: application/json' -d '{question}'", "Ctrl-C stops it"])


def _raise_terminated(_number: int, _frame: FrameType | None) -> None:
    raise _Terminated


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
