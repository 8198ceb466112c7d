"""The report's per-question view: every model's answer beside the gold one, over the passages shown, with their quotes marked."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from rag.eval.diff import Run, new_words
from rag.eval.evidence import Quote, Span, locate_gold, locate_shown, shown_chunks
from rag.eval.metrics import Row
from rag.eval.run import failure_of
from rag.eval.stats import cluster_of
from understudy.records import Chunk, Question, Trace

CHANGED = 0.05  # of a question's quality, from which on it counts as better or worse
ISOLATES = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}  # bidirectional controls, which can make text read as another


@dataclass(frozen=True)
class Mark:
    """A run of passage text and what it is: gold evidence, or cited by the models at these places of the report."""

    text: str
    is_gold: bool
    cited_by: list[int]


@dataclass(frozen=True)
class PassageView:
    """A passage with its marks; `shown_to` names the models whose prompt held it."""

    document: str
    pages: list[int]
    marks: list[Mark]
    shown_to: list[str]


@dataclass(frozen=True)
class QuoteView:
    """A quote as a model emitted it."""

    text: str
    state: Literal["right", "verbatim", "not found"]


@dataclass(frozen=True)
class AnswerView:
    """One model's answer."""

    model: str
    place: int
    said: list[Run]  # new: what the baseline's answer lacks; of the baseline's, what no rival's has
    quotes: list[QuoteView]
    query: str
    abstained: bool
    failure: str
    row: Row
    quality: float | None
    trace_id: str


@dataclass(frozen=True)
class Case:
    """One question with every model's answer; `change` is the worst rival's quality minus the baseline's."""

    question: Question
    document: str
    kind: Literal["answerable", "unanswerable", "no key"]
    answers: list[AnswerView]
    passages: list[PassageView]
    change: float
    outcome: Literal["worse", "better", "same"]

    @property
    def is_wrong_for_all(self) -> bool:
        """Whether no model got it right."""
        return all(answer.row["is_right"] == 0.0 for answer in self.answers)


def build_cases(questions: Sequence[Question], traces: dict[str, list[Trace]], rows: dict[str, list[Row]], chunks: dict[str, Chunk]) -> list[Case]:
    """Every question, the worst regressions first."""
    cases = [
        _build_case(question, {name: traces[name][place] for name in traces}, {name: rows[name][place] for name in rows}, chunks)
        for place, question in enumerate(questions)
    ]
    return sorted(cases, key=lambda case: (case.change, _worst(case), case.question.id))


def quality(row: Row) -> float | None:
    """How good one run was: token-F1 where there is an answer, right or wrong where there is none."""
    return row["abstention_accuracy"] if row["answerable"] == 0.0 else row["token_f1"]


def visible(text: str) -> str:
    """Text with control characters, direction overrides and lone surrogates made visible; nothing else changes."""
    if text.isprintable():
        return text
    return "".join(_visible_character(character) for character in text)


def _visible_character(character: str) -> str:
    code, category = ord(character), unicodedata.category(character)
    if character in "\n\t" or category not in ("Cc", "Cf", "Cs"):
        return character
    if code < 0x20 or code == 0x7F:
        return chr(0x2400 + code) if code < 0x20 else "␡"
    return f"⟨U+{code:04X}⟩" if category in ("Cc", "Cs") or code in ISOLATES else character


def _build_case(question: Question, traces: dict[str, Trace], rows: dict[str, Row], chunks: dict[str, Chunk]) -> Case:
    shown = {name: shown_chunks(trace, chunks) for name, trace in traces.items()}
    every = list({chunk.id: chunk for passages in shown.values() for chunk in passages}.values())
    gold = locate_gold(question, every, chunks)
    emitted = {name: [locate_shown(text, shown[name]) for text in trace.quotes] for name, trace in traces.items()}
    said = _compare_answers(traces)
    answers = [_build_answer(name, place, traces[name], rows[name], said[name], emitted[name], gold) for place, name in enumerate(traces)]
    passages = []
    for chunk in every:
        seeing = [name for name in traces if chunk in shown[name]]
        cited = [[span for quote in emitted[name] for span in quote.spans] if name in seeing else [] for name in traces]
        passages.append(PassageView(chunk.document, chunk.pages, mark_text(chunk, [s for q in gold for s in q.spans], cited), seeing))
    change = _change([answer.quality for answer in answers])
    kind: Literal["answerable", "unanswerable", "no key"] = "no key" if not question.has_answer_key else "answerable" if question.answerable else "unanswerable"
    outcome: Literal["worse", "better", "same"] = "worse" if change <= -CHANGED else "better" if change >= CHANGED else "same"
    return Case(question, cluster_of(question) if question.documents else "", kind, answers, passages, change, outcome)


def _compare_answers(traces: Mapping[str, Trace]) -> dict[str, list[Run]]:
    """Every rival's answer beside the baseline's, and the baseline's beside all; abstentions and failures are beside none."""
    answering = {name: trace.answer for name, trace in traces.items() if trace.complete and not trace.abstained}
    baseline = next(iter(traces))
    said = {}
    for name, trace in traces.items():
        others = [text for other, text in answering.items() if (other == baseline) != (name == baseline)]
        said[name] = new_words(trace.answer, others if name in answering else [])
    return said


def _build_answer(name: str, place: int, trace: Trace, row: Row, said: list[Run], emitted: list[Quote], gold: list[Quote]) -> AnswerView:
    quotes = []
    for quote in emitted:
        is_right = bool(quote.spans) and any(quote.overlaps(wanted) for wanted in gold)
        quotes.append(QuoteView(quote.text, "right" if is_right else "verbatim" if quote.spans else "not found"))
    query = next((step.text for step in trace.steps if step.name == "plan"), "")
    failure = "" if trace.complete else failure_of(trace)
    return AnswerView(name, place, said, quotes, query, trace.abstained, failure, row, quality(row), trace.id)


def mark_text(chunk: Chunk, gold: Sequence[Span], cited: Sequence[Sequence[Span]]) -> list[Mark]:
    """The chunk's text cut wherever a gold or cited span begins or ends; `cited` is by the model's place."""
    whole = Span(chunk.document_id, chunk.start, chunk.end)
    layers = [[span for span in spans if span.shared_with(whole)] for spans in (gold, *cited)]
    cuts = {chunk.start, chunk.end}
    for span in (span for layer in layers for span in layer):
        cuts |= {max(span.start, chunk.start), min(span.end, chunk.end)}
    edges = sorted(cuts)
    marks = []
    for start, end in pairwise(edges):
        piece = Span(chunk.document_id, start, end)
        inside = [any(span.shared_with(piece) for span in layer) for layer in layers]
        text = chunk.text[start - chunk.start : end - chunk.start]
        marks.append(Mark(text, inside[0], [place for place, is_cited in enumerate(inside[1:]) if is_cited]))
    return marks


def _change(qualities: list[float | None]) -> float:
    """The worst rival against the baseline; with no rival, how far the one answer is from perfect."""
    known = [value for value in qualities if value is not None]
    if len(known) < len(qualities) or not known:
        return 0.0
    if len(known) == 1:
        return 0.0
    return min(known[1:]) - known[0]


def _worst(case: Case) -> float:
    """Among equal changes, the questions that everybody gets wrong come first."""
    return min((answer.quality for answer in case.answers if answer.quality is not None), default=1.0)
