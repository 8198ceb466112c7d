"""Question files: one JSON object a line (DESIGN.md, Question file)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from understudy.digests import digest_of
from understudy.errors import StorageError
from understudy.files import numbered_rows
from understudy.records import Question


def read_questions(path: Path) -> list[Question]:
    """The questions of a file, in its order; keys that are not ours are ignored.

    Raises NotFoundError where there is no file, StorageError naming the file, the line and the cause.
    """
    questions: list[Question] = []
    lines: dict[str, int] = {}
    for number, row in numbered_rows(path):
        try:
            question = parse_question(row)
        except ValueError as error:
            raise StorageError(f"{path} line {number}: {error}", "correct the line; DESIGN.md and the README show the format") from error
        if question.id in lines:
            raise StorageError(
                f"{path} line {number}: the id {question.id!r} was already used on line {lines[question.id]}",
                "give every question an id of its own",
            )
        lines[question.id] = number
        questions.append(question)
    if not questions:
        raise StorageError(f"{path} holds no question", 'write one JSON object a line, at least {"question": "…"}')
    return questions


def parse_question(row: dict[str, Any]) -> Question:
    """One row as a Question; raises ValueError with the cause.

    An unanswerable row has no quotes and therefore no `documents`; its scalar `document` says where it belongs.
    """
    text = _text(row, "question").strip()
    if not text:
        raise ValueError("`question` is missing or empty")
    quotes = _texts(row, "quotes")
    documents = _texts(row, "documents") or _texts(row, "document")
    pages = _pages(row)
    for name, values in (("documents", documents), ("pages", pages)):
        if quotes and len(values) not in (0, 1, len(quotes)):
            raise ValueError(f"{len(quotes)} quotes but {len(values)} {name}; give one for each quote, or one for all")
    return Question(
        id=_text(row, "id") or digest_of(text)[:16],
        question=text,
        answers=_answers(row),
        has_answer_key="answer" in row,
        quotes=quotes,
        documents=documents,
        pages=pages,
        query=_text(row, "query"),
        type=_text(row, "type"),
        tenant=_text(row, "tenant") or "default",
    )


def _answers(row: dict[str, Any]) -> list[str] | None:
    """The accepted answers; None where `answer` is null or absent."""
    answer = row.get("answer")
    if answer is None:
        return None
    answers = [answer] if isinstance(answer, str) else answer
    if not isinstance(answers, list) or not answers or not all(isinstance(item, str) and item.strip() for item in answers):
        raise ValueError("`answer` is neither text, nor a list of accepted texts, nor null (for a question that the documents do not answer)")
    return answers


def _pages(row: dict[str, Any]) -> list[int]:
    value = row.get("pages") or row.get("page") or []
    pages = value if isinstance(value, list) else [value]
    if not all(isinstance(page, int) and not isinstance(page, bool) and page >= 1 for page in pages):
        raise ValueError("`pages` are not whole numbers from 1 on")
    return pages


def _texts(row: dict[str, Any], key: str) -> list[str]:
    """A list of texts; a single text counts as a list of one."""
    value = row.get(key)
    values = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) and item.strip() for item in values):
        raise ValueError(f"`{key}` is not a list of texts")
    return values


def _text(row: dict[str, Any], key: str) -> str:
    """A text, empty where the key is absent or null."""
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"`{key}` is not text")
    return value
