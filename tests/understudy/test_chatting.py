"""ask and chat as a person and a pipe meet them, and model output that would act on the terminal."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest

from rag.agent import Tools
from rag.chat import Conversation
from rag.events import AnswerText, Done, Event
from rag.retrieve import open_retriever
from tests.scripted import HASTY, Endpoint, drip, scripted
from understudy.client import ModelClient
from understudy.commands.answers import AnswerPrinter, answer_json, answer_lines
from understudy.commands.chatting import Session
from understudy.records import Citation, Trace
from understudy.settings.answers import Agent
from understudy.terminal import inert_json, printable
from understudy.workspace import Workspace

ANSWERS = {
    "plan": "kiln firing",
    "answer": "Quote: fired on Tuesdays at seven\nAnswer: On Tuesdays at seven.",
    "validate": "1",
    "rewrite": "At what time is the kiln fired?",
}
HOSTILE = "\x1b]8;;http://evil.example/\x07click\x1b]8;;\x07 \x1b[2J \x9b31m \x07\r\x00 \u202etxt.exe ![x](http://evil.example/a.png)"
QUESTION = "When is the kiln fired?"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with scripted("far") as made:
        made.reply = lambda step, _: ANSWERS[step]
        yield made


@pytest.fixture
def session(endpoint: Endpoint, notes_workspace: Workspace) -> Iterator[Session]:
    with asyncio.Runner() as runner:
        tools = Tools(ModelClient(endpoint.model, HASTY), open_retriever(notes_workspace), Agent())
        yield Session(tools, Conversation(), AnswerPrinter(True), runner.run, True)
        runner.run(tools.__aexit__())


def trace_of(text: str, **changes: object) -> Trace:
    values: dict[str, object] = {
        "id": text, "question": text, "steps": [], "answer": text, "abstained": False, "score": 0.9, "source": "model", "model": text, "generation": "g",
        "citations": [Citation(chunk_id="c", document_id="d", document=text, quote=text, page=1, start=0, end=1)], "prompt_version": "p", "created_at": 0.0,
    }  # fmt: skip
    return Trace.model_validate(values | changes)


async def played(*events: Event) -> AsyncGenerator[Event, None]:
    for event in events:
        yield event


def assert_inert(shown: str) -> None:
    assert all(c.isprintable() or c == "\n" for c in shown), ascii(shown)


def test_what_a_model_writes_does_nothing_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """CASE 12: no control character, escape sequence, terminal link or bidirectional mark gets through; addresses stay text."""
    hostile = trace_of(HOSTILE, complete=False, metadata={"error": HOSTILE})
    printer = AnswerPrinter(True)
    trace = asyncio.run(printer.follow(played(AnswerText(HOSTILE[:20]), AnswerText(HOSTILE[20:]), Done(hostile))))
    shown = capsys.readouterr().out + "\n".join([*printer.rest(trace), *answer_lines(trace)])
    assert_inert(shown)
    assert "![x](http://evil.example/a.png)" in shown
    as_json = inert_json(answer_json(hostile))
    assert_inert(as_json)
    assert json.loads(as_json)["answer"] == HOSTILE
    assert_inert(printable(HOSTILE))
    assert json.loads(inert_json({"🜁\U000e0001\n": [HOSTILE]})) == {"🜁\U000e0001\n": [HOSTILE]}


def test_text_that_was_withdrawn_is_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    printer = AnswerPrinter(True)
    trace = asyncio.run(printer.follow(played(AnswerText("On Sundays"), Done(trace_of("The documents do not answer this question.")))))
    lines = printer.rest(trace)
    assert capsys.readouterr().out == "On Sundays\n"
    assert "withdrawn" in lines[0]
    assert "do not answer" in lines[1]


def test_a_quote_that_is_repeated_is_shown_once() -> None:
    once = trace_of("x")
    assert answer_lines(once.model_copy(update={"citations": once.citations * 5})) == answer_lines(once)


def test_an_incomplete_answer_says_why() -> None:
    assert "cut off: 900 tokens spent" in answer_lines(trace_of("x", complete=False, metadata={"error": "900 tokens spent"}))[-1]


def test_a_conversation_over_a_pipe(session: Session, endpoint: Endpoint, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["/sources", QUESTION + "\n", "\n", "/sources", "/dance", "And at what time?", "/quit", "never asked"]
    assert session.hold(iter(lines)) == 0
    out = capsys.readouterr().out
    assert [trace.question for trace in session.traces] == [QUESTION, ANSWERS["rewrite"]]
    assert out.count("On Tuesdays at seven.\n") == 2
    assert "nothing was answered yet" in out
    assert "The glaze cools for nine hours." in out  # /sources shows the passage
    assert "no command /dance" in out
    assert "never asked" not in str(endpoint.bodies)


def test_a_question_that_fails_does_not_end_the_conversation(session: Session, endpoint: Endpoint, capsys: pytest.CaptureFixture[str]) -> None:
    endpoint.faults = [lambda handler: handler.send(401, {"error": {"message": "no key"}})]
    assert session.hold(iter([QUESTION, QUESTION])) == 1
    assert [trace.complete for trace in session.traces] == [False, True]
    assert "no key" in capsys.readouterr().err


def test_an_interrupt_stops_the_answer_and_a_second_one_leaves(session: Session) -> None:
    real, interrupts = session.run, iter([True, False, True, True])

    def run(answer: Any) -> Trace:
        if next(interrupts):
            answer.close()
            raise KeyboardInterrupt
        return real(answer)

    session.run = run
    assert session.hold(iter([QUESTION] * 9)) == 130
    assert len(session.traces) == 1  # stopped, answered, stopped, left


@pytest.mark.slow
def test_chat_in_a_process_of_its_own(endpoint: Endpoint, notes_workspace: Workspace, tmp_path: Path) -> None:
    """A pipe, an answer, Ctrl-C during the next one, which is kept incomplete, and Ctrl-C again."""
    root = tmp_path / "workspace"
    shutil.copytree(notes_workspace.root, root, symlinks=True)
    (root / "understudy.yaml").write_text(f"remotes: {{far: {{base_url: '{endpoint.model.base_url}', model: m}}}}\n")
    command = [sys.executable, "-m", "understudy.cli", "--workspace", str(root), "chat", "--model", "far"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout and process.stderr
    process.stdin.write(QUESTION + "\n")
    process.stdin.flush()
    assert process.stdout.readline() == "On Tuesdays at seven.\n"
    endpoint.faults = [drip]
    process.stdin.write("And at what time?\n")
    process.stdin.flush()
    while "rewrite" not in endpoint.asked:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    while "stopped" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)  # at once
    assert process.wait(30) == 130
    assert "Traceback" not in process.stderr.read()
    traces = list(Workspace(root, notes_workspace.config, {}).store.traces("default"))
    assert [(trace.complete, trace.metadata.get("error", "")) for trace in traces[-2:]] == [(True, ""), (False, "the run was cancelled")]
