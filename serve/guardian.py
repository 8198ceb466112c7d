"""Runs a command so that it and all its descendants end when the process that asked for it ends, even by kill -9.

Started as `python -I -S guardian.py LIFELINE_FD COMMAND…`, the leader of a session of its own. The asking process holds the
other end of the lifeline pipe; the kernel closes it however that process dies. (PR_SET_PDEATHSIG alone would not do: it
fires when the *thread* that forked ends, and vLLM starts its engine and worker processes from threads.) Standard library only,
so that it is up in milliseconds.

    lifeline closed   everything is killed at once
    SIGTERM           the command is asked to end, and killed when it does not; exit status as the command's
    command ends      its left-over descendants are killed
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import select
import signal
import subprocess
import sys
import time
from types import FrameType

GRACE_SECONDS = 15.0  # for the command to end by itself after SIGTERM
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


class StopAsked(Exception):
    """SIGTERM arrived."""


def main(arguments: list[str]) -> int:
    """Guard the command until it ends; its exit status, 128 + signal where a signal ended it."""
    lifeline, command = int(arguments[0]), arguments[1:]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans become our children, not init's
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _raise_stop)
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),  # safe: there is one thread here
    )
    try:
        orphaned = _wait(child.pid, lifeline)
    except StopAsked:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child.terminate()
        orphaned = _wait(child.pid, lifeline, GRACE_SECONDS)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if orphaned:
        child.kill()
    _kill_session()
    status = child.wait()
    _reap_orphans()
    _clear_shared_memory()
    return 128 - status if status < 0 else status


def _raise_stop(_number: int, _frame: FrameType | None) -> None:
    raise StopAsked


def _wait(pid: int, lifeline: int, seconds: float | None = None) -> bool:
    """Wait for the command or the lifeline to end; False when the command ended, True when it must be killed."""
    process = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(process, select.POLLIN)
    poll.register(lifeline, select.POLLHUP)
    try:
        ready = {descriptor for descriptor, _ in poll.poll(None if seconds is None else seconds * 1000)}
    finally:
        os.close(process)
    return process not in ready


def _kill_session() -> None:
    """Kill what is left of our session. Python's resource trackers go last: they free the shared memory of the dead."""
    deadline = time.monotonic() + 1.0
    while members := _session_members():
        others = [pid for pid in members if not _is_tracker(pid)]
        for pid in members if time.monotonic() > deadline else others:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _reap_orphans() -> None:
    """Collect the dead descendants; a dead process whose threads are still being torn down takes a moment."""
    deadline = time.monotonic() + 1.0
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < deadline:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.02)


def _clear_shared_memory() -> None:
    """Remove what Intel's OpenMP and loky leave behind for each process that was killed: a small file, named by its pid."""
    for name in os.listdir("/dev/shm"):
        match = re.fullmatch(r"__KMP_REGISTERED_LIB_(\d+)_\d+|sem\.loky-(\d+)-\w+", name)
        if match and not os.path.exists(f"/proc/{match[1] or match[2]}"):
            with contextlib.suppress(OSError):  # another user's, or gone already
                os.unlink(f"/dev/shm/{name}")


def _session_members() -> list[int]:
    """Living processes of this session, less this one."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/stat") as file:
                state, _, _, session = file.read().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(session) == os.getsid(0) and state not in "ZX":
            found.append(int(name))
    return found


def _is_tracker(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return b"resource_tracker" in file.read()
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
