"""The commands, by subject; each returns an Outcome, and cli.py alone prints and exits."""

from __future__ import annotations

import json
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


def printable(text: str) -> str:
    """Text from documents or models as a terminal may show it: no control characters."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def inert_json(value: object, indent: int | None = 2) -> str:
    """JSON that a terminal may show: json.dumps alone leaves the C1 controls and the bidirectional marks as they are."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)
