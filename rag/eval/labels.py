"""People's labels of blind pairs: a line each in the run's folder, on disk before the next pair is shown."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from rag.eval.metrics import normalize_answer
from understudy.errors import StorageError
from understudy.records import Record

Choice = Literal["a", "tie", "b"]  # what a rater prefers
FILE = "reviews.jsonl"
LONGEST_NOTE = 4_000  # characters
AS_CHOICE: dict[str, Choice] = {"a": "a", "b": "b", "both": "tie", "neither": "tie"}


class Label(Record):
    """One person's decision on one question; the newest of a question and two models holds."""

    question_id: str
    question: str
    tenant: str
    a: str  # the models
    b: str
    shown_first: str  # which of them was answer 1
    choice: Literal["a", "b", "both", "neither"]
    note: str = Field("", max_length=LONGEST_NOTE)
    created_at: float  # seconds since the epoch


def add_label(folder: Path, label: Label) -> None:
    """Append a label; it is on disk when this returns. Raises StorageError, with the labels before it as they were."""
    path = folder / FILE
    line = (json.dumps(label.model_dump(), ensure_ascii=False) + "\n").encode()
    try:
        with path.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    file.truncate(end)
                raise
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}", "free space; the labels given before are kept") from error


def read_labels(path: Path) -> list[Label]:
    """All labels of a file, oldest first; a last line that was cut off is no label. Raises StorageError."""
    if not path.exists():
        return []
    labels = []
    content = path.read_bytes()
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):
        try:
            labels.append(Label.model_validate_json(line))
        except ValidationError as error:
            raise StorageError(f"{path} line {number} is not a label", "correct or remove the line") from error
    return labels


def repair(folder: Path) -> None:
    """Remove a last line that was cut off, so that the next label begins a line of its own."""
    path = folder / FILE
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def labels_of(folder: Path, a: str, b: str) -> dict[str, Label]:
    """The newest label of each question on these two models, by question id."""
    return {label.question_id: label for label in read_labels(folder / FILE) if (label.a, label.b) == (a, b)}


def choices_of(labels: dict[str, Label], ids: Sequence[str]) -> list[Choice | None]:
    """What people preferred, in the order of the ids; None where nobody looked."""
    return [AS_CHOICE[labels[question_id].choice] if question_id in labels else None for question_id in ids]


def reviewed_questions(reports: Path, tenant: str) -> list[str]:
    """The questions that people reviewed in any evaluation: what they decided stays worth something only while nothing learns from them."""
    paths = sorted(reports.glob(f"*/{FILE}"))
    return list(dict.fromkeys(label.question for path in paths for label in read_labels(path) if label.tenant == tenant))


class HeldOut:
    """Tells reviewed questions by their words."""

    reason = "a person reviewed it in an evaluation, so it stays held out"

    def __init__(self, reports: Path, tenant: str) -> None:
        self._known = {normalize_answer(question) for question in reviewed_questions(reports, tenant)}

    def __contains__(self, question: str) -> bool:
        return normalize_answer(question) in self._known
