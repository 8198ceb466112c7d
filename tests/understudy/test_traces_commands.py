"""traces ls, show and export as commands: filters, the tree, terminals, tenants."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.cli import build_parser
from understudy.commands import Outcome
from understudy.commands.trace_view import MARK, trace_lines
from understudy.errors import NotFoundError, UsageError
from understudy.records import Chunk, Document, Message, Step, Trace, Usage
from understudy.terminal import inert_json
from understudy.workspace import Workspace, create_workspace

Make = Callable[..., Trace]
HOSTILE = "\x1b]0;owned\x07\x1b[31mred\u202e\x9b2J\x7f"


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return create_workspace(str(tmp_path / "w"))


@pytest.fixture
def chunks(workspace: Workspace, make_document: Callable[..., tuple[Document, list[Chunk]]]) -> list[Chunk]:
    document, made = make_document("gates.txt", ["The keeper of gate one\nwaits three days here.", f"Gate two {HOSTILE} has no keeper."])
    workspace.store.add_document(document, made)
    return made


@pytest.fixture
def trace(make_trace: Make, chunks: list[Chunk]) -> Trace:
    asked = [Message(role="system", content="Use the passages."), Message(role="user", content=f"How long? {HOSTILE}")]
    ids = [chunk.id for chunk in chunks]
    steps = [
        Step(name="plan", messages=asked, text="gate waiting", model="tiny", seconds=0.5, usage=Usage(prompt_tokens=20, completion_tokens=3)),
        Step(name="retrieve", passage_ids=[*ids, "gone" * 16], parsed={"query": "gate waiting"}, seconds=0.1),
        Step(name="answer", text=f"Answer: three {HOSTILE}", passage_ids=ids, model="tiny", mean_logprob=-0.25, finish_reason="stop", seconds=1.5),
        Step(name="validate", text="1", parsed={"score": 0.875, "verbatim": 1.0}, model="tiny", seconds=0.2, usage=Usage(prompt_tokens=30, cached_tokens=25)),
    ]
    values = {"steps": steps, "source": "model", "model": "tiny", "id": "ab" * 16, "score": 0.875, "created_at": 1.7e9}
    return make_trace(f"How long? {HOSTILE}", "Three days.", chunks[0], "keeper of gate one\nwaits three days", chunks, **values)


def run(workspace: Workspace, *words: str) -> Outcome:
    args = build_parser().parse_args([*words, "--workspace", str(workspace.root)])
    args.set, args.json = getattr(args, "set", []), False
    module, _, function = args.run.partition(":")
    outcome = getattr(importlib.import_module(f"understudy.commands.{module}"), function)(args)
    assert isinstance(outcome, Outcome)
    return outcome


def test_a_run_is_shown_as_a_tree_with_its_quote_marked(workspace: Workspace, trace: Trace) -> None:
    workspace.store.put_trace(trace)
    lines = run(workspace, "traces", "show", "abab").lines
    text = "\n".join(lines)
    assert [line[:2] for line in lines if line[:2] in ("├─", "└─")] == ["├─", "├─", "├─", "└─"]
    assert "The »keeper of gate one waits three days« here." in text
    assert "gonegonegone is no longer in the corpus" in text
    assert "2.30 s, 50 prompt tokens (25 cached), 3 completion tokens" in text
    assert "0.50 s  20 → 3 tokens, 0 cached  tiny" in text
    assert "1.50 s  logprob -0.250  tiny  stop" in text
    assert "score: 0.875" in text
    assert '"keeper of gate one waits three days"  gates.txt, p. 1' in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)


def test_colours_are_ours_alone(trace: Trace, chunks: list[Chunk]) -> None:
    text = "\n".join(trace_lines(trace, {chunk.id: chunk for chunk in chunks}, in_colour=True))
    assert f"{MARK}keeper of gate one waits three days\x1b[0m here." in text
    assert set(re.findall(r"\x1b.{0,6}?m", text)) <= {"\x1b[1m", "\x1b[2m", "\x1b[30;43m", "\x1b[0m"}
    assert not re.search(r"\x1b(?!\[[\d;]*m)|[\x00-\x09\x0b-\x1a\x1c-\x1f\x7f-\x9f\u202e]", text)


def test_overlapping_quotes_and_quotes_of_other_passages_are_marked_once(trace: Trace, chunks: list[Chunk]) -> None:
    [citation] = trace.citations
    wider = citation.model_copy(update={"start": citation.start + 7, "end": chunks[1].start + 8})
    text = "\n".join(trace_lines(trace.model_copy(update={"citations": [wider, citation]}), {chunk.id: chunk for chunk in chunks}, in_colour=False))
    assert "The »keeper of gate one waits three days«» here.«" in text
    assert "»Gate two« " in text


def test_another_tenants_trace_is_not_shown(workspace: Workspace, trace: Trace) -> None:
    workspace.store.put_trace(trace.model_copy(update={"tenant": "other"}))
    with pytest.raises(NotFoundError, match="no single trace"):
        run(workspace, "traces", "show", "abab")
    assert run(workspace, "traces", "ls").result["traces"] == []


def test_the_newest_are_listed_last_and_filters_hold(workspace: Workspace, make_trace: Make) -> None:
    for day in range(1, 6):
        trace = make_trace(f"Question {day}?", None if day == 2 else "Yes.", None, "", [], id=f"{day}" * 32, created_at=86400.0 * day, score=day / 10)
        workspace.store.put_trace(trace)

    def listed(*options: str) -> str:
        return "".join(row["id"][0] for row in run(workspace, "traces", "ls", *options).result["traces"])

    assert listed() == "12345"
    assert listed("--limit", "2") == "45"
    assert listed("--since", "1970-01-03", "--until", "1970-01-05") == "23"
    assert listed("--since", "1970-01-05T01:00+01:00") == "45"
    assert listed("--min-score", "0.3", "--max-score", "0.4") == "34"
    assert listed("--outcome", "abstained") == "2"
    assert listed("--contains", "QUESTION 4") == "4"
    assert listed("--source", "model") == ""
    with pytest.raises(UsageError, match="--since 'soon'"):
        listed("--since", "soon")
    assert run(workspace, "traces", "ls", "--limit", "1").lines == [
        "555555555555  1970-01-06 00:00  expert   answered   0.50                            Question 5?"
    ]


def test_splits_are_exported_apart(workspace: Workspace, trace: Trace) -> None:
    asked = trace.steps[2].model_copy(update={"messages": trace.steps[0].messages})
    for number, split in enumerate(("train", "calibration", "")):
        metadata = {"split": split} if split else {}
        workspace.store.put_trace(trace.model_copy(update={"id": f"{number}" * 32, "steps": [asked], "metadata": metadata}))

    def exported(*options: str) -> str:
        return "".join(row["trace_id"][0] for row in run(workspace, "traces", "export", *options).result["traces"])

    assert (exported(), exported("--split", "calibration"), exported("--split", "train")) == ("02", "1", "02")
    assert exported("--outcome", "abstained") == ""


@given(st.dictionaries(st.text(), st.text()))
def test_json_on_a_terminal_is_inert_and_the_same(value: dict[str, str]) -> None:
    text = inert_json(value | {"hostile": HOSTILE})
    assert all(c.isprintable() or c == "\n" for c in text)
    assert json.loads(text) == value | {"hostile": HOSTILE}
