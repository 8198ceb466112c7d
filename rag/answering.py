"""One question in, one kept Trace out: what `ask`, `chat` and a gateway call around the agent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from functools import partial

from rag.agent import run_agent
from rag.cached import answer_cached
from rag.chat import Conversation, stand_alone
from rag.events import AnswerText, Emit, Event, ignore, stream
from rag.run import Tools
from rag.traces import keep_trace
from understudy.records import Trace
from understudy.workspace import Workspace


async def answer_question(question: str, tools: Tools, emit: Emit = ignore, conversation: Conversation | None = None) -> Trace:
    """Answer a question, after a conversation or alone, from the cache where it may be. The trace is kept, and the conversation remembers it."""
    conversation = conversation or Conversation()
    noted = {"conversation": conversation.digest, "asked": question} if conversation.turns else {}
    asked, steps = await stand_alone(question, conversation, tools, emit)

    async def run() -> Trace:
        return await run_agent(asked, tools, noted, emit, tuple(steps))

    if tools.cached:
        trace = await answer_cached(asked, tools.cached.after(conversation.digest), run)
        if trace.cache != "miss":
            trace = trace.model_copy(update={"steps": steps, "metadata": {**trace.metadata, **noted}})
            emit(AnswerText(trace.answer))
    else:
        trace = await run()
    await asyncio.to_thread(tools.keep, trace)
    conversation.remember(trace)
    return trace


def stream_answer(question: str, tools: Tools, conversation: Conversation | None = None) -> AsyncGenerator[Event, None]:
    """`answer_question` as a stream of events, Done last; closing it cancels the run."""
    return stream(lambda emit: answer_question(question, tools, emit, conversation))


def trace_keeper(workspace: Workspace) -> Callable[[Trace], None]:
    """Where every finished trace goes, whole or not: the one place for what is done with traces before and after they are stored."""
    return partial(keep_trace, workspace)
