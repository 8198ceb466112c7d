"""Training rows from verified traces: RAFT's idea (arXiv:2403.10131), corrected.

Supporting passages stand among passages that retrieval really returned. Questions that rest on the same
support share one set of passages, so that their rows share a prompt prefix. A row that teaches to abstain
shows only passages that neither overlap a supporting span nor hold the answer.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Literal

from rag.citations import find_quote, sentence_around
from rag.prompts import ABSTENTION, answer_target, proposal_text, score_target
from rag.retrieve import document_order
from understudy.records import Chunk, Example, Trace

NEAR = 12  # a passage among so many best retrieved ones is a fair distractor


@dataclass(frozen=True)
class Source:
    """A verified trace with what retrieval returned, nearest first, among the documents rows may show."""

    trace: Trace
    retrieved: list[str]  # chunk ids
    support: tuple[str, ...]  # chunk ids that hold the cited quotes, in document order
    split: Literal["train", "validation"]


@dataclass
class PassageSet:
    """One prompt context, the questions it answers, and those it does not."""

    passage_ids: list[str]
    answered: list[Source] = field(default_factory=list)
    unanswered: list[Source] = field(default_factory=list)


@dataclass(frozen=True)
class Mix:
    """How many rows of each kind."""

    k: int  # passages of a prompt
    no_support: float = 0.25  # abstention rows per answerable question, besides the unanswerable questions
    abstention_repeats: int = 2  # passage sets each unanswerable question is shown with
    keyword_questions: float = 1.0  # rows that ask with the expert's search query, per row that asks with the question
    good_validations: float = 0.4  # right proposals per answerable question
    bad_validations: float = 0.3  # wrong proposals per question


def build_examples(sources: list[Source], chunks: dict[str, Chunk], mix: Mix, seed: int) -> list[Example]:
    """All rows, passage sets together; the same sources and seed give the same rows."""
    rng = random.Random(seed)
    examples = []
    for split in ("train", "validation"):
        chosen = [source for source in sources if source.split == split]
        sets = make_passage_sets([s for s in chosen if not s.trace.abstained], chunks, mix.k)
        place_unanswered(sets, chosen, chunks, mix, rng)
        for passage_set in sets:
            examples += rows_of_set(passage_set, chunks, mix, rng)
        examples += [plan_row(source) for source in chosen if planned_query(source.trace)]
    return examples


def make_passage_sets(sources: list[Source], chunks: dict[str, Chunk], k: int) -> list[PassageSet]:
    """Sets of passages that together show every source its support.

    A set begins with the support of one group of questions and the uncited passages they retrieved most, those
    that support other questions first. It then takes in every later group whose support it shows, as long as the
    group really retrieved the rest: the distractors of one question are the support of another.
    """
    by_support: dict[tuple[str, ...], list[Source]] = defaultdict(list)
    for source in sources:
        by_support[source.support[:k]].append(source)
    waiting = dict(sorted(by_support.items(), key=lambda item: -len(item[0])))
    sets = []
    while waiting:
        support = next(iter(waiting))
        group = waiting.pop(support)
        votes: Counter[str] = Counter()
        for source in group:
            votes.update({chunk_id: len(source.retrieved) - rank for rank, chunk_id in enumerate(source.retrieved)})
        open_support = {chunk_id for other in waiting for chunk_id in other}
        near = [c for c, _ in votes.most_common(NEAR) if c not in support]
        distractors = sorted(near, key=lambda c: c not in open_support)  # stable: most retrieved first within each kind
        passages = {*support, *distractors[: max(0, k - len(support))]}
        for other in [o for o in waiting if set(o) <= passages and all(passages <= {*o, *source.retrieved[:NEAR]} for source in waiting[o])]:
            group = group + waiting.pop(other)
        sets.append(PassageSet(canonical_order(list(passages), chunks), answered=group))
    return sets


def place_unanswered(sets: list[PassageSet], sources: list[Source], chunks: dict[str, Chunk], mix: Mix, rng: random.Random) -> None:
    """Show each unanswerable question, and some answerable ones, with passages that do not answer them.

    An existing set is taken where retrieval really returned most of its passages for the question, so that
    the row shares its prefix; otherwise the question gets the nearest unsupporting passages as its own set.
    """
    answerable = [source for source in sources if not source.trace.abstained]
    rng.shuffle(answerable)
    wanted = [source for source in sources if source.trace.abstained for _ in range(mix.abstention_repeats)]
    wanted += answerable[: round(mix.no_support * len(answerable))]
    for source in wanted:
        retrieved = set(source.retrieved[:NEAR])
        fitting = [
            s
            for s in sets
            if source not in s.unanswered
            and source not in s.answered
            and len(retrieved.intersection(s.passage_ids)) >= max(1, mix.k - 1)
            and not any(supports(source.trace, chunks[c]) for c in s.passage_ids)
        ]
        if fitting:
            min(fitting, key=lambda s: (len(s.unanswered), -len(retrieved.intersection(s.passage_ids)))).unanswered.append(source)
        else:
            own = [c for c in source.retrieved if not supports(source.trace, chunks[c])][: mix.k]
            if own and not any(s.passage_ids == canonical_order(own, chunks) for s in sets):
                sets.append(PassageSet(canonical_order(own, chunks), unanswered=[source]))


def supports(trace: Trace, chunk: Chunk) -> bool:
    """Whether a chunk overlaps one of the trace's cited spans, or holds its answer or a quote in other words' place."""
    for citation in trace.citations:
        overlaps = citation.document_id == chunk.document_id and citation.start < chunk.end and chunk.start < citation.end
        if overlaps or find_quote(citation.quote, chunk.text):
            return True
    return bool(not trace.abstained and find_quote(trace.answer.rstrip("."), chunk.text))


def rows_of_set(passage_set: PassageSet, chunks: dict[str, Chunk], mix: Mix, rng: random.Random) -> list[Example]:
    """Answer, abstention and validation rows over one set of passages."""
    rows = []
    quotes = [whole_quotes(source.trace, chunks) for source in passage_set.answered]
    proposals = [proposal_text(quoted, source.trace.answer) for quoted, source in zip(quotes, passage_set.answered, strict=True)]
    for index, source in enumerate(passage_set.answered):
        kind = "two-passage" if len(source.support) > 1 else "answerable"
        target = answer_target(quotes[index], source.trace.answer)
        rows += [_row("answer", source, passage_set, target, kind, question=asked) for asked in questions_of(source.trace, mix, rng)]
        if rng.random() < mix.good_validations:
            rows.append(_row("validate", source, passage_set, score_target(True), "good", proposals[index]))
        if rng.random() < mix.bad_validations:
            others = [p for i, p in enumerate(proposals) if i != index]
            wrong = wrong_proposal(source.trace.answer, quotes[index], others, rng)
            rows.append(_row("validate", source, passage_set, score_target(False), wrong[0], wrong[1]))
    for source in passage_set.unanswered:
        kind = "unanswerable" if source.trace.abstained else "no-support"
        rows += [_row("answer", source, passage_set, ABSTENTION, kind, question=asked) for asked in questions_of(source.trace, mix, rng)]
        if proposals and rng.random() < mix.bad_validations:
            rows.append(_row("validate", source, passage_set, score_target(False), "bad-other-question", rng.choice(proposals)))
    return rows


def questions_of(trace: Trace, mix: Mix, rng: random.Random) -> list[str]:
    """The question, and its keywords where the expert gave a search query: another way to ask the same."""
    keywords = planned_query(trace)
    return [trace.question, keywords] if keywords and rng.random() < mix.keyword_questions else [trace.question]


def planned_query(trace: Trace) -> str:
    """The first search query of a trace; empty where nobody planned."""
    step = next((step for step in trace.steps if step.name == "plan"), None)
    return str(step.parsed.get("query") or step.text) if step else ""


def whole_quotes(trace: Trace, chunks: dict[str, Chunk]) -> list[str]:
    """The trace's quotes on one line each, widened to whole sentences: where to begin and end is then plain to learn."""
    quotes = []
    for citation in trace.citations:
        chunk = chunks[citation.chunk_id]
        start, end = sentence_around(chunk.text, citation.start - chunk.start, citation.end - chunk.start)
        quotes.append(" ".join(chunk.text[start:end].split()))
    return list(dict.fromkeys(quotes))


