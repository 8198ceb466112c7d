"""What a frozen question set keeps out of training: its questions, what is nearly the same, and the documents that it asks about.

The measures are those of the leak guard (rag/eval/leaks.py), so that what is trained past here can be evaluated on the set.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePath

import numpy as np

from rag.eval.leaks import Embed
from rag.same_questions import NEAR, normalised, numbers_of
from train.splits import Groups
from understudy.records import Chunk, Question, Trace


def asked_documents(questions: Sequence[Question], chunks: dict[str, Chunk]) -> set[str]:
    """The ids of the documents that questions name. `chunks` is the corpus by id."""
    named = {PurePath(document).name for question in questions for document in question.documents}
    return {chunk.document_id for chunk in chunks.values() if PurePath(chunk.document).name in named}


def reserved(traces: Sequence[Trace], questions: Sequence[Question], chunks: dict[str, Chunk], embed: Embed, with_documents: bool) -> dict[str, str]:
    """Why a trace may not teach, by its id, for those that the set keeps out; with `with_documents` also traces on its documents."""
    if not traces or not questions:
        return {}
    words = {normalised(question.question) for question in questions}
    by_numbers: dict[frozenset[tuple[str, int]], list[int]] = defaultdict(list)
    for place, question in enumerate(questions):
        by_numbers[frozenset(numbers_of(question.question).items())].append(place)
    documents, groups = asked_documents(questions, chunks) if with_documents else set(), Groups(chunks)
    asked, given = embed([question.question for question in questions]), embed([trace.question for trace in traces])
    found = {}
    for trace, vector in zip(traces, given, strict=True):
        rivals = by_numbers.get(frozenset(numbers_of(trace.question).items()), [])
        if normalised(trace.question) in words or (rivals and float(np.max(asked[rivals] @ vector)) >= NEAR):
            found[trace.id] = "asked by the regression set, or nearly"
        elif documents.intersection(groups.of_trace(trace)):
            found[trace.id] = "rests on a document of the regression set"
    return found
