"""Pairs and batches of the retriever's tuning: no passage that supports a question is ever its negative."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.recall import share_found, summarise
from train.recipe import RetrieverRecipe, load_retriever_recipe
from train.retriever import Pair, columns_of, deal, make_pairs, rate_at
from understudy.errors import TrainingError, UsageError
from understudy.records import Chunk, Document, Trace

MakeDocument = Callable[..., tuple[Document, list[Chunk]]]
MakeTrace = Callable[..., Trace]
TEXTS = st.sampled_from([f"passage {i}" for i in range(8)])


@st.composite
def pairs(draw: st.DrawFn) -> list[Pair]:
    made = []
    for place in range(draw(st.integers(1, 25))):
        support = draw(st.frozensets(TEXTS, min_size=1, max_size=3))
        negatives = draw(st.lists(TEXTS.filter(lambda text, own=support: text not in own), max_size=4, unique=True))
        made.append(Pair(f"question {place}", draw(st.sampled_from(sorted(support))), tuple(negatives), support))
    return made


@given(made=pairs(), batch=st.integers(2, 6), epoch=st.integers(0, 2))
def test_every_pair_is_dealt_once_an_epoch_and_no_support_is_a_negative(made: list[Pair], batch: int, epoch: int) -> None:
    recipe = RetrieverRecipe(batch=batch, negative_depth=2)
    batches = deal(made, recipe, epoch)
    assert batches == deal(made, recipe, epoch)
    assert sorted(t.pair.asked for b in batches for t in b) == sorted(pair.asked for pair in made)
    for dealt in batches:
        assert 1 <= len(dealt) <= batch
        columns = columns_of(dealt)
        assert {len(column) for column in columns} == {len(dealt)}
        for place, triplet in enumerate(dealt):
            assert triplet.negative is None or triplet.negative in triplet.pair.negatives[:2]
            others = [text for column in columns[1:] for other, text in enumerate(column) if (column, other) != (columns[1], place)]
            assert not triplet.pair.support & set(others)


def test_pairs_come_from_what_is_cited_and_retrieved(make_document: MakeDocument, make_trace: MakeTrace) -> None:
    _, first = make_document("first.txt", ["The kiln is fired on Tuesdays.", "Carp live in the pond.", "Again: fired on Tuesdays."])
    _, second = make_document("second.txt", ["The barn is green.", "Nothing else."])
    chunks = {chunk.id: chunk for chunk in [*first, *second]}
    trace = make_trace("When is it fired?", "On Tuesdays.", first[0], "fired on Tuesdays", [*first, *second])
    found = make_pairs([trace], chunks)
    assert [pair.asked for pair in found] == ["When is it fired?", "query words"]
    assert {pair.positive for pair in found} == {first[0].text}
    assert found[0].negatives == (first[1].text, second[0].text, second[1].text)  # the third passage says the same
    assert found[0].support == {first[0].text, first[2].text}
    assert make_pairs([trace], chunks, without=frozenset({second[0].document_id}))[0].negatives == (first[1].text,)
    with pytest.raises(TrainingError, match="no trace cites"):
        make_pairs([trace], chunks, without=frozenset({first[0].document_id}))
    assert [share_found(trace, passages) for passages in ([], [first[1]], [first[1], first[0]])] == [0.0, 0.0, 1.0]


def test_recall_is_compared_question_by_question(make_document: MakeDocument, make_trace: MakeTrace) -> None:
    _, (chunk,) = make_document("first.txt", ["The kiln is fired on Tuesdays."])
    traces = [make_trace(f"When? {i}", "On Tuesdays.", chunk, "Tuesdays", [chunk]) for i in range(20)]
    before = {("dense", 2): [0.0] * 10 + [1.0] * 10}
    (row,) = summarise(before, {("dense", 2): [1.0] * 20}, traces)
    assert (row["before"], row["after"], row["difference"], row["n"]) == (0.5, 1.0, 0.5, 20)
    assert 0 < row["low"] < 0.5 < row["high"] < 1


@given(done=st.floats(0, 1))
def test_the_rate_stays_under_its_peak_and_ends_at_zero(done: float) -> None:
    recipe = RetrieverRecipe()
    assert 0 <= rate_at(done, recipe) <= recipe.learning_rate
    assert rate_at(1.0, recipe) == 0


def test_wrong_settings_are_named() -> None:
    assert load_retriever_recipe(["epochs=3", "name=ours"]).epochs == 3
    with pytest.raises(UsageError, match="did you mean epochs"):
        load_retriever_recipe(["epoch=3"])
