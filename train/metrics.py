"""A run's metrics, a row a step: metrics.jsonl in its folder, and whatever else the recipe reports to.

A reporter is what `report_to` names: tensorboard, or an entry point of the group `understudy.reporters` in an installed package,
a callable that takes the run's folder and the steps already done, and returns a Reporter.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from understudy.errors import UsageError
from understudy.files import read_jsonl, write_jsonl

FILE, TENSORBOARD = "metrics.jsonl", "tensorboard"
GROUP = "understudy.reporters"
Row = dict[str, float]  # step, loss, learning_rate, grad_norm, tokens_per_second; validation_loss where it was taken


class Reporter(Protocol):
    """Receives the metrics of a run."""

    def log(self, row: Row) -> None:
        """One step's metrics, by name."""

    def close(self) -> None:
        """The run has ended or is interrupted."""


class JsonLines:
    """A JSON object a line, written as it comes."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def log(self, row: Row) -> None:
        """One step's line."""
        self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Event files in RUN/tensorboard, for `tensorboard --logdir`."""

    def __init__(self, run: Path, steps: int) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(run / TENSORBOARD), purge_step=steps + 1 if steps else None)

    def log(self, row: Row) -> None:
        """One step's metrics as scalars."""
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(f"train/{name}", value, int(row["step"]))

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


class Metrics:
    """Writes each step's metrics. Use as a context manager; rows of steps that a killed run took after its last checkpoint are dropped.

    Of several processes only the main one writes.
    """

    def __init__(self, run: Path, report_to: list[str], steps: int, is_main: bool = True) -> None:
        self._reporters: list[Reporter] = []
        if is_main:
            makers = find_reporters(report_to)
            write_jsonl(run / FILE, [row for row in read_whole(run / FILE) if row["step"] <= steps])
            self._reporters = [JsonLines(run / FILE), *(make(run, steps) for make in makers)]

    def log(self, row: Row) -> None:
        """Write one step's metrics."""
        for reporter in self._reporters:
            reporter.log(row)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for reporter in self._reporters:
            reporter.close()


def read_whole(path: Path) -> list[Row]:
    """The rows of a metrics file; a last line that a killed run left unfinished is no row."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    if not text.endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
    return read_jsonl(path)


def find_reporters(names: list[str]) -> list[Callable[[Path, int], Reporter]]:
    """The makers of the named reporters; raises UsageError for one that is not installed."""
    installed = {point.name: point for point in entry_points(group=GROUP)}
    for name in names:
        if name != "tensorboard" and name not in installed:
            raise UsageError(f"report_to: no reporter {name}", f"one of: {', '.join(['tensorboard', *sorted(installed)])}; packages add others ({GROUP})")
    return [TensorBoard if name == "tensorboard" else installed[name].load() for name in names]
