"""How passages become the contexts of prompts. Whatever the strategy, every text shown is verbatim, so quotes can be checked.

concat      one prompt with all passages, in document order: what is trained on, and the default
sequential  one prompt a passage, best first: the agent answers from the first that supports an answer; for small windows
summarise   one prompt with the sentences that bear on the question, in their order: more passages in the same space
"""

from __future__ import annotations

from typing import Literal

from rag.nearest import nearness, sentence_spans
from understudy.records import Passage

Strategy = Literal["concat", "sequential", "summarise"]


def contexts(strategy: Strategy, question: str, passages: list[Passage], max_words: int = 200) -> list[list[str]]:
    """The passage texts of each prompt, in the order in which prompts are to be tried; `passages` come in the order in which one prompt
    shows them, and `max_words` bounds a summary."""
    in_order = [passage.chunk.text for passage in passages]
    if strategy == "sequential":
        return [[passage.chunk.text] for passage in sorted(passages, key=lambda passage: passage.rank)] or [[]]
    if strategy == "summarise":
        return [summarise(question, in_order, max_words)]
    return [in_order]


def summarise(question: str, texts: list[str], max_words: int) -> list[str]:
    """Of each text the sentences that share most with the question (rag.nearest), verbatim and in order; texts without one are left out.

    Sentences are taken by score, the earlier of equals first, while they fit in `max_words`.
    """
    sentences = [(place, text[start:end]) for place, text in enumerate(texts) for start, end in sentence_spans(text)]
    scores = nearness(question, [sentence for _, sentence in sentences])
    taken, left = set(), max_words
    for i in sorted(range(len(sentences)), key=lambda i: (-scores[i], i)):
        words = len(sentences[i][1].split())
        if scores[i] > 0 and words <= left:
            taken.add(i)
            left -= words
    return [
        "".join(sentences[i][1] for i in range(len(sentences)) if i in taken and sentences[i][0] == place).strip()
        for place in range(len(texts))
        if any(sentences[i][0] == place for i in taken)
    ]
