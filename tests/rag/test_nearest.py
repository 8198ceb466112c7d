"""The sentences that a prompt points at: verbatim, distinct, the nearest first."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from rag.citations import SENTENCE_WORDS, find_quote
from rag.nearest import nearest_sentences, sentence_spans

TEXTS = [
    "The reading room opens at nine. A visitor may borrow six books for three weeks.\n\nLost cards cost four euro.",
    "may borrow six books for three weeks. The library was founded by a printer.",
]
WORDS = st.sampled_from(["the", "library", "opens", "at", "nine", "books", "Visitors", "borrow", "6", "cards.", "Lost!", "rooms?", "\n\n", "\n"])


def test_the_sentence_that_shares_most_of_the_question_comes_first() -> None:
    assert nearest_sentences("How many books may a visitor borrow?", TEXTS, 2)[0] == "A visitor may borrow six books for three weeks."


def test_forms_of_a_word_and_phrases_count_too() -> None:
    texts = ["Renewals of a contract are free.", "A contract is non-renewable after three terms."]
    assert nearest_sentences("Is the contract non-renewable?", texts, 1) == texts[1:]
    assert nearest_sentences("Is the contract still renewable?", texts, 1) == texts[1:]


def test_what_stands_whole_within_another_is_not_shown_again() -> None:
    found = nearest_sentences("How many books may a visitor borrow?", TEXTS, 5)
    assert sum("six books" in sentence for sentence in found) == 1


def test_a_sentence_without_a_word_of_the_question_is_no_neighbour() -> None:
    assert nearest_sentences("Who drives the tram?", TEXTS, 5) == []
    assert nearest_sentences("Who drives the tram?", [], 5) == []
    assert nearest_sentences("", TEXTS, 5) == []


def test_what_is_too_long_to_be_quoted_is_left_out() -> None:
    assert nearest_sentences("What stands in the table?", ["table " * (SENTENCE_WORDS + 1)], 2) == []


@settings(max_examples=50, deadline=None)
@given(question=st.lists(WORDS).map(" ".join), texts=st.lists(st.lists(WORDS, max_size=30).map(" ".join), max_size=3), count=st.integers(0, 4))
def test_every_sentence_is_a_quote_of_the_texts(question: str, texts: list[str], count: int) -> None:
    found = nearest_sentences(question, texts, count)
    assert len(found) == len(set(found)) <= count
    assert all(any(find_quote(sentence, text) for text in texts) for sentence in found)


@given(st.lists(WORDS).map(" ".join))
def test_sentence_spans_cover_the_text(text: str) -> None:
    assert "".join(text[start:end] for start, end in sentence_spans(text)) == text
