"""The guard on questions of every kind it promises to tell apart; laws it keeps on any text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag.cache_guard import compare, normalize, question_digest

NEAR_MISSES = [
    ("negation", "May staff take the minutes home?", "May staff not take the minutes home?"),
    ("negation", "Are models with a bias report released?", "Are models without a bias report released?"),
    ("number", "Who approves budgets over 5000 euro?", "Who approves budgets over 50,000 euro?"),
    ("number", "What happens on the second warning?", "What happens on the third warning?"),
    ("number", "Is it 2 days of notice after 3 weeks?", "Is it 3 days of notice after 2 weeks?"),
    ("date", "When is the report due in March?", "When is the report due in May?"),
    ("date", "Is the desk open on Mondays?", "Is the desk open on Sunday?"),
    ("unit", "How many weeks are logs kept?", "How many months are logs kept?"),
    ("name", "Who advises the Oslo office?", "Who advises the Bergen office?"),
    ("opposite", "How do I enable single sign-on?", "How do I disable single sign-on?"),
    ("opposite", "Which suppliers are approved?", "Which suppliers are unapproved?"),
    ("opposite", "What is the upload limit?", "What is the download limit?"),
    ("time", "Who is told before a model is changed?", "Who is told after a model is changed?"),
    ("degree", "What is the minimum retention of records?", "What is the maximum retention of records?"),
    ("degree", "What applies above 100 users?", "What applies below 100 users?"),
    ("modality", "When may the register be updated?", "When must the register be updated?"),
    ("quantity", "Are contractors covered by the policy?", "Are all contractors covered by the policy?"),
    ("question", "Who approves a model?", "When is a model approved?"),
    ("question", "How long are drafts kept?", "How often are drafts kept?"),
    ("direction", "Can data move to the test system?", "Can data move from the test system?"),
    ("roles", "Does the auditor inform the owner of a finding?", "Does the owner inform the auditor of a finding?"),
    ("roles", "Can you reimburse the fee to me?", "Can I reimburse you the fee?"),
]  # fmt: skip

SAME = [
    ("How long are access records kept?", "For how long do you keep access records?"),
    ("Who approves a new model?", "A new model is approved by whom?"),
    ("May staff use private phones?", "Are staff allowed to use private phones?"),
    ("What is the fee for a lost badge?", "How much is the fee for a lost badge?"),
    ("Is training compulsory for contractors?", "For contractors, is training compulsory?"),
    ("Must the two-page summary be signed?", "Does the 2 page summary have to be signed?"),
    ("What's the limit of 10,000 rows for?", "What is the limit of 10000 rows for?"),
]


@pytest.mark.parametrize(("kind", "cached", "asked"), NEAR_MISSES)
def test_a_near_miss_is_found_out_for_what_it_is(kind: str, cached: str, asked: str) -> None:
    for one, other in ((cached, asked), (asked, cached)):
        assert any(finding.startswith(kind) for finding in compare(one, other).findings), compare(one, other)


@pytest.mark.parametrize(("cached", "asked"), SAME)
def test_the_same_question_in_other_words_passes(cached: str, asked: str) -> None:
    assert compare(cached, asked).findings == compare(asked, cached).findings == ()


def test_words_without_a_counterpart_are_named() -> None:
    found = compare("Who signs the risk register?", "Who signs the incident log?")
    assert found.findings == ()
    assert (len(found.missing), len(found.added)) == (2, 2)


@pytest.mark.parametrize("variant", ["WHO approves  a model", "who approves a model?!", " Who approves a model? ", "Ｗho approves a model?"])
def test_case_spaces_and_closing_marks_make_no_other_question(variant: str) -> None:
    assert question_digest(variant) == question_digest("Who approves a model?")


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200))
def test_any_text_equals_itself_and_normalising_twice_changes_nothing(text: str) -> None:
    found = compare(text, text)
    assert found.missing == found.added == found.findings == ()
    assert normalize(normalize(text)) == normalize(text)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(NEAR_MISSES + [("", a, b) for a, b in SAME]))
def test_comparing_is_symmetric(pair: tuple[str, str, str]) -> None:
    forth, back = compare(pair[1], pair[2]), compare(pair[2], pair[1])
    assert bool(forth.findings) == bool(back.findings)
    assert (forth.missing, forth.added) == (back.added, back.missing)
