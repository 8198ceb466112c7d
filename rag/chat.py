"""A conversation: what was asked and answered, in memory only, and follow-up questions rewritten into stand-alone ones."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field

from rag import prompts
from rag.events import Emit
from rag.run import BudgetSpent, Run, Tools
from understudy.digests import digest_of
from understudy.errors import EndpointError
from understudy.records import Step, Trace

TURNS = 4  # the latest, shown to the model
TURN_CHARACTERS = 400  # of each question and each answer
MAX_REWRITE_TOKENS = 64
KNOWN_SHARE = 0.8  # of a rewritten question's content words, from which on it asks nothing new


@dataclass
class Conversation:
    """The questions, stand-alone, and their answers, oldest first."""

    turns: list[tuple[str, str]] = field(default_factory=list)

    def remember(self, trace: Trace) -> None:
        """Add a finished turn; an incomplete one is forgotten."""
        if trace.complete:
            self.add(trace.question, trace.answer)

    def add(self, question: str, answer: str) -> None:
        """Add a turn; of each only the beginning is kept, and of all the latest."""
        self.turns.append((question[:TURN_CHARACTERS], answer[:TURN_CHARACTERS]))
        del self.turns[:-TURNS]

    @property
    def digest(self) -> str:
        """Identity of what the next question is asked after; empty before the first."""
        return digest_of(self.turns)[:16] if self.turns else ""


async def stand_alone(question: str, conversation: Conversation, tools: Tools, emit: Emit) -> tuple[str, list[Step]]:
    """The question as it can be understood alone, and the step that rewrote it.

    The question itself before the first turn, and where the rewriting fails: no answer, cut off, no question, or about other things than
    the conversation.
    """
    if not conversation.turns:
        return question, []
    run = Run(question, tools, emit)
    try:
        async with asyncio.timeout(tools.settings.max_seconds):
            step = await run.ask("rewrite", prompts.rewrite_messages(question, conversation.turns), MAX_REWRITE_TOKENS)
    except asyncio.CancelledError:
        tools.keep(run.trace("the run was cancelled", {"asked": question}))
        raise
    except (EndpointError, BudgetSpent, TimeoutError):
        return question, []
    rewritten = re.sub(r"(?i)^question\s*:\s*", "", prompts.parse_query(step.text))
    is_whole = step.finish_reason != "length" and rewritten.endswith("?") >= question.endswith("?")  # a small model may write search words
    known = [question, *(text for turn in conversation.turns for text in turn)]
    chosen = rewritten if is_whole and asks_nothing_new(rewritten, known) else question
    run.add(step, {"question": chosen})
    return chosen, run.steps


def asks_nothing_new(question: str, known: list[str]) -> bool:
    """Whether a question has content words, and nearly all of them stand in the known texts."""
    words, there = set(re.findall(r"\w{4,}", question.lower())), set(re.findall(r"\w{4,}", " ".join(known).lower()))
    return bool(words) and len(words & there) >= KNOWN_SHARE * len(words)
