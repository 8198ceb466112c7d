"""Other systems' records: what langchain-mongodb really wrote (data/make_langchain_cache.py), and the documented shapes of the others."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag.foreign import FORMATS, Format, detect_format, read_call, read_messages, rows_of
from rag.prompts import ABSTENTION
from rag.recover import Prompts, imported_trace, is_abstention, question_of, read_answer, recover, verdict_of
from rag.retrieve import Retriever, open_retriever
from rag.traces import import_traces
from tests.conftest import workspace_of_notes
from understudy.cli import COMMANDS
from understudy.errors import StorageError, UsageError
from understudy.progress import show_progress
from understudy.records import Trace, TraceFilter
from understudy.workspace import Workspace

DATA = Path(__file__).parent / "data"
NOTES = {
    "kiln.txt": "The kiln is fired on Tuesdays at seven in the morning. The glaze cools for nine hours.",
    "barn.txt": "The barn doors are painted green every third summer by the village school.",
    "pond.txt": "The pond is stocked with forty carp in April, never later than the tenth.",
}
CONTEXT = "\n\n".join(NOTES.values())
KILN = "The kiln is fired on Tuesdays at seven in the morning."
ASKED = f"Context:\n{CONTEXT}\n\nQuestion: When is the kiln fired?"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return workspace_of_notes(tmp_path_factory.mktemp("foreign"), NOTES)


@pytest.fixture(scope="module")
def retriever(workspace: Workspace) -> Retriever:
    return open_retriever(workspace)


def traces_of(rows: list[dict[str, Any]], retriever: Retriever) -> dict[str, Trace]:
    """By question; every row must be a call."""
    calls = [read_call(row, number, detect_format(rows[0])) for number, row in enumerate(rows, 1)]
    found, _ = recover(calls, Prompts(retriever.chunks.values()))
    return {one.question: imported_trace(one, retriever, "train") for one in found}


def test_what_langchain_kept_in_mongodb_becomes_traces(workspace: Workspace, retriever: Retriever) -> None:
    """Of the semantic cache, whose documents have `text`."""
    result = import_traces(workspace, DATA / "langchain-semantic-cache.jsonl", "train", show_progress)
    assert (result["format"], result["imported"], result["unverified"], result["skipped"]) == ("langchain-cache", 5, 2, [])
    traces = {trace.question: trace for trace in workspace.store.traces("default", TraceFilter(source="imported"))}
    check(traces)
    again = traces_of([row for _, row in rows_of(DATA / "langchain-semantic-cache.jsonl")], retriever)
    assert {trace.id for trace in again.values()} == {trace.id for trace in traces.values()}  # importing again replaces them


def test_the_exact_cache_is_read_as_well(retriever: Retriever) -> None:
    """Its documents have `prompt` instead."""
    check(traces_of([row for _, row in rows_of(DATA / "langchain-cache.jsonl")], retriever))


def check(traces: dict[str, Trace]) -> None:
    """What both caches recorded of the same chains."""
    kiln = traces["When is the kiln fired?"]
    assert [(c.document, c.page, c.quote) for c in kiln.citations] == [("kiln.txt", 1, KILN)]
    assert [step.name for step in kiln.steps] == ["plan", "retrieve", "answer", "validate"]
    assert (kiln.steps[0].text, kiln.steps[0].parsed) == ("kiln firing time", {"query": "kiln firing time"})
    assert len(kiln.steps[1].passage_ids) == 3
    assert (kiln.score, kiln.model, kiln.steps[2].usage.prompt_tokens, kiln.steps[2].finish_reason) == (0.9, "gpt-teacher", 80, "stop")
    assert kiln.created_at > 1.7e9
    barn = traces["Who paints the barn doors?"]
    assert [c.quote for c in barn.citations] == ["painted green every third summer by the village school"]
    owner = traces["Who owns the kiln?"]
    assert (owner.abstained, owner.answer, owner.citations, "unverified" in owner.metadata) == (True, ABSTENTION, [], False)
    assert "supports the answer" in traces["How many carp are put in the pond?"].metadata["unverified"]
    assert "no passage" in traces["What is the capital of France?"].metadata["unverified"]


def reply(text: str, **changes: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}], "model": "gpt-x", **changes}


LANGCHAIN_MESSAGE = {"lc": 1, "type": "constructor", "id": ["langchain", "schema", "messages", "HumanMessage"], "kwargs": {"content": ASKED}}
SHAPES: dict[str, tuple[Format, dict[str, Any]]] = {
    "chat": ("chat", {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": ASKED}, {"role": "assistant", "content": KILN}]}),
    "chat parts": (
        "chat",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ASKED}]}, {"role": "assistant", "content": [{"type": "text", "text": KILN}]}]},
    ),
    "chat with a tool": (
        "chat",
        {
            "messages": [
                {"role": "user", "content": "When is the kiln fired?"},
                {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
                {"role": "tool", "content": CONTEXT},
                {"role": "user", "content": "When is the kiln fired?"},
                {"role": "assistant", "content": KILN},
            ]
        },
    ),
    "openai": ("openai", {"request": {"model": "m", "messages": [{"role": "user", "content": ASKED}]}, "response": reply(KILN)}),
    "openai batch": (
        "openai",
        {"request": {"body": {"messages": [{"role": "user", "content": ASKED}]}}, "response": {"status_code": 200, "body": reply(KILN)}},
    ),
    "langsmith model": (
        "langsmith",
        {"run_type": "llm", "inputs": {"messages": [[LANGCHAIN_MESSAGE]]}, "outputs": {"generations": [[{"text": KILN, "type": "ChatGeneration"}]]}},
    ),
    "langsmith openai": ("langsmith", {"inputs": {"messages": [{"role": "user", "content": ASKED}]}, "outputs": reply(KILN)}),
    "langsmith chain": (
        "langsmith",
        {
            "inputs": {"question": "When is the kiln fired?"},
            "outputs": {"answer": KILN, "context": [{"page_content": text, "metadata": {}} for text in NOTES.values()]},
            "start_time": "2026-01-02T03:04:05+00:00",
            "end_time": "2026-01-02T03:04:07+00:00",
        },
    ),
    "langsmith example": ("langsmith", {"inputs": {"question": "When is the kiln fired?", "context": CONTEXT}, "outputs": {"output": {"content": KILN}}}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_documented_shape_is_seen_and_read(retriever: Retriever, name: str) -> None:
    kind, row = SHAPES[name]
    assert detect_format(row) == kind
    trace = traces_of([row], retriever)["When is the kiln fired?"]
    assert "unverified" not in trace.metadata
    assert ([c.quote for c in trace.citations], trace.answer, trace.complete) == ([KILN], KILN, True)
    if name == "langsmith chain":
        assert (trace.created_at, trace.steps[-1].seconds) == (1767323045.0, 2.0)


def test_an_array_is_read_like_lines(tmp_path: Path) -> None:
    row = SHAPES["langsmith chain"][1]
    (tmp_path / "runs.json").write_text(json.dumps([row, row], indent=1))
    assert list(rows_of(tmp_path / "runs.json")) == [(1, row), (2, row)]


def test_an_answer_that_broke_off_is_incomplete(retriever: Retriever) -> None:
    broken = reply(KILN)
    broken["choices"][0]["finish_reason"] = None
    trace = traces_of([{"request": {"messages": [{"role": "user", "content": ASKED}]}, "response": broken}], retriever)["When is the kiln fired?"]
    assert not trace.complete
    assert "broke off" in trace.metadata["error"]


def test_rows_that_are_nothing_are_told_line_by_line(workspace: Workspace, tmp_path: Path) -> None:
    user = {"role": "user", "content": ASKED}
    deep: Any = "x"
    for _ in range(200):
        deep = [deep]
    rows = [SHAPES["chat"][1], {"messages": [user]}, {"messages": [user, {"role": "assistant", "content": " "}]}, {"messages": [{"role": "wizard"}]}]
    rows += [{"other": 1}, {"messages": deep}, {"messages": [{"role": "assistant", "content": "An answer to nothing."}]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = import_traces(workspace, tmp_path / "rows.jsonl", "train", show_progress)
    assert result["imported"] == 1
    assert [row["line"] for row in result["skipped"]] == [2, 3, 4, 5, 6, 7]


def test_other_chunks_than_ours_are_found_in_the_prompt(retriever: Retriever) -> None:
    """The other system cut, numbered and wrapped its passages in its own way."""
    text = "[1] (kiln.txt)\n  The kiln is fired on Tuesdays\nat seven in the morning. The glaze cools\n for nine hours.\n[2] words that no document here holds"
    row = {"messages": [{"role": "user", "content": f"{text}\n\n**Question:** When is the kiln fired?"}, {"role": "assistant", "content": KILN}]}
    [citation] = traces_of([row], retriever)["When is the kiln fired?"].citations
    assert citation.document == "kiln.txt"


def test_answers_that_are_numbers_are_no_verdicts_on_each_other(retriever: Retriever) -> None:
    rows = [{"messages": [{"role": "user", "content": f"{n} {ASKED}"}, {"role": "assistant", "content": text}]} for n, text in enumerate(("1", "0.9"))]
    trace = traces_of(rows, retriever)["When is the kiln fired?"]
    assert (trace.answer, trace.score) == ("0.9", None)


@pytest.mark.parametrize("created", [float("inf"), float("nan"), 10**400, -5, True, "soon", None])
def test_a_time_that_is_none_is_unknown(created: object) -> None:
    with suppress(ValueError):  # a number beyond all floats is no row of this format
        row = {"request": {"messages": [{"role": "user", "content": ASKED}]}, "response": reply(KILN, created=created)}
        assert read_call(row, 1, "openai").asked_at in (0.0, 1.0)


def test_a_naive_time_is_utc() -> None:
    row = SHAPES["langsmith chain"][1]
    assert read_call(row | {"start_time": "2026-01-02T03:04:05"}, 1, "langsmith").asked_at == 1767323045.0


def test_broken_characters_can_be_stored(retriever: Retriever, workspace: Workspace) -> None:
    row = json.loads('{"inputs": {"question": "When is it fired? \\ud83d"}, "outputs": {"answer": "At seven \\ude00.", "context": "c \\ud800"}}')
    [trace] = traces_of([row], retriever).values()
    workspace.store.put_trace(trace)
    assert workspace.store.trace(trace.id) == trace
    assert trace.question == "When is it fired? ?"


def test_nothing_is_built_from_a_serialised_object(tmp_path: Path) -> None:
    """LangChain's loader would make the object that a document names; here it is a message of an unknown kind."""
    hostile = {"lc": 1, "type": "constructor", "id": ["subprocess", "Popen"], "kwargs": {"args": ["touch", str(tmp_path / "made")], "content": KILN}}
    generation = json.dumps({"lc": 1, "type": "constructor", "id": ["os", "system"], "kwargs": {"text": KILN}})
    with pytest.raises(ValueError, match="unknown role 'Popen'"):
        read_call({"text": json.dumps([hostile]), "return_val": json.dumps([generation])}, 1, "langchain-cache")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("row", [{}, {"a": 1}, {"return_val": "x"}])
