"""Whether a text bears out an answer, by its words: no model judges, so the check is cheap, repeatable and the same for every teacher."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from rag.cache_words import NUMBERS
from rag.citations import find_quote, sentence_around
from rag.eval.evidence import numbers_in
from rag.index import tokenize
from understudy.records import Chunk, Trace

SUPPORTED_SHARE = 0.5  # of an answer's words; the sample's experts' answers reach 0.54 at least (docs/training.md, Data)
HELD_SHARE = 0.9  # of an answer's words, from which on a passage gives the answer away


@dataclass(frozen=True)
class Support:
    """What of an answer stands in a text."""

    share: float  # of its distinct stemmed words, stop words left out, in [0, 1]; 1.0 for an answer without words
    missing_numbers: tuple[str, ...]  # those it states in digits and the text does not

    @property
    def is_enough(self) -> bool:
        """Whether an answer may rest on the text."""
        return self.share >= SUPPORTED_SHARE and not self.missing_numbers


def support_of(answer: str, text: str) -> Support:
    """How far a text bears out an answer. A number in digits must be in the text, in digits or spelt out; words need only mostly be."""
    words, _ = _read(text)
    stated, digits = _read(answer)
    return Support(len(stated & words) / len(stated) if stated else 1.0, tuple(sorted(digits - words)))


def support_of_trace(trace: Trace, chunks: dict[str, Chunk]) -> Support:
    """How far what a trace cites, each quote with the rest of its sentence, and its question bear out its answer."""
    return support_of(trace.answer, " ".join([trace.question, *whole_quotes(trace, chunks)]))


def whole_quotes(trace: Trace, chunks: dict[str, Chunk]) -> list[str]:
    """The trace's quotes on one line each, widened to whole sentences: where to begin and end is then plain to learn."""
    quotes = []
    for citation in trace.citations:
        chunk = chunks[citation.chunk_id]
        start, end = sentence_around(chunk.text, citation.start - chunk.start, citation.end - chunk.start)
        quotes.append(" ".join(chunk.text[start:end].split()))
    return list(dict.fromkeys(quotes))


def holds_answer(trace: Trace, chunk: Chunk) -> bool:
    """Whether a chunk overlaps one of the trace's cited spans, or holds a quote or the answer: such a passage is never shown to abstain over."""
    for citation in trace.citations:
        overlaps = citation.document_id == chunk.document_id and citation.start < chunk.end and chunk.start < citation.end
        if overlaps or find_quote(citation.quote, chunk.text):
            return True
    return not trace.abstained and _holds(trace.answer, chunk.text)


def _holds(answer: str, text: str) -> bool:
    """Whether the text says the answer, in its words or nearly; an answer of stop words alone, such as "no", is everywhere and held nowhere."""
    if not _read(answer)[0]:
        return False
    if f" {_plain(answer)} " in f" {_plain(text)} ":
        return True
    support = support_of(answer, text)
    return support.share >= HELD_SHARE and not support.missing_numbers


@lru_cache(maxsize=1 << 16)
def _read(text: str) -> tuple[frozenset[str], frozenset[str]]:
    """(stemmed words, and numbers in digits, spelt out or not; the numbers that the text itself has in digits)."""
    spelt = re.sub(r"[a-z]+", lambda word: NUMBERS.get(word.group(), word.group()), text.lower())
    words = {word for word in tokenize([spelt])[0] if not word.isdigit()}
    return frozenset(words | set(numbers_in(spelt))), frozenset(numbers_in(text))


@lru_cache(maxsize=1 << 16)
def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