def wrong_proposal(answer: str, quotes: list[str], others: list[str], rng: random.Random) -> tuple[str, str]:
    """(kind, text) of an answer that is wrong for this question: another question's, a changed number, or a false abstention."""
    changed = change_number(answer, rng)
    if changed and (not others or rng.random() < 0.3):
        return "bad-number", proposal_text(quotes, changed)
    if others and rng.random() < 0.85:
        return "bad-other-answer", rng.choice(others)
    return "bad-abstention", ABSTENTION


def change_number(text: str, rng: random.Random) -> str | None:
    """The text with one of its numbers made another, or None where it has none."""
    numbers = list(re.finditer(r"\d+", text))
    if not numbers:
        return None
    chosen = rng.choice(numbers)
    value = int(chosen.group())
    other = str(rng.choice([v for v in (value + 1, value * 2, max(1, value // 2), value + 10) if v != value]))
    return text[: chosen.start()] + other + text[chosen.end() :]


def plan_row(source: Source) -> Example:
    """The expert's search query as the completion of the plan prompt."""
    trace = source.trace
    return Example(
        task="plan",
        question=trace.question,
        passage_ids=[],
        target=planned_query(trace),
        split=source.split,
        kind="plan",
        trace_id=trace.id,
        group_ids=groups_of(trace),
    )


def groups_of(trace: Trace) -> list[str]:
    """The documents a trace's rows learn from."""
    return sorted({citation.document_id for citation in trace.citations})


def canonical_order(ids: list[str], chunks: dict[str, Chunk]) -> list[str]:
    """Passages as a prompt shows them: in document order, so that equal sets give equal prefixes."""
    return sorted(dict.fromkeys(ids), key=lambda c: document_order(chunks[c]))


def _row(
    task: Literal["answer", "validate"], source: Source, passage_set: PassageSet, target: str, kind: str, proposal: str = "", question: str = ""
) -> Example:
    return Example(
        task=task,
        question=question or source.trace.question,
        passage_ids=passage_set.passage_ids,
        proposal=proposal,
        target=target,
        split=source.split,
        kind=kind,
        trace_id=source.trace.id,
        group_ids=groups_of(source.trace),
    )
