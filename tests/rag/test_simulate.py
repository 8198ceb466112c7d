"""The simulation phase with a scripted teacher: a real server, real retrieval, kills at every call."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from rag.prompts import ABSTENTION
from rag.question_writing import Unusable, read_question
from rag.recorded import Budget, BudgetReached, CallLog, RecordedClient
from rag.retrieve import Retriever, open_retriever
from rag.same_questions import KnownQuestions
from rag.simulate import Plan, simulate, spread, visits_of
from tests.conftest import workspace_of_notes
from train.ledger import is_teaching, verify_traces
from understudy.client import Model
from understudy.errors import EndpointError, StorageError
from understudy.progress import show_progress
from understudy.records import Chunk, Document, Message, Trace
from understudy.workspace import Workspace, create_workspace

NOTES = {
    "kiln.txt": "The kiln in the east yard is fired on Tuesdays at seven in the morning.",
    "barn.txt": "The barn doors are painted green every third summer by the village school.",
    "pond.txt": "The pond is stocked with forty carp in April, never later than the tenth.",
    "mill.txt": "The mill grinds barley from noon until the miller has gone home again.",
    "well.txt": "The well is cleaned by two brothers who live beyond the northern hedge.",
}
SUBJECTS = {name.removesuffix(".txt"): text for name, text in NOTES.items()}
Rule = Callable[[str, str], str | None]  # (subject, prompt) -> another reply than a good teacher's, or None


def subject_of(prompt: str) -> str:
    """The note that a prompt's own question or passage is about."""
    last = prompt.rpartition("Question: ")[2] if "Question: …" not in prompt else prompt
    return next((name for name in SUBJECTS if name in last), "")


def good_teacher(prompt: str) -> str:
    """Writes a question with its quote, finds it, quotes it, and abstains where nothing answers."""
    subject = subject_of(prompt)
    if "Write one question" in prompt:
        return f"Question: Who owns the {subject} these days?" + (f"\nQuote: {SUBJECTS[subject]}" if "Quote: …" in prompt else "")
    if "search query" in prompt:
        return f"{subject} owner"
    if "Proposed answer" in prompt:
        return "1"
    return ABSTENTION if "unanswerable" in prompt else f"Quote: {SUBJECTS.get(subject)}\nAnswer: That is told of the {subject}."


class Teacher:
    """A chat completions server; `rule` may answer in the good teacher's place, and `at_call` is told the number of each call."""

    def __init__(self) -> None:
        self.rule: Rule = lambda _subject, _prompt: None
        self.at_call: Callable[[int], None] = lambda _: None
        self.prompts: list[str] = []
        self.broken = False
        teacher = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
                teacher.prompts.append(prompt)
                teacher.at_call(len(teacher.prompts))
                text = teacher.rule(subject_of(prompt), prompt)
                choice = {"message": {"role": "assistant", "content": good_teacher(prompt) if text is None else text}, "index": 0, "finish_reason": "stop"}
                usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
                body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [] if teacher.broken else [choice], "usage": usage}
                content = json.dumps(body).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.model = Model("teacher", "m", self.url)


@pytest.fixture
def teacher() -> Iterator[Teacher]:
    made = Teacher()
    yield made
    made.server.shutdown()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return workspace_of_notes(tmp_path_factory.mktemp("simulate"), NOTES)


@pytest.fixture(scope="module")
def retriever(corpus: Workspace) -> Retriever:
    return open_retriever(corpus)


@pytest.fixture
def workspace(corpus: Workspace, tmp_path: Path) -> Workspace:
    """The corpus with a store of its own."""
    shutil.copytree(corpus.root, tmp_path / "w", symlinks=True)
    return create_workspace(str(tmp_path / "w"))


def kept(workspace: Workspace) -> list[Trace]:
    return sorted(workspace.store.traces("default"), key=lambda trace: trace.question)


def plan(questions: int = 50, unanswerable: float = 0.0, concurrency: int = 2, **budget: int) -> Plan:
    return Plan(questions, unanswerable, Budget(**budget), concurrency)


def test_questions_that_hold_become_a_teachers_traces(workspace: Workspace, retriever: Retriever, teacher: Teacher) -> None:
    result = simulate(workspace, teacher.model, retriever, plan(), show_progress)
    assert result["kept"] == {"answerable": 5, "unanswerable": 0}
    assert result["rejected"] == {"a duplicate": 10}  # the second and third pass write nothing new
    assert (result["stopped"], result["calls"], result["tokens"]) == ("chunks", 30, {"prompt": 3000, "completion": 300})
    for trace in kept(workspace):
        assert (trace.source, trace.metadata["teacher"], trace.metadata["split"]) == ("model", "teacher", "train")
        assert [citation.chunk_id for citation in trace.citations] == [trace.metadata["written_from"]]
        assert [step.name for step in trace.steps] == ["plan", "retrieve", "answer", "validate"]
    verified = verify_traces(kept(workspace), retriever.chunks)
    assert verified.rejections == []
    assert all(is_teaching(source.trace) and source.support == (source.trace.metadata["written_from"],) for source in verified.sources)
    report = json.loads((workspace.root / result["report"]).read_text())
    assert {row["reason"] for row in report["rejections"]} == {"a duplicate"}


