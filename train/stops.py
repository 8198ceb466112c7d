"""What ends a run before its time: Ctrl-C, a gradient that is not finite, memory that runs out. Each leaves the last good checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch

from train.trie import Row
from understudy.errors import TrainingError
from understudy.files import write_json

SIGNALS = (signal.SIGINT, signal.SIGTERM)
DUMP = "not-finite.json"


class NotFinite(TrainingError):
    """A step's gradient is not finite; the weights are those from before the step."""


class Interruption:
    """Ctrl-C or SIGTERM during a step: `asked` turns true, so that the step can be ended and kept. A second one acts at once."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self.asked = False
        self._report, self._before = report, dict[int, Any]()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(number, self._before[number])
        with suppress(RuntimeError):  # the signal came while something was being written
            self._report("stopping once this step is done and kept; again: at once, back to the last checkpoint")


@contextmanager
def explained(run: Path, step: int, batches: list[list[Row]], describe: Callable[[Row], dict[str, Any]]) -> Iterator[None]:
    """Turn what goes wrong within a step into a TrainingError that says how to go on; a step that is not finite has its rows written down."""
    try:
        yield
    except NotFinite as error:
        write_json(run / DUMP, {"step": step, "error": error.message, "rows": [describe(row) for batch in batches for row in batch]})
        raise TrainingError(f"{error.message}, at step {step}; its rows are in {run / DUMP}", error.remedy) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            f"memory ran out at step {step}",
            "free memory and train again: it goes on from the last checkpoint; or begin anew with a smaller tokens_per_batch or gradient_checkpointing=true",
        ) from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on the CPU (a plain RuntimeError) or a GPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
