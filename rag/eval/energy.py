"""Energy that a model's answers took, where the machine tells: processor packages by RAPL (/sys/class/powercap), GPUs by NVML.

Counters are of the whole package and the whole GPU, whoever uses them: measure on a machine that does nothing else. Reading RAPL needs root on
most kernels (CVE-2020-8694); what cannot be read is left out, and without any counter the energy is unknown, not zero.
"""

from __future__ import annotations

import ctypes
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from understudy.files import read_json, write_json
from understudy.records import Question, Trace

POWERCAP = Path("/sys/class/powercap")
FILE = "energy.json"
Runner = Callable[[Question], Awaitable[Trace]]


class Counter:
    """A counter of joules that starts again at zero beyond its range."""

    def __init__(self, name: str, read: Callable[[], float], span: float = float("inf")) -> None:
        self.name, self._read, self._span = name, read, span
        self._last = read()

    def since_last(self) -> float:
        """Joules since the last reading, 0 where it cannot be read any more. At most one turn of the counter may lie between two readings."""
        try:
            now = self._read()
        except (OSError, ValueError):
            return 0.0
        used = now - self._last
        self._last = now
        return used if used >= 0 else used + self._span


def counters(powercap: Path = POWERCAP) -> list[Counter]:
    """Every counter that can be read: one a processor package, one a GPU."""
    return [*_packages(powercap), *_gpus()]


class Meter:
    """Adds up what a model's questions take: reads the counters when its first question is asked and whenever one is answered."""

    def __init__(self, found: Callable[[], list[Counter]] = counters) -> None:
        self._find = found
        self._counters: list[Counter] | None = None
        self.joules: dict[str, float] = {}
        self.questions = 0

    def metered(self, runner: Runner) -> Runner:
        """The runner, measured."""

        async def run(question: Question) -> Trace:
            if self._counters is None:
                self._counters = self._find()
            trace = await runner(question)
            self.questions += 1
            for counter in self._counters:
                self.joules[counter.name] = self.joules.get(counter.name, 0.0) + counter.since_last()
            return trace

        return run


def keep_energy(folder: Path, meters: dict[str, Meter]) -> dict[str, dict[str, Any]]:
    """Add what was measured to the run's folder; {model: {joules_per_question, questions, joules: {counter: joules}}} of the run so far.

    What a killed session used is lost with its questions, so that the mean stays right.
    """
    path = folder / FILE
    kept: dict[str, dict[str, Any]] = read_json(path) if path.exists() else {}
    for name, meter in meters.items():
        if meter.joules:
            before = kept.get(name, {"questions": 0, "joules": {}})
            joules = {key: before["joules"].get(key, 0.0) + meter.joules.get(key, 0.0) for key in dict.fromkeys([*before["joules"], *meter.joules])}
            questions = before["questions"] + meter.questions
            kept[name] = {"joules_per_question": round(sum(joules.values()) / questions, 3), "questions": questions, "joules": joules}
    if any(meter.joules for meter in meters.values()):
        write_json(path, kept)
    return kept


def _packages(powercap: Path) -> list[Counter]:
    found = []
    for zone in sorted(powercap.glob("*-rapl:*")):
        if zone.name.count(":") == 1:  # a package; what lies inside it has two
            try:
                name, span = (zone / "name").read_text().strip(), int((zone / "max_energy_range_uj").read_text()) / 1e6
                found.append(Counter(f"{name} ({zone.name})", lambda file=zone / "energy_uj": int(file.read_text()) / 1e6, span))  # type: ignore[misc]
            except (OSError, ValueError):
                continue
    return found


def _gpus() -> list[Counter]:
    """Total energy since the driver was loaded, of every GPU that counts it (Volta and later), through NVIDIA's management library."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return []
    count = ctypes.c_uint()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return []
    found = []
    for place in range(count.value):
        device = ctypes.c_void_p()
        if nvml.nvmlDeviceGetHandleByIndex_v2(place, ctypes.byref(device)):
            continue

        def read(device: ctypes.c_void_p = device) -> float:
            millijoules = ctypes.c_ulonglong()
            if nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(millijoules)):
                raise OSError("NVML gives no energy")
            return millijoules.value / 1000

        try:
            found.append(Counter(f"gpu {place}", read))
        except OSError:
            continue
    return found