def test_a_share_of_the_questions_finds_no_answer(workspace: Workspace, retriever: Retriever, teacher: Teacher) -> None:
    def rule(subject: str, prompt: str) -> str | None:
        if "Write one question" in prompt and "Quote: …" not in prompt:
            return f"Question: Is the unanswerable colour of the {subject} known?"
        return ABSTENTION if "unanswerable" in prompt and "Copy the sentence" in prompt else None

    teacher.rule = rule
    result = simulate(workspace, teacher.model, retriever, plan(5, 0.4), show_progress)
    assert result["kept"] == {"answerable": 3, "unanswerable": 2}
    assert all(t.abstained == ("unanswerable" in t.question) for t in kept(workspace))


REPLIES = {
    "no question in the reply": "I would rather not.",
    "not one whole question": "Question: The kiln",
    "points at the passage, which its reader does not see": "Question: What does this passage say of the kiln?\nQuote: x",
    "no quote in the reply": "Question: When is the kiln in the yard fired?",
    "the quote is not verbatim in the passage": "Question: When is the kiln fired?\nQuote: The kiln is fired on Sundays at noon.",
}


@pytest.mark.parametrize("reason", REPLIES)
def test_a_reply_that_will_not_do_is_told(retriever: Retriever, reason: str) -> None:
    chunk = next(chunk for chunk in retriever.chunks.values() if chunk.document == "kiln.txt")
    with pytest.raises(Unusable, match=re.escape(reason)):
        read_question(REPLIES[reason], chunk, answered=True)


def test_answers_that_do_not_hold_are_not_kept(workspace: Workspace, retriever: Retriever, teacher: Teacher) -> None:
    def rule(subject: str, prompt: str) -> str | None:
        if "Write one question" in prompt:
            return "Question: Which planet is furthest away?\nQuote: " + SUBJECTS["pond"] if subject == "pond" else None
        if "Copy the sentence" in prompt:
            return {"kiln": ABSTENTION, "barn": "Answer: Green.", "mill": f"Quote: {SUBJECTS['mill']}\nAnswer: Barley."}.get(subject)
        return "0" if "Proposed answer" in prompt and subject == "mill" else None

    teacher.rule = rule
    limited = workspace.root / "understudy.yaml"
    limited.write_text("agent: {max_rounds: 1}\nretrieval: {k: 1}\n")
    narrow = create_workspace(str(workspace.root))
    result = simulate(narrow, teacher.model, replace(retriever, settings=narrow.config.retrieval), plan(unanswerable=0.0), show_progress)
    reasons = {
        row["document"]: row["reason"] for row in json.loads((narrow.root / result["report"]).read_text())["rejections"] if "duplicate" not in row["reason"]
    }
    assert reasons["kiln.txt"] == "the teacher abstained"
    assert reasons["barn.txt"] == "the answer has no verbatim quote"
    assert reasons["mill.txt"] == "validated below agent.accept_score"
    assert reasons["pond.txt"] == "retrieval does not find the passage it was written about"
    assert [trace.question for trace in kept(narrow)] == ["Who owns the well these days?"]


@pytest.mark.parametrize("budget", [{"calls": 7}, {"tokens": 700}])
def test_a_budget_is_kept_and_a_larger_one_goes_on(workspace: Workspace, retriever: Retriever, teacher: Teacher, budget: dict[str, int]) -> None:
    first = simulate(workspace, teacher.model, retriever, plan(**budget), show_progress)
    assert first["stopped"] == next(iter(budget))
    assert first["calls"] == len(teacher.prompts) <= 8
    second = simulate(workspace, teacher.model, retriever, plan(questions=5), show_progress)
    assert (second["kept"]["answerable"], second["stopped"]) == (5, "questions")
    assert len(teacher.prompts) == second["calls"] == 20  # nothing was asked twice
    simulate(workspace, teacher.model, retriever, plan(questions=5), show_progress)
    assert len(teacher.prompts) == 20
    assert len(kept(workspace)) == 5