def test_an_unknown_format_is_named(row: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="no format known"):
        detect_format(row)


def test_the_command_line_knows_every_format() -> None:
    [command] = [command for command in COMMANDS if command.words == "traces import"]
    [choices] = [options["choices"] for names, options in command.arguments if names == ("--format",)]
    assert choices == list(FORMATS)


def test_an_empty_file_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(StorageError, match="nothing"):
        import_traces(workspace, tmp_path / "none.jsonl", "train", show_progress)


KEYS = ["messages", "role", "content", "kwargs", "inputs", "outputs", "request", "response", "choices", "return_val", "text", "message", "generations"]
json_values = st.recursive(
    st.none() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), json_values, max_size=5), st.sampled_from(FORMATS[1:]))
def test_any_json_is_a_call_or_a_reason(row: dict[str, Any], kind: Format) -> None:
    with suppress(ValueError):
        assert read_call(row, 1, kind).text


@pytest.mark.parametrize(
    ("text", "answer", "quotes", "abstained"),
    [
        ("Quote: a b c\nAnswer: Yes.", "Yes.", ["a b c"], False),
        ('{"answer": "Yes.", "quotes": ["a b c", {"quote": "d e f"}]}', "Yes.", ["a b c", "d e f"], False),
        ('```json\n{"answer": "I don\'t know."}\n```', "I don't know.", [], True),
        ("The context does not mention it.", "The context does not mention it.", [], True),
        ("It isn't stated in the passages.", "It isn't stated in the passages.", [], True),
        ("You may not enter without a permit.", "You may not enter without a permit.", [], False),
        ("<think>hm</think>Forty.", "Forty.", [], False),
    ],
)
def test_answers_in_other_forms(text: str, answer: str, quotes: list[str], abstained: bool) -> None:
    assert read_answer(text) == (answer, quotes, abstained)
    assert is_abstention(answer, quotes) == abstained


@pytest.mark.parametrize(("text", "score"), [("Score: 0.9", 0.9), ("1", 1.0), ('{"score": 0.4, "why": "x"}', 0.4), ("0.9 of the carp", None), ("{}", None)])
def test_verdicts_in_other_forms(text: str, score: float | None) -> None:
    assert verdict_of(text) == score


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("Context: x\nQuestion: When?", "When?"),
        ("### User question:\nWhen then?\nAnswer:", "When then?"),
        ("<context>a b</context>\n<question>\nWhen now?\n</question>", "When now?"),
        ("Use this. Is it so?\nMore words\nHow many?", "How many?"),
    ],
)
def test_questions_in_other_forms(prompt: str, question: str) -> None:
    call = read_call({"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": "x"}]}, 1, "chat")
    assert question_of(call, shows_passages=True) == question


def test_messages_of_text_models() -> None:
    assert [m.content for m in read_messages("Human: hello")] == ["Human: hello"]
