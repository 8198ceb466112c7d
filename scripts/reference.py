"""Write docs/cli.md from the command table and docs/settings.md from the configuration and the recipe; --check fails where they differ."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from pydantic import BaseModel

os.environ["COLUMNS"] = "100"
DOCS = Path(__file__).parent.parent / "docs"


def commands() -> str:
    """The help of every command, as Markdown."""
    from understudy.cli import build_parser
    from understudy.command_table import COMMANDS

    parser = build_parser()
    parts = ["# Commands\n\nMade by `python scripts/reference.py` from the command table; do not edit.\n", f"```\n{parser.format_help()}```\n"]
    for command in COMMANDS:
        child = parser
        for word in command.words.split():
            subparsers = next(a for a in child._actions if isinstance(a, argparse._SubParsersAction))
            child = subparsers.choices[word]
        parts.append(f"## {command.words}\n\n```\n{child.format_help()}```\n")
    return "\n".join(parts)


def settings() -> str:
    """Every setting of a workspace, of a recipe and of the retriever's tuning, with its default, as Markdown."""
    from train.recipe import Recipe, RetrieverRecipe
    from understudy.config import Config

    parts = ["# Settings\n\nMade by `python scripts/reference.py`; do not edit.\n"]
    parts.append("## A workspace\n\n`understudy.yaml` < `UNDERSTUDY_SECTION__KEY` in the environment < `--set section.key=value`.\n")
    parts.append(table(Config))
    parts.append("\n## A training recipe\n\nA YAML file, or `understudy train key=value`; the shipped ones lie in `train/recipes/`.\n")
    parts.append(table(Recipe))
    parts.append("\n## Tuning the retriever\n\n`understudy retriever tune key=value`.\n")
    parts.append(table(RetrieverRecipe))
    return "\n".join(parts) + "\n"


def table(model: type[BaseModel]) -> str:
    """Key, default and meaning of each field; sections are flattened."""
    return "\n".join(["| key | default | |", "|---|---|---|", *rows(model, "")])


def rows(model: type[BaseModel], prefix: str) -> list[str]:
    """A table's lines of one model's fields."""
    lines = []
    for name, field in model.model_fields.items():
        if isinstance(field.default, BaseModel):
            lines += rows(type(field.default), f"{prefix}{name}.")
        else:
            default = field.get_default(call_default_factory=True)
            shown = "" if default is None or default == "" else f"`{default}`"
            lines.append(f"| `{prefix}{name}` | {shown} | {(field.description or '').replace('|', '/')} |")
    return lines


if __name__ == "__main__":
    stale = []
    for name, text in (("cli.md", commands()), ("settings.md", settings())):
        target = DOCS / name
        if "--check" not in sys.argv:
            target.write_text(text)
        elif not target.exists() or target.read_text() != text:
            stale.append(name)
    if stale:
        sys.exit(f"docs/{', docs/'.join(stale)} must be made anew: run .venv/bin/python scripts/reference.py")
