"""Change single settings in understudy.yaml; whatever else stands there, comments included, stays as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from understudy.errors import UsageError
from understudy.files import write_text


def set_values(path: Path, values: Mapping[str, Any]) -> None:
    """Set dotted keys (`serve.max_num_seqs`) to scalars, or to lists and mappings of them; an absent file is made.

    Raises UsageError, with the file as it was, where it is written in a way that this cannot change.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for key, value in values.items():
        text = with_value(text, key, value)
    write_text(path, text)


def with_value(text: str, key: str, value: Any) -> str:
    """YAML text with one dotted key set. Raises UsageError."""
    try:
        before = yaml.safe_load(text) or {}
        changed = _edited(text, key.split("."), value)
        if yaml.safe_load(changed) == _assigned(before, key.split("."), value):
            return changed
    except (yaml.YAMLError, TypeError, ValueError, AttributeError, IndexError):  # a scalar, a list or an alias on the way
        pass
    raise UsageError(f"{key} cannot be set in the settings file as it is written", f"write it there by hand: {key} is to be {json.dumps(value)}")


def _edited(text: str, parts: list[str], value: Any) -> str:
    node: Any = yaml.compose(text)
    if node is None:
        return _lines_end(text) + _block(parts, value, 0)
    for place, part in enumerate(parts):
        child = next((child for name, child in node.value if name.value == part), None)
        if child is None:
            return _inserted(text, node, parts[place:], value)
        if place == len(parts) - 1 or child.tag.endswith(":null"):
            inline = _inline(parts[place + 1 :], value)
            gap = "" if child.start_mark.index < child.end_mark.index else " "  # `key:` has an empty value
            return text[: child.start_mark.index] + gap + inline + text[child.end_mark.index :]
        node = child
    raise AssertionError("a key has parts")


def _inserted(text: str, mapping: Any, parts: list[str], value: Any) -> str:
    """The text with a key more in a mapping: before its brace, or on a line after its last."""
    if mapping.flow_style:
        brace = mapping.end_mark.index - 1
        return text[:brace].rstrip() + (", " if mapping.value else "") + f"{parts[0]}: {_inline(parts[1:], value)}" + text[brace:]
    last = mapping.value[-1][1]
    while getattr(last, "flow_style", True) is False and last.value:  # a block's own end lies after the comments that follow it
        last = last.value[-1][1] if isinstance(last, yaml.MappingNode) else last.value[-1]
    place = last.end_mark.index
    end = text.find("\n", place) if not text[:place].endswith("\n") else place - 1
    head, tail = (text, "") if end < 0 else (text[: end + 1], text[end + 1 :])
    return _lines_end(head) + _block(parts, value, mapping.value[0][0].start_mark.column) + tail


def _block(parts: list[str], value: Any, indent: int) -> str:
    lines = [f"{' ' * (indent + 2 * depth)}{part}:" for depth, part in enumerate(parts)]
    return "\n".join(lines) + f" {_inline([], value)}\n"


def _inline(parts: list[str], value: Any) -> str:
    """JSON is YAML."""
    for part in reversed(parts):
        value = {part: value}
    return json.dumps(value, ensure_ascii=False)


def _lines_end(text: str) -> str:
    return text if not text or text.endswith("\n") else text + "\n"


def _assigned(values: dict[str, Any], parts: list[str], value: Any) -> dict[str, Any]:
    first, *rest = parts
    return {**values, first: _assigned(values.get(first) or {}, rest, value) if rest else value}
