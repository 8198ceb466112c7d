"""People's labels of blind pairs: a line each in the run's folder, on disk before the next pair is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from rag.eval.metrics import normalize_answer
from understudy.errors import StorageError
from understudy.files import append_jsonl, locked
from understudy.records import Record

Choice = Literal["a", "tie", "b"]  # what a rater prefers
FILE = "reviews.jsonl"
LONGEST_NOTE, LONGEST_NAME = 4_000, 60  # characters
AS_CHOICE: dict[str, Choice] = {"a": "a", "b": "b", "both": "tie", "neither": "tie"}


class Label(Record):
    """One person's decision on one question; the newest of a reviewer, a question and two models holds."""

    question_id: str
    question: str
    tenant: str
    a: str  # the models
    b: str
    shown_first: str  # which of them was answer 1
    choice: Literal["a", "b", "both", "neither"]
    note: str = Field("", max_length=LONGEST_NOTE)
    created_at: float  # seconds since the epoch
    reviewer: str = Field("", max_length=LONGEST_NAME)  # as they called themselves; empty where one person reviews alone


def add_label(folder: Path, label: Label) -> None:
    """Append a label; it is on disk when this returns, whoever else labels now. Raises StorageError, with the labels before it as they were."""
    with locked(folder / ".reviews.lock"):
        append_jsonl(folder / FILE, label.model_dump())


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


def labels_of(folder: Path, a: str, b: str) -> dict[str, dict[str, Label]]:
    """Each reviewer's newest label of each question on these two models, by reviewer and question id."""
    found: dict[str, dict[str, Label]] = {}
    for label in read_labels(folder / FILE):
        if (label.a, label.b) == (a, b):
            found.setdefault(label.reviewer, {})[label.question_id] = label
    return found


def choices_of(labels: Mapping[str, Label], ids: Sequence[str]) -> list[Choice | None]:
    """What a reviewer preferred, in the order of the ids; None where they did not look."""
    return [AS_CHOICE[labels[question_id].choice] if question_id in labels else None for question_id in ids]


def joint_choices(labels: Mapping[str, Mapping[str, Label]], ids: Sequence[str]) -> list[Choice | None]:
    """What most of the reviewers who looked prefer, a tie where they are even; None where nobody looked."""
    by_reviewer = [choices_of(of_reviewer, ids) for of_reviewer in labels.values()]
    joint: list[Choice | None] = []
    for given in zip(*by_reviewer, strict=True) if by_reviewer else [()] * len(ids):
        lead = given.count("b") - given.count("a")
        joint.append("b" if lead > 0 else "a" if lead < 0 else "tie" if any(given) else None)
    return joint


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
