"""What an adapter or a tuned embedder has seen of the questions it is measured on: by its manifest's lineage, and the dataset that this names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rag.same_questions import NEAR, normalised, numbers_of
from understudy.adapters import AdapterManifest
from understudy.digests import digest_of
from understudy.files import read_json, read_jsonl
from understudy.models import LEARNT
from understudy.records import Chunk, Question

Kind = Literal["question", "near-duplicate", "document"]
Embed = Callable[[list[str]], NDArray[np.float32]]  # texts → unit vectors [texts, dim]
SPOKEN: dict[Kind, str] = {
    "question": "asked in training",
    "near-duplicate": "nearly the same as one asked in training",
    "document": "about a document it learnt from",
}


@dataclass(frozen=True)
class Learner:
    """What learnt, and what its manifest says of it."""

    name: str
    group_ids: list[str]
    dataset_digest: str
    question_digests: list[str]


def adapter_learner(manifest: AdapterManifest) -> Learner:
    """An adapter."""
    return Learner(manifest.served_name, manifest.group_ids, manifest.dataset_digest, manifest.question_digests)


def embedder_learner(folder: Path) -> Learner | None:
    """A tuned embedder (train/retriever.py); None where nothing was learnt here."""
    if not (folder / LEARNT).exists():
        return None
    manifest = read_json(folder / LEARNT)
    return Learner(f"the embedder {folder.name}", manifest["group_ids"], manifest["result"]["dataset"], [])


@dataclass(frozen=True)
class Leak:
    """A question that is not new to a model, and why."""

    question_id: str
    question: str
    model: str
    kind: Kind
    of: str  # the question or document of the training data


def find_leaks(questions: Sequence[Question], learner: Learner, chunks: Iterable[Chunk], trained_on: Sequence[str] | None, embed: Embed) -> list[Leak]:
    """Each question that the learner knows, once, by its plainest reason.

    `chunks` is the corpus, which tells documents' ids; `trained_on` the training questions' texts, None where the dataset is gone: then
    near-duplicates go unseen.
    """
    ids: dict[str, set[str]] = defaultdict(set)
    for chunk in chunks:
        ids[PurePath(chunk.document).name].add(chunk.document_id)
    learnt, asked = set(learner.group_ids), set(learner.question_digests)
    asked |= {digest_of(text) for text in trained_on or []}
    near = _nearest_trained([question.question for question in questions], list(trained_on or []), embed)
    leaks = []
    for question, twin in zip(questions, near, strict=True):
        seen = [name for name in dict.fromkeys(question.documents) if ids[PurePath(name).name] & learnt]
        found: tuple[Kind, str] | None = None
        if digest_of(question.question) in asked:
            found = "question", question.question
        elif twin:
            found = "near-duplicate", twin
        elif seen:
            found = "document", seen[0]
        if found:
            leaks.append(Leak(question.id, question.question, learner.name, *found))
    return leaks


def trained_questions(datasets: Path, learner: Learner) -> list[str] | None:
    """The questions of the training rows of its dataset; None where the dataset is gone."""
    path = datasets / learner.dataset_digest / "examples.jsonl"
    if not learner.dataset_digest or not path.exists():
        return None
    return list(dict.fromkeys(str(row["question"]) for row in read_jsonl(path) if row["split"] == "train"))


def spoken(leaks: Sequence[Leak]) -> str:
    """How many there are of each kind, with an example."""
    parts = []
    for kind, meaning in SPOKEN.items():
        of_kind = [leak for leak in leaks if leak.kind == kind]
        if of_kind:
            parts.append(f"{len(of_kind)} {meaning}, such as {of_kind[0].question!r}" + (f" ({of_kind[0].of})" if kind == "document" else ""))
    return "; ".join(parts)


def _nearest_trained(questions: list[str], trained: list[str], embed: Embed) -> list[str | None]:
    """For each question, the trained one that is the same but for its wording, or None: near in meaning, with the same numbers."""
    if not questions or not trained:
        return [None] * len(questions)
    words = {normalised(text): text for text in trained}
    vectors, of_trained = embed(questions), embed(trained)
    found = []
    for text, vector in zip(questions, vectors, strict=True):
        cosines = of_trained @ vector
        near = [int(place) for place in np.argsort(-cosines) if cosines[place] >= NEAR]
        same = next((trained[place] for place in near if numbers_of(trained[place]) == numbers_of(text)), None)
        found.append(words.get(normalised(text), same))
    return found
