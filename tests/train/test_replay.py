"""Replay: how much of what was learnt is repeated, and what a frozen question set keeps out of training."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from train.replay import Replay, replay_some
from train.reserved import asked_documents, reserved
from understudy.digests import digest_of
from understudy.records import Chunk, Document, Example, Question, Trace


def row(question: int, split: str = "train") -> Example:
    values = {"task": "plan", "question": str(question), "passage_ids": [], "target": "t", "split": split, "kind": "good", "trace_id": "t", "group_ids": []}
    return Example.model_validate(values)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=60), st.integers(0, 30), st.floats(0, 1), st.integers(0, 3))
def test_new_rows_all_stay_and_learnt_ones_up_to_their_share(asked: list[int], known: int, share: float, seed: int) -> None:
    examples = [row(number, "validation" if place % 7 == 0 else "train") for place, number in enumerate(asked)]
    learnt = frozenset(digest_of(str(number)) for number in range(known))
    kept, counts = replay_some(examples, Replay(learnt, share), seed)
    train = [example for example in kept if example.split == "train"]
    repeated = [example for example in train if digest_of(example.question) in learnt]
    assert [e for e in kept if e.split != "train" or digest_of(e.question) not in learnt] == [
        e for e in examples if e.split != "train" or digest_of(e.question) not in learnt
    ]
    assert counts["new"] == len(train) - len(repeated) and counts["repeated"] == len(repeated)
    assert counts["left_out"] == len(examples) - len(kept)
    largest = max([sum(e.question == question for e in examples) for question in {e.question for e in examples}], default=0)
    if counts["left_out"]:  # as much as was asked for, to a question's rows
        assert share * len(train) - 1e-6 <= len(repeated) <= share / (1 - share) * counts["new"] + largest
    assert replay_some(examples, Replay(learnt, 1.0), seed)[0] == examples


def test_the_regression_set_keeps_its_questions_and_documents_out(
    make_document: Callable[..., tuple[Document, list[Chunk]]], make_trace: Callable[..., Trace]
) -> None:
    [kept], [asked] = make_document("kept.txt", ["The kiln is fired on Tuesdays."])[1], make_document("asked.txt", ["The pond holds forty carp."])[1]
    chunks = {chunk.id: chunk for chunk in (kept, asked)}
    traces = [
        make_trace("When is the kiln fired?", "On Tuesdays", kept, "The kiln is fired on Tuesdays.", [kept]),
        make_trace("How many carp?", "Forty", asked, "The pond holds forty carp.", [asked]),
        make_trace("WHO feeds the carp", None, None, "", [kept]),
        make_trace("Is kiln 7 fired?", None, None, "", [kept]),
    ]
    questions = [Question(id="1", question="Who feeds the carp?", documents=["in/asked.txt"]), Question(id="2", question="Is kiln 8 fired?")]

    def embed(texts: list[str]) -> np.ndarray:
        return np.ones((len(texts), 1), dtype=np.float32)  # everything means the same

    found = reserved(traces, questions, chunks, embed, with_documents=True)
    assert asked_documents(questions, chunks) == {asked.document_id}
    assert found[traces[2].id].startswith("asked by") and traces[3].id not in found  # another number is another question
    assert "nearly" in found[traces[0].id] and found[traces[1].id] == found[traces[0].id]

    def apart(texts: list[str]) -> np.ndarray:
        return np.array([[1, 0] if text in [q.question for q in questions] else [0, 1] for text in texts], dtype=np.float32)

    assert reserved(traces, questions, chunks, apart, with_documents=True).keys() == {traces[1].id, traces[2].id}
    assert reserved(traces, questions, chunks, apart, with_documents=False).keys() == {traces[2].id}
