"""Traces as chat JSONL: experts' answers with the prompts a model would see, models' answers with those they saw."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rag.ingest import ingest
from rag.prompts import ABSTENTION, answer_messages, parse_answer, plan_messages
from rag.traces import UnsupportedAnswer, chat_rows, export_traces, import_traces
from tests.understudy.test_chat import CHATML, make_tokenizer
from understudy.progress import show_progress
from understudy.records import Chunk, Message, Step, Trace, TraceFilter
from understudy.workspace import Workspace

PARAGRAPHS = [f"Rule {number} says that the keeper of gate {number}\nwaits {number + 3} days." for number in range(6)]
QUOTE = "the keeper of gate 4\nwaits 7 days"

Make = Callable[..., Any]


def by_id(chunks: list[Chunk]) -> dict[str, Chunk]:
    return {chunk.id: chunk for chunk in chunks}


def steps(retrieved: list[Chunk], query: str = "gate waiting") -> list[Step]:
    """As an expert's trace has them."""
    ids = [chunk.id for chunk in retrieved]
    plan = [Step(name="plan", text=query)] if query else []
    return [*plan, Step(name="retrieve", passage_ids=ids), Step(name="answer", text="unused", passage_ids=ids)]


def turns(messages: list[Message], answered: str) -> list[dict[str, str]]:
    return [*(message.model_dump() for message in messages), {"role": "assistant", "content": answered}]


@pytest.fixture
def chunks(make_document: Make) -> list[Chunk]:
    return list(make_document("gates.txt", PARAGRAPHS)[1])


def test_an_expert_answer_stands_after_the_prompt_a_model_would_see(chunks: list[Chunk], make_trace: Make) -> None:
    retrieved = [chunks[i] for i in (2, 0, 5, 4, 1, 3)]  # the cited one is not among the nearest three
    trace: Trace = make_trace("How long at gate 4?", "Seven days.", chunks[4], QUOTE, retrieved, steps=steps(retrieved))
    plan, answer = chat_rows(trace, by_id(chunks), k=3)
    assert plan == {"messages": turns(plan_messages(trace.question), "gate waiting"), "task": "plan", "trace_id": trace.id}
    shown = [PARAGRAPHS[i] for i in (0, 2, 4)]  # the cited one and the nearest two others, in document order
    target = "Quote: the keeper of gate 4 waits 7 days\nAnswer: Seven days."
    assert answer == {"messages": turns(answer_messages(trace.question, shown), target), "task": "answer", "trace_id": trace.id}
    read = parse_answer(target)
    assert (read.quotes, read.text, read.well_formed) == ([" ".join(QUOTE.split())], "Seven days.", True)
    assert read.quotes[0] in answer["messages"][1]["content"]


def test_a_null_answer_is_an_abstention_over_what_was_retrieved(chunks: list[Chunk], make_trace: Make) -> None:
    trace: Trace = make_trace("Who paints the gates?", None, None, "", chunks[::-1], steps=steps(chunks[::-1], query=""))
    [row] = chat_rows(trace, by_id(chunks), k=2)
    assert row["messages"] == turns(answer_messages(trace.question, PARAGRAPHS[4:]), ABSTENTION)


def test_every_cited_passage_is_shown_even_beyond_k(chunks: list[Chunk], make_trace: Make) -> None:
    first: Trace = make_trace("How long?", "Seven days, then eight.", chunks[4], QUOTE, chunks, steps=steps(chunks))
    second: Trace = make_trace("How long?", "Seven days, then eight.", chunks[5], "waits 8 days", chunks)
    trace = first.model_copy(update={"citations": [*second.citations, *first.citations], "quotes": ["waits 8 days", QUOTE]})
    answer = chat_rows(trace, by_id(chunks), k=1)[-1]
    assert answer["messages"][1]["content"] == answer_messages(trace.question, PARAGRAPHS[4:])[-1].content
    assert parse_answer(answer["messages"][-1]["content"]).quotes == ["waits 8 days", "the keeper of gate 4 waits 7 days"]


def test_passages_that_are_gone_are_left_out_and_a_cited_one_ends_the_trace(chunks: list[Chunk], make_trace: Make) -> None:
    trace: Trace = make_trace("How long at gate 4?", "Seven days.", chunks[4], QUOTE, chunks, steps=steps(chunks))
    shown = chat_rows(trace, by_id(chunks[1:]), k=3)[-1]["messages"][1]["content"]
    assert shown == answer_messages(trace.question, [PARAGRAPHS[i] for i in (1, 2, 4)])[-1].content
    with pytest.raises(UnsupportedAnswer, match="no longer in the corpus"):
        chat_rows(trace, by_id(chunks[:4]), k=3)


def test_a_model_answer_comes_with_the_prompt_it_saw(chunks: list[Chunk], make_trace: Make) -> None:
    seen = [Message(role="user", content="as it was")]
    taken = [Step(name="plan", text="query", messages=seen), Step(name="answer", text="first"), Step(name="answer", text="last", messages=seen)]
    trace: Trace = make_trace("How long?", "Seven days.", chunks[4], QUOTE, chunks, steps=taken, source="model")
    assert chat_rows(trace, {}, k=3) == [{"messages": turns(seen, "last"), "task": "answer", "trace_id": trace.id}]
    for broken in (trace.model_copy(update={"complete": False}), trace.model_copy(update={"steps": taken[:1]})):
        with pytest.raises(UnsupportedAnswer, match="incomplete"):
            chat_rows(broken, {}, k=3)


def test_what_experts_wrote_is_exported_as_trl_reads_it(corpus_workspace: Workspace, tmp_path: Path) -> None:
    from datasets import load_dataset
    from trl.data_utils import apply_chat_template, is_conversational

    (tmp_path / "kiln.txt").write_text("The kiln is fired on Tuesdays at seven. The glaze cools for nine hours.")
    ingest(corpus_workspace, [tmp_path / "kiln.txt"], show_progress)
    asked = [
        {"question": "When is the kiln fired?", "answer": ["On Tuesdays at seven.", "Tuesdays"], "quotes": ["fired on Tuesdays at seven"], "query": "kiln day"},
        {"question": "Who owns the kiln?", "answer": None},
    ]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    import_traces(corpus_workspace, tmp_path / "asked.jsonl", "train", show_progress)
    result = export_traces(corpus_workspace, TraceFilter(source="expert"))
    assert result["skipped"] == []
    file = tmp_path / "export.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in result["traces"]))
    rows = list(load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache")))
    assert [row["task"] for row in rows] == ["plan", "answer", "answer"]
    assert all(is_conversational(row) for row in rows)
    texts = [apply_chat_template(row, make_tokenizer(CHATML))["text"] for row in rows]
    endings = ["kiln day", "Quote: fired on Tuesdays at seven\nAnswer: On Tuesdays at seven.", ABSTENTION]
    for text, ending in zip(texts, endings, strict=True):
        assert text.rstrip().endswith(f"<|im_start|>assistant\n{ending}<|im_end|>")
    assert "[1] The kiln is fired on Tuesdays at seven. The glaze cools for nine hours." in texts[1]
    assert export_traces(corpus_workspace, TraceFilter(source="model")) == {"traces": [], "skipped": []}
