"""A row of the table of commands, and arguments that several rows share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

Arguments = list[tuple[tuple[str, ...], dict[str, object]]]


@dataclass(frozen=True)
class Command:
    """One row of the table: words typed, help, the function that runs it, and its arguments."""

    words: str
    help: str
    run: str  # module:function, in understudy.commands
    arguments: Arguments = field(default_factory=list)


def arg(*names: str, **options: object) -> tuple[tuple[str, ...], dict[str, object]]:
    """An argument, as argparse takes it."""
    return names, options


def number(text: str) -> float:
    """A finite number: no comparison refuses `nan`. Raises ValueError, which argparse reports."""
    found = float(text)
    if not math.isfinite(found):
        raise ValueError(text)
    return found


MODEL = arg("--model", help="base, an adapter's name, a release's alias, or a configured remote; default: releases.default, else the newest adapter")
MODE = arg("--mode", choices=["agentic", "fast", "closed-book"], help="default: agent.mode of the configuration")
QUESTIONS = arg("--questions", required=True, metavar="FILE", help="question file (JSONL)")
