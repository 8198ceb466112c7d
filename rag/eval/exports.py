"""Question files for other evaluation tools, one JSON object a line.

lm-eval: a task over it sets `dataset_path: json`, `doc_to_text: question`, `doc_to_target: target`. Inspect: `json_dataset` reads input,
target, id and metadata as they are. Where the documents do not answer, the target is the sentence that says so.
"""

from __future__ import annotations

from typing import Any, Literal

from rag.prompts import ABSTENTION
from understudy.records import Question

ExportFormat = Literal["lm-eval", "inspect"]


def export_rows(questions: list[Question], kind: ExportFormat) -> list[dict[str, Any]]:
    """The rows of the questions that have an answer key."""
    return [_lm_eval(question) if kind == "lm-eval" else _inspect(question) for question in questions if question.has_answer_key]


def _lm_eval(question: Question) -> dict[str, Any]:
    targets = question.answers or [ABSTENTION]
    return {"id": question.id, "question": question.question, "target": targets[0], "targets": targets, **_about(question)}


def _inspect(question: Question) -> dict[str, Any]:
    targets = question.answers or [ABSTENTION]
    return {"id": question.id, "input": question.question, "target": targets if len(targets) > 1 else targets[0], "metadata": _about(question)}


def _about(question: Question) -> dict[str, Any]:
    return {"answerable": question.answerable, "type": question.type, "documents": question.documents, "quotes": question.quotes}
