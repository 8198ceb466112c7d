"""An optional second opinion: a language model compares two answers to each question, once in each order.

A model that judges prefers places as well as answers (Zheng et al. 2023, Judging LLM-as-a-Judge, 3.3), so a preference counts only where
both orders give it, and how often the place alone decided is stated. The judge sees what people see: question, passages and answers,
without names and without the expert's answer.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rag.eval.agreement import share, summarise
from rag.eval.contest import Contest, says_the_same, view_pair
from rag.eval.labels import Choice, joint_choices, labels_of
from rag.recorded import Budget, CallLog, RecordedClient
from understudy.client import Model
from understudy.digests import digest_of
from understudy.files import locked, read_json, write_json
from understudy.progress import Progress
from understudy.records import Chunk, Message, Trace

MAX_TOKENS = 256
SYSTEM = "You compare two answers to a question about documents. You judge by the passages alone, and a longer answer is not a better one."
TASK = (
    "Passages:\n{passages}\n\nQuestion: {question}\n\n<answer 1>\n{first}\n</answer 1>\n\n<answer 2>\n{second}\n</answer 2>\n\n"
    "Which answer is better: right, complete, and borne out by the passages? Where the passages do not answer the question, saying so is the right "
    "answer. Give your reason in one sentence. Then write one of these three lines, and nothing after it:\nVerdict: 1\nVerdict: 2\nVerdict: tie"
)
JUDGE_VERSION = digest_of([SYSTEM, TASK, MAX_TOKENS])[:12]
Place = Literal["1", "2", "tie"]


@dataclass(frozen=True)
class Verdict:
    """One question's two verdicts; None is a reply that holds none."""

    question_id: str
    a_first: Place | None
    b_first: Place | None

    @property
    def choice(self) -> Choice | None:
        """What both orders prefer, a tie where they differ; None where either holds no verdict."""
        if self.a_first is None or self.b_first is None:
            return None
        first: Choice = {"1": "a", "2": "b", "tie": "tie"}[self.a_first]  # type: ignore[assignment]
        second: Choice = {"1": "b", "2": "a", "tie": "tie"}[self.b_first]  # type: ignore[assignment]
        return first if first == second else "tie"

    @property
    def is_by_place(self) -> bool | None:
        """Whether the same place won in both orders."""
        return None if self.choice is None else self.a_first == self.b_first != "tie"


def ask_judge(
    contest: Contest,
    pairs: Sequence[tuple[Trace, Trace]],
    model: Model,
    chunks: Mapping[str, Chunk],
    concurrency: int,
    progress: Callable[[str, int], Progress],
) -> Path:
    """Ask about every pair that differs, twice; `pairs` are the runs of every question. Returns the file of the verdicts.

    What was asked before is not asked again. Raises EndpointError where the judge is gone; its verdicts until then are kept.
    """
    name = f"judge-{digest_of([model.name, model.served_name, model.base_url, contest.a, contest.b, JUDGE_VERSION])[:12]}"
    asked = [place for place, pair in enumerate(pairs) if not says_the_same(pair)]
    with locked(contest.folder / f".{name}.lock"):
        log = CallLog(contest.folder / f"{name}.calls.jsonl")
        with progress(f"judge {model.name}", 2 * len(asked)) as bar:
            client = RecordedClient(model, log, Budget())
            verdicts = asyncio.run(_ask_all(contest, client, [(place, pairs[place]) for place in asked], chunks, concurrency, bar))
        path = contest.folder / f"{name}.json"
        cost = (log.prompt_tokens * model.price_in + log.completion_tokens * model.price_out) / 1e6
        facts = {"judge": model.name, "model": model.served_name, "version": JUDGE_VERSION, "a": contest.a, "b": contest.b, "same": len(pairs) - len(asked)}
        usage = {"calls": len(log), "prompt_tokens": log.prompt_tokens, "completion_tokens": log.completion_tokens, "cost": cost}
        rows = [{"question_id": verdict.question_id, "a_first": verdict.a_first, "b_first": verdict.b_first} for verdict in verdicts]
        write_json(path, {**facts, **usage, "verdicts": rows})
    return path


def judgements(folder: Path) -> list[Path]:
    """The files of verdicts in a run's folder."""
    return sorted(folder.glob("judge-????????????.json"))


def summarise_judge(contest: Contest, path: Path) -> dict[str, Any]:
    """What a judge preferred, how often its verdict hung on the place, what it cost, and its agreement with metrics and people."""
    record = read_json(path)
    by_id = {row["question_id"]: Verdict(**row) for row in record.pop("verdicts")}
    found = [by_id.get(question_id) for question_id in contest.ids]
    choices = [verdict.choice if verdict else None for verdict in found]
    people = joint_choices(labels_of(contest.folder, contest.a, contest.b), contest.ids)
    asked = [place for verdict in by_id.values() for place in (verdict.a_first, verdict.b_first)]
    decided = [place for place in asked if place in ("1", "2")]
    return {
        "rater": "judge",
        **record,
        **summarise(contest, choices, {"people": people}),
        "unreadable": sum(verdict.choice is None for verdict in by_id.values()),
        "position_bias": share([verdict.is_by_place if verdict else None for verdict in found], contest.clusters),
        "first_place_share": round(decided.count("1") / len(decided), 6) if decided else None,
    }


def judge_messages(question: str, passages: Sequence[str], answers: Sequence[str]) -> list[Message]:
    """The request about two answers in this order."""
    shown = "\n\n".join(f"[{number}] {text}" for number, text in enumerate(passages, 1)) or "(none)"
    task = TASK.format(passages=shown, question=question, first=answers[0], second=answers[1])
    return [Message(role="system", content=SYSTEM), Message(role="user", content=task)]


def parse_verdict(text: str) -> Place | None:
    """The last verdict of a reply, after its think block; None where it holds none."""
    said = text.rpartition("</think>")[2]
    named = re.findall(r"(?i)verdict\W*(?:answer\W*)?(1|2|tie)\b", said) or re.findall(r"(?i)^\W*(?:answer\W*)?(1|2|tie)\W*$", said)
    if not named:
        return None
    last: Place = named[-1].lower()
    return last


async def _ask_all(
    contest: Contest, client: RecordedClient, pairs: Sequence[tuple[int, tuple[Trace, Trace]]], chunks: Mapping[str, Chunk], concurrency: int, bar: Progress
) -> list[Verdict]:
    """A verdict for every pair, `concurrency` pairs at a time, in their order."""
    waiting = iter(pairs)  # shared by the workers: each pair is taken once
    found: dict[int, Verdict] = {}

    async def work() -> None:
        for place, pair in waiting:
            verdicts = []
            for order in (pair, pair[::-1]):
                answers, passages = view_pair(order, chunks)
                texts = ["".join(mark.text for mark in passage.marks) for passage in passages]
                written = ["(no answer: the run failed)" if answer.failed else answer.text or "(empty)" for answer in answers]
                reply = await client.complete(judge_messages(contest.questions[place], texts, written), MAX_TOKENS)
                verdicts.append(parse_verdict(reply.text))
                bar.advance()
            found[place] = Verdict(contest.ids[place], *verdicts)

    try:
        async with client, asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
    except ExceptionGroup as errors:  # one cause, seen by several workers
        raise errors.exceptions[0] from None
    return [found[place] for place, _ in pairs]
