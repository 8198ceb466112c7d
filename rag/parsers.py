"""Children that parse files: each stays for many files, under limits of memory, processor and wall time, and is replaced when it dies.

An interpreter's start costs more than most files do, so a child is kept; a fresh one takes over after RECYCLE files, because memory
that a parser leaks counts against the files after it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

from understudy.errors import DocumentError
from understudy.settings.corpus import Ingest

RECYCLE = 500  # files of one child
START_SECONDS = 60.0
ROOT = Path(__file__).parents[1]


class Parsers:
    """Up to `count` children; `parse` may be called from as many threads. Use as a context manager."""

    def __init__(self, limits: Ingest, count: int) -> None:
        self._limits = limits
        self._idle: SimpleQueue[Child | None] = SimpleQueue()
        for _ in range(count):
            self._idle.put(None)
        self._children: set[Child] = set()
        self._lock = threading.Lock()
        self._closed = False

    def parse(self, path: Path) -> list[dict[str, Any]]:
        """The documents of a file, as rag.parse answers; raises DocumentError with the reason where there are none."""
        child = self._idle.get()
        try:
            if child is None or not child.usable:
                child = self._replace(child)
            return child.parse(path)
        finally:
            self._idle.put(child)

    def _replace(self, child: Child | None) -> Child:
        fresh = Child(self._limits)
        with self._lock:
            if child is not None:
                child.kill()
                self._children.discard(child)
            self._children.add(fresh)
            if self._closed:
                fresh.kill()
        return fresh

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._lock:
            self._closed = True
            for child in self._children:
                child.kill()


class Child:
    """One running `python -m rag.parse --worker`."""

    def __init__(self, limits: Ingest) -> None:
        self._limits = limits
        self._left = RECYCLE
        self._received = b""
        cpu = math.ceil(limits.parse_seconds)
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(  # -P: a folder called rag/ among the documents is not our code
            [sys.executable, "-P", "-m", "rag.parse", "--worker", str(int(limits.parse_memory_gib * 2**30)), str(cpu), limits.parser],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": paths},
        )
        self._waiting = selectors.DefaultSelector()
        assert self._process.stdout is not None
        self._waiting.register(self._process.stdout, selectors.EVENT_READ)
        self._started = False

    @property
    def usable(self) -> bool:
        """Whether it runs and has files left."""
        return self._left > 0 and self._process.poll() is None

    def parse(self, path: Path) -> list[dict[str, Any]]:
        """See Parsers.parse."""
        if not self._started:
            self._answer(START_SECONDS)
            self._started = True
        self._left -= 1
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(str(path)).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise DocumentError(self._end()) from error
        answer = json.loads(self._answer(self._limits.parse_seconds))
        if isinstance(answer, dict):
            if "memory limit" in answer["error"]:
                self._left = 0
            raise DocumentError(answer["error"])
        return list(answer)

    def kill(self) -> None:
        """End it at once; its files are closed."""
        self._process.kill()
        self._process.wait()
        self._waiting.close()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with contextlib.suppress(OSError):  # what was still to be written goes nowhere
                    pipe.close()

    def _answer(self, seconds: float) -> bytes:
        """The next line it writes; raises DocumentError where it takes too long or dies."""
        deadline = time.monotonic() + seconds
        assert self._process.stdout is not None
        parts = [self._received]
        while b"\n" not in parts[-1]:
            left = deadline - time.monotonic()
            if left <= 0 or not self._waiting.select(left):
                self.kill()
                raise DocumentError(f"the parser was stopped after {seconds:g} s")
            block = os.read(self._process.stdout.fileno(), 1 << 20)
            if not block:
                raise DocumentError(self._end())
            parts.append(block)
        line, _, self._received = b"".join(parts).partition(b"\n")
        return line

    def _end(self) -> str:
        """Why it died, in words."""
        code = self._process.wait()
        if code == -signal.SIGXCPU:
            return f"the parser was stopped after {self._limits.parse_seconds:g} s of processor time"
        if code < 0:
            return f"the parser crashed ({signal.Signals(-code).name}), or ran out of its {self._limits.parse_memory_gib:g} GiB"
        return f"the parser ended with exit code {code}"
