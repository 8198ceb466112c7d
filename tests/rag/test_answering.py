"""Questions one after another: follow-ups rewritten, a bounded memory, every trace kept once."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from rag.answering import answer_question, trace_keeper
from rag.cache import Scope, SemanticCache
from rag.cache_decision import DEFAULT
from rag.cached import Cached
from rag.chat import TURN_CHARACTERS, TURNS, Conversation, asks_nothing_new
from rag.events import AnswerText, Event, StepDone
from rag.retrieve import Retriever
from tests.rag.test_agent import QUESTION, RIGHT, tools_of
from tests.scripted import Endpoint, drip, status
from understudy.records import Trace
from understudy.settings.answers import Cache
from understudy.workspace import Workspace

FOLLOW_UP = "And at what time?"


def hold(endpoint: Endpoint, retriever: Retriever, questions: list[str], conversation: Conversation, **settings: object) -> tuple[list[Trace], list[Event]]:
    events: list[Event] = []

    async def run() -> list[Trace]:
        async with tools_of(endpoint, retriever, **settings) as tools:
            return [await answer_question(question, tools, events.append, conversation) for question in questions]

    return asyncio.run(run()), events


def test_a_follow_up_is_rewritten_from_the_conversation(endpoint: Endpoint, retriever: Retriever) -> None:
    endpoint.reply = lambda step, _: {**RIGHT, "rewrite": "At what time on Tuesdays is the kiln fired?"}[step]
    conversation = Conversation()
    [first, second], events = hold(endpoint, retriever, [QUESTION, FOLLOW_UP], conversation)
    assert endpoint.asked == ["plan", "answer", "validate", "rewrite", "plan", "answer", "validate"]
    shown = endpoint.bodies[3]["messages"][-1]["content"]
    assert QUESTION in shown and "On Tuesdays at seven." in shown and FOLLOW_UP in shown
    assert second.question == "At what time on Tuesdays is the kiln fired?"
    assert second.metadata["asked"] == FOLLOW_UP
    assert second.steps[0].name == "rewrite"
    assert "conversation" not in first.metadata
    assert second.metadata["conversation"] == Conversation([(QUESTION, first.answer)]).digest
    assert "rewrite" in [event.step.name for event in events if isinstance(event, StepDone)]
    assert [turn[0] for turn in conversation.turns] == [QUESTION, second.question]


def test_the_cache_stands_before_the_runs_of_a_conversation(endpoint: Endpoint, retriever: Retriever) -> None:
    endpoint.reply = lambda step, _: RIGHT[step]
    cache = SemanticCache(retriever.store, retriever, Cache(), DEFAULT)
    cached = Cached(cache, Scope(retriever.tenant, "base", "p"), "base", 0.5)
    kept: list[Trace] = []
    events: list[Event] = []

    async def run() -> list[Trace]:
        async with replace(tools_of(endpoint, retriever), cached=cached, keep=kept.append) as tools:
            talk = Conversation([("Where is the kiln?", "In the yard.")])
            first, second = [await answer_question(QUESTION, tools, events.append) for _ in range(2)]
            return [first, second, await answer_question(QUESTION, tools, events.append, talk)]

    traces = asyncio.run(run())
    assert [trace.cache for trace in traces] == ["miss", "exact", "miss"]  # a conversation is a scope of its own
    assert traces == kept
    assert [event.text for event in events if isinstance(event, AnswerText)][1] == traces[1].answer == traces[0].answer


@pytest.mark.parametrize("rewritten", ["", "<think>hm", "kiln fired Tuesdays time", "What is the meaning of quantum chromodynamics in Paris?"])
def test_a_rewriting_that_fails_leaves_the_question_as_it_is(endpoint: Endpoint, retriever: Retriever, rewritten: str) -> None:
    endpoint.reply = lambda step, _: {**RIGHT, "rewrite": rewritten}[step]
    [_, second], _ = hold(endpoint, retriever, [QUESTION, FOLLOW_UP], Conversation())
    assert second.question == FOLLOW_UP
    assert second.complete


def test_so_does_an_endpoint_that_fails_at_it(endpoint: Endpoint, retriever: Retriever) -> None:
    endpoint.reply, endpoint.faults = lambda step, _: RIGHT[step], [status(401)]
    [trace], _ = hold(endpoint, retriever, [FOLLOW_UP], Conversation([(QUESTION, "On Tuesdays.")]))
    assert (trace.question, trace.complete) == (FOLLOW_UP, True)


def test_memory_is_bounded_and_holds_no_incomplete_turn() -> None:
    trace = Trace.model_validate(
        {"id": "1", "question": "q" * 9999, "steps": [], "answer": "a" * 9999, "abstained": False, "citations": [], "score": None, "source": "model",
         "generation": "g", "prompt_version": "p", "created_at": 0.0}
    )  # fmt: skip
    conversation = Conversation()
    conversation.remember(trace.model_copy(update={"complete": False}))
    assert (conversation.turns, conversation.digest) == ([], "")
    digests = set()
    for number in range(TURNS + 3):
        conversation.remember(trace.model_copy(update={"question": f"{number} {trace.question}"}))
        digests.add(conversation.digest)
    assert len(conversation.turns) == TURNS
    assert all(len(text) <= TURN_CHARACTERS for turn in conversation.turns for text in turn)
    assert len(digests) == TURNS + 3


def test_what_asks_something_new() -> None:
    assert asks_nothing_new("When is the kiln fired?", ["the kiln", "fired on Tuesday, when?"])
    assert not asks_nothing_new("Where is the treasure?", ["the kiln"])
    assert not asks_nothing_new("a b", ["a b"])


def test_every_trace_is_kept_once_whole_or_not(endpoint: Endpoint, retriever: Retriever, notes_workspace: Workspace) -> None:
    endpoint.reply = lambda step, _: RIGHT[step]
    asked = [f"{QUESTION} {ending}" for ending in ("whole", "failed", "cancelled", "cancelled while it was rewritten")]

    async def run() -> None:
        async with replace(tools_of(endpoint, retriever), keep=trace_keeper(notes_workspace)) as tools:
            await answer_question(asked[0], tools)
            endpoint.faults = [status(401)]
            await answer_question(asked[1], tools)
            for question, conversation in ((asked[2], None), (asked[3], Conversation([("kiln?", "yes")]))):
                endpoint.faults, before = [drip], len(endpoint.asked)
                task = asyncio.create_task(answer_question(question, tools, conversation=conversation))
                while len(endpoint.asked) == before:
                    await asyncio.sleep(0.01)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

    asyncio.run(run())
    kept = {trace.question: trace for trace in notes_workspace.store.traces("default") if trace.question in asked}
    assert [kept[question].complete for question in asked] == [True, False, False, False]
    assert [kept[question].metadata.get("error", "")[:7] for question in asked] == ["", "base an", "the run", "the run"]
