"""An engine that somebody else runs, at `serve.url`: used as it is, never started, stopped or paused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from serve.arguments import ServedAdapter
from serve.engine import load_adapter, registered_adapters, served_base
from serve.gateway.gateway import Gateway
from serve.gateway.observe import Log
from understudy.engines import RunningEngine, find_engine_elsewhere, is_local, require_engine
from understudy.errors import AdapterError, NotFoundError, UnderstudyError
from understudy.workspace import Workspace

LOOK_SECONDS = 5.0  # between looks at whether it is there


def find_elsewhere(workspace: Workspace) -> RunningEngine | None:
    """The engine at `serve.url` with the digest of the weights that it has to serve; see `find_engine_elsewhere` for what is raised."""
    found = find_engine_elsewhere(workspace)
    return None if found is None else found.model_copy(update={"base_digest": _expected_digest(workspace)})


def require_elsewhere(workspace: Workspace, report: Callable[[str], None]) -> RunningEngine:
    """The same, with our adapters loaded where it can load them from this machine's folders; raises NotFoundError where it is away."""
    require_engine(workspace)
    found = find_elsewhere(workspace)
    assert found is not None and found.capabilities is not None
    if found.capabilities.loads_adapters and is_local(found.url):
        for adapter in registered_adapters(workspace, found.base_digest):
            _load(found, adapter, report)
        found = find_elsewhere(workspace) or found
    return found


def _load(engine: RunningEngine, adapter: ServedAdapter, report: Callable[[str], None]) -> None:
    if adapter.name in engine.models:
        return
    try:
        load_adapter(engine.url, adapter)
    except AdapterError as error:
        report(f"not loaded there: {error.message}")


def _expected_digest(workspace: Workspace) -> str:
    try:
        return served_base(workspace)[2]
    except NotFoundError:
        return ""  # then no adapter can be proven there


class Elsewhere:
    """In the supervisor's place: tells the gateway whether the engine is there."""

    def __init__(self, workspace: Workspace, log: Log, report: Callable[[str], None]) -> None:
        self._workspace, self._log, self._report = workspace, log, report

    async def watch(self, gateway: Gateway) -> None:
        """Look for ever; while it is away, requests are answered 503."""
        before: RunningEngine | None = None
        while True:
            try:
                found = await asyncio.to_thread(find_elsewhere, self._workspace)
            except UnderstudyError as error:
                found = None
                if before is not None:
                    self._report(f"{error.message}; {error.remedy}")
            if found != before:
                gateway.serve(found)
                self._log.write("engine_found" if found else "engine_away", url=self._workspace.config.serve.url)
            before = found
            await asyncio.sleep(LOOK_SECONDS)
