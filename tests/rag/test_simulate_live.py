"""The simulation phase with SmolLM2-135M as the teacher, on a real vLLM. It is a poor teacher: the test is about the mechanism."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rag.citations import find_quote
from rag.ingest import ingest
from rag.recorded import Budget
from rag.retrieve import open_retriever
from rag.simulate import Plan, simulate
from tests.conftest import DOCUMENTS, MODELS, SAMPLE, Served
from understudy.client import engine_model
from understudy.progress import show_progress
from understudy.workspace import create_workspace

CALLS = 24


@pytest.mark.engine
def test_a_small_local_teacher_writes_and_answers_within_its_budget(engine_session: Served, tmp_path: Path) -> None:
    workspace = create_workspace(str(tmp_path / "workspace"), "ingest: {chunk_tokens: 96, overlap_tokens: 16}\nagent: {max_rounds: 1, accept_score: 0.0}\n")
    workspace.models.symlink_to(MODELS)
    ingest(workspace, [SAMPLE / "pdf" / name for name in DOCUMENTS[:1]], show_progress)
    retriever, teacher = open_retriever(workspace), engine_model(engine_session.running, "base")
    plan = Plan(questions=4, unanswerable=0.25, budget=Budget(calls=CALLS), concurrency=4)
    result = simulate(workspace, teacher, retriever, plan, show_progress)
    print(json.dumps(result, indent=2))
    assert result["stopped"] in ("questions", "calls")
    assert 4 <= result["calls"] <= CALLS
    assert result["tokens"]["completion"] > 0
    traces = list(workspace.store.traces("default"))
    assert len(traces) == result["kept"]["answerable"] + result["kept"]["unanswerable"]
    for trace in traces:
        print(trace.question, "|", trace.answer)
        assert trace.complete
        assert trace.metadata["teacher"] == "base"
        assert all(find_quote(citation.quote, retriever.chunks[citation.chunk_id].text) for citation in trace.citations)
    assert simulate(workspace, teacher, retriever, plan, show_progress) == result  # all of it from the log
