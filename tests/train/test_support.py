"""An answer is borne out by words, its numbers strictly; what experts wrote passes, what others say or altered numbers do not."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import SAMPLE
from train.examples import change_number
from train.support import holds_answer, support_of
from understudy.records import Chunk, Trace

WORDS = ["kiln", "glaze", "fired", "Tuesdays", "seven", "cools", "nine", "hours", "barn", "12", "3.5"]


def experts() -> list[dict[str, Any]]:
    """The sample's answered questions, the held-out ones not among them."""
    rows = [json.loads(line) for name in ("train", "calibration") for line in (SAMPLE / "questions" / f"{name}.jsonl").read_text().splitlines()]
    return [row for row in rows if row["answer"]]


@pytest.mark.parametrize(
    ("answer", "text", "missing"),
    [
        ("Within 15 days.", "Members have fifteen days in which to appeal.", ()),
        ("It takes three days.", "It takes 3 days.", ()),
        ("Within 16 days.", "Members have fifteen days in which to appeal.", ("16",)),
        ("It costs 1,000 euro.", "It costs 1000 euro.", ()),
        ("By 2027.", "Since 2026.", ("2027",)),
    ],
)
def test_numbers_are_the_same_in_digits_and_spelt_out(answer: str, text: str, missing: tuple[str, ...]) -> None:
    assert support_of(answer, text).missing_numbers == missing


@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=8), st.lists(st.sampled_from(WORDS), max_size=8))
def test_a_text_bears_out_what_it_says(said: list[str], more: list[str]) -> None:
    answer = " ".join(said)
    assert support_of(answer, " ".join([*more, answer])).is_enough


def test_what_experts_wrote_is_supported_and_what_is_wrong_is_not() -> None:
    rows, rng = experts(), random.Random(0)
    evidence = [" ".join([row["question"], *row["quotes"]]) for row in rows]
    passed = [support_of(row["answer"], text).is_enough for row, text in zip(rows, evidence, strict=True)]
    assert sum(passed) >= 0.98 * len(rows)  # all of them with the rest of the quotes' sentences, which the export adds
    swapped = [support_of(rng.choice(rows)["answer"], text).is_enough for text in evidence]
    assert sum(swapped) <= 0.02 * len(rows)
    altered = [support_of(changed, text).is_enough for row, text in zip(rows, evidence, strict=True) if (changed := change_number(row["answer"], rng))]
    assert len(altered) > 100
    assert sum(altered) <= 0.05 * len(altered)


def test_a_passage_that_holds_the_answer_is_known(make_document, make_trace) -> None:  # type: ignore[no-untyped-def]
    says, elsewhere, near, other = (
        "Visitors may borrow up to six books for three weeks.",
        "As the rules say, six books is the limit.",
        "A card is needed. Up to six books may be borrowed by visitors, for three weeks, no more.",
        "Lost cards are replaced for four euro.",
    )
    _, chunks = make_document("a.txt", [says, elsewhere, near, other])
    trace: Trace = make_trace("How many?", "Six books.", chunks[0], "borrow up to six books", chunks)
    assert [holds_answer(trace, chunk) for chunk in chunks] == [True, True, True, False]
    assert not holds_answer(trace.model_copy(update={"answer": "No.", "citations": []}), Chunk(**{**chunks[3].model_dump(), "text": "There is no fee."}))
