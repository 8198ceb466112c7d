"""Worked examples for a model that was not trained: its best few-shot prompt, chosen on training questions.

Candidates are the examples that every prompt may show (rag.prompts) and some drawn from experts' answers; each is tried on other training
questions, and the one that answers them best is kept with the model's calibration. No calibration or held-out question takes part.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from rag.agent import Tools, run_agent
from rag.eval.evidence import Corpus
from rag.eval.metrics import score_trace, worth
from rag.prompts import ABSTENTION, EXAMPLE_SHOTS, Shot, answer_target
from rag.retrieve import document_order
from rag.validation import UNFITTED
from understudy.progress import Progress
from understudy.records import Chunk, Question, Trace

DRAWN_SETS = 2  # besides the built-in one
ANSWERED, ABSTAINED = 2, 1  # of a drawn set; the last shown is an answer
TRIED = 18  # training questions that each set is tried on
FEWEST = 12  # with fewer the built-in examples stay


@dataclass(frozen=True)
class Taught:
    """A training trace as a question with its answer, and as a worked example."""

    question: Question
    shot: Shot


def taught_by(traces: Iterable[Trace], chunks: dict[str, Chunk], k: int) -> list[Taught]:
    """Experts' whole training traces whose support is among the first `k` passages that retrieval returned."""
    found = []
    for trace in traces:
        ids = next((step.passage_ids for step in trace.steps if step.name == "retrieve"), [])[:k]
        is_shown = {citation.chunk_id for citation in trace.citations} <= set(ids) <= chunks.keys()
        if trace.source != "expert" or not trace.complete or trace.metadata.get("split", "train") != "train" or not is_shown:
            continue
        if not trace.abstained and not trace.quotes:
            continue
        passages = [chunk.text for chunk in sorted((chunks[chunk_id] for chunk_id in ids), key=document_order)]
        target = ABSTENTION if trace.abstained else answer_target([" ".join(quote.split()) for quote in trace.quotes], trace.answer)
        question = Question(id=trace.id, question=trace.question, has_answer_key=True, answers=None if trace.abstained else [trace.answer], quotes=trace.quotes)
        found.append(Taught(question, Shot(question=trace.question, passages=passages, target=target)))
    return found


def draw_sets(taught: Sequence[Taught], seed: int) -> tuple[list[list[Shot]], list[Question]]:
    """(candidate sets, the built-in one first; questions to try them on, of which no set shows one)."""
    rng = random.Random(seed)
    kinds = [[each for each in taught if (each.question.answers is None) == is_unanswered] for is_unanswered in (True, False)]
    unanswered, answered = (rng.sample(kind, len(kind)) for kind in kinds)
    sets = [list(EXAMPLE_SHOTS)]
    for _ in range(DRAWN_SETS):
        if len(unanswered) > ABSTAINED and len(answered) > ANSWERED:
            drawn = [unanswered.pop() for _ in range(ABSTAINED)] + [answered.pop() for _ in range(ANSWERED)]
            sets.append([each.shot for each in drawn])
    third = TRIED // 3
    return sets, [each.question for each in (*unanswered[:third], *answered[: TRIED - third])]


async def choose_shots(tools: Tools, traces: Iterable[Trace], concurrency: int, progress: Callable[[str, int], Progress], seed: int = 0) -> list[Shot]:
    """The set that answers training questions best (rag.eval.metrics.worth), the built-in one first of equals.

    The tools are the caller's and stay open.
    """
    corpus = Corpus.of(tools.retriever.chunks)
    sets, questions = draw_sets(taught_by(traces, tools.retriever.chunks, tools.retriever.settings.k), seed)
    if len(sets) == 1 or len(questions) < FEWEST:
        return list(EXAMPLE_SHOTS)
    gate = asyncio.Semaphore(concurrency)
    with progress("choosing worked examples", len(sets) * len(questions)) as bar:

        async def ask(question: Question, shots: list[Shot]) -> float:
            async with gate:
                trace = await run_agent(question.question, _tools_for(tools, shots))
                bar.advance()
                return worth(score_trace(trace, question, corpus), trace.abstained)

        earned = [sum(await asyncio.gather(*(ask(question, shots) for question in questions))) for shots in sets]
    return sets[earned.index(max(earned))]


def _tools_for(tools: Tools, shots: list[Shot]) -> Tools:
    """One pass, one call to the model, with these examples."""
    settings = tools.settings.model_copy(update={"mode": "fast", "max_rounds": 1})
    return replace(tools, settings=settings, calibration=UNFITTED.model_copy(update={"shots": shots}), teacher=None)
