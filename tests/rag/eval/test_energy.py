"""Energy by RAPL's files as the kernel documents them (Documentation/power/powercap), in a folder of our own."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from rag.eval.energy import Meter, counters, keep_energy
from understudy.records import Question, Trace


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """Two packages, the core of one of them, and a zone that only root may read."""
    for zone, name in (("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "core"), ("intel-rapl:1", "package-1"), ("intel-rapl:2", "psys")):
        (tmp_path / "powercap" / zone).mkdir(parents=True)
        (tmp_path / "powercap" / zone / "name").write_text(f"{name}\n")
        (tmp_path / "powercap" / zone / "max_energy_range_uj").write_text("100000000\n")
    for zone in ("intel-rapl:0", "intel-rapl:0:0", "intel-rapl:1"):
        put(tmp_path / "powercap", zone, 90.0)
    return tmp_path / "powercap"


def put(powercap: Path, zone: str, joules: float) -> None:
    (powercap / zone / "energy_uj").write_text(f"{round(joules * 1e6)}\n")


def test_a_model_is_charged_what_the_packages_used_while_it_was_asked(powercap: Path, tmp_path: Path, ask, reply) -> None:  # type: ignore[no-untyped-def]
    meter, readings = Meter(lambda: [c for c in counters(powercap) if "gpu" not in c.name]), iter([95.0, 2.0, 10.0])

    async def run(_: Question) -> Trace:
        put(powercap, "intel-rapl:0", next(readings))  # the counter turns over at 100 J
        return reply()

    async def run_all() -> None:
        for _ in range(3):
            await meter.metered(run)(ask())

    asyncio.run(run_all())
    assert meter.joules == {"package-0 (intel-rapl:0)": pytest.approx(20.0), "package-1 (intel-rapl:1)": 0.0}
    assert keep_energy(tmp_path, {"base": meter})["base"]["joules_per_question"] == pytest.approx(20 / 3, abs=1e-3)
    again = keep_energy(tmp_path, {"base": meter, "new": Meter(list)})  # a session later
    assert again["base"]["questions"] == 6 and again["base"]["joules_per_question"] == pytest.approx(20 / 3, abs=1e-3) and "new" not in again


def test_without_a_counter_the_energy_is_unknown(tmp_path: Path, ask, reply) -> None:  # type: ignore[no-untyped-def]
    meter = Meter(lambda: counters(tmp_path / "no such folder")[:0])

    async def run(_: Question) -> Trace:
        return reply()

    asyncio.run(meter.metered(run)(ask()))
    assert keep_energy(tmp_path, {"base": meter}) == {} and not (tmp_path / "energy.json").exists()
