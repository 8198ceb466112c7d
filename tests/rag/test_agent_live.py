"""The agent on a real engine: a streamed answer is the whole one, and many runs share the engine."""

from __future__ import annotations

import asyncio

import pytest

from rag.agent import Tools, run_agent, stream_agent
from rag.events import AnswerText, Done
from rag.retrieve import Retriever
from tests.conftest import Served
from understudy.client import ModelClient, engine_model
from understudy.completions import Completion
from understudy.records import Message
from understudy.settings.answers import Agent

pytestmark = pytest.mark.engine


def test_a_streamed_completion_is_the_whole_one(engine_session: Served) -> None:
    asked = [Message(role="user", content="Name three colours.")]
    drafts: list[Completion] = []

    async def run() -> tuple[Completion, Completion]:
        async with ModelClient(engine_model(engine_session.running, "base")) as client:
            return await client.complete(asked, 24), await client.complete(asked, 24, on_progress=drafts.append)

    whole, streamed = asyncio.run(run())
    assert streamed.text == whole.text
    assert streamed.tokens == whole.tokens
    assert streamed.usage.completion_tokens == whole.usage.completion_tokens > 0
    assert streamed.usage.prompt_tokens == whole.usage.prompt_tokens > 0
    assert streamed.first_alternatives.keys() == whole.first_alternatives.keys()
    assert streamed.mean_logprob == pytest.approx(whole.mean_logprob, abs=0.05)
    assert len(drafts) > 5
    assert all(whole.text.startswith(draft.text) for draft in drafts)


def test_an_answer_is_gone_on_from_where_it_is_put(engine_session: Served) -> None:
    asked = [Message(role="user", content="Name three colours.")]

    async def run() -> tuple[Completion, str, Completion]:
        async with ModelClient(engine_model(engine_session.running, "base")) as client:
            whole = await client.complete(asked, 24)
            put = " ".join(whole.text.split(" ")[:4])
            return whole, put, await client.complete([*asked, Message(role="assistant", content=put)], 8)

    whole, put, rest = asyncio.run(run())
    assert rest.usage.prompt_tokens > whole.usage.prompt_tokens
    assert whole.text.startswith(put + rest.text[:2])


@pytest.mark.parametrize("mode", ["agentic", "fast", "closed-book"])
def test_runs_of_each_mode_end_whole(engine_session: Served, retriever: Retriever, mode: str) -> None:
    async def run() -> None:
        async with Tools(ModelClient(engine_model(engine_session.running, "base")), retriever, Agent.model_validate({"mode": mode})) as tools:
            events = [event async for event in stream_agent("When is the kiln fired?", tools)]
            assert isinstance(events[-1], Done)
            assert events[-1].trace.complete
            assert "".join(event.text for event in events if isinstance(event, AnswerText)) == events[-1].trace.answer
            traces = await asyncio.gather(*(run_agent(f"When is kiln {number} fired?", tools) for number in range(8)))
            assert all(trace.complete for trace in traces)

    asyncio.run(run())