def test_a_log_cut_off_anywhere_is_gone_on_with(workspace: Workspace, retriever: Retriever, teacher: Teacher) -> None:
    """What a kill at each call leaves: the calls until then, and the beginning of the next line."""
    whole = simulate(workspace, teacher.model, retriever, plan(questions=3, concurrency=1), show_progress)
    calls = workspace.simulations / whole["simulation"] / "calls.jsonl"
    lines = calls.read_bytes().splitlines(keepends=True)
    questions = [trace.question for trace in kept(workspace)]
    for count in range(len(lines)):
        calls.write_bytes(b"".join(lines[:count]) + lines[count][: len(lines[count]) // 2])
        asked = len(teacher.prompts)
        again = simulate(workspace, teacher.model, retriever, plan(questions=3, concurrency=1), show_progress)
        assert len(teacher.prompts) - asked == len(lines) - count
        assert again == whole
    assert [trace.question for trace in kept(workspace)] == questions


@pytest.mark.engine  # for its time alone: a second process loads the embedder
def test_a_killed_process_loses_the_calls_in_flight_and_nothing_else(workspace: Workspace, retriever: Retriever, teacher: Teacher) -> None:
    (workspace.root / "understudy.yaml").write_text(f"remotes: {{teacher: {{base_url: '{teacher.url}', model: m}}}}\n")
    command = [sys.executable, "-m", "understudy.cli", "--workspace", str(workspace.root), "traces", "simulate", "--questions", "5", "--unanswerable", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    teacher.at_call = lambda number: os.kill(process.pid, signal.SIGKILL) if number == 11 else None
    assert process.wait(120) == -signal.SIGKILL, process.communicate()
    teacher.at_call = lambda _: None
    again = create_workspace(str(workspace.root))
    result = simulate(again, teacher.model, retriever, Plan(5, 0.0, Budget()), show_progress)
    assert (result["kept"], result["calls"]) == ({"answerable": 5, "unanswerable": 0}, 20)
    assert len(teacher.prompts) <= 20 + 4  # four questions were in flight
    assert len(kept(again)) == 5


def test_a_teacher_that_is_gone_ends_it_and_costs_nothing(workspace: Workspace, retriever: Retriever, teacher: Teacher) -> None:
    teacher.broken = True
    with pytest.raises(EndpointError, match="5 times in a row"):
        simulate(workspace, teacher.model, retriever, plan(), show_progress)
    teacher.broken = False
    assert simulate(workspace, teacher.model, retriever, plan(questions=5), show_progress)["calls"] == 20


def test_the_same_request_again_is_another_sample(teacher: Teacher, tmp_path: Path) -> None:
    written: Iterator[str] = iter("abcdef")
    teacher.rule = lambda _subject, _prompt: next(written)
    messages = [Message(role="user", content="x")]

    async def ask(times: int, calls: int | None = None) -> list[str]:
        async with RecordedClient(teacher.model, CallLog(tmp_path / "calls.jsonl"), Budget(calls)) as client:
            return [(await client.complete(messages, 8, 0.8)).text for _ in range(times)]

    assert asyncio.run(ask(2)) == ["a", "b"]
    assert asyncio.run(ask(3)) == ["a", "b", "c"]
    with pytest.raises(BudgetReached):
        asyncio.run(ask(4, calls=3))


def test_a_log_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "calls.jsonl").write_text('{"key": "k", "text": "x"}\n')
    with pytest.raises(StorageError, match="line 1"):
        CallLog(tmp_path / "calls.jsonl")


def test_near_duplicates_are_one_question_unless_a_number_differs(retriever: Retriever) -> None:
    known = KnownQuestions(retriever.embed)
    known.add(["How many carp are there in the pond?"])
    assert known.admit("how many CARP are there, in the pond") == "a duplicate"
    assert known.admit("How many carp are in the pond?") == "a near-duplicate"
    assert known.admit("What does article 5 require of providers?") is None
    assert known.admit("What does article 6 require of providers?") is None
    assert KnownQuestions(lambda texts: np.zeros((len(texts), 3))).admit("First?") is None


def test_visits_spread_over_documents_and_headings(make_document: Callable[..., tuple[Document, list[Chunk]]]) -> None:
    words = "one two three four five six seven eight nine"
    chunks = [chunk for name in "abc" for chunk in make_document(name, [f"{name} {n} {words}" for n in range(4)])[1]]
    chunks = [chunk.model_copy(update={"headings": [f"h{chunk.ordinal // 2}"]}) for chunk in chunks]
    order = spread(chunks, seed=1)
    assert sorted(order, key=lambda c: c.id) == sorted(chunks, key=lambda c: c.id)
    assert all({c.document for c in order[i : i + 3]} == {"a", "b", "c"} for i in range(0, 12, 3))
    assert {(c.document, c.headings[0]) for c in order[:6]} == {(d, h) for d in "abc" for h in ("h0", "h1")}
    assert spread(chunks, seed=1) == order != spread(chunks, seed=2)
    visits = list(visits_of([*chunks, make_document("short", ["a heading"])[1][0]], 0.25, seed=0))
    assert [sum(not visit.answered for visit in visits[i : i + 4]) for i in range(0, 36, 4)] == [1] * 9
    assert [visit.temperature for visit in visits].count(0.0) == 12
