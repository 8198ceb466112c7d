"""Trials as they run: every answer's part in its trial, the candidate asked in the shadow, and the stop where it proves worse."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from serve.gateway.observe import Log, Metrics
from serve.gateway.routing import Route
from serve.release.trial import Line, Observation, Trial, keep_line, observe, read_trial, trial_file
from understudy.errors import UnderstudyError, UsageError
from understudy.records import Trace
from understudy.releases import Canary, decide, stopped
from understudy.workspace import Workspace

SHADOWS_AT_ONCE = 4  # candidates asked in the shadow; a question that comes while so many run has none


class Trials:
    """The trials of every alias, each taken up from its file when its first answer comes."""

    def __init__(self, workspace: Workspace, log: Log, metrics: Metrics) -> None:
        self._workspace, self._log, self._metrics = workspace, log, metrics
        self._open: dict[str, tuple[Canary, Trial]] = {}  # by alias: the one that runs
        self._shadows: set[asyncio.Task[None]] = set()
        self._one_at_a_time = asyncio.Lock()

    async def take(self, route: Route, trace: Trace) -> None:
        """Count an answer for the trial that it was given in, if any. A trial that fails is logged: the answer is none the worse."""
        role = "canary" if route.is_canary else "live"
        self._metrics.count_release(route.answers.name, role, trace.outcome)
        if route.canary and route.shadow is None and (seen := observe(trace)):
            await self._add(route.alias, route.canary, Line(canary=seen) if route.is_canary else Line(live=seen))

    def ask_in_shadow(self, route: Route, shown: Trace, ask: Callable[[], Coroutine[Any, Any, Trace]]) -> None:
        """Ask the candidate what the live release was asked, behind the answer and beside others; `ask` keeps its trace."""
        canary, live = route.canary, observe(shown)
        if canary is None or route.shadow is None or live is None or len(self._shadows) >= SHADOWS_AT_ONCE:
            return
        task = asyncio.ensure_future(self._shadow(route, canary, live, ask))
        self._shadows.add(task)
        task.add_done_callback(self._shadows.discard)

    async def stop(self, alias: str, canary: Canary, reason: str, evidence: dict[str, Any]) -> None:
        """End a trial, unless somebody has already. The decision is on disk when this returns, or the log says why not."""
        try:
            await asyncio.to_thread(decide, self._workspace, alias, "stopped", lambda before: stopped(before, canary), reason, evidence=evidence)
        except UsageError:  # over already
            return
        except UnderstudyError as error:
            self._log.write("fault", kind=type(error).__name__, message=error.message, remedy=error.remedy)
            return
        self._metrics.release_stops.labels(alias).inc()
        self._log.write("release_stopped", alias=alias, release=canary.release, reason=reason)

    async def close(self) -> None:
        """End what is asked in the shadow."""
        for task in list(self._shadows):
            task.cancel()
        await asyncio.gather(*self._shadows, return_exceptions=True)

    async def settle(self) -> None:
        """Wait for what is asked in the shadow."""
        await asyncio.gather(*self._shadows, return_exceptions=True)

    async def _shadow(self, route: Route, canary: Canary, live: Observation, ask: Callable[[], Coroutine[Any, Any, Trace]]) -> None:
        assert route.shadow is not None
        try:
            trace = await ask()
        except UnderstudyError as error:
            self._log.write("shadow_failed", release=route.shadow.name, message=error.message)
            return
        self._metrics.count_release(route.shadow.name, "shadow", trace.outcome)
        if seen := observe(trace):
            await self._add(route.alias, canary, Line(live=live, canary=seen))

    async def _add(self, alias: str, canary: Canary, line: Line) -> None:
        """One line more; the trial ends where it tells that the candidate is worse."""
        async with self._one_at_a_time:
            path, known = trial_file(self._workspace, alias, canary), self._open.get(alias)
            try:
                trial = known[1] if known and known[0] == canary else await asyncio.to_thread(read_trial, path, self._workspace.config.releases)
                self._open[alias] = (canary, trial)
                await asyncio.to_thread(keep_line, path, line)
            except OSError as error:
                self._log.write("fault", kind="OSError", message=f"{path.name}: {error.strerror}")
                return
            trial.add(line)
            verdict = trial.verdict
        if verdict:
            await self.stop(alias, canary, verdict, trial.as_json())
