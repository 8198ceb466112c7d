"""The catalogue in force: what is served changes under the gateway, and no request waits for a busy engine to list it."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from typing import Any

import aiohttp

from serve.gateway.catalogue import Catalogue, Listing, read_catalogue
from serve.gateway.observe import Log
from serve.gateway.routing import ReleaseBook
from serve.prove import MERGED_PROOF, PROOF
from serve.repeat import Repeated
from understudy.engines import RunningEngine
from understudy.errors import AdapterError
from understudy.workspace import Workspace

FRESH_SECONDS = 1.0  # for which what is served is not looked up again
STALE_SECONDS = 10.0  # after which nothing is answered from it
LISTING_SECONDS = 5.0

Registry = frozenset[tuple[str, int]]  # the adapters' manifests and proofs, each with when it was written


class Names:
    """The catalogue in force, made in a thread and with a look at the engine's own list: at most once a second while the registry is the same."""

    def __init__(self, workspace: Workspace, http: aiohttp.ClientSession, log: Log) -> None:
        self._workspace, self._http, self._log = workspace, http, log
        self.releases, self._repeated = ReleaseBook(workspace), Repeated(log)
        self.engine: RunningEngine | None = None  # set by what starts and restarts it
        self.is_paused = False  # why there is none
        self._made: tuple[float, RunningEngine | None, Catalogue] | None = None
        self._registry: Registry = frozenset()  # as it was when the catalogue was made
        self._making = asyncio.Lock()
        self._refreshing: asyncio.Task[Catalogue] | None = None

    async def catalogue(self) -> Catalogue:
        """What can be named; where it is older than a second it is made anew behind, so that no request waits for a busy engine's list."""
        if self._made is None or self._made[1] is not self.engine or self._age > STALE_SECONDS:
            return await self.fresh()
        if self._age > FRESH_SECONDS and (self._refreshing is None or self._refreshing.done()):
            self._refreshing = asyncio.ensure_future(self.fresh())
        return self._made[2]

    async def fresh(self) -> Catalogue:
        """What can be named now: what is refused by it was not proven a moment ago either."""
        async with self._making:
            registry = await asyncio.to_thread(read_registry, self._workspace)
            if self._made is None or self._made[1] is not self.engine or self._age > FRESH_SECONDS or registry != self._registry:
                engine = self.engine
                self._made, self._registry = (time.monotonic(), engine, await self._make(engine)), registry
            return self._made[2]

    async def _make(self, engine: RunningEngine | None) -> Catalogue:
        """The catalogue anew. The one before it stands while a busy engine does not list what it serves, or a manifest is broken."""
        before = self._made[2] if self._made and self._made[1] is engine else None
        try:
            listing = await self._listing(engine) if engine else None
            named = (self._workspace, engine if listing else None, listing or {}, self.releases, self._repeated, self.is_paused)
            return await asyncio.to_thread(read_catalogue, *named)
        except TimeoutError:
            return before or read_catalogue(self._workspace, None, {}, self.releases, self._repeated)
        except AdapterError as error:
            if before is None:
                raise
            self._log.write("fault", kind="AdapterError", message=error.message, remedy=error.remedy)
            return before

    def expire(self) -> None:
        """Look anew before the next answer: a server could not be reached."""
        self._made = None

    @property
    def _age(self) -> float:
        return time.monotonic() - self._made[0] if self._made else math.inf

    async def _listing(self, engine: RunningEngine) -> Listing | None:
        """None where nothing is there. Raises TimeoutError where it takes long to answer."""
        try:
            timeout = aiohttp.ClientTimeout(total=LISTING_SECONDS)
            headers = {"Authorization": f"Bearer {engine.api_key}"} if engine.api_key_env else {}
            async with self._http.get(f"{engine.url}/models", headers=headers, timeout=timeout, allow_redirects=False) as reply:
                rows: list[dict[str, Any]] = (await reply.json(content_type=None))["data"]
                return {row["id"]: (row.get("root") or "", row.get("parent") or "") for row in rows}
        except TimeoutError:
            raise
        except (aiohttp.ClientError, OSError, KeyError, TypeError, ValueError):
            return None


def read_registry(workspace: Workspace) -> Registry:
    """Changes with every adapter and every proof."""
    found = set()
    for file in workspace.adapters.glob("*/*/*.json"):
        if file.name in ("manifest.json", PROOF, MERGED_PROOF):
            with contextlib.suppress(FileNotFoundError):
                found.add((str(file), file.stat().st_mtime_ns))
    return frozenset(found)
