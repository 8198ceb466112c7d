"""The commands, by subject; each returns an Outcome, and cli.py alone prints and exits."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import dataclass, field
from typing import Any

from understudy.workspace import Workspace, open_workspace


@dataclass(frozen=True)
class Outcome:
    """What a command did: for programs, for people, and its exit code."""

    result: dict[str, Any]
    lines: list[str] = field(default_factory=list)
    exit_code: int = 0


def workspace_of(args: Namespace) -> Workspace:
    """The workspace the arguments name, with their --set overrides."""
    return open_workspace(args.workspace, args.set)


def report(line: str) -> None:
    """A line of progress, on stderr so that --json output stays clean."""
    sys.stderr.write(f"  {line}\n")
    sys.stderr.flush()
