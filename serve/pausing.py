"""Lending the engine's memory: `serve pause`, `serve resume`, and `train --borrow`.

The asking process and `serve` meet in two files in run/: pause.json says that the engine shall be away and for whom, serve.json what
the serving process makes of it. A holder that has died holds nothing any more, so nothing stays paused by accident.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ValidationError

from understudy.engines import is_alive
from understudy.errors import EngineError, NotFoundError, StorageError
from understudy.files import read_json, write_json
from understudy.workspace import Workspace

POLL_SECONDS, HEARTBEAT_SECONDS = 0.1, 15.0
SPARE_SECONDS = 60.0  # for an engine to stop, after its requests were given time to end

State = Literal["serving", "pausing", "paused", "starting"]


class Serving(BaseModel):
    """What the process of `understudy serve` says of itself."""

    pid: int
    url: str  # the gateway's
    state: State


class _Pause(BaseModel):
    holder: int  # the process it is for; 0: until `serve resume`


def find_serving(workspace: Workspace) -> Serving | None:
    """The running `understudy serve` of this workspace."""
    try:
        found = Serving.model_validate(read_json(_serving_file(workspace)))
    except (NotFoundError, StorageError, ValidationError):
        return None
    return found if is_alive(found.pid) else None


def announce(workspace: Workspace, url: str, state: State) -> None:
    """Say, as the serving process, how it is."""
    write_json(_serving_file(workspace), Serving(pid=os.getpid(), url=url, state=state).model_dump())


def withdraw(workspace: Workspace) -> None:
    """Take back what a serving process said, and any pause with it: on its way in and out."""
    for file in (_serving_file(workspace), _pause_file(workspace)):
        file.unlink(missing_ok=True)


def is_pause_wanted(workspace: Workspace) -> bool:
    """Whether the engine shall be away now."""
    holder = _holder(workspace)
    return holder is not None and (holder == 0 or is_alive(holder))


def pause(workspace: Workspace, report: Callable[[str], None], holder: int = 0) -> Serving:
    """Have the engine's memory freed: running requests end, others get 503. Returns once it is; raises NotFoundError, EngineError."""
    serving = _require_serving(workspace)
    if is_pause_wanted(workspace) and holder:
        raise EngineError("the engine is paused already, for someone else", "wait for them, or `understudy serve resume`")
    write_json(_pause_file(workspace), _Pause(holder=holder).model_dump())
    report(f"pausing the engine behind {serving.url}")
    try:
        return _wait_for(workspace, "paused", workspace.config.gateway.drain_seconds + SPARE_SECONDS, report)
    except BaseException:
        _let_go(workspace, holder)
        raise


def resume(workspace: Workspace, report: Callable[[str], None]) -> Serving:
    """Bring the engine back. Returns once it answers; raises NotFoundError, EngineError."""
    serving = _require_serving(workspace)
    _pause_file(workspace).unlink(missing_ok=True)
    report(f"bringing the engine behind {serving.url} back")
    return _wait_for(workspace, "serving", workspace.config.serve.start_seconds, report)


@contextmanager
def borrowed(workspace: Workspace, report: Callable[[str], None]) -> Iterator[None]:
    """The engine is away for the block, where one is served here; it comes back however the block or this process ends."""
    if find_serving(workspace) is None:
        yield
        return
    pause(workspace, report, os.getpid())
    try:
        yield
    finally:
        _let_go(workspace, os.getpid())
        report("the engine is given its memory back")


def wait_for_restart(workspace: Workspace, report: Callable[[str], None]) -> None:
    """Where `serve` is about to start its engine, return once it answers: a command's own would take its memory and its place.

    Raises EngineError where it does not come.
    """
    serving = find_serving(workspace)
    if serving is None or not (serving.state == "starting" or (serving.state != "serving" and not is_pause_wanted(workspace))):
        return
    report(f"waiting for the engine behind {serving.url}")
    with contextlib.suppress(NotFoundError):  # that server has ended instead
        _wait_for(workspace, "serving", workspace.config.serve.start_seconds, report)


def _holder(workspace: Workspace) -> int | None:
    """Whom a pause is for; None where there is none."""
    try:
        return _Pause.model_validate(read_json(_pause_file(workspace))).holder
    except (NotFoundError, StorageError, ValidationError):
        return None


def _let_go(workspace: Workspace, holder: int) -> None:
    """End a pause, unless it is somebody else's by now: `serve pause` outlasts the borrower whom it came upon."""
    if _holder(workspace) == holder:
        _pause_file(workspace).unlink(missing_ok=True)


def _require_serving(workspace: Workspace) -> Serving:
    serving = find_serving(workspace)
    if serving is None:
        raise NotFoundError("nothing is served from this workspace", f"start it: understudy --workspace {workspace.root} serve")
    return serving


def _wait_for(workspace: Workspace, state: State, seconds: float, report: Callable[[str], None]) -> Serving:
    began = spoken = time.monotonic()
    while time.monotonic() - began < seconds:
        serving = _require_serving(workspace)
        if serving.state == state:
            return serving
        if time.monotonic() - spoken > HEARTBEAT_SECONDS:
            spoken = time.monotonic()
            report(f"{serving.state} ({spoken - began:.0f} s)")
        time.sleep(POLL_SECONDS)
    raise EngineError(f"the engine is not {state} after {seconds:.0f} s", "see logs/gateway.jsonl and logs/engine.log")


def _serving_file(workspace: Workspace) -> Path:
    return workspace.engine_file.with_name("serve.json")


def _pause_file(workspace: Workspace) -> Path:
    return workspace.engine_file.with_name("pause.json")
