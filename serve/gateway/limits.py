"""Who may go next: a rate limit a key, and a bounded, fair queue between tenants in front of each model server."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from serve.gateway.errors import Refused

SMOOTHING = 0.1  # weight of the newest request in the mean duration, which Retry-After is estimated from
LONGEST_RETRY = 60.0  # seconds


class RateLimits:
    """A token bucket a key: `per_minute` requests, as many of them at once."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}  # key id → (tokens left, when)

    def take(self, key_id: str, per_minute: int) -> None:
        """Count a request; raises Refused (429) with the time until the next one is allowed."""
        now = self._clock()
        left, then = self._buckets.get(key_id, (float(per_minute), now))
        left = min(float(per_minute), left + (now - then) * per_minute / 60)
        if left < 1:
            self._buckets[key_id] = (left, now)
            raise Refused(429, "rate_limit_exceeded", f"this key may make {per_minute} requests a minute", retry_after=math.ceil((1 - left) * 60 / per_minute))
        self._buckets[key_id] = (left - 1, now)


class FairGate:
    """At most `at_once` requests run; the others wait, each tenant in its own order. The tenant that has the fewest running goes next.

    So one tenant's flood delays another by one request at most (max-min fairness; Bertsekas and Gallager, Data Networks, 6.5.2).
    """

    def __init__(self, at_once: int, max_waiting: int, wait_seconds: float) -> None:
        self._at_once, self._max_waiting, self._wait_seconds = at_once, max_waiting, wait_seconds
        self._running: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # a tenant that was served goes to the end
        self._mean_seconds = 1.0

    @property
    def running(self) -> int:
        """Requests that hold a slot."""
        return self._running.total()

    @property
    def waiting(self) -> int:
        """Requests that wait for one."""
        return sum(map(len, self._waiting.values()))

    @asynccontextmanager
    async def slot(self, tenant: str) -> AsyncIterator[None]:
        """Hold a slot for the block; raises Refused (429) where the tenant's queue is full or the wait too long."""
        if self.running < self._at_once and not self._waiting:
            self._running[tenant] += 1
        else:
            await self._wait(tenant)
        began = time.monotonic()
        try:
            yield
        finally:
            self._mean_seconds += SMOOTHING * (time.monotonic() - began - self._mean_seconds)
            self._leave(tenant)

    async def _wait(self, tenant: str) -> None:
        queue = self._waiting.get(tenant) or deque()
        if len(queue) >= self._max_waiting:
            raise self._refusal("too many requests wait already")
        self._waiting[tenant] = queue
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(turn)
        try:
            async with asyncio.timeout(self._wait_seconds):
                await turn
        except BaseException as fault:
            if turn.done() and not turn.cancelled():  # our turn came at the same moment
                self._leave(tenant)
            else:
                self._forget(tenant, turn)
            if isinstance(fault, TimeoutError):
                raise self._refusal(f"no turn within {self._wait_seconds:g} s") from fault
            raise

    def _forget(self, tenant: str, turn: asyncio.Future[None]) -> None:
        queue = self._waiting[tenant]
        queue.remove(turn)
        if not queue:
            del self._waiting[tenant]

    def _leave(self, tenant: str) -> None:
        self._running[tenant] -= 1
        if not self._running[tenant]:
            del self._running[tenant]
        while self._waiting and self.running < self._at_once:
            chosen = min(self._waiting, key=lambda each: self._running[each])  # the first of equals waits longest
            queue = self._waiting.pop(chosen)
            turn = queue.popleft()
            if queue:
                self._waiting[chosen] = queue
            if not turn.done():
                self._running[chosen] += 1
                turn.set_result(None)

    def _refusal(self, why: str) -> Refused:
        expected = self._mean_seconds * (self.waiting + 1) / self._at_once
        return Refused(429, "overloaded", f"the server is busy: {why}", retry_after=min(LONGEST_RETRY, math.ceil(expected)))
