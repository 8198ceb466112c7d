"""Write docs/cli.md from the command table; --check fails when the file differs."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ["COLUMNS"] = "100"
TARGET = Path(__file__).parent.parent / "docs" / "cli.md"


def reference() -> str:
    """The help of every command, as Markdown."""
    from understudy.cli import COMMANDS, build_parser

    parser = build_parser()
    parts = ["# Commands\n\nMade by `python scripts/cli_reference.py` from the command table; do not edit.\n", f"```\n{parser.format_help()}```\n"]
    for command in COMMANDS:
        child = parser
        for word in command.words.split():
            subparsers = next(a for a in child._actions if isinstance(a, argparse._SubParsersAction))
            child = subparsers.choices[word]
        parts.append(f"## {command.words}\n\n```\n{child.format_help()}```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    if "--check" in sys.argv:
        if not TARGET.exists() or TARGET.read_text() != reference():
            sys.exit("docs/cli.md is not what the command table says: run .venv/bin/python scripts/cli_reference.py")
    else:
        TARGET.write_text(reference())
