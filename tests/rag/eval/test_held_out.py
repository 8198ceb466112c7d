"""What people reviewed stays held out: no import for training takes it, and no dataset learns it or nearly the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rag.eval.labels import HeldOut, Label, add_label, reviewed_questions
from train.ledger import Rules, verify_traces
from understudy.cli import main
from understudy.records import Chunk, Document, Trace
from understudy.workspace import Workspace

REVIEWED = "How often are the barn doors painted?"


def review(workspace: Workspace, name: str, question: str, tenant: str = "default") -> Path:
    folder = workspace.reports / name
    folder.mkdir(parents=True, exist_ok=True)
    add_label(folder, Label(question_id="q", question=question, tenant=tenant, a="x", b="y", shown_first="y", choice="both", created_at=0.0))
    return folder


def test_an_expert_import_leaves_reviewed_questions_out(notes_workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"question": "how often are the  Barn doors painted", "answer": "every third summer"},
        {"question": "When is the kiln fired?", "answer": "on Tuesdays"},
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = review(notes_workspace, "run1", REVIEWED)
    try:
        assert main(["--workspace", str(notes_workspace.root), "traces", "import", str(tmp_path / "answers.jsonl"), "--json"]) == 0
    finally:
        shutil.rmtree(folder)
    found = json.loads(capsys.readouterr().out)
    assert found["imported"] == 1 and [(row["line"], row["reason"]) for row in found["skipped"]] == [(1, HeldOut.reason)]


def test_reviews_of_every_evaluation_count_and_of_this_tenant_alone(corpus_workspace: Workspace) -> None:
    assert reviewed_questions(corpus_workspace.reports, "default") == []
    for name, question, tenant in (("r1", REVIEWED, "default"), ("r2", "Who mends the roof?", "default"), ("r2", REVIEWED, "other")):
        review(corpus_workspace, name, question, tenant)
    assert reviewed_questions(corpus_workspace.reports, "default") == [REVIEWED, "Who mends the roof?"]
    assert reviewed_questions(corpus_workspace.reports, "other") == [REVIEWED]


def test_a_dataset_learns_neither_a_reviewed_question_nor_nearly_the_same(
    make_document: Callable[..., tuple[Document, list[Chunk]]], make_trace: Callable[..., Trace]
) -> None:
    _, chunks = make_document("barn.txt", ["The barn doors are painted green every third summer.", "The kiln is fired on Tuesdays."])
    traces = [
        make_trace(question, answer, chunk, quote, chunks)
        for question, answer, chunk, quote in (
            (REVIEWED, "Every third summer.", chunks[0], "every third summer"),
            ("How often are all the barn doors painted?", "Every third summer.", chunks[0], "every third summer"),
            ("When is the kiln fired?", "On Tuesdays.", chunks[1], "fired on Tuesdays"),
        )
    ]
    by_id = {chunk.id: chunk for chunk in chunks}
    verified = verify_traces(traces, by_id, Rules(reviewed=(REVIEWED,)))
    assert [(rejected.reason, rejected.detail) for rejected in verified.rejections] == [("reviewed in an evaluation", REVIEWED)] * 2
    assert [source.trace.question for source in verified.sources] == ["When is the kiln fired?"]
    assert len(verify_traces(traces, by_id).sources) == 3
