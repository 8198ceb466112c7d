"""RAFT rows: support among retrieved distractors, no support where a row teaches to abstain, real wrong answers."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag.prompts import ABSTENTION
from train.examples import BAD_SHARE, FEWER, Mix, build_examples, change_number, draw_passages, with_bad_share
from train.ledger import Source, verify_traces
from train.support import holds_answer
from understudy.records import Chunk, Example, Trace

Made = tuple[list[Trace], dict[str, Chunk]]


def corpus(make_document: Callable[..., tuple[object, list[Chunk]]], make_trace: Callable[..., Trace]) -> Made:
    chunks: list[Chunk] = []
    for name in "abc":
        paragraphs = [f"In {name}, rule number {i} says that the owner of thing {name}{i} waits {i + 3} days before acting." for i in range(8)]
        chunks += make_document(f"{name}.txt", paragraphs)[1]
    traces = []
    for index, chunk in enumerate(chunks):
        same = [c for c in chunks if c.document == chunk.document]
        others = [c for c in chunks if c is not chunk]
        retrieved = [*same, *others]
        quote = chunk.text.split(" says that ")[1]
        for asked in range(2):
            question = f"How long does the owner of item {index} wait, asked {asked}?"
            traces.append(make_trace(question, f"The owner waits {chunk.ordinal + 3} days.", chunk, quote, retrieved))
    traces += [make_trace(f"Who pays for item {i}?", None, None, "", chunks[i:] + chunks[:i]) for i in range(6)]
    return traces, {chunk.id: chunk for chunk in chunks}


def test_rows_show_their_support_and_abstention_rows_do_not(make_document, make_trace) -> None:  # type: ignore[no-untyped-def]
    traces, chunks = corpus(make_document, make_trace)
    verified = verify_traces(traces, chunks)
    assert verified.rejections == []
    sources = verified.sources
    by_id = {source.trace.id: source for source in sources}
    examples = build_examples(sources, chunks, Mix(k=3, no_support=0.5), seed=0)
    kinds = {example.kind for example in examples}
    assert {"answerable", "no-support", "unanswerable", "good", "plan"} <= kinds
    for example in examples:
        source = by_id[example.trace_id]
        if example.task == "plan":
            continue
        assert len(example.passage_ids) == len(set(example.passage_ids)) <= 3
        assert set(example.passage_ids) <= set(source.retrieved)
        if example.kind in ("answerable", "good"):
            assert set(source.support) <= set(example.passage_ids)
        if example.kind in ("no-support", "unanswerable"):
            assert example.target == ABSTENTION
            assert not any(holds_answer(source.trace, chunks[c]) for c in example.passage_ids)
    validations = [example for example in examples if example.task == "validate"]
    bad = [example for example in validations if example.target == "0"]
    assert len(bad) >= BAD_SHARE * len(validations)
    assert all(example.proposal != by_id[example.trace_id].trace.answer for example in bad)


@pytest.mark.parametrize(("share", "right"), [(0.0, 0), (1.0, 48)])
def test_validations_are_as_many_as_asked_for(make_document, make_trace, share: float, right: int) -> None:  # type: ignore[no-untyped-def]
    traces, chunks = corpus(make_document, make_trace)
    sources = verify_traces(traces, chunks).sources
    kinds = [example.kind for example in build_examples(sources, chunks, Mix(k=2, validations=share), seed=0) if example.task == "validate"]
    assert kinds.count("good") == right
    assert any(kind.startswith("bad") for kind in kinds) == bool(right)


def test_the_same_seed_gives_the_same_rows(make_document, make_trace) -> None:  # type: ignore[no-untyped-def]
    traces, chunks = corpus(make_document, make_trace)
    sources = verify_traces(traces, chunks).sources
    first, second = (build_examples(sources, chunks, Mix(k=2), seed=3) for _ in range(2))
    assert [e.digest for e in first] == [e.digest for e in second]
    assert [e.digest for e in build_examples(sources, chunks, Mix(k=2), seed=4)] != [e.digest for e in first]


def test_held_out_documents_are_never_shown(make_document, make_trace) -> None:  # type: ignore[no-untyped-def]
    traces, chunks = corpus(make_document, make_trace)
    trained = [t for t in traces if all(c.document != "c.txt" for c in t.citations)]
    sources = verify_traces(trained, chunks).sources
    examples = build_examples(sources, chunks, Mix(k=3), seed=0)
    assert examples
    assert all(chunks[c].document != "c.txt" for example in examples for c in example.passage_ids)


def test_a_changed_number_is_another_number() -> None:
    rng = random.Random(0)
    assert change_number("no digits", rng) is None
    for _ in range(50):
        assert change_number("within 15 days", rng) != "within 15 days"


def test_distractors_were_retrieved_for_the_question_and_are_not_cited(make_document, make_trace) -> None:  # type: ignore[no-untyped-def]
    traces, chunks = corpus(make_document, make_trace)
    traces = [
        t.model_copy(update={"steps": [t.steps[0], t.steps[1].model_copy(update={"passage_ids": t.steps[1].passage_ids[i % 5 :][:9]})]})
        for i, t in enumerate(traces)
    ]
    sources = verify_traces(traces, chunks).sources
    by_id = {source.trace.id: source for source in sources}
    answered = [e for e in build_examples(sources, chunks, Mix(k=4), seed=0) if e.kind in ("answerable", "good")]
    assert answered
    for example in answered:
        source = by_id[example.trace_id]
        assert set(example.passage_ids) - set(source.support) <= set(source.retrieved)


@pytest.mark.parametrize("dose", [0, 2, 4, 8])
def test_a_dose_is_the_number_of_distractors_in_every_epoch(make_document, make_trace, dose: int) -> None:  # type: ignore[no-untyped-def]
    traces, chunks = corpus(make_document, make_trace)
    sources = verify_traces(traces, chunks).sources
    examples = [e for e in build_examples(sources, chunks, Mix(k=2, dose=dose), seed=0) if e.task != "plan"]
    fewest = min(len(source.retrieved) for source in sources)  # a side of a single small document may have fewer
    for example in examples:
        shown = [set(draw_passages(example, 0, epoch)) for epoch in range(8)]
        assert all(passages == set(example.passage_ids) for passages in shown)
        if example.kind in ("answerable", "good"):
            assert len(shown[0] - set(example.support_ids)) == min(dose, fewest - 1) or (example.split == "train" and len(shown[0]) == 1 + dose)
    assert {e.kind for e in examples} >= {"answerable", "no-support", "unanswerable"}


@given(st.integers(1, 8), st.sets(st.integers(0, 7)), st.integers(0, 2**32))
def test_an_epoch_shows_the_support_and_a_drawn_part_of_the_rest(count: int, optional: set[int], seed: int) -> None:
    ids = [f"c{i}" for i in range(count)]
    row = {"task": "answer", "question": "q?", "target": "t", "split": "train", "kind": "answerable", "trace_id": "t", "group_ids": []}
    example = Example(**row, passage_ids=ids, optional_ids=[f"c{i}" for i in optional if i < count])  # type: ignore[arg-type]
    other = example.model_copy(update={"question": "another?", "target": "other"})  # of the same set
    for epoch in range(4):
        shown = draw_passages(example, seed, epoch)
        assert shown == draw_passages(other, seed, epoch)
        assert len(shown) == len(set(shown)) >= 1
        assert set(ids) >= set(shown) >= set(ids) - set(example.optional_ids)


def test_epochs_differ_in_how_many_distractors_they_show() -> None:
    row = {"task": "answer", "question": "q?", "target": "t", "split": "train", "kind": "answerable", "trace_id": "t", "group_ids": []}
    counts = Counter(len(draw_passages(Example(**row, passage_ids=list("abcd"), optional_ids=list("bcd")), 0, epoch)) for epoch in range(2000))  # type: ignore[arg-type]
    assert set(counts) == {1, 2, 3, 4}
    assert abs(counts[4] / 2000 - (1 - FEWER)) < 0.04


def test_sets_of_the_same_passages_are_one(make_document, make_trace) -> None:  # type: ignore[no-untyped-def]
    _, chunks = make_document("a.txt", [f"Rule number {i} says that owners wait {i + 3} days before acting." for i in range(2)])
    by_id = {chunk.id: chunk for chunk in chunks}
    traces = [make_trace(f"How long, {w}?", f"Owners wait {i + 3} days.", chunks[i], "says that owners wait", chunks) for i, w in ((0, "first"), (1, "second"))]
    sources = [Source(t, [c.id for c in chunks], (t.citations[0].chunk_id,), "train") for t in traces]
    for order in (sources, sources[::-1]):
        rows = [e for e in build_examples(order, by_id, Mix(k=2), 0) if e.task == "answer"]
        assert {tuple(e.passage_ids) for e in rows if e.kind == "answerable"} == {tuple(c.id for c in chunks)}
        assert all(not set(e.optional_ids) & set(e.support_ids) for e in rows if e.kind == "answerable")


def test_another_questions_answer_is_no_wrong_one_where_it_is_the_same(make_document, make_trace) -> None:  # type: ignore[no-untyped-def]
    _, chunks = make_document("a.txt", ["Owners wait three days before acting. Guests wait for a week.", "The barn is green."])
    asked = [("How long, first?", "Owners wait three days."), ("How long, second?", "Three days the owners wait."), ("And guests?", "Guests wait a week.")]
    traces = [make_trace(question, answer, chunks[0], "Owners wait three days", chunks) for question, answer in asked]
    sources = [Source(t, [c.id for c in chunks], (chunks[0].id,), "train") for t in traces]
    by_id = {c.id: c for c in chunks}
    rows = [e for seed in range(9) for e in build_examples(sources, by_id, Mix(k=2, validations=1.0), seed) if e.kind == "bad-other-answer"]
    assert {"week" in e.proposal for e in rows if e.question.startswith("How long")} == {True}
    assert {"week" in e.proposal for e in rows if e.question.startswith("And guests")} == {False}


@given(st.integers(0, 30), st.integers(0, 30))
def test_wrong_answers_are_a_share_of_the_validations(good: int, bad: int) -> None:
    row = {"task": "validate", "question": "q?", "passage_ids": [], "split": "train", "trace_id": "t", "group_ids": []}
    rows = [Example(**row, target="1", kind="good") for _ in range(good)] + [Example(**row, target="0", kind="bad-number") for _ in range(bad)]  # type: ignore[arg-type]
    kept = with_bad_share(rows, random.Random(0))
    assert sum(e.kind != "good" for e in kept) == bad >= BAD_SHARE * len(kept)
    assert len(kept) == len(rows) or len(kept) + 1 > bad / BAD_SHARE - 1  # no more is lost than it takes
