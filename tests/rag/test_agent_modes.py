"""Modes, live text, think blocks, verdicts without log-probabilities, and the teacher."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag.agent import Teacher, Tools, run_agent, stream_agent
from rag.events import AnswerText, AnswerWriter, Done
from rag.prompts import ABSTENTION, EXAMPLE_SHOTS, answer_messages, answer_target, closed_book_messages, parse_answer
from rag.retrieve import Retriever
from rag.traces import UnsupportedAnswer, chat_rows
from rag.validation import Calibration, Logistic, read_verdict, stated_score
from tests.rag.test_agent import QUESTION, RIGHT, ask, fixed_calibration, tools_of
from tests.scripted import HASTY, Endpoint, cut_off, scripted, status
from understudy.client import ModelClient
from understudy.completions import Completion
from understudy.records import Trace, Usage
from understudy.settings.answers import Agent

KEY = "sk-teacher-0123456789"


@pytest.fixture
def teacher() -> Iterator[Endpoint]:
    with scripted("frontier", KEY) as made:
        made.reply = lambda step, _: {"answer": "Quote: The glaze cools for nine hours.\nAnswer: Nine hours.", "validate": "1"}[step]
        yield made


def shown_text(endpoint: Endpoint, retriever: Retriever, calibration: Calibration | None = None, **settings: object) -> tuple[list[str], Trace]:
    async def run() -> tuple[list[str], Trace]:
        async with tools_of(endpoint, retriever, calibration, **settings) as tools:
            events = [event async for event in stream_agent(QUESTION, tools)]
        assert isinstance(events[-1], Done)
        return [event.text for event in events if isinstance(event, AnswerText)], events[-1].trace

    return asyncio.run(run())


def escalated(endpoint: Endpoint, teacher: Endpoint, retriever: Retriever, **settings: object) -> Trace:
    async def run() -> Trace:
        made = Agent.model_validate({"escalate_to": "frontier", "max_rounds": 1, "worked_example": False, **settings})
        async with Tools(ModelClient(endpoint.model, HASTY), retriever, made, None, Teacher(ModelClient(teacher.model, HASTY))) as tools:
            return await run_agent(QUESTION, tools)

    return asyncio.run(run())


def test_fast_is_one_call_and_its_text_is_shown_while_it_is_written(endpoint: Endpoint, retriever: Retriever) -> None:
    endpoint.reply = lambda step, _: RIGHT[step]
    texts, trace = shown_text(endpoint, retriever, mode="fast")
    assert endpoint.asked == ["answer"]
    assert endpoint.bodies[0]["stream"]
    assert len(texts) > 1
    assert "".join(texts) == trace.answer == "On Tuesdays at seven."
    assert trace.complete
    assert [citation.document for citation in trace.citations] == ["kiln.txt"]
    assert trace.score == pytest.approx(0.905, abs=0.01)  # its likelihood per token
    assert trace.steps[-1].parsed["score"] == trace.score
    assert trace.metadata["mode"] == "fast"
    retrieved, answered = trace.steps
    assert answered.first_token_seconds is not None and 0 < answered.first_token_seconds <= answered.seconds
    ranked = retriever.search([QUESTION])
    assert retrieved.parsed["ranking"] == [passage.chunk.id for passage in ranked] and sorted(retrieved.passage_ids) == sorted(retrieved.parsed["ranking"])


def test_fast_shows_nothing_that_the_calibration_will_make_an_abstention(endpoint: Endpoint, retriever: Retriever) -> None:
    endpoint.reply = lambda step, _: RIGHT[step]
    texts, trace = shown_text(endpoint, retriever, fixed_calibration(-2.0), mode="fast")
    assert texts == [ABSTENTION]
    assert trace.abstained
    assert trace.citations == []


def test_an_unasked_verdict_weighs_nothing_in_a_calibrated_score(endpoint: Endpoint, retriever: Retriever) -> None:
    endpoint.reply = lambda step, _: RIGHT[step]
    right = Logistic(signals=["verdict"], means=[0.7], scales=[0.1], weights=[3.0], bias=0.4)
    calibration = fixed_calibration(2.0).model_copy(update={"right": right})
    assert ask(endpoint, retriever, calibration, mode="fast").score == pytest.approx(0.5987, abs=1e-3)  # the logistic of the bias alone


def test_closed_book_shows_the_model_no_passage(endpoint: Endpoint, retriever: Retriever) -> None:
    endpoint.reply = lambda _step, _prompt: "On Sundays."
    trace = ask(endpoint, retriever, mode="closed-book")
    assert endpoint.bodies[0]["messages"] == [message.model_dump() for message in closed_book_messages(QUESTION)]
    assert [step.name for step in trace.steps] == ["answer"]
    assert (trace.answer, trace.citations, trace.complete) == ("On Sundays.", [], True)
    assert trace.score is not None and trace.score < 0.5  # half of its likelihood: nothing is cited


def test_a_stream_that_stops_without_a_finish_reason_is_incomplete_and_never_exported(endpoint: Endpoint, retriever: Retriever) -> None:
    endpoint.faults = [cut_off("Quote: fired on Tuesdays at seven\nAnswer: On Tue")]
    texts, trace = shown_text(endpoint, retriever, mode="fast")
    assert "".join(texts) == "On Tue"
    assert not trace.complete
    assert "finish reason" in trace.metadata["error"]
    with pytest.raises(UnsupportedAnswer):
        chat_rows(trace, retriever.chunks, 2)


@given(
    quotes=st.lists(st.text("ab :", min_size=1, max_size=20), max_size=2),
    answer=st.text("abAnswer: \n<", max_size=40),
    thought=st.text("ab Answer:", max_size=20),
)
def test_live_text_is_always_the_beginning_of_the_answer(quotes: list[str], answer: str, thought: str) -> None:
    written = f"<think>{thought}</think>" + answer_target(quotes, answer)
    texts: list[str] = []
    writer = AnswerWriter(lambda event: texts.append(event.text if isinstance(event, AnswerText) else ""))
    for end in range(0, len(written) + 1, 3):
        writer.feed(written[:end])
    final = parse_answer(written).text
    writer.finish(final)
    assert "".join(texts) == final


def test_a_think_block_is_kept_in_the_step_and_stands_in_no_answer_or_quote(endpoint: Endpoint, retriever: Retriever) -> None:
    thought = "<think>Quote: painted green every third summer\nAnswer: green</think>\n"
    endpoint.reply = lambda step, _: thought + RIGHT[step]
    texts, trace = shown_text(endpoint, retriever)
    assert "".join(texts) == trace.answer == "On Tuesdays at seven."
    assert trace.quotes == ["fired on Tuesdays at seven"]
    assert trace.steps[0].parsed["query"] == "kiln firing"
    assert all(step.text.startswith("<think>") for step in trace.steps if step.name != "retrieve")


def test_a_verdict_is_read_from_text_where_there_are_no_log_probabilities(endpoint: Endpoint, retriever: Retriever) -> None:
    endpoint.refuses_logprobs = True
    endpoint.reply = lambda step, _: {**RIGHT, "validate": '{"score": 0.8, "reason": "it says so"}'}[step]
    trace = ask(endpoint, retriever)
    assert trace.score == pytest.approx(0.8)
    assert endpoint.bodies[-1]["max_tokens"] > 4  # a stated score needs room
    assert sum("logprobs" in body for body in endpoint.bodies) == 1


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("1", 1.0), ("0.35", 0.35), ("Score: 0.9", 0.9), ("The quote is there.\nScore: 0.9", 0.9), ("**Score:** 0.7", 0.7), ('{"score": 0.25}', 0.25),
        ('```json\n{"Score": "1"}\n```', 1.0), ("<think>Score: 0.1</think>Score: 0.9", 0.9), ("Score: 0.9. Yes, score: 0.9", 0.9),
        ("Score: 0.1 or score: 0.9", None), ("Score: 8/10", None), ("Score: 1/10", None), ("Score: 90%", None), ("Score: 10", None), ("Score: 1.5", None),
        ("yes", None), ("", None),
    ],
)  # fmt: skip
def test_a_stated_score_is_read_strictly(text: str, score: float | None) -> None:
    assert stated_score(text) == score


def test_a_stated_fraction_is_not_its_first_token() -> None:
    assert read_verdict(Completion("0.9", Usage(), "stop", ["0", ".9"], [0.0, 0.0], {"0": -0.01, "1": -5.0})) == 0.9
    assert read_verdict(Completion("0", Usage(), "stop", ["0"], [0.0], {"0": -0.7, "1": -0.7})) == pytest.approx(0.5)


def test_a_low_score_goes_to_the_teacher_with_the_same_passages(endpoint: Endpoint, teacher: Endpoint, retriever: Retriever) -> None:
    endpoint.reply = lambda step, _: {**RIGHT, "validate": "0"}[step]
    trace = escalated(endpoint, teacher, retriever)
    assert (trace.answer, trace.model, trace.metadata["escalated"]) == ("Nine hours.", "frontier", "true")
    assert [citation.quote for citation in trace.citations] == ["The glaze cools for nine hours."]
    assert teacher.asked == ["answer", "validate"]
    shown = [retriever.chunks[chunk_id].text for chunk_id in trace.steps[1].passage_ids]
    assert teacher.bodies[0]["messages"] == [message.model_dump() for message in answer_messages(QUESTION, shown, EXAMPLE_SHOTS)]
    assert {body["temperature"] for body in teacher.bodies} == {0.0}
    assert set(teacher.keys) == {f"Bearer {KEY}"}
    assert set(endpoint.keys) == {None}  # the key goes to its own host only
    assert KEY not in trace.model_dump_json()


def test_a_good_score_does_not(endpoint: Endpoint, teacher: Endpoint, retriever: Retriever) -> None:
    endpoint.reply = lambda step, _: RIGHT[step]
    trace = escalated(endpoint, teacher, retriever)
    assert teacher.asked == []
    assert "escalated" not in trace.metadata


def test_fast_escalates_too_and_shows_no_text_that_is_replaced(endpoint: Endpoint, teacher: Endpoint, retriever: Retriever) -> None:
    endpoint.reply, endpoint.logprob = lambda step, _: RIGHT[step], -2.0
    trace = escalated(endpoint, teacher, retriever, mode="fast")
    assert (trace.answer, trace.metadata["escalated"]) == ("Nine hours.", "true")
    assert "stream" not in endpoint.bodies[0]
    assert teacher.asked == ["answer"]


@pytest.mark.parametrize("answered_first", [False, True])
def test_a_teacher_that_fails_leaves_the_models_own_answer(endpoint: Endpoint, teacher: Endpoint, retriever: Retriever, answered_first: bool) -> None:
    endpoint.reply = lambda step, _: {**RIGHT, "validate": "0"}[step]
    teacher.faults = [lambda handler: handler.answer("Answer: Nine.", {})] * answered_first + [status(401, f"bad key {KEY}")]
    trace = escalated(endpoint, teacher, retriever)
    assert trace.complete
    assert "401" in trace.metadata["escalation_error"]
    assert "escalated" not in trace.metadata
    assert trace.answer == "On Tuesdays at seven."
    assert [step.model for step in trace.steps] == ["base", "", "base", "base"]
    assert KEY not in trace.model_dump_json()


def aggregating(retriever: Retriever, strategy: str) -> Retriever:
    return replace(retriever, settings=retriever.settings.model_copy(update={"aggregate": strategy, "k": 3}))


def test_passages_one_after_another_end_with_the_first_that_answers(endpoint: Endpoint, retriever: Retriever) -> None:
    endpoint.reply = lambda step, prompt: RIGHT[step] if step != "answer" or "kiln is fired" in prompt else ABSTENTION
    trace = ask(endpoint, aggregating(retriever, "sequential"), max_rounds=1)
    prompts = [body["messages"][-1]["content"] for name, body in zip(endpoint.asked, endpoint.bodies, strict=True) if name == "answer"]
    assert trace.answer == "On Tuesdays at seven."
    assert trace.citations
    assert 1 <= len(prompts) <= 3
    assert all(sum(chunk.text in prompt for chunk in retriever.chunks.values()) == 1 for prompt in prompts)
    assert "kiln is fired" in prompts[-1]


def test_a_summary_keeps_the_sentences_that_bear_on_the_question(endpoint: Endpoint, retriever: Retriever) -> None:
    endpoint.reply = lambda step, _: RIGHT[step]
    trace = ask(endpoint, aggregating(retriever, "summarise"), max_rounds=1)
    asked = endpoint.bodies[1]["messages"][-1]["content"]
    assert "fired on Tuesdays" in asked
    assert "glaze cools" not in asked
    assert trace.citations[0].quote == "fired on Tuesdays at seven"


def test_the_accepted_answer_is_exported_not_the_last(endpoint: Endpoint, retriever: Retriever) -> None:
    second = {**RIGHT, "answer": "Quote: pond\nAnswer: In April.", "validate": "0"}
    endpoint.reply = lambda step, _: (RIGHT if endpoint.asked.count("answer") <= 1 and step != "validate" else second)[step]
    trace = ask(endpoint, retriever, max_rounds=2)
    assert [step.parsed["answer"] for step in trace.steps if step.name == "answer"] == ["On Tuesdays at seven.", "In April."]
    [row] = chat_rows(trace, retriever.chunks, 2)
    assert "On Tuesdays at seven." in row["messages"][-1]["content"]
