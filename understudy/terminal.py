"""What a terminal may show of text that others wrote, and of a figure that may be missing."""

from __future__ import annotations

import json


def printable(text: str) -> str:
    """Text from documents or models as a terminal may show it: no control characters."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def inert_json(value: object, indent: int | None = 2) -> str:
    """JSON that a terminal may show: json.dumps alone leaves DEL, the C1 controls and the bidirectional marks as they are."""
    lines = json.dumps(value, ensure_ascii=False, indent=indent).split("\n")
    return "\n".join(line if line.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in line) for line in lines)


def figure(value: float | None) -> str:
    """Three decimals, or a dash where nothing was measured."""
    return "–" if value is None else f"{value:.3f}"


def _escaped(character: str) -> str:
    return "\\u007f" if character == "\x7f" else json.dumps(character)[1:-1]
