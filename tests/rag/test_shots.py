"""The worked examples of a model without an adapter: drawn from experts' answers, chosen by how it answers other training questions."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from rag.calibrate import calibrate
from rag.prompts import ABSTENTION, EXAMPLE_SHOTS, answer_target
from rag.retrieve import Retriever
from rag.shots import ABSTAINED, ANSWERED, DRAWN_SETS, FEWEST, choose_shots, draw_sets, taught_by
from rag.traces import expert_trace
from rag.validation import read_calibration
from tests.rag.test_agent import RIGHT, tools_of
from tests.scripted import Endpoint
from understudy.progress import SilentProgress, show_progress
from understudy.records import Question, Trace


def taught_traces(retriever: Retriever, count: int = 24) -> list[Trace]:
    """Experts' traces, every third an abstention."""
    quote = "fired on Tuesdays at seven"
    questions = [
        Question(id=str(i), question=f"When is the kiln fired, asked person {i}?", answers=None if i % 3 == 0 else ["On Tuesdays."], has_answer_key=True)
        for i in range(count)
    ]
    return [expert_trace(q.model_copy(update={"quotes": [quote] if q.answers else []}), retriever, "train") for q in questions]


def test_only_experts_answers_of_the_training_split_with_their_support_shown_teach(retriever: Retriever) -> None:
    answered, abstained = taught_traces(retriever)[1], taught_traces(retriever)[0]
    held = answered.model_copy(update={"metadata": {**answered.metadata, "split": "calibration"}})
    students = answered.model_copy(update={"source": "model"})
    unseen = answered.model_copy(update={"steps": [step.model_copy(update={"passage_ids": []}) for step in answered.steps]})
    found = taught_by([answered, abstained, held, students, unseen], retriever.chunks, 2)
    assert [each.shot.target for each in found] == [answer_target(answered.quotes, "On Tuesdays."), ABSTENTION]
    assert all(len(each.shot.passages) <= 2 for each in found)


def test_what_a_set_shows_is_not_what_it_is_tried_on(retriever: Retriever) -> None:
    sets, questions = draw_sets(taught_by(taught_traces(retriever), retriever.chunks, 2), seed=3)
    assert sets[0] == list(EXAMPLE_SHOTS)
    assert len(sets) == 1 + DRAWN_SETS
    drawn = [shot for shots in sets[1:] for shot in shots]
    assert len({shot.question for shot in drawn}) == DRAWN_SETS * (ANSWERED + ABSTAINED)
    assert not {shot.question for shot in drawn} & {question.question for question in questions}
    assert all([shot.target == ABSTENTION for shot in shots] == [True] * ABSTAINED + [False] * ANSWERED for shots in sets[1:])
    assert draw_sets([], seed=3) == ([list(EXAMPLE_SHOTS)], [])


def test_the_set_that_helps_most_is_kept_with_the_calibration(endpoint: Endpoint, retriever: Retriever, tmp_path: Path) -> None:
    traces = taught_traces(retriever)
    sets, tried_on = draw_sets(taught_by(traces, retriever.chunks, 2), seed=0)
    unanswered = {question.question for question in tried_on if question.answers is None}

    def reply(step: str, prompt: str) -> str:
        asked = prompt.rpartition("Question: ")[2].partition("\n")[0]
        if step != "answer":
            return RIGHT[step]
        return ABSTENTION if asked in unanswered or sets[2][0].question not in prompt else RIGHT["answer"]

    endpoint.reply = reply
    tools = replace(tools_of(endpoint, retriever), settings=tools_of(endpoint, retriever).settings)
    questions = [Question(id=str(i), question=f"When is it fired {i}?", answers=["On Tuesdays"], has_answer_key=True) for i in range(2)]
    result = asyncio.run(calibrate(questions, "key", tools, tmp_path, 2, show_progress, traces))
    kept = read_calibration(tmp_path)
    assert kept is not None
    assert kept.shots == sets[2]
    assert result["worked_examples"] == [shot.question for shot in sets[2]]


def test_too_few_training_questions_leave_the_built_in_examples(endpoint: Endpoint, retriever: Retriever) -> None:
    async def choose(count: int) -> object:
        async with tools_of(endpoint, retriever) as tools:
            return await choose_shots(tools, taught_traces(retriever, count), 2, SilentProgress)

    assert asyncio.run(choose(0)) == list(EXAMPLE_SHOTS)
    assert asyncio.run(choose(FEWEST)) == list(EXAMPLE_SHOTS)
    assert endpoint.asked == []
