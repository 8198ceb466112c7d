"""How a teacher is asked for questions about a chunk, and what of its reply may be used."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rag.citations import find_quote
from rag.prompts import EXAMPLE_PASSAGES, EXAMPLE_QUESTION, EXAMPLE_QUOTE, EXAMPLE_UNANSWERED, QUOTE_LABEL, strip_thinking
from understudy.digests import digest_of
from understudy.records import Chunk, Message

QUESTION_LABEL = "Question:"
MAX_TOKENS = 192  # of a reply
WORDS = (4, 50)  # of a question

SYSTEM = "You write the questions that readers ask about documents. A question must be clear to somebody who does not see the passage."
ANSWERED_TASK = (
    "Passage from {place}:\n{passage}\n\n"
    "Write one question that this passage answers. Then copy the sentence of the passage that answers it, word for word. Reply in two lines:\n"
    f"{QUESTION_LABEL} …\n{QUOTE_LABEL} …"
)
UNANSWERED_TASK = (
    "Passage from {place}:\n{passage}\n\n"
    "Write one question on the same subject that a reader may well ask and that this passage does not answer. Reply in one line:\n"
    f"{QUESTION_LABEL} …"
)
EXAMPLE_PLACE = "Reading room rules"
WRITING_VERSION = digest_of([SYSTEM, ANSWERED_TASK, UNANSWERED_TASK, EXAMPLE_PASSAGES, EXAMPLE_QUESTION, EXAMPLE_QUOTE, EXAMPLE_UNANSWERED])[:12]

POINTS_AT_PASSAGE = re.compile(r"\b(this|the|above|given) (passage|text|excerpt|paragraph|sentence)\b|\baccording to (it|this)\b", re.IGNORECASE)


@dataclass(frozen=True)
class WrittenQuestion:
    """A question, the chunk it was written about, and the quote that answers it; without one it should find no answer."""

    question: str
    chunk: Chunk
    quote: str = ""


class Unusable(Exception):
    """A reply, a question or an answer that is not kept; its message is the reason."""


def writing_messages(chunk: Chunk, answered: bool) -> list[Message]:
    """The prompt that asks for one question about a chunk, after a worked example."""
    task = ANSWERED_TASK if answered else UNANSWERED_TASK
    example = f"{QUESTION_LABEL} {EXAMPLE_QUESTION}\n{QUOTE_LABEL} {EXAMPLE_QUOTE}" if answered else f"{QUESTION_LABEL} {EXAMPLE_UNANSWERED}"
    place = ", ".join([chunk.document, *chunk.headings])
    return [
        Message(role="system", content=SYSTEM),
        Message(role="user", content=task.format(place=EXAMPLE_PLACE, passage=EXAMPLE_PASSAGES[0])),
        Message(role="assistant", content=example),
        Message(role="user", content=task.format(place=place, passage=" ".join(chunk.text.split()))),
    ]


def read_question(text: str, chunk: Chunk, answered: bool) -> WrittenQuestion:
    """What a teacher wrote; raises Unusable with the reason."""
    text = strip_thinking(text)
    labelled = re.search(rf"(?im)^\W*{QUESTION_LABEL}\W*(.+?)\s*$", text)
    line = labelled.group(1) if labelled else next((line for line in text.splitlines() if line.rstrip().endswith("?")), "")
    question = line.strip(" *\"'“”")
    if not question:
        raise Unusable("no question in the reply")
    if not question.endswith("?") or not WORDS[0] <= len(question.split()) <= WORDS[1]:
        raise Unusable("not one whole question")
    if POINTS_AT_PASSAGE.search(question):
        raise Unusable("points at the passage, which its reader does not see")
    if question.lower() in (EXAMPLE_QUESTION.lower(), EXAMPLE_UNANSWERED.lower()):
        raise Unusable("repeats the example")
    if not answered:
        return WrittenQuestion(question, chunk)
    found = re.search(rf"(?im)^\W*{QUOTE_LABEL}\s*(.+?)\s*$", text)
    quote = found.group(1).strip(" *\"'“”") if found else ""
    if not quote:
        raise Unusable("no quote in the reply")
    if find_quote(quote, chunk.text) is None:
        raise Unusable("the quote is not verbatim in the passage")
    return WrittenQuestion(question, chunk, quote)
