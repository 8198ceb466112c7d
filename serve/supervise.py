"""Our side of the engine's process: spawning it under its guardian, waiting for health, finding out why it died, stopping it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from understudy.engines import RunningEngine
from understudy.errors import EngineError
from understudy.files import read_json

GUARDIAN = Path(__file__).with_name("guardian.py")
STOP_SECONDS = 20.0  # longer than the guardian's own patience
POLL_SECONDS = 0.25
HEARTBEAT_SECONDS = 15.0

# What vLLM writes when it begins a stage of its start, in order.
STAGES = (
    ("Initializing a V1 LLM engine", "starting the engine process"),
    ("Starting to load model", "loading the weights"),
    ("Model loading took", "allocating the KV cache"),
    ("init engine", "loading the adapters"),
    ("Application startup complete", "answering"),
)


@dataclass
class Engine:
    """A vLLM engine and its guardian. Leaving the context stops both."""

    process: subprocess.Popen[bytes]
    lifeline: int  # our end of the pipe; the guardian kills everything when it closes
    log_file: Path
    running: RunningEngine | None = None
    engine_file: Path | None = None

    @property
    def pid(self) -> int:
        """The guardian's: SIGTERM to it ends the engine in order."""
        return self.process.pid

    def poll(self) -> int | None:
        """The exit status once the engine has ended."""
        return self.process.poll()

    def stop(self) -> None:
        """End the engine and everything it started; may be called twice."""
        if self.engine_file is not None:
            remove_announcement(self.engine_file, self.pid)
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_SECONDS)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                self._kill()
        self._kill()
        if self.lifeline >= 0:
            os.close(self.lifeline)
            self.lifeline = -1

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


def spawn(command: list[str], environment: dict[str, str], host: str, port: int, log_file: Path) -> Engine:
    """Start the command under its guardian, in a session of its own, writing to `log_file`; the log before is kept as .previous.

    Raises EngineError when the port is taken.
    """
    require_free_port(host, port)
    log_file.parent.mkdir(parents=True, exist_ok=True)
    if log_file.exists():
        log_file.replace(log_file.with_suffix(".previous" + log_file.suffix))
    theirs, ours = os.pipe()  # neither is inherited unless passed on
    try:
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(GUARDIAN), str(theirs), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[theirs],
                start_new_session=True,  # a terminal's Ctrl-C is ours to handle
            )
    except OSError as error:
        os.close(ours)
        raise EngineError(f"cannot start the engine: {error}", "understudy doctor") from error
    finally:
        os.close(theirs)
    return Engine(process, ours, log_file)


def wait_until_healthy(engine: Engine, url: str, seconds: float, on_progress: Callable[[str], None]) -> None:
    """Return when the engine answers /health; raises EngineError as soon as it has died, or after `seconds`."""
    began = spoken = time.monotonic()
    stage = "starting vLLM"
    on_progress(stage)
    while not _is_healthy(url):
        if engine.poll() is not None:
            raise died(engine)
        now = time.monotonic()
        if now - began > seconds:
            raise EngineError(f"the engine was not healthy after {seconds:.0f} s ({stage}); its log is {engine.log_file}", "raise serve.start_seconds")
        reached = _stage(engine.log_file) or stage
        if reached != stage or now - spoken > HEARTBEAT_SECONDS:
            stage, spoken = reached, now
            on_progress(f"{stage} ({now - began:.0f} s)")
        time.sleep(POLL_SECONDS)
    on_progress(f"ready after {time.monotonic() - began:.0f} s")


def died(engine: Engine) -> EngineError:
    """The error that says why an engine ended, as far as its log tells."""
    cause = find_cause(engine.log_file.read_text(encoding="utf-8", errors="replace"))
    remedy = "understudy doctor checks memory, ports and packages"
    if "address already in use" in cause.lower():
        remedy = "choose another port: serve.port=…"
    elif "memory" in cause.lower():
        remedy = "lower serve.kv_cache_gib (CPU) or serve.gpu_memory_utilization (GPU)"
    return EngineError(f"the engine ended with status {engine.poll()}: {cause}; its log is {engine.log_file}", remedy)


def find_cause(log: str) -> str:
    """The first error of a vLLM log, less its prefixes: later ones are consequences of it. Else the last line."""
    lines = [re.sub(r"^(\([^)]*pid=\d+\)\s*)?((INFO|WARNING|ERROR|CRITICAL) \d\S* [\d:]+ \[[^\]]*\]\s*)?", "", line).strip() for line in log.splitlines()]
    for number, line in enumerate(lines):
        if re.match(r"([\w.]*(Error|Exception|Interrupt)\b.*: .+|[\w.]+\.py: error: .+)", line) and "root cause" not in line:
            detail = lines[number + 1 : number + 2] if "validation error" in line else []  # pydantic says what is wrong below
            return " ".join([line, *detail])[:400]
    return next((line[:300] for line in reversed(lines) if line), "it wrote nothing")


def require_free_port(host: str, port: int) -> None:
    """Raises EngineError when something listens there; vLLM itself would share the port with another vLLM and not say so."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise EngineError(
                f"cannot listen on {host} port {port}: {error.strerror}", f"stop what uses it, or choose another: serve.port={port + 1}"
            ) from error


def free_port(host: str) -> int:
    """A port that nothing listens on now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def remove_announcement(engine_file: Path, pid: int) -> None:
    """Remove run/engine.json if it is about this engine."""
    if engine_file.exists() and read_json(engine_file).get("pid") == pid:
        engine_file.unlink(missing_ok=True)


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(url.removesuffix("/v1") + "/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def _stage(log_file: Path) -> str | None:
    log = log_file.read_text(encoding="utf-8", errors="replace")
    return next((label for marker, label in reversed(STAGES) if marker in log), None)
