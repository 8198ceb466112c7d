"""No group and no near-duplicate question is ever on two sides."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from train.near_duplicates import near_duplicate_pairs
from train.splits import Groups, Splits, assign_splits
from understudy.digests import digest_of
from understudy.records import Chunk, Citation, Trace

TOPICS = ("keep logs", "stop the system", "report incidents", "train operators", "pay fines", "review models", "buy software")
Made = tuple[int, int, tuple[int, ...], str | None]  # topic, wording, documents cited, declared side


def chunk(document: int, heading: str = "") -> Chunk:
    name = f"d{document}"
    return Chunk(
        id=f"{name}/{heading}", document_id=name, document=f"{name}.pdf", text="", start=0, end=1, pages=[1], ordinal=0, headings=[heading] * bool(heading)
    )


def trace(made: Made, number: int) -> Trace:
    topic, wording, documents, side = made
    question = f"{('How must they', 'And how must they')[wording % 2]} {TOPICS[topic]} {'in case ' + str(wording) * 6 if wording > 1 else ''}?"
    citations = [Citation(chunk_id=f"d{d}/", document_id=f"d{d}", document="", quote="", page=1, start=0, end=1) for d in documents]
    values = {"question": question, "steps": [], "answer": "", "abstained": not documents, "citations": citations, "score": 1.0, "source": "expert"}
    noted = {"split": side} if side else {}
    return Trace.model_validate({**values, "id": str(number), "generation": "", "prompt_version": "", "created_at": 0.0, "metadata": noted})


def traces_of(declared: bool) -> st.SearchStrategy[list[Trace]]:
    side = st.sampled_from(["train", "train", "calibration", "held-out"]) if declared else st.none()
    made = st.tuples(st.integers(0, 6), st.integers(0, 5), st.lists(st.integers(0, 11), max_size=2).map(tuple), side)
    return st.lists(made, max_size=30).map(lambda rows: [trace(row, number) for number, row in enumerate(rows)])


CHUNKS = {made.id: made for made in map(chunk, range(12))}


def assert_disjoint(traces: list[Trace], splits: Splits) -> None:
    groups = Groups(CHUNKS)
    assert splits.sides.keys() | splits.leaks.keys() == {t.id for t in traces}
    assert not splits.sides.keys() & splits.leaks.keys()
    owners: dict[str, set[str]] = {}
    for t in traces:
        for group in groups.of_trace(t) if t.id in splits.sides else []:
            owners.setdefault(group, set()).add(splits.sides[t.id])
            assert group in splits.groups[splits.sides[t.id]]
    assert all(len(sides) == 1 for sides in owners.values())
    assert sum(len(own) for own in splits.groups.values()) == len(owners)
    for i, j in near_duplicate_pairs([t.question for t in traces]):
        sides = {splits.sides[t.id] for t in (traces[i], traces[j]) if t.id in splits.sides}
        assert len(sides) <= 1


@settings(max_examples=50, deadline=None)
@given(traces_of(declared=False), st.sampled_from([0.0, 0.1, 0.3]))
def test_sides_that_are_drawn_are_disjoint(traces: list[Trace], held_out: float) -> None:
    splits = assign_splits(traces, Groups(CHUNKS), held_out)
    assert_disjoint(traces, splits)
    assert not splits.leaks  # whole classes move, so nothing is lost
    assert held_out or "held-out" not in splits.sides.values()
    assert assign_splits(list(reversed(traces)), Groups(CHUNKS), held_out).sides == splits.sides


@settings(max_examples=50, deadline=None)
@given(traces_of(declared=True))
def test_sides_that_people_declared_are_disjoint(traces: list[Trace]) -> None:
    splits = assign_splits(traces, Groups(CHUNKS))
    assert_disjoint(traces, splits)
    if any(t.metadata["split"] != "train" for t in traces):
        assert all(splits.sides[t.id] == t.metadata["split"] for t in traces if t.id in splits.sides)
        assert not any(t.metadata["split"] == "held-out" and t.id in splits.leaks for t in traces)  # the side that matters most loses nothing


def test_shares_are_about_those_wanted() -> None:
    traces = [trace((0, 0, (n,), None), n).model_copy(update={"question": digest_of(n)}) for n in range(40)]
    made = {c.id: c for c in map(chunk, range(40))}
    counts = Counter(assign_splits(traces, Groups(made), 0.2).sides.values())
    assert counts == {"train": 28, "held-out": 8, "calibration": 4}


def test_sections_are_the_groups_of_a_single_document() -> None:
    made = {c.id: c for c in (chunk(0, "Scope"), chunk(0, "Duties"))}
    groups = Groups(made)
    assert {groups.of_chunk(c) for c in made.values()} == {"d0#Scope", "d0#Duties"}
    assert {Groups(CHUNKS).of_chunk(c) for c in CHUNKS.values()} == {f"d{n}" for n in range(12)}


def test_a_question_without_an_answer_is_on_its_documents_side() -> None:
    asked = trace((0, 0, (), None), 1).model_copy(update={"metadata": {"document": "d3.pdf"}})
    simulated = asked.model_copy(update={"metadata": {"written_from": "d4/"}})
    assert [Groups(CHUNKS).of_trace(t) for t in (asked, simulated)] == [["d3"], ["d4"]]
