"""Answers word by word: what of one the others lack."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from rag.eval.diff import COMPARED, WORD, Run, new_words
from rag.eval.explorer import build_cases
from rag.eval.metrics import score_trace


def new(text: str, *others: str) -> list[str]:
    return [run.text for run in new_words(text, others) if run.is_new]


def test_words_are_new_in_runs_whatever_their_case_and_punctuation() -> None:
    assert new("Up to seven big books, for three weeks!", "up to six books for three weeks") == ["seven big"]
    assert new("six books", "Up to six books.") == [] and new("a b", "b c", "d a") == []
    assert new("books six", "six books") == ["books"] or new("books six", "six books") == ["six"]  # one of them is out of order
    assert new("alone") == [] and new_words("", ["x"]) == []
    assert len(new("x " * (COMPARED + 9), "y")[0].split()) == COMPARED


TEXTS = st.text(st.sampled_from("ab ,.É\n"), max_size=30)


@given(TEXTS, st.lists(TEXTS, max_size=3))
@example("b.a.a", [""])  # one run of three words, without a space
def test_runs_are_the_text_and_nothing_is_new_to_itself(text: str, others: list[str]) -> None:
    runs = new_words(text, others)
    assert "".join(run.text for run in runs) == text and all(run.text for run in runs)
    assert not new(text, *others, text.swapcase())
    if others:
        assert len(WORD.findall(" ".join(new(text, *others, "a")))) <= len(WORD.findall(" ".join(new(text, *others))))


def test_rivals_stand_beside_the_baseline_and_abstentions_beside_nobody(ask, reply, abstain, corpus) -> None:  # type: ignore[no-untyped-def]
    traces = {"base": [reply(answer="Up to nine books")], "a": [reply(answer="Up to six books")], "b": [reply(answer="six books")], "c": [abstain()]}
    [case] = build_cases([ask()], traces, {name: [score_trace(trace, ask(), corpus)] for name, [trace] in traces.items()}, corpus)
    assert [[run.text for run in answer.said if run.is_new] for answer in case.answers] == [["nine"], ["six"], ["six"], []]
    assert case.answers[3].said == [Run(traces["c"][0].answer, is_new=False)]
