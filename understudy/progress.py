"""Progress on stderr: a bar with a time estimate on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Self, TextIO

EVERY_SECONDS = 15.0  # between lines where there is no terminal


def is_colourful(stream: TextIO) -> bool:
    """Whether to write colours there: on a terminal, unless NO_COLOR is set (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


class Progress:
    """Counts work of a known size. Use as a context manager."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done, self.note = label, total, 0, ""
        self._began = self._shown = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Report `count` more units done; `note` is shown beside the bar."""
        self.done += count
        self.note = note or self.note
        now = time.monotonic()
        if now - self._shown >= (0.2 if self._terminal else EVERY_SECONDS):
            self._shown = now
            self._show()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._terminal and self._shown > self._began:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def _show(self) -> None:
        elapsed = time.monotonic() - self._began
        share = self.done / self.total if self.total else 1.0
        left = elapsed / share - elapsed if share > 0 else 0.0
        text = f"{self.label} {self.done}/{self.total} ({share:.0%}), about {left:.0f} s left{'  ' + self.note if self.note else ''}"
        if self._terminal:
            filled = int(share * 24)
            sys.stderr.write(f"\r\x1b[K  [{'#' * filled}{'.' * (24 - filled)}] {text}")
        else:
            sys.stderr.write(f"  {text}\n")
        sys.stderr.flush()


class SilentProgress(Progress):
    """Shows nothing: of several processes, one reports."""

    def _show(self) -> None:
        pass


def show_progress(label: str, total: int) -> Progress:
    """The progress display that commands hand to library code."""
    return Progress(label, total)
