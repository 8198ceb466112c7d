"""The fair queue: never more than its slots, no tenant starved, every slot back."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from serve.gateway.errors import Refused
from serve.gateway.limits import FairGate
from serve.gateway.requests import MAX_REPEATS, harmless_schema


@settings(max_examples=40, deadline=None)
@given(
    at_once=st.integers(1, 4),
    requests=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 4), st.sampled_from(["ends", "fails", "cancelled"])), min_size=1, max_size=24),
)
def test_whatever_happens_to_requests_no_slot_is_lost_and_none_too_many_is_given(at_once: int, requests: list[tuple[str, int, str]]) -> None:
    gate, most = FairGate(at_once, 100, 60), 0

    async def request(tenant: str, turns: int, ending: str) -> None:
        nonlocal most
        async with gate.slot(tenant):
            most = max(most, gate.running)
            for _ in range(turns):
                await asyncio.sleep(0)
            if ending == "fails":
                raise ValueError

    async def run() -> None:
        tasks = [asyncio.ensure_future(request(*each)) for each in requests]
        for (_, turns, ending), task in zip(requests, tasks, strict=True):
            if ending == "cancelled":
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        async with gate.slot("z"):
            assert gate.running == 1

    asyncio.run(run())
    assert most <= at_once
    assert (gate.running, gate.waiting) == (0, 0)


def test_a_flood_of_one_tenant_delays_another_by_one_request() -> None:
    order: list[str] = []

    async def request(gate: FairGate, tenant: str) -> None:
        async with gate.slot(tenant):
            order.append(tenant)
            await asyncio.sleep(0)

    async def run() -> None:
        gate = FairGate(1, 100, 60)
        tasks = [asyncio.ensure_future(request(gate, "flood")) for _ in range(20)]
        await asyncio.sleep(0)
        tasks += [asyncio.ensure_future(request(gate, "small")) for _ in range(3)]
        await asyncio.gather(*tasks)

    asyncio.run(run())
    assert Counter(order[:8])["small"] == 3, order


def test_slots_are_shared_evenly_while_two_tenants_want_them() -> None:
    async def run() -> None:
        gate, held, release = FairGate(4, 100, 60), Counter[str](), asyncio.Event()

        async def request(tenant: str, until: asyncio.Event) -> None:
            async with gate.slot(tenant):
                held[tenant] += 1
                await until.wait()
                held[tenant] -= 1

        first = asyncio.Event()
        tasks = [asyncio.ensure_future(request("a", first)) for _ in range(4)]
        await asyncio.sleep(0)
        tasks += [asyncio.ensure_future(request(tenant, release)) for tenant in "aaaabbbb"]
        await asyncio.sleep(0)
        first.set()
        for _ in range(10):
            await asyncio.sleep(0)
        assert held == {"a": 2, "b": 2}
        release.set()
        await asyncio.gather(*tasks)

    asyncio.run(run())


def test_a_wait_that_is_too_long_or_a_queue_that_is_full_is_429() -> None:
    async def run() -> None:
        gate = FairGate(1, 1, 0.02)
        async with gate.slot("a"):
            waiting = asyncio.ensure_future(gate.slot("a").__aenter__())
            await asyncio.sleep(0)
            with pytest.raises(Refused, match="wait already"):
                await gate.slot("a").__aenter__()
            with pytest.raises(Refused, match="no turn") as caught:
                await waiting
        assert caught.value.status == 429 and (caught.value.retry_after or 0) >= 1
        assert (gate.running, gate.waiting) == (0, 0)

    asyncio.run(run())


def test_schemas_that_grow_without_bound_are_refused() -> None:
    assert harmless_schema({"properties": {"pattern": {"type": "string", "maxLength": MAX_REPEATS}}, "$defs": {"a": {"$ref": "#/$defs/a"}}})
    for wrong in ({"a": {"b": [{"pattern": "x"}]}}, {"minItems": 1e9}, {"$ref": "file:///etc/passwd"}, {"x": [{}] * 3000}):
        with pytest.raises((ValueError, ValidationError)):
            harmless_schema(wrong)
