"""A sentence around a span is whole sentences, holds the span and stays in the text; a table is not a sentence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag.citations import SENTENCE_WORDS, sentence_around

WORDS = st.text("abcdeé", min_size=1, max_size=6)
SENTENCES = st.builds(
    lambda first, rest, mark, quoted: f"“{' '.join([first.title(), *rest])}{mark}”" if quoted else " ".join([first.title(), *rest]) + mark,
    st.text("abcde", min_size=1, max_size=6),
    st.lists(WORDS, min_size=1, max_size=5),
    st.sampled_from(".!?"),
    st.booleans(),
)
GAPS = st.sampled_from([" ", "\n", "  ", "\n\n", " \n "])


@given(text=st.text('aB.!?" \n1', min_size=1, max_size=60), bounds=st.tuples(st.integers(0, 59), st.integers(0, 59)))
def test_it_holds_the_span_and_stays_in_the_text(text: str, bounds: tuple[int, int]) -> None:
    start, last = sorted(min(bound, len(text) - 1) for bound in bounds)
    if text[start].isspace() or text[last].isspace():  # a quote begins and ends in a word
        return
    first, end = sentence_around(text, start, last + 1)
    assert 0 <= first <= start <= last < end <= len(text)
    assert text[first:end] == text[first:end].strip()
    assert sentence_around(text, first, end) == (first, end)


@given(sentences=st.lists(st.tuples(SENTENCES, GAPS), min_size=1, max_size=5), place=st.randoms(use_true_random=False))
def test_it_is_the_sentences_that_the_span_touches(sentences: list[tuple[str, str]], place: object) -> None:
    text, spans = "", []
    for sentence, gap in sentences:
        spans.append((len(text), len(text) + len(sentence)))
        text += sentence + gap
    low, high = sorted(place.randrange(len(spans)) for _ in range(2))  # type: ignore[attr-defined]
    start, end = spans[low][0], spans[high][1] - 1  # without the last mark
    assert sentence_around(text, start, end) == (spans[low][0], spans[high][1])


@pytest.mark.parametrize(
    ("text", "quote", "sentence"),
    [
        ("It opens at nine. Visitors may borrow six books. Cards are free.", "borrow six", "Visitors may borrow six books."),
        ("Version 2.5 costs 3.50 euro a day. Pay first.", "costs", "Version 2.5 costs 3.50 euro a day."),
        ("Bring a card, e.g. a passport. Pay first.", "passport", "Bring a card, e.g. a passport."),
        ("Fees\n\nA lost card costs four euro\n\nHours", "lost card", "A lost card costs four euro"),
        ("A rule holds.\n7 days is the limit.", "days is", "7 days is the limit."),
        ("The limit excludes VAT.1 Article 5 forbids splitting.", "forbids", "Article 5 forbids splitting."),
        ("It came with version 2.5 The end.", "came", "It came with version 2.5 The end."),
        ("Class | Meaning\nS3 | Limited harm\nS4 | Near miss\n\nTell the owner.", "Limited", "S3 | Limited harm"),
    ],
)
def test_sentences_are_found(text: str, quote: str, sentence: str) -> None:
    start = text.index(quote)
    first, end = sentence_around(text, start, start + len(quote))
    assert text[first:end] == sentence


def test_a_long_table_gives_its_row_and_over_all_rows_the_span_itself() -> None:
    table = "\n".join(f"row {i} | {i} days" for i in range(SENTENCE_WORDS))
    start = table.index("row 7")
    assert sentence_around(table, start, start + 5) == (start, table.index("\n", start))
    assert sentence_around(table, 0, len(table)) == (0, len(table))


def test_a_long_list_gives_the_span_itself() -> None:
    text = "\n".join(f"row {i}: {i} days" for i in range(SENTENCE_WORDS))
    start = text.index("row 7")
    assert sentence_around(text, start, start + 5) == (start, start + 5)
    assert sentence_around(text, 0, len(text)) == (0, len(text))
