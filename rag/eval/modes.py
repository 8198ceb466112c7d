"""A model among `--models`, in a mode: NAME, or NAME:MODE; agentic where none is named."""

from __future__ import annotations

from typing import Literal, get_args

from rag.eval.recorded_answers import TEACHER
from understudy.errors import UsageError

Mode = Literal["agentic", "fast", "closed-book"]
DEFAULT: Mode = "agentic"


def split_mode(spec: str) -> tuple[str, Mode]:
    """(model, mode) of what was named; raises UsageError for a mode that there is not."""
    model, separator, mode = spec.strip().partition(":")
    for known in get_args(Mode):
        if mode == known and model != TEACHER:
            return model, known
    if not separator:
        return model, DEFAULT
    if model == TEACHER:
        raise UsageError(f"{spec}: recorded answers have no mode", "name teacher alone")
    raise UsageError(f"{spec}: there is no mode {mode!r}", f"one of: {', '.join(get_args(Mode))}")


def in_mode(model: str, mode: Mode) -> str:
    """The name that a model in a mode has in a report."""
    return model if mode == DEFAULT else f"{model}:{mode}"


def without_digest(name: str) -> str:
    """What a name in a report has in common with that of the model's successors: NAME@DIGEST:MODE → NAME:MODE."""
    model, separator, mode = name.partition(":")
    return model.partition("@")[0] + separator + mode
