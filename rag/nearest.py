"""The sentences of passages that are nearest to a question, by the words they share: what a prompt points at and what a summary keeps."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

from rag.citations import SENTENCE_WORDS, sentence_breaks
from rag.index import tokenize
from rag.same_questions import normalised, shingles

LEAST_WORDS = 3  # fewer are no quote (rag.citations.find_quote)
SHINGLE_WEIGHT = 0.1  # what each run of characters counts for that a question and a sentence share


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
    return [(start, end) for start, end in pairwise(sentence_breaks(text)) if start < end]


def nearness(question: str, sentences: list[str]) -> list[float]:
    """Of each sentence the sum of idf over the stems that it shares with the question, idf being taken over these sentences, and
    SHINGLE_WEIGHT for each run of characters that both have, which tells phrases and forms of a word; 0 where no stem is shared."""
    asked, *stems = (set(words) for words in tokenize([question, *sentences]))
    runs, *own_runs = (shingles(normalised(text)) for text in (question, *sentences))
    frequency = Counter(stem for own in stems for stem in own & asked)
    by_stems = [sum(math.log(1 + len(sentences) / frequency[stem]) for stem in sorted(own & asked)) for own in stems]
    return [score and score + SHINGLE_WEIGHT * len(own & runs) for score, own in zip(by_stems, own_runs, strict=True)]
