"""The leak guard: the same question, nearly the same one, and one about a document learnt from; by lineage alone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from rag.eval.leaks import adapter_learner, embedder_learner, find_leaks, spoken, trained_questions
from rag.eval.recorded_answers import recorded_answers
from understudy.adapters import AdapterManifest
from understudy.digests import digest_of
from understudy.errors import UsageError

TRAINED = ["How many books may a visitor borrow?", "When does the reading room open in 2024?", "Who mends the roof?"]


@pytest.fixture
def manifest() -> AdapterManifest:
    return AdapterManifest(
        name="tiny", digest="0123456789abcdef", base="b", base_digest="", served_base_digest="", quantisation="nf4", tokenizer_digest="",
        chat_template_digest="", prompt_version="", dataset_digest="d1", recipe={}, seed=0, rank=8, alpha=16, targets=[], packages={}, metrics={},
        tenants=[], group_ids=["id of other.pdf"], question_digests=[digest_of(text) for text in TRAINED], created_at=0.0,
    )  # fmt: skip


def embed(texts: list[str]) -> np.ndarray:
    """Bags of words, of unit length."""
    vocabulary = sorted({word for text in [*texts, *TRAINED, *QUESTIONS] for word in text.lower().strip("?").split()})
    counts = np.array([[Counter(text.lower().strip("?").split())[word] for word in vocabulary] for text in texts], dtype=np.float32)
    return counts / np.linalg.norm(counts, axis=1, keepdims=True)


QUESTIONS = [
    "How many books may a visitor borrow?",  # trained on
    "how many books may a visitor  borrow",  # the same words
    "When does the big reading room open in 2024?",  # a near-duplicate
    "When does the reading room open in 2025?",  # another number makes another question
    "What is in the other file?",  # about a document learnt from
    "What does a lost card cost?",  # new
]


def test_every_kind_of_leak_is_found_once(ask, corpus, manifest) -> None:
    documents = [["library.pdf"]] * 4 + [["other.pdf"], ["library.pdf"]]
    questions = [ask(id=str(place), question=text, documents=documents[place]) for place, text in enumerate(QUESTIONS)]
    leaks = find_leaks(questions, adapter_learner(manifest), corpus.values(), TRAINED, embed)
    assert [(leak.question_id, leak.kind, leak.of) for leak in leaks] == [
        ("0", "question", TRAINED[0]),
        ("1", "near-duplicate", TRAINED[0]),
        ("2", "near-duplicate", TRAINED[1]),
        ("4", "document", "other.pdf"),
    ]
    assert {leak.model for leak in leaks} == {"tiny@0123456789ab"}
    assert spoken(leaks).startswith("1 asked in training, such as 'How many books may a visitor borrow?'; 2 nearly the same")
    gone = find_leaks(questions, adapter_learner(manifest), corpus.values(), None, embed)  # without its dataset, digests and documents are left
    assert [(leak.question_id, leak.kind) for leak in gone] == [("0", "question"), ("4", "document")]


def test_the_questions_trained_on_are_those_of_the_manifests_dataset(tmp_path: Path, manifest) -> None:
    assert trained_questions(tmp_path, adapter_learner(manifest)) is None
    (tmp_path / "d1").mkdir()
    rows = [{"question": text, "split": split} for text, split in (("A?", "train"), ("B?", "validation"), ("A?", "train"), ("C?", "train"))]
    (tmp_path / "d1" / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert trained_questions(tmp_path, adapter_learner(manifest)) == ["A?", "C?"]


def test_a_tuned_embedder_has_learnt_too_and_one_from_elsewhere_has_not(ask, corpus, tmp_path: Path) -> None:
    assert embedder_learner(tmp_path) is None
    (tmp_path / "manifest.json").write_text(json.dumps({"group_ids": ["id of other.pdf"], "result": {"dataset": "d1"}}))
    tuned = embedder_learner(tmp_path)
    assert tuned is not None and tuned.dataset_digest == "d1"
    questions = [ask(id="1", question=QUESTIONS[4], documents=["other.pdf"]), ask(id="2", question=QUESTIONS[5], documents=["library.pdf"])]
    [leak] = find_leaks(questions, tuned, corpus.values(), None, embed)
    assert (leak.question_id, leak.kind, leak.model) == ("1", "document", f"the embedder {tmp_path.name}")


def test_the_teachers_newest_recorded_answer_counts(ask, reply) -> None:
    questions = [ask(id="1", question="One?"), ask(id="2", question="Two  times?")]
    traces = [
        reply(id="old", question="One?", source="imported", created_at=1.0),
        reply(id="new", question="One?", source="imported", created_at=2.0),
        reply(id="expert", question="One?", source="expert", created_at=3.0),  # the key itself
        reply(id="student", question="Two times?", created_at=4.0),
        reply(id="cut off", question="Two times?", source="imported", complete=False, created_at=5.0),
        reply(id="simulated", question="Two times?", metadata={"teacher": "frontier"}, created_at=1.0),
    ]
    assert [trace.id for trace in recorded_answers(questions, traces)] == ["new", "simulated"]
    with pytest.raises(UsageError, match=r"answers to 1 of 2 questions are not recorded, such as 'Two times\?'"):
        recorded_answers(questions, traces[:5])
