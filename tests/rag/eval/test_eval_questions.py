"""Question files: every form that DESIGN.md allows, and errors that name file, line and cause."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rag.eval.questions import read_questions
from understudy.errors import NotFoundError, StorageError


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def test_every_form_is_read(tmp_path: Path) -> None:
    full, scalar, unanswerable, bare, several = read_questions(
        write(
            tmp_path / "q.jsonl",
            {
                "id": "a",
                "question": "Q1?",
                "answer": "A",
                "quotes": ["x y z"],
                "documents": ["d.pdf"],
                "pages": [2],
                "query": "q",
                "type": "t",
                "tenant": "x",
            },
            {
                "id": "b",
                "question": "Q2?",
                "answer": "A",
                "quotes": ["x y z"],
                "document": "d.pdf",
                "page": 3,
                "needs": ["x"],
                "split": "train",
            },
            {"id": "c", "question": "Q3?", "answer": None, "quotes": [], "documents": [], "document": "d.pdf", "pages": []},
            "",
            {"question": "Q4?"},
            {"id": "e", "question": "Q5?", "answer": ["A", "B"], "query": None},
        )
    )
    assert (full.answers, full.has_answer_key, full.documents, full.pages, full.tenant) == (["A"], True, ["d.pdf"], [2], "x")
    assert (scalar.documents, scalar.pages, scalar.tenant) == (["d.pdf"], [3], "default")
    assert (unanswerable.answers, unanswerable.has_answer_key, unanswerable.documents) == (None, True, ["d.pdf"])
    assert (bare.answers, bare.has_answer_key, bare.documents) == (None, False, [])
    assert several.answers == ["A", "B"] and several.query == ""


def test_a_missing_id_is_the_questions_digest(tmp_path: Path) -> None:
    first = read_questions(write(tmp_path / "a.jsonl", {"question": "Same?"}, {"question": "Other?"}))
    again = read_questions(write(tmp_path / "b.jsonl", {"question": " Same? ", "answer": "x"}))
    assert first[0].id == again[0].id != first[1].id


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ('{"question": ', "not JSON"),
        ("[1]", "not a JSON object"),
        ({"answer": "A"}, "`question` is missing"),
        ({"question": "  "}, "`question` is missing"),
        ({"question": 3}, "`question` is not text"),
        ({"question": "Q?", "answer": 3}, "`answer` is neither"),
        ({"question": "Q?", "answer": []}, "`answer` is neither"),
        ({"question": "Q?", "answer": ""}, "`answer` is neither"),
        ({"question": "Q?", "quotes": [1]}, "`quotes` is not a list of texts"),
        ({"question": "Q?", "pages": [0]}, "whole numbers from 1"),
        ({"question": "Q?", "page": "3"}, "whole numbers from 1"),
        ({"question": "Q?", "quotes": ["a", "b", "c"], "documents": ["d", "e"]}, "3 quotes but 2 documents"),
        ({"id": "first", "question": "Q?"}, "'first' was already used on line 1"),
    ],
)
def test_errors_name_file_line_and_cause(tmp_path: Path, row: object, cause: str) -> None:
    path = write(tmp_path / "q.jsonl", {"id": "first", "question": "Fine?"}, row)
    with pytest.raises(StorageError) as caught:
        read_questions(path)
    assert str(path) in caught.value.message and "line 2" in caught.value.message and cause in caught.value.message
    assert caught.value.remedy


def test_no_file_and_no_question(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(StorageError, match="holds no question"):
        read_questions(write(tmp_path / "empty.jsonl", "", "  "))


def test_the_sample_files_are_read() -> None:
    files = sorted((Path(__file__).parents[3] / "samples" / "ai-governance" / "questions").glob("*.jsonl"))
    assert len(files) >= 3
    for path in files:
        questions = read_questions(path)
        assert all(question.has_answer_key and question.documents for question in questions)
        assert all(len(question.documents) == len(question.quotes) for question in questions if question.answerable)
