"""Training rows from verified traces: RAFT's idea (arXiv:2403.10131), corrected.

Supporting passages stand among passages that retrieval really returned and the answer does not cite. Questions that rest on the same
support share one set of passages, so that their rows share a prompt prefix. How many of the distractors a set shows, which, and in what
order is drawn anew for each epoch, once a set. A row that teaches to abstain shows only passages that neither overlap a supporting span
nor hold the answer.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Literal

from rag.eval.metrics import gold_recall
from rag.prompts import ABSTENTION, answer_target, proposal_text, score_target
from rag.retrieve import document_order
from train.ledger import Source
from train.support import holds_answer, whole_quotes
from understudy.digests import digest_of
from understudy.records import Chunk, Example, Trace

NEAR = 12  # a passage among so many best retrieved ones is a fair distractor
FEWER = 0.25  # share of a set's epochs in which it shows fewer distractors than it has
SAME = 0.6  # share of an answer's words, from which on another question's answer may be right for this one too
BAD_SHARE = 0.3  # of the validation rows at least, answers that the validator must score low


@dataclass
class PassageSet:
    """One prompt context, the questions it answers, and those it does not."""

    passage_ids: list[str]
    answered: list[Source] = field(default_factory=list)
    unanswered: list[Source] = field(default_factory=list)


@dataclass(frozen=True)
class Mix:
    """How many rows of each kind."""

    k: int  # passages of a prompt; more where an answer rests on more
    dose: int | None = None  # exactly so many distractors in every epoch, for studies of robustness; None: what fills k
    no_support: float = 0.25  # abstention rows per answerable question, besides the unanswerable questions
    abstention_repeats: int = 2  # passage sets each unanswerable question is shown with
    keyword_questions: float = 1.0  # rows that ask with the expert's search query, per row that asks with the question
    validations: float = 0.4  # share of the answerable questions whose right answer is judged, too

    def distractors(self, support: int) -> int:
        """How many uncited passages stand among so many supporting ones."""
        return max(0, self.k - support) if self.dose is None else self.dose

    @property
    def wrong_validations(self) -> float:
        """Share of the questions for which a wrong proposal is made, besides every real failure."""
        return 0.75 * self.validations

    @property
    def unanswered(self) -> int:
        """Passages of a prompt that answers nothing: as many as one that rests on one of them."""
        return 1 + self.distractors(1)


def build_examples(sources: list[Source], chunks: dict[str, Chunk], mix: Mix, seed: int) -> list[Example]:
    """All rows, passage sets together; the same sources and seed give the same rows."""
    rng = random.Random(seed)
    examples = []
    for split in ("train", "validation"):
        chosen = [source for source in sources if source.split == split]
        sets = make_passage_sets([s for s in chosen if not s.trace.abstained], chunks, mix)
        place_unanswered(sets, chosen, chunks, mix, rng)
        rows = [row for passage_set in sets for row in rows_of_set(passage_set, chunks, mix, rng)]
        examples += with_bad_share(rows, rng)
        examples += [plan_row(source) for source in chosen if planned_query(source.trace)]
    return examples


def draw_passages(example: Example, seed: int, epoch: int) -> list[str]:
    """The passages of an epoch, by chunk id in the order shown: the same for every row of the example's set, at least one, its support whole."""
    shown = list(example.passage_ids)
    rng = random.Random(f"{seed}/{epoch}/{digest_of(shown)}")
    optional = [chunk_id for chunk_id in shown if chunk_id in example.optional_ids]
    most = len(optional) - (len(optional) == len(shown))
    if most > 0 and rng.random() < FEWER:
        dropped = set(rng.sample(optional, rng.randint(1, most)))
        shown = [chunk_id for chunk_id in shown if chunk_id not in dropped]
    rng.shuffle(shown)
    return shown


def make_passage_sets(sources: list[Source], chunks: dict[str, Chunk], mix: Mix) -> list[PassageSet]:
    """Sets of passages that together show every source its support.

    A set begins with the support of one group of questions and the uncited passages they all retrieved, most retrieved first but those
    that support other questions before. It then takes in every later group whose support it shows, as long as the group really retrieved
    the rest: the distractors of one question are the support of another.
    """
    by_support: dict[tuple[str, ...], list[Source]] = defaultdict(list)
    for source in sources:
        by_support[source.support].append(source)
    waiting = dict(sorted(by_support.items(), key=lambda item: -len(item[0])))
    sets: dict[tuple[str, ...], PassageSet] = {}
    while waiting:
        support = next(iter(waiting))
        group = waiting.pop(support)
        votes: Counter[str] = Counter()
        for source in group:
            votes.update({chunk_id: len(source.retrieved) - rank for rank, chunk_id in enumerate(source.retrieved)})
        open_support = {chunk_id for other in waiting for chunk_id in other}
        common = set.intersection(*(set(source.retrieved) for source in group))
        near = [c for c, _ in votes.most_common() if c in common and c not in support][:NEAR]
        distractors = sorted(near, key=lambda c: c not in open_support)  # stable: most retrieved first within each kind
        passages = {*support, *distractors[: mix.distractors(len(support))]}
        for other in [o for o in waiting if joins(o, waiting[o], passages, len(support), mix)]:
            group = group + waiting.pop(other)
        ordered = canonical_order(list(passages), chunks)
        sets.setdefault(tuple(ordered), PassageSet(ordered)).answered.extend(group)
    return list(sets.values())


