"""What happens during a run, as it happens: typed events, passed to a callback or read from a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass

from rag.prompts import ANSWER_FOUND, strip_thinking
from understudy.records import Step, StepName, Trace


@dataclass(frozen=True)
class StepStarted:
    """A step begins."""

    name: StepName
    model: str = ""  # the one asked; empty where none is


@dataclass(frozen=True)
class StepDone:
    """A step has ended well."""

    step: Step


@dataclass(frozen=True)
class AnswerText:
    """A piece of the answer, to be shown after the pieces before it."""

    text: str


@dataclass(frozen=True)
class Done:
    """The run has ended; always the last event. The trace's answer is what counts."""

    trace: Trace


Event = StepStarted | StepDone | AnswerText | Done
Emit = Callable[[Event], None]


def ignore(_: Event) -> None:
    """Nobody listens."""


async def stream(run: Callable[[Emit], Awaitable[Trace]]) -> AsyncGenerator[Event, None]:
    """The events of a run as they happen, Done last. Closing the generator, or cancelling its reader, cancels the run and waits for its end.

    Raises what the run raises.
    """
    events: asyncio.Queue[Event | None] = asyncio.Queue()
    task = asyncio.ensure_future(run(events.put_nowait))
    task.add_done_callback(lambda _: events.put_nowait(None))
    try:
        while (event := await events.get()) is not None:
            yield event
        yield Done(await task)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class AnswerWriter:
    """Emits the answer's text piece by piece: what follows the answer's label, never a think block or a quote."""

    def __init__(self, emit: Emit) -> None:
        self._emit, self._shown = emit, ""

    def feed(self, written: str) -> None:
        """Emit what has become readable of a completion that is being written."""
        found = ANSWER_FOUND.search(strip_thinking(written))
        if found:
            self._show(found.group(1).strip())

    def finish(self, answer: str) -> None:
        """Emit what is missing of the accepted answer; nothing where what was shown is not its beginning."""
        self._show(answer)

    def _show(self, text: str) -> None:
        if text.startswith(self._shown) and text != self._shown:
            self._emit(AnswerText(text[len(self._shown) :]))
            self._shown = text
