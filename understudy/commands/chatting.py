"""chat: a conversation in the terminal, or over a pipe, a question a line."""

from __future__ import annotations

import asyncio
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from understudy.commands import Outcome, report
from understudy.commands.answers import AnswerPrinter, answer_json, answering
from understudy.records import Trace
from understudy.terminal import printable

if TYPE_CHECKING:
    from rag.chat import Conversation
    from rag.run import Tools

WELCOME = "Ask about the documents. /sources shows what the last answer rests on, /quit leaves, Ctrl-C stops an answer."
INTERRUPTED = 130


def chat(args: Namespace) -> Outcome:
    """Answer questions until /quit or the end of the input; 1 where one could not be answered, 130 after Ctrl-C at the prompt or twice."""
    from rag.chat import Conversation

    with answering(args) as (_, tools), asyncio.Runner() as runner:
        session = Session(tools, Conversation(), AnswerPrinter(not args.json), runner.run, not args.json)
        try:
            exit_code = session.hold(read_lines())
        finally:
            runner.run(tools.__aexit__())
    return Outcome({"answers": [answer_json(trace) for trace in session.traces]}, exit_code=exit_code)


def read_lines() -> Iterator[str]:
    """The lines that a person types, with a prompt and line editing, or those of a pipe."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401 - input() edits lines with it; its history stays in memory

    report(WELCOME)
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


@dataclass
class Session:
    """A conversation as it is held."""

    tools: Tools
    conversation: Conversation
    printer: AnswerPrinter
    run: Callable[..., Trace]  # a coroutine to its end; KeyboardInterrupt cancels it
    shows_text: bool
    traces: list[Trace] = field(default_factory=list)

    def hold(self, lines: Iterator[str]) -> int:
        """Answer line after line; returns the exit code."""
        was_stopped, failed = False, False
        try:
            for line in lines:
                question = line.strip()
                if question == "/quit":
                    break
                if question.startswith("/"):
                    self._show(self._sources() if question == "/sources" else [f"no command {question}; there are /sources and /quit"])
                elif question:
                    answered, was_stopped_before = self._answer(question), was_stopped
                    was_stopped = answered is None
                    failed |= answered is False
                    if was_stopped and was_stopped_before:
                        return INTERRUPTED
                    if was_stopped:
                        report("stopped; Ctrl-C again leaves")
        except KeyboardInterrupt:
            return INTERRUPTED
        return int(failed)

    def _answer(self, question: str) -> bool | None:
        """Whether there is an answer; None where Ctrl-C stopped it.

        The interrupted run is torn down before this returns: the interpreter drops a KeyboardInterrupt raised in a destructor.
        """
        from rag.answering import stream_answer

        try:
            trace = self.run(self.printer.follow(stream_answer(question, self.tools, self.conversation)))
        except KeyboardInterrupt:
            return None
        self.traces.append(trace)
        if not trace.complete and not trace.answer:
            report(printable(f"no answer: {trace.metadata.get('error')}; trace {trace.id[:12]}"))
            return False
        self._show([*self.printer.rest(trace), ""])
        return True

    def _sources(self) -> list[str]:
        """What the last answer rests on: its quotes, then the passages it was given."""
        if not self.traces:
            return ["nothing was answered yet"]
        last = self.traces[-1]
        lines = [f'"{citation.quote}"  {citation.document}, p. {citation.page}' for citation in dict.fromkeys(last.citations)]
        ids = next((step.passage_ids for step in reversed(last.steps) if step.passage_ids), [])
        for chunk in (self.tools.retriever.chunks[chunk_id] for chunk_id in ids if chunk_id in self.tools.retriever.chunks):
            lines += [f"── {chunk.document}, p. {', '.join(map(str, chunk.pages))}", chunk.text]
        return lines or ["it rests on no passage"]

    def _show(self, lines: list[str]) -> None:
        if self.shows_text:
            print("\n".join(printable(line) for line in lines), flush=True)