def joins(support: tuple[str, ...], sources: list[Source], passages: set[str], supporting: int, mix: Mix) -> bool:
    """Whether questions may be asked over passages made for others, of which so many support those: what they do not cite, they retrieved.

    Under a fixed dose of distractors it must also be as many.
    """
    if not set(support) <= passages or (mix.dose is not None and len(support) != supporting):
        return False
    return all(passages <= {*support, *source.retrieved[:NEAR]} for source in sources)


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
            and len(retrieved.intersection(s.passage_ids)) >= max(1, len(s.passage_ids) - 1)
            and not any(holds_answer(source.trace, chunks[c]) for c in s.passage_ids)
        ]
        if fitting:
            min(fitting, key=lambda s: (len(s.unanswered), -len(retrieved.intersection(s.passage_ids)))).unanswered.append(source)
        else:
            own = [c for c in source.retrieved if not holds_answer(source.trace, chunks[c])][: mix.unanswered]
            if own and not any(s.passage_ids == canonical_order(own, chunks) for s in sets):
                sets.append(PassageSet(canonical_order(own, chunks), unanswered=[source]))


def rows_of_set(passage_set: PassageSet, chunks: dict[str, Chunk], mix: Mix, rng: random.Random) -> list[Example]:
    """Answer, abstention and validation rows over one set of passages."""
    make = RowMaker(passage_set, mix)
    rows = []
    quotes = [whole_quotes(source.trace, chunks) for source in passage_set.answered]
    proposals = [proposal_text(quoted, source.trace.answer) for quoted, source in zip(quotes, passage_set.answered, strict=True)]
    for index, source in enumerate(passage_set.answered):
        kind = "two-passage" if len(source.support) > 1 else "answerable"
        target = answer_target(quotes[index], source.trace.answer)
        rows += [make.row("answer", source, target, kind, question=asked) for asked in questions_of(source.trace, mix, rng)]
        if rng.random() < mix.validations:
            rows.append(make.row("validate", source, score_target(True), "good", proposals[index]))
        if rng.random() < mix.wrong_validations:
            others = [p for p, other in zip(proposals, passage_set.answered, strict=True) if gold_recall(other.trace.answer, source.trace.answer) < SAME]
            wrong = wrong_proposal(source.trace.answer, quotes[index], others, rng)
            rows.append(make.row("validate", source, score_target(False), wrong[0], wrong[1]))
        rows += [make.row("validate", source, score_target(False), "bad-failure", failure) for failure in source.failures]
    for source in passage_set.unanswered:
        kind = "unanswerable" if source.trace.abstained else "no-support"
        rows += [make.row("answer", source, ABSTENTION, kind, question=asked) for asked in questions_of(source.trace, mix, rng)]
        if proposals and rng.random() < mix.wrong_validations:
            rows.append(make.row("validate", source, score_target(False), "bad-other-question", rng.choice(proposals)))
        if source.trace.abstained:
            rows += [make.row("validate", source, score_target(False), "bad-failure", failure) for failure in source.failures]
    return rows


def with_bad_share(rows: list[Example], rng: random.Random) -> list[Example]:
    """The rows, less as many right proposals as it takes for wrong ones to be BAD_SHARE of the validations."""
    good = [index for index, row in enumerate(rows) if row.kind == "good"]
    bad = sum(row.task == "validate" for row in rows) - len(good)
    surplus = len(good) - int(bad * (1 - BAD_SHARE) / BAD_SHARE)
    dropped = set(rng.sample(good, surplus)) if surplus > 0 else set()
    return [row for index, row in enumerate(rows) if index not in dropped]


def questions_of(trace: Trace, mix: Mix, rng: random.Random) -> list[str]:
    """The question, and its keywords where the expert gave a search query: another way to ask the same."""
    keywords = planned_query(trace)
    return [trace.question, keywords] if keywords and rng.random() < mix.keyword_questions else [trace.question]


def planned_query(trace: Trace) -> str:
    """The first search query of a trace; empty where nobody planned."""
    step = next((step for step in trace.steps if step.name == "plan"), None)
    return str(step.parsed.get("query") or step.text) if step else ""


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
    return RowMaker(PassageSet([]), Mix(0)).row("plan", source, planned_query(source.trace), "plan")


def canonical_order(ids: list[str], chunks: dict[str, Chunk]) -> list[str]:
    """Passages as a prompt shows them: in document order, so that equal sets give equal prefixes."""
    return sorted(dict.fromkeys(ids), key=lambda c: document_order(chunks[c]))


class RowMaker:
    """Makes the rows over one set of passages."""

    def __init__(self, passage_set: PassageSet, mix: Mix) -> None:
        needed = {chunk_id for source in passage_set.answered for chunk_id in source.support}
        self._passage_ids = passage_set.passage_ids
        self._optional = [c for c in self._passage_ids if c not in needed] if mix.dose is None else []

    def row(self, task: Literal["plan", "answer", "validate"], source: Source, target: str, kind: str, proposal: str = "", question: str = "") -> Example:
        """One row; it asks with the trace's question unless it is given another."""
        trace = source.trace
        return Example(
            task=task,
            question=question or trace.question,
            passage_ids=self._passage_ids,
            optional_ids=self._optional,
            support_ids=list(source.support),
            proposal=proposal,
            target=target,
            split=source.split,
            kind=kind,
            trace_id=trace.id,
            group_ids=list(source.groups),
        )
