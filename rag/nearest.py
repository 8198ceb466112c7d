"""The sentences of passages that are nearest to a question, by the words they share: what a prompt points at and what a summary keeps."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

from rag.citations import SENTENCE_BREAK, SENTENCE_WORDS
from rag.index import tokenize

LEAST_WORDS = 3  # fewer are no quote (rag.citations.find_quote)


def nearest_sentences(question: str, texts: list[str], count: int) -> list[str]:
    """At most `count` sentences of the texts, each on one line, the one nearest to the question first.

    Sentences are cut where quotes are (`rag.citations.sentence_around`). One that shares no word with the question, is longer
    than a quote may be, or stands whole within another is left out.
    """
    lines = dict.fromkeys(" ".join(text[start:end].split()) for text in texts for start, end in sentence_spans(text))
    sentences = [line for line in lines if LEAST_WORDS <= len(line.split()) <= SENTENCE_WORDS]
    scores = nearness(question, sentences)
    found: list[str] = []
    for place in sorted(range(len(sentences)), key=lambda place: (-scores[place], place)):
        if len(found) < count and scores[place] > 0 and not any(sentences[place] in other or other in sentences[place] for other in found):
            found.append(sentences[place])
    return found


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """The [start, end) of each sentence, together the whole text."""
    breaks = [0, *(match.end() for match in SENTENCE_BREAK.finditer(text)), len(text)]
    return [(start, end) for start, end in pairwise(breaks) if start < end]


def nearness(question: str, sentences: list[str]) -> list[float]:
    """Of each sentence the sum of idf over the stems that it shares with the question, idf being taken over these sentences."""
    asked, *stems = (set(words) for words in tokenize([question, *sentences]))
    frequency = Counter(stem for own in stems for stem in own & asked)
    return [sum(math.log(1 + len(sentences) / frequency[stem]) for stem in sorted(own & asked)) for own in stems]
