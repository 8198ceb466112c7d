"""How near in meaning an answer is to the expert's, by the workspace's own embedder: no judge, no network."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from rag.eval.metrics import Row
from understudy.records import Question, Trace

Embed = Callable[[list[str]], NDArray[np.float32]]  # texts → unit vectors [texts, dim]


def add_similarity(rows: Sequence[Row], traces: Sequence[Trace], questions: Sequence[Question], embed: Embed) -> None:
    """Set each row's `semantic_similarity`: the cosine of the answer to the nearest accepted one, not below 0; answerable questions.

    An abstention and a failed run say nothing, which is near to nothing: 0.
    """
    said = [trace.answer if trace.complete and not trace.abstained else "" for trace in traces]
    texts = sorted({text for text in (*said, *(answer for question in questions for answer in question.answers or [])) if text.strip()})
    vectors = dict(zip(texts, embed(texts), strict=True)) if texts else {}
    for row, text, question in zip(rows, said, questions, strict=True):
        if question.answers is not None:
            cosines = [float(vectors[text] @ vectors[answer]) for answer in question.answers if answer in vectors] if text in vectors else []
            row["semantic_similarity"] = min(1.0, max(0.0, *cosines, 0.0))
