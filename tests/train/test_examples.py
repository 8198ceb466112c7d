"""RAFT rows: support among retrieved distractors, no support where a row teaches to abstain, real wrong answers."""

from __future__ import annotations

import random
from collections.abc import Callable

from rag.prompts import ABSTENTION
from train.dataset import assign_splits, is_teaching, rejection, verify_traces
from train.examples import Mix, build_examples, change_number, supports
from understudy.records import Chunk, Trace

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
    sources, ledger = verify_traces(traces, chunks)
    assert ledger == []
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
            assert not any(supports(source.trace, chunks[c]) for c in example.passage_ids)
    validations = [example for example in examples if example.task == "validate"]
    bad = [example for example in validations if example.target == "0"]
    assert len(bad) >= 0.3 * len(validations)
    assert all(example.proposal != by_id[example.trace_id].trace.answer for example in bad)


def test_the_same_seed_gives_the_same_rows(make_document, make_trace) -> None:  # type: ignore[no-untyped-def]
    traces, chunks = corpus(make_document, make_trace)
    sources, _ = verify_traces(traces, chunks)
    first, second = (build_examples(sources, chunks, Mix(k=2), seed=3) for _ in range(2))
    assert [e.digest for e in first] == [e.digest for e in second]
    assert [e.digest for e in build_examples(sources, chunks, Mix(k=2), seed=4)] != [e.digest for e in first]


def test_held_out_documents_are_never_shown(make_document, make_trace) -> None:  # type: ignore[no-untyped-def]
    traces, chunks = corpus(make_document, make_trace)
    trained = [t for t in traces if all(c.document != "c.txt" for c in t.citations)]
    sources, _ = verify_traces(trained, chunks)
    examples = build_examples(sources, chunks, Mix(k=3), seed=0)
    assert examples
    assert all(chunks[c].document != "c.txt" for example in examples for c in example.passage_ids)


def test_what_may_not_teach_is_rejected_with_its_reason(make_document, make_trace) -> None:  # type: ignore[no-untyped-def]
    _, chunks = make_document("a.txt", ["the quoted words stand here"])
    by_id = {chunk.id: chunk for chunk in chunks}
    good = make_trace("q?", "a b c", chunks[0], "quoted words stand", chunks)
    assert rejection(good, by_id) is None
    assert rejection(good.model_copy(update={"complete": False}), by_id) == "incomplete"
    assert rejection(good.model_copy(update={"score": 0.1}), by_id) == "validated below the threshold"
    assert rejection(good.model_copy(update={"citations": []}), by_id) == "no citation"
    assert "no longer" in (rejection(good, {}) or "")
    altered = good.citations[0].model_copy(update={"quote": "other words entirely"})
    assert "verbatim" in (rejection(good.model_copy(update={"citations": [altered]}), by_id) or "")


def test_documents_do_not_stand_on_two_sides(make_document, make_trace) -> None:  # type: ignore[no-untyped-def]
    traces, _ = corpus(make_document, make_trace)
    splits = assign_splits(traces)
    sides: dict[str, set[str]] = {}
    for trace in traces:
        for citation in trace.citations:
            sides.setdefault(citation.document_id, set()).add(splits[trace.id])
    assert all(len(side) == 1 for side in sides.values())


def test_a_changed_number_is_another_number() -> None:
    rng = random.Random(0)
    assert change_number("no digits", rng) is None
    for _ in range(50):
        assert change_number("within 15 days", rng) != "within 15 days"


def test_only_teachers_teach(make_trace) -> None:  # type: ignore[no-untyped-def]
    own = make_trace("q?", None, None, "", [], source="model")
    assert not is_teaching(own)
    assert is_teaching(own.model_copy(update={"metadata": {"teacher": "frontier"}}))
    assert is_teaching(own.model_copy(update={"source": "imported"}))


def test_unverified_traces_teach_only_where_they_are_asked_for(make_document, make_trace) -> None:  # type: ignore[no-untyped-def]
    traces, chunks = corpus(make_document, make_trace)
    listed = list(chunks.values())
    marked = {"source": "imported", "metadata": {"unverified": "no passage"}}
    foreign = [make_trace(f"Who waits for item {i}?", "Its owner.", None, "", listed[i:], **marked) for i in range(4)]
    sources, ledger = verify_traces([*traces, *foreign], chunks)
    assert len(sources) == len(traces)
    assert [row["reason"] for row in ledger] == ["unverified"] * 4
    sources, ledger = verify_traces([*traces, *foreign], chunks, unverified_k=2)
    assert ledger == []
    assert [source.support for source in sources[-4:]] == [tuple(c.id for c in listed[i : i + 2]) for i in range(4)]
    examples = build_examples(sources, chunks, Mix(k=2), seed=0)
    taught = [e for e in examples if e.trace_id == foreign[0].id and e.task == "answer" and e.target != ABSTENTION]
    assert {e.target for e in taught} == {"Answer: Its owner."}
    assert all(e.passage_ids == [c.id for c in listed[:2]] for e in taught)
    sources, ledger = verify_traces(foreign, chunks, unverified_k=2)
    assert (sources, len(ledger)) == ([], 4)  # documents that no verified trace cites may be kept for evaluation
