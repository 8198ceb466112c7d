"""What a calibration leaves out of the graph, by what it brought; and quotes that are copied rather than written."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag.citations import BEGINNING_WORDS, complete_quote, find_quote
from rag.policy import FEWEST, is_worth_taking, surplus, worth_going_on_below
from rag.prompts import ABSTENTION, completed
from rag.retrieve import Retriever
from tests.rag.test_agent import RIGHT, Policy, ask, fixed_calibration
from tests.rag.test_agent_modes import shown_text
from tests.scripted import Endpoint

GAINS = st.lists(st.floats(-1, 1), min_size=FEWEST, max_size=60)
SCORES = st.lists(st.integers(0, 10).map(lambda tenth: tenth / 10), min_size=60, max_size=60)
LONG = "Quote: The kiln in the east shed is fired on Tuesdays at seven.\nAnswer: On Tuesdays at seven."
TEXTS = [
    "A sign stands at each entrance, at least three metres before\nthe camera. Another day begins.",
    "The camera. A sign stands at each entrance, at least",
]
TABLE = "Class | Meaning | First response\nS3 moderate | Limited harm | Tell the owner\nS4 minor | Near miss | Log it\n\nClasses are drawn\nup by hand."


@settings(max_examples=25, deadline=None)
@given(gains=GAINS, scores=SCORES)
def test_rounds_begin_below_a_score_only_where_they_brought_more_than_a_standard_error(gains: list[float], scores: list[float]) -> None:
    scores = scores[: len(gains)]
    threshold = worth_going_on_below(scores, gains)
    begun = [gain for score, gain in zip(scores, gains, strict=True) if score < threshold]
    assert (surplus(begun) > 0) == (threshold > 0)
    assert surplus(begun) >= max(0.0, surplus([gain for score, gain in zip(scores, gains, strict=True) if score < 0.5])) - 1e-9
    assert worth_going_on_below(scores, [-abs(gain) for gain in gains]) == 0


def test_one_lucky_question_is_no_reason_for_a_step_and_few_questions_leave_nothing_out() -> None:
    lucky = [1.0] + [0.0] * (FEWEST - 1)
    assert not is_worth_taking(lucky)
    assert worth_going_on_below([0.1] * FEWEST, lucky) == 0
    assert is_worth_taking([1.0, 1.0, *lucky])
    assert is_worth_taking([-1.0] * (FEWEST - 1))
    assert worth_going_on_below([0.1] * (FEWEST - 1), [-1.0] * (FEWEST - 1)) == 1


@pytest.mark.parametrize(
    ("beginning", "quote"),
    [
        ("A sign stands at each", "A sign stands at each entrance, at least three metres before the camera."),
        ("A sign stands at every", "A sign stands at each entrance, at least three metres before the camera."),  # the last word may not be whole
        ("A sign stands at every entrance", "A sign stands at each entrance, at least three metres before the camera."),  # what stands nowhere is dropped
        ("A sign hangs at every entrance", None),
        ("A sign stands", None),
        ("each entrance, at least three metres befo", "each entrance, at least three metres before the camera."),
        ("three metres before the camera. Ano", None),  # nothing is left of the sentence
    ],
)
def test_a_quote_is_completed_where_its_whole_words_stand_in_one_place(beginning: str, quote: str | None) -> None:
    assert complete_quote(beginning, TEXTS) == quote
    assert complete_quote(beginning, [*TEXTS, TEXTS[0]]) == quote  # passages may overlap
    assert complete_quote(beginning, [*TEXTS, "A sign stands at each entrance, in front of the camera."]) in (None, quote)


@given(
    words=st.lists(st.sampled_from(["kiln", "is", "fired", "on", "Tuesdays.", "The", "barn,", "green", "Moss"]), min_size=8, max_size=40),
    start=st.integers(0, 9),
    count=st.integers(1, 9),
)
def test_a_completed_quote_is_verbatim_and_begins_as_written(words: list[str], start: int, count: int) -> None:
    text, beginning = " ".join(words), " ".join(words[start : start + count])
    quote = complete_quote(beginning + " x", [text])
    if quote:
        assert count >= BEGINNING_WORDS
        assert quote.startswith(beginning)
        assert find_quote(quote, text)


def test_an_answer_is_gone_on_from_its_completed_quote_else_from_its_whole_words() -> None:
    assert completed("Quote: A sign stands at ea", TEXTS) == "Quote: A sign stands at each entrance, at least three metres before the camera.\nAnswer:"
    assert completed("Quote: A sign stands by a do", TEXTS) == "Quote: A sign stands by a"
    assert completed("Quote: S3 moderate | Limited ha", [TABLE]) == "Quote: S3 moderate | Limited harm | Tell the owner\nAnswer:"
    assert completed("Quote: The barn.\nAnswer: It is gre", TEXTS) == "Quote: The barn.\nAnswer: It is"
    assert completed("<think>Quote: A sign stands at ea", TEXTS) == ""


def ask_as(endpoint: Endpoint, retriever: Retriever, policy: Policy, bias: float = 2.0, **asked: object) -> tuple[list[str], list[str]]:
    """(what was asked, what was shown) of a run under a policy."""
    texts, trace = shown_text(endpoint, retriever, fixed_calibration(bias, policy), **asked)
    assert trace.complete
    assert trace.answer == (ABSTENTION if bias < 0 else "On Tuesdays at seven.")
    return endpoint.asked, texts


def test_a_policy_says_which_calls_are_made(endpoint: Endpoint, retriever: Retriever) -> None:
    endpoint.reply = lambda step, _: {**RIGHT, "validate": "0"}[step]
    lean = Policy(plans_first=False, asks_verdict=False, goes_on_below=0.0)
    assert ask_as(endpoint, retriever, lean)[0] == ["answer"]
    endpoint.asked.clear()
    asked, _ = ask_as(endpoint, retriever, lean.model_copy(update={"asks_verdict": True, "goes_on_below": 1.0}))
    assert asked[:4] == ["answer", "validate", "plan", "answer"]  # a later round is planned


@pytest.mark.parametrize("mode", ["agentic", "fast"])
def test_a_quote_is_copied_and_the_answer_gone_on_from_there(endpoint: Endpoint, retriever: Retriever, mode: str) -> None:
    passage = next(chunk.text for chunk in retriever.chunks.values() if "fired on Tuesdays" in chunk.text)
    endpoint.reply, endpoint.keeps_limits = lambda _step, _: f"Quote: {passage.split('.')[0]} and then it lies.\nAnswer: On Tuesdays at seven.", True
    endpoint.model = endpoint.model.__class__(**{**vars(endpoint.model), "continues": True})
    policy = Policy(plans_first=False, asks_verdict=False, completes_quotes=True)
    asked, texts = ask_as(endpoint, retriever, policy, mode=mode)
    assert asked == ["answer", "answer"]
    assert [body["max_tokens"] for body in endpoint.bodies] == [12, 116]
    assert (endpoint.bodies[1]["continue_final_message"], endpoint.bodies[1]["add_generation_prompt"]) == (True, False)
    assert endpoint.bodies[1]["messages"][-1]["content"].endswith(".\nAnswer:")
    assert "".join(texts) == "On Tuesdays at seven."
    trace = ask(endpoint, retriever, fixed_calibration(2.0, policy))
    [citation] = trace.citations
    assert citation.quote in passage
    step = next(step for step in trace.steps if step.name == "answer")
    assert step.usage.prompt_tokens == 20  # of both calls
    endpoint.asked.clear()
    assert ask_as(endpoint, retriever, policy, bias=-2.0, mode=mode)[0] == ["answer"]  # an abstention is not written to its end
