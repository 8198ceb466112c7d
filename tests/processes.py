"""What runs, as /proc tells it."""

from __future__ import annotations

from pathlib import Path


def session_of(pid: int) -> dict[int, str]:
    """Living processes of a session and their names."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, rest = stat.read_text().rpartition(")")
        except OSError:
            continue
        if int(rest.split()[3]) == pid and rest.split()[0] not in "ZX":
            found[int(stat.parent.name)] = head.partition("(")[2]
    return found
