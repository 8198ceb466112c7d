"""What MinHash proposes is judged by the true similarity; what is alike is found."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from train.near_duplicates import THRESHOLD, joined, near_duplicate_pairs, shingles, similarity

WORDS = st.lists(
    st.sampled_from(
        ["who", "may", "stop", "the", "high", "risk", "system", "when", "how", "long", "must", "operators", "keep", "logs", "of", "a", "model", "here"]
    ),
    min_size=1,
    max_size=14,
)
QUESTIONS = st.lists(WORDS.map(" ".join), max_size=14)
SURE = 0.8  # below it one pair in 5,000 may be missed


@settings(max_examples=40, deadline=None)
@given(QUESTIONS, st.data())
def test_pairs_are_those_of_the_true_similarity(questions: list[str], data: st.DataObject) -> None:
    for _ in range(3 if questions else 0):  # one word changed, as paraphrases have it
        words = data.draw(st.sampled_from(questions)).split()
        words[data.draw(st.integers(0, len(words) - 1))] = "anything"
        questions = [*questions, " ".join(words)]
    found = set(near_duplicate_pairs(questions))
    sets = [shingles(question) for question in questions]
    true = {(i, j): similarity(sets[i], sets[j]) for j in range(len(sets)) for i in range(j)}
    assert found <= {pair for pair, value in true.items() if value >= THRESHOLD}
    assert found >= {pair for pair, value in true.items() if value >= SURE}


def test_spelling_and_punctuation_do_not_count() -> None:
    assert near_duplicate_pairs(["Who may stop it?", "who MAY stop it", "", "?!"]) == [(0, 1), (2, 3)]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 12), st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=12), st.data())
def test_classes_are_the_connected_components(count: int, pairs: list[tuple[int, int]], data: st.DataObject) -> None:
    pairs = [(a % count, b % count) for a, b in pairs] if count else []
    keys: list[list[object]] = [data.draw(st.lists(st.sampled_from("xyz"), max_size=1)) for _ in range(count)]
    classes = joined(count, pairs, keys)  # type: ignore[arg-type]
    assert all(classes[a] == classes[b] for a, b in pairs)
    assert all(classes[i] == classes[j] for i in range(count) for j in range(count) if set(keys[i]) & set(keys[j]))
    edges = {i: {i} for i in range(count)}
    for _ in range(count):
        for a in range(count):
            near = {b for x, y in pairs for b in (x, y) if a in (x, y)} | {b for b in range(count) if set(keys[a]) & set(keys[b])}
            edges[a] |= {c for b in near for c in edges[b]}
    assert all((classes[i] == classes[j]) == (j in edges[i]) for i in range(count) for j in range(count))
