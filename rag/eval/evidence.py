"""What an answer rests on: where its quotes stand, whether they are the gold ones, which sentences nothing supports."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePath

from rag.citations import find_quote
from rag.index import tokenize
from understudy.errors import NotFoundError
from understudy.records import Chunk, Question, Trace

SUPPORTED_SHARE = 0.6  # of a sentence's content words, from which on it counts as supported
OVERLAP_SHARE = 0.5  # of the shorter quote, from which on two quotes are the same evidence


@dataclass(frozen=True)
class Span:
    """A stretch of a document, in code points of its text."""

    document_id: str
    start: int
    end: int

    def shared_with(self, other: Span) -> int:
        """Code points in both."""
        if self.document_id != other.document_id:
            return 0
        return max(0, min(self.end, other.end) - max(self.start, other.start))


@dataclass(frozen=True)
class Quote:
    """A quote and every place where it stands verbatim; no place means that it was not found."""

    text: str
    spans: list[Span]

    def overlaps(self, other: Quote) -> bool:
        """Whether both are the same evidence: by document spans where both were found, by their words otherwise."""
        if self.spans and other.spans:
            return any(a.shared_with(b) >= OVERLAP_SHARE * min(a.end - a.start, b.end - b.start) for a in self.spans for b in other.spans)
        mine, theirs = Counter(_words(self.text)), Counter(_words(other.text))
        shorter = min(mine.total(), theirs.total())
        return shorter > 0 and (mine & theirs).total() >= OVERLAP_SHARE * shorter


class Corpus(dict[str, Chunk]):
    """The chunks of a corpus by id; its documents' chunks and texts are looked up once, not for every question."""

    @classmethod
    def of(cls, chunks: Mapping[str, Chunk]) -> Corpus:
        """The chunks as a corpus; one that is a corpus already is used as it is."""
        return chunks if isinstance(chunks, cls) else cls(chunks)

    @cached_property
    def documents(self) -> dict[str, list[Chunk]]:
        """The chunks of each document, by its id."""
        found: dict[str, list[Chunk]] = defaultdict(list)
        for chunk in self.values():
            found[chunk.document_id].append(chunk)
        return dict(found)

    @cached_property
    def named(self) -> dict[str, list[str]]:
        """Document ids by file name."""
        found: dict[str, list[str]] = defaultdict(list)
        for document_id, chunks in self.documents.items():
            found[PurePath(chunks[0].document).name].append(document_id)
        return dict(found)

    @cached_property
    def _texts(self) -> dict[str, str]:
        return {}

    def text_of(self, document_id: str) -> str:
        """A document's text put together from its chunks, so that a gold quote cut by a chunk boundary is still found."""
        if document_id not in self._texts:
            self._texts[document_id] = _stitched(self.documents[document_id])
        return self._texts[document_id]


def shown_chunks(trace: Trace, chunks: dict[str, Chunk]) -> list[Chunk]:
    """The passages that the answers of this run could rest on, each once, in the order shown.

    Raises NotFoundError for a passage that `chunks` lacks: scored without it, a right answer would look wrong.
    """
    answering = [step for step in trace.steps if step.name == "answer" and step.passage_ids]
    steps = answering or [step for step in trace.steps if step.name == "retrieve"]
    return look_up([chunk_id for step in steps for chunk_id in step.passage_ids], chunks)


def first_retrieved(trace: Trace, chunks: dict[str, Chunk]) -> tuple[list[Chunk], bool]:
    """The passages of the first retrieval, best first where the trace has kept their ranks, and whether it has."""
    step = next((step for step in trace.steps if step.name == "retrieve"), None)
    if step is None:
        return [], True
    ranking = step.parsed.get("ranking")
    if isinstance(ranking, list) and sorted(ranking) == sorted(step.passage_ids):
        return look_up(ranking, chunks), True
    return look_up(step.passage_ids, chunks), len(step.passage_ids) <= 1


