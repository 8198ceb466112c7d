"""A run whose plan, answer and verdict come from models of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from rag.agent import Teacher, Tools, run_agent
from rag.answering import answer_question
from rag.chat import Conversation
from rag.retrieve import Retriever
from tests.rag.test_agent import QUESTION, RIGHT
from tests.scripted import HASTY, Endpoint, scripted
from understudy.client import ModelClient
from understudy.records import StepName, Trace
from understudy.settings.answers import Agent


@pytest.fixture
def rivals() -> Iterator[dict[StepName, Endpoint]]:
    """A server for each step."""
    with scripted("planner") as planner, scripted("writer") as writer, scripted("checker") as checker:
        for made in (planner, writer, checker):
            made.reply = lambda step, _: {**RIGHT, "rewrite": "At what time is the kiln fired?"}[step]
        yield {"plan": planner, "answer": writer, "validate": checker}


def tools_of(rivals: dict[StepName, Endpoint], retriever: Retriever, settings: Agent, teacher: Teacher | None = None) -> Tools:
    clients = {step: ModelClient(endpoint.model, HASTY) for step, endpoint in rivals.items()}
    apart: dict[StepName, ModelClient] = {"rewrite": clients["plan"], "plan": clients["plan"], "validate": clients["validate"]}
    return Tools(clients["answer"], retriever, settings, teacher=teacher, by_step=apart, release="eu-act@0123456789ab")


def test_each_step_asks_its_own_model_and_the_trace_says_which(rivals: dict[StepName, Endpoint], retriever: Retriever) -> None:
    rivals["validate"].refuses_logprobs = True

    async def run() -> list[Trace]:
        talk = Conversation()
        async with tools_of(rivals, retriever, Agent()) as tools:
            return [await answer_question(asked, tools, conversation=talk) for asked in (QUESTION, "And at what time?")]

    first, second = asyncio.run(run())
    assert [(step.name, step.model) for step in first.steps if step.model] == [("plan", "planner"), ("answer", "writer"), ("validate", "checker")]
    assert (first.model, first.release, first.complete, first.answer) == ("writer", "eu-act@0123456789ab", True, "On Tuesdays at seven.")
    assert {step.endpoint for step in first.steps if step.model} == {endpoint.model.base_url for endpoint in rivals.values()}
    assert second.steps[0].name == "rewrite" and second.steps[0].model == "planner"
    assert set(rivals["answer"].asked) == {"answer"} and set(rivals["validate"].asked) == {"validate"}
    assert "logprobs" in rivals["answer"].bodies[-1] and "logprobs" not in rivals["validate"].bodies[-1]  # what one refuses the others still give


def test_the_teacher_takes_every_step_over(rivals: dict[StepName, Endpoint], retriever: Retriever) -> None:
    rivals["validate"].reply = lambda *_: "0"
    with scripted("frontier") as frontier:
        frontier.reply = lambda step, _: RIGHT[step]

        async def run() -> Trace:
            settings = Agent(escalate_to="frontier", escalate_below=0.5, max_rounds=1)
            async with tools_of(rivals, retriever, settings, Teacher(ModelClient(frontier.model, HASTY))) as tools:
                return await run_agent(QUESTION, tools)

        trace = asyncio.run(run())
    assert trace.model == "frontier" and [step.model for step in trace.steps if step.model] == ["planner", "writer", "checker", "frontier", "frontier"]
