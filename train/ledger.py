"""Which traces may teach, and why the others may not: every trace of the store is a source, held out, or a line of the ledger."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from rag.citations import find_quote
from rag.eval.metrics import gold_recall
from rag.prompts import parse_answer, proposal_text
from rag.same_questions import normalised
from train.near_duplicates import near_duplicate_pairs
from train.splits import Groups, Splits, assign_splits
from train.support import support_of_trace
from understudy.records import Chunk, Record, Trace

ACCEPTED_SCORE = 0.5  # a trace validated below this teaches nothing
WRONG_RECALL = 1 / 3  # a model's answer that has less of the teacher's words is wrong beyond doubt
Barred = Callable[[Trace], str | None]  # why a trace may not teach, or None
FAILURES = 2  # real wrong answers to one question that the validator is shown


class Rejection(Record):
    """A line of the ledger."""

    trace_id: str
    question: str
    reason: str  # one of a few, to be counted
    detail: str = ""  # what of this trace it is


@dataclass(frozen=True)
class Source:
    """A verified trace with what retrieval returned, nearest first, among the passages that rows of its side may show."""

    trace: Trace
    retrieved: list[str]  # chunk ids
    support: tuple[str, ...]  # chunk ids that hold the cited quotes, in document order
    split: Literal["train", "validation"]  # what calibrates is never trained on
    groups: tuple[str, ...] = ()  # that it cites, or was asked about
    failures: tuple[str, ...] = ()  # answers that a model really gave to this question and that are wrong, as a validator sees them


@dataclass
class Verified:
    """The outcome for all traces."""

    sources: list[Source] = field(default_factory=list)
    held_out: list[Trace] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)

    def reject(self, trace: Trace, reason: str, detail: str = "") -> None:
        """Enter a trace in the ledger."""
        self.rejections.append(Rejection(trace_id=trace.id, question=trace.question, reason=reason, detail=detail))

    @property
    def reasons(self) -> dict[str, int]:
        """How many traces each reason kept out, the most frequent first."""
        return dict(Counter(rejection.reason for rejection in self.rejections).most_common())


@dataclass(frozen=True)
class Rules:
    """What verification depends on besides traces and corpus."""

    students: frozenset[str] = frozenset()  # names of the base and of every adapter trained here, without digests
    unverified_k: int = 0  # imported traces without known support are shown so many passages; 0 leaves them out
    held_out: float = 0.0  # share of the traces kept for evaluation, where no side was declared on import
    reviewed: tuple[str, ...] = ()  # questions that people reviewed in an evaluation: neither they nor near-duplicates teach


def verify_traces(traces: Iterable[Trace], chunks: dict[str, Chunk], rules: Rules = Rules(), barred: Barred | None = None) -> Verified:
    """What may teach of all traces, on its side; `chunks` is the corpus by id, `barred` says what the rules do not.

    Rows may only show passages of groups that the traces of their own side cite: what is kept for calibration or evaluation is never seen
    in training, not even as a distractor.
    """
    verified, teaching, own_answers = Verified(), [], set()
    given: dict[str, list[str]] = defaultdict(list)  # what models wrote in answer to each question
    for trace in traces:
        if is_teaching(trace, rules.students):
            teaching.append(trace)
        else:
            own_answers.add((normalised(trace.question), trace.answer))
            verified.reject(trace, "the student's own unreviewed answer", trace.model)
        if trace.source == "model" and trace.complete:
            given[normalised(trace.question)] += [step.text for step in trace.steps if step.name == "answer"]
    kept = []
    for trace in teaching:
        if trace.source == "imported" and not trace.abstained and (normalised(trace.question), trace.answer) in own_answers:
            verified.reject(trace, "the student's own unreviewed answer", "imported again")
        elif found := rejection(trace, chunks, rules.unverified_k > 0):
            verified.reject(trace, *found)
        elif barred and (reason := barred(trace)):
            verified.reject(trace, reason)
        else:
            kept.append(trace)
    kept = _without_duplicates(_without_reviewed(kept, rules.reviewed, verified), verified)
    groups = Groups(chunks)
    splits = assign_splits(kept, groups, rules.held_out)
    for trace in kept:
        if leak := splits.leaks.get(trace.id):
            verified.reject(trace, leak)
        elif splits.sides[trace.id] == "held-out":
            verified.held_out.append(trace)
        else:
            _add_source(verified, trace, splits, groups, chunks, rules.unverified_k, failures_at(trace, given[normalised(trace.question)]))
    return verified


def _without_reviewed(traces: list[Trace], reviewed: tuple[str, ...], verified: Verified) -> list[Trace]:
    """The traces that ask nothing that a person reviewed."""
    if not reviewed:
        return traces
    pairs = near_duplicate_pairs([*reviewed, *(trace.question for trace in traces)])
    twins = {later - len(reviewed): reviewed[first] for first, later in pairs if first < len(reviewed) <= later}
    for place, twin in twins.items():
        verified.reject(traces[place], "reviewed in an evaluation", twin)
    return [trace for place, trace in enumerate(traces) if place not in twins]


def is_teaching(trace: Trace, students: frozenset[str] = frozenset()) -> bool:
    """Whether a trace comes from a teacher: an expert or a person's correction, another system, or a model that is not the student.

    A model's own run teaches only where a teacher simulated it or took it over, and never where that teacher is the student.
    """
    if trace.source == "expert":
        return True
    if trace.model.partition("@")[0] in students:
        return False
    return trace.source == "imported" or "teacher" in trace.metadata or "escalated" in trace.metadata


def rejection(trace: Trace, chunks: dict[str, Chunk], unverified: bool = False) -> tuple[str, str] | None:
    """(reason, detail) why a trace may not teach, or None."""
    is_unverified = "unverified" in trace.metadata
    if is_unverified and not unverified:
        return "unverified", trace.metadata["unverified"]
    if not trace.complete:
        return "incomplete", trace.metadata.get("error", "")
    if trace.score is None and trace.source == "model":
        return "not validated", ""
    if trace.score is not None and trace.score < ACCEPTED_SCORE:
        return "validated below the threshold", f"{trace.score:.2f}"
    if trace.abstained or (is_unverified and not trace.citations):
        return None
    if not trace.citations:
        return "no citation", ""
    return _unfounded(trace, chunks)


def _unfounded(trace: Trace, chunks: dict[str, Chunk]) -> tuple[str, str] | None:
    """(reason, detail) where what a trace cites does not stand, or does not bear out its answer."""
    for citation in trace.citations:
        chunk = chunks.get(citation.chunk_id)
        if chunk is None:
            return "cites a chunk that is no longer in the corpus", citation.document
        if find_quote(citation.quote, chunk.text) is None:
            return "quote not verbatim in the cited chunk", citation.quote
    support = support_of_trace(trace, chunks)
    if support.missing_numbers:
        return "states a number that its quotes do not", ", ".join(support.missing_numbers)
    if not support.is_enough:
        return "not supported by its quotes", f"{support.share:.2f} of its words"
    return None


def _without_duplicates(traces: list[Trace], verified: Verified) -> list[Trace]:
    """One trace a question: a person's before a model's, then the newest."""
    best: dict[str, Trace] = {}
    for trace in sorted(traces, key=lambda t: (t.source == "expert", t.created_at, t.id)):
        best[normalised(trace.question)] = trace
    for trace in traces:
        chosen = best[normalised(trace.question)]
        if chosen.id != trace.id:
            verified.reject(trace, "another answer to the same question was taken", chosen.id)
    return [trace for trace in traces if best[normalised(trace.question)].id == trace.id]


def failures_at(trace: Trace, texts: list[str]) -> tuple[str, ...]:
    """Of what models wrote in answer to a question, what is wrong beyond doubt by the trace that knows the answer, as a validator sees it."""
    answers = [parse_answer(text) for text in texts]
    wrong = [a for a in answers if a.text and not a.abstained and (trace.abstained or gold_recall(a.text, trace.answer) < WRONG_RECALL)]
    return tuple(dict.fromkeys(proposal_text([" ".join(q.split()) for q in a.quotes], " ".join(a.text.split())) for a in wrong))[:FAILURES]


def _add_source(
    verified: Verified, trace: Trace, splits: Splits, groups: Groups, chunks: dict[str, Chunk], unverified_k: int, failures: tuple[str, ...]
) -> None:
    """Make a source of a trace, unless it is unverified and there is nothing to show."""
    side = splits.sides[trace.id]
    shown = dict.fromkeys(chunk_id for step in trace.steps if step.name == "retrieve" for chunk_id in step.passage_ids)
    retrieved = [c for c in shown if c in chunks and groups.of_chunk(chunks[c]) in splits.groups[side]]
    cited = {citation.chunk_id for citation in trace.citations}
    if "unverified" in trace.metadata and not cited and not trace.abstained:
        cited = set(retrieved[:unverified_k])
        if not cited:
            verified.reject(trace, "unverified, and no passage that a row may show")
            return
    support = sorted(cited, key=lambda c: (chunks[c].document, chunks[c].start))
    split: Literal["train", "validation"] = "train" if side == "train" else "validation"
    verified.sources.append(Source(trace, retrieved, tuple(support), split, tuple(groups.of_trace(trace)), failures))