def relevant_chunks(gold: list[Quote], chunks: dict[str, Chunk]) -> set[str]:
    """Ids of the chunks that hold a gold quote whole."""
    documents = Corpus.of(chunks).documents
    spans = [span for quote in gold for span in quote.spans]
    return {chunk.id for span in spans for chunk in documents[span.document_id] if chunk.start <= span.start and span.end <= chunk.end}


def look_up(chunk_ids: Iterable[str], chunks: dict[str, Chunk]) -> list[Chunk]:
    """The chunks of these ids, each once; raises NotFoundError."""
    wanted = list(dict.fromkeys(chunk_ids))
    missing = [chunk_id for chunk_id in wanted if chunk_id not in chunks]
    if missing:
        raise NotFoundError(
            f"passage {missing[0][:12]} of a trace is no longer in the corpus",
            "the documents changed after the run: evaluate again over the live corpus",
        )
    return [chunks[chunk_id] for chunk_id in wanted]


def locate_shown(quote: str, shown: list[Chunk]) -> Quote:
    """An emitted quote with every place it has in the passages shown."""
    return Quote(quote, [Span(c.document_id, c.start + start, c.start + end) for c in shown for start, end in _places(quote, c.text)])


def locate_gold(question: Question, shown: list[Chunk], chunks: dict[str, Chunk]) -> list[Quote]:
    """The question's gold quotes, located in the documents it names, or else in those of the passages shown.

    Quotes too short to be found verbatim (see `find_quote`) prove nothing and are left out.
    """
    corpus, quotes = Corpus.of(chunks), []
    for position, text in enumerate(question.quotes):
        if len(text.split()) < 3:
            continue
        if question.documents:
            documents = corpus.named.get(PurePath(question.documents[min(position, len(question.documents) - 1)]).name, [])
        else:
            documents = list(dict.fromkeys(chunk.document_id for chunk in shown))
        quotes.append(Quote(text, [Span(document_id, *place) for document_id in documents for place in _places(text, corpus.text_of(document_id))]))
    return quotes


def unsupported_sentences(answer: str, shown: list[Chunk]) -> tuple[int, int]:
    """(unsupported, all) sentences of an answer: one is unsupported when it states a number that no passage
    states, or when too few of its content words, stemmed, are in the passages."""
    text = " ".join(chunk.text for chunk in shown)
    stems, numbers = set(tokenize([text])[0]), set(numbers_in(text))
    unsupported = total = 0
    for sentence in split_sentences(answer):
        words = [word for word in tokenize([sentence])[0] if not word.isdigit()]
        stated = numbers_in(sentence)
        if not words and not stated:
            continue
        total += 1
        known = sum(word in stems for word in words)
        unsupported += any(number not in numbers for number in stated) or known < SUPPORTED_SHARE * len(words)
    return unsupported, total


def split_sentences(text: str) -> list[str]:
    """Sentences, split at line ends and where a full stop is followed by a capital letter."""
    return [part.strip() for part in re.split(r"\n+|(?<=[.!?])\s+(?=[\"“'(\[]*[A-ZÀ-ÖØ-Þ])", text) if part.strip()]


def _places(quote: str, text: str) -> list[tuple[int, int]]:
    """Every [start, end) of the quote in the text."""
    places: list[tuple[int, int]] = []
    offset = 0
    while span := find_quote(quote, text[offset:]):
        places.append((offset + span[0], offset + span[1]))
        offset += span[1]
    return places


def _stitched(chunks: list[Chunk]) -> str:
    """A document's text from its chunks; what no chunk holds is line ends."""
    text = ""
    for chunk in sorted(chunks, key=lambda part: part.start):
        text += "\n" * (chunk.start - len(text)) + chunk.text[max(0, len(text) - chunk.start) :]
    return text


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def numbers_in(text: str) -> list[str]:
    """Numbers with thousands separators removed: 1,000 and 1000 are one number."""
    return [re.sub(r",(?=\d{3}(?!\d))", "", number) for number in re.findall(r"\d+(?:[.,]\d+)*", text)]
