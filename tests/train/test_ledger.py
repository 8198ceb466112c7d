"""Every trace is a source, held out, or a line of the ledger with its reason; teachers teach, the student does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.train.test_examples import corpus
from train.examples import Mix, build_examples
from train.ledger import Rules, is_teaching, rejection, verify_traces
from understudy.records import Chunk, Document, Step, Trace, document_of

MakeDocument, MakeTrace = Callable[..., tuple[Document, list[Chunk]]], Callable[..., Trace]
STUDENTS = frozenset({"base", "smollm2", "handbooks"})
NOTES = ["Visitors may borrow up to six books for three weeks.", "Lost cards are replaced for a fee of 4 euro.", "The barn doors are green."]


@pytest.fixture
def chunks(make_document: MakeDocument) -> list[Chunk]:
    return make_document("a.txt", NOTES)[1]


@pytest.fixture
def good(chunks: list[Chunk], make_trace: MakeTrace) -> Trace:
    return make_trace("How many books may a visitor borrow?", "A visitor may borrow six books.", chunks[0], "up to six books", chunks)


def reason(trace: Trace, chunks: list[Chunk]) -> str | None:
    found = rejection(trace, {chunk.id: chunk for chunk in chunks})
    return found and found[0]


def test_what_may_not_teach_is_rejected_with_its_reason(chunks: list[Chunk], good: Trace) -> None:
    def after(**changes: object) -> str | None:
        return reason(good.model_copy(update=changes), chunks)

    assert after() is None
    assert after(complete=False) == "incomplete"
    assert after(score=0.1) == "validated below the threshold"
    assert after(score=None) is None  # an expert's needs no judge
    assert after(score=None, source="model") == "not validated"
    assert after(citations=[]) == "no citation"
    assert after(metadata={"unverified": "no passage"}) == "unverified"
    assert reason(good, []) == "cites a chunk that is no longer in the corpus"
    assert after(citations=[good.citations[0].model_copy(update={"quote": "other words entirely"})]) == "quote not verbatim in the cited chunk"
    assert after(answer="A visitor may borrow 7 books.") == "states a number that its quotes do not"
    assert after(answer="Green barn doors please every passing tourist.") == "not supported by its quotes"


def test_only_teachers_teach(good: Trace) -> None:
    own = good.model_copy(update={"source": "model", "model": "handbooks@0123456789ab"})
    assert not is_teaching(own, STUDENTS)
    taught = own.model_copy(update={"model": "frontier", "metadata": {"teacher": "frontier"}})
    assert is_teaching(taught, STUDENTS)
    assert is_teaching(taught.model_copy(update={"metadata": {"escalated": "true"}}), STUDENTS)
    assert not is_teaching(taught.model_copy(update={"metadata": {}}), STUDENTS)
    assert not is_teaching(taught.model_copy(update={"model": "base", "metadata": {"teacher": "base"}}), STUDENTS)  # simulated by the student itself
    assert not is_teaching(own.model_copy(update={"source": "imported"}), STUDENTS)
    assert is_teaching(own.model_copy(update={"source": "expert"}), STUDENTS)  # a person's correction


def test_the_students_answers_come_back_by_no_way(chunks: list[Chunk], good: Trace) -> None:
    own = good.model_copy(update={"id": "own", "source": "model", "model": "handbooks@0123456789ab"})
    again = own.model_copy(update={"id": "again", "source": "imported", "model": ""})
    verified = verify_traces([own, again], {c.id: c for c in chunks}, Rules(STUDENTS))
    assert verified.sources == []
    assert [(r.trace_id, r.reason, r.detail) for r in verified.rejections] == [
        ("own", "the student's own unreviewed answer", "handbooks@0123456789ab"),
        ("again", "the student's own unreviewed answer", "imported again"),
    ]


def test_of_several_answers_a_persons_is_taken_then_the_newest(chunks: list[Chunk], good: Trace) -> None:
    teachers = good.model_copy(update={"id": "t", "source": "model", "model": "frontier", "metadata": {"teacher": "frontier"}, "created_at": 9.0})
    later = good.model_copy(update={"id": "correction", "question": good.question.upper() + " ", "answer": "Six books.", "created_at": good.created_at + 1})
    verified = verify_traces([good, later, teachers], {c.id: c for c in chunks}, Rules(STUDENTS))
    assert [source.trace.id for source in verified.sources] == ["correction"]
    assert {(r.trace_id, r.detail) for r in verified.rejections} == {(good.id, "correction"), ("t", "correction")}
    assert verified.reasons == {"another answer to the same question was taken": 2}


def test_wrong_answers_that_models_gave_are_shown_to_the_validator(chunks: list[Chunk], good: Trace, make_trace: MakeTrace) -> None:
    unanswered = make_trace("Who built the library?", None, None, "", chunks)
    wrong = Step(name="answer", text="Quote: The barn doors are green.\nAnswer: The barn doors are green.", model="handbooks")
    right = Step(name="answer", text="Quote: up to six books\nAnswer: Six books, a visitor may borrow.", model="handbooks")
    own = [
        good.model_copy(update={"id": f"own{i}", "source": "model", "model": "handbooks", "steps": [step], "question": question})
        for i, (step, question) in enumerate([(wrong, good.question), (right, good.question), (wrong, unanswered.question)])
    ]
    by_id = {c.id: c for c in chunks}
    verified = verify_traces([good, unanswered, *own], by_id, Rules(STUDENTS))
    assert len(verified.rejections) == 3
    failure = 'The barn doors are green. ("The barn doors are green.")'
    assert {source.trace.id: source.failures for source in verified.sources} == {good.id: (failure,), unanswered.id: (failure,)}
    rows = [e for e in build_examples(verified.sources, by_id, Mix(k=2), 0) if e.kind == "bad-failure"]
    assert {(e.question, e.proposal, e.target) for e in rows} == {(good.question, failure, "0"), (unanswered.question, failure, "0")}


def test_unverified_traces_teach_only_where_they_are_asked_for(make_document: MakeDocument, make_trace: MakeTrace) -> None:
    traces, chunks = corpus(make_document, make_trace)
    listed = list(chunks.values())
    marked = {"source": "imported", "metadata": {"unverified": "no passage"}}
    foreign = [
        make_trace(f"Who waits for item {word}?", "Its owner.", None, "", listed[i:], **marked) for i, word in enumerate(("ash", "birch", "cedar", "elm"))
    ]
    verified = verify_traces([*traces, *foreign], chunks)
    assert verified.reasons == {"unverified": 4}
    assert {rejection.detail for rejection in verified.rejections} == {"no passage"}
    verified = verify_traces([*traces, *foreign], chunks, Rules(unverified_k=2))
    assert verified.rejections == []
    taught = [source for source in verified.sources if source.trace in foreign]
    assert all(source.support == tuple(source.retrieved[:2]) for source in taught)
    examples = build_examples(verified.sources, chunks, Mix(k=2), seed=0)
    taught_rows = [e for e in examples if e.trace_id == foreign[0].id and e.task == "answer" and e.kind != "no-support"]
    assert {e.target for e in taught_rows} == {"Answer: Its owner."}
    verified = verify_traces(foreign, chunks, Rules(unverified_k=2))
    assert (verified.sources, len(verified.rejections)) == ([], 4)  # documents that no verified trace cites may be kept for evaluation
    assert verified.reasons == {"unverified, and no passage that a row may show": 4}


def test_every_trace_is_accounted_for(make_document: MakeDocument, make_trace: MakeTrace) -> None:
    made: list[Trace] = []
    by_id: dict[str, Chunk] = {}
    for name in "abcdefghij":
        _, chunks = make_document(f"{name}.txt", [f"In {name * 9} the owner of thing {name * 7} number {i} waits {i + 3} days." for i in range(3)])
        by_id |= {chunk.id: chunk for chunk in chunks}
        made += [make_trace(f"{name * 8} {name * 6} {c.ordinal * 5} wait?", f"It waits {c.ordinal + 3} days.", c, "the owner of thing", chunks) for c in chunks]
    made = [t.model_copy(update={"score": 0.2}) if i % 7 == 0 else t for i, t in enumerate(made)]
    verified = verify_traces(made, by_id, Rules(held_out=0.2))
    ids = [s.trace.id for s in verified.sources] + [t.id for t in verified.held_out] + [r.trace_id for r in verified.rejections]
    assert sorted(ids) == sorted(t.id for t in made)
    assert verified.held_out and {s.split for s in verified.sources} == {"train", "validation"}
    kept_away = {c.document_id for t in verified.held_out for c in t.citations}
    assert not any(by_id[c].document_id in kept_away for s in verified.sources for c in s.retrieved)


def test_a_single_document_is_split_by_its_sections(make_document: MakeDocument, make_trace: MakeTrace) -> None:
    names = ("ash", "birch", "cedar", "elm", "fir", "hazel", "lime", "maple", "oak", "pine")
    document, chunks = make_document("a.txt", [f"The {name} keeper of house {i} waits {i + 3} days." for i, name in enumerate(names)])
    chunks = [chunk.model_copy(update={"headings": [name, "Detail"]}) for chunk, name in zip(chunks, names, strict=True)]
    traces = [make_trace(f"{name * 4} wait {name * 3}?", f"It waits {i + 3} days.", chunks[i], "waits", chunks) for i, name in enumerate(names)]
    traces = [t.model_copy(update={"citations": [t.citations[0].model_copy(update={"quote": chunks[i].text})]}) for i, t in enumerate(traces)]
    verified = verify_traces(traces, {chunk.id: chunk for chunk in chunks}, Rules(held_out=0.1))
    sides = {split: {g for s in verified.sources if s.split == split for g in s.groups} for split in ("train", "validation")}
    assert len(sides["train"]) == 8 and len(sides["validation"]) == 1 and not sides["train"] & sides["validation"]
    assert {document_of(group) for groups in sides.values() for group in groups} == {document.id}
    assert all(set(s.retrieved) == set(s.support) for s in verified.sources if s.split == "validation")
