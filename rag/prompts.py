"""Every prompt, rendered in one place for inference, training and proof, so that they cannot drift.

Answer and validation prompts share one prefix (system, passages), then task and question: an engine's
prefix cache pays for the passages once, and so does training over a prefix tree (train/trie.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from rag.citations import LINE_BREAK, SENTENCE_BREAK, complete_quote
from rag.nearest import SHINGLE_WEIGHT, nearest_sentences
from rag.same_questions import SHINGLE
from understudy.digests import digest_of
from understudy.records import Example, Message

ABSTENTION = "The documents do not answer this question."

QUOTE_LABEL, ANSWER_LABEL = "Quote:", "Answer:"
NEAREST = 2  # sentences that an answer prompt points at

SYSTEM = "You answer questions about documents. Use only the passages you are given."
PLAN_SYSTEM = "You turn questions into search queries."

PLAN_TASK = "Write a short search query of keywords for this question.\nQuestion: {question}"
ANSWER_TASK = (
    "Copy the sentence of the passages that answers the question, word for word, after 'Quote:'. "
    "Then answer in one sentence after 'Answer:'. "
    f"If the passages do not answer it, write only: {ABSTENTION}\n"
    "Question: {question}\nSentences near it:\n{nearest}"
)
VALIDATE_TASK = (
    "Is the proposed answer right, by the passages alone? Write a score from 0 (wrong) to 1 (right).\nQuestion: {question}\nProposed answer: {proposal}"
)

EXAMPLE_PASSAGES = [
    "The reading room opens at nine on weekdays. Visitors may borrow up to six books for three weeks.",
    "Lost cards are replaced at the front desk for a fee of four euro.",
]
EXAMPLE_QUESTION = "How many books can a visitor take home?"
EXAMPLE_QUOTE = "Visitors may borrow up to six books for three weeks."
EXAMPLE_ANSWER = "A visitor can borrow up to six books."
EXAMPLE_UNANSWERED = "When was the library built?"
EXAMPLE_QUERY = "visitor borrowing limit books"

EXAMPLES = [EXAMPLE_PASSAGES, EXAMPLE_QUESTION, EXAMPLE_QUOTE, EXAMPLE_ANSWER, EXAMPLE_QUERY]
SHOWN = [LINE_BREAK.pattern, SENTENCE_BREAK.pattern, NEAREST, SHINGLE, SHINGLE_WEIGHT]  # what lines and nearest sentences depend on
PROMPT_VERSION = digest_of([ABSTENTION, SYSTEM, PLAN_SYSTEM, PLAN_TASK, ANSWER_TASK, VALIDATE_TASK, *EXAMPLES, *SHOWN])[:12]

ANSWER_FOUND = re.compile(r"(?is)\banswer\s*:\s*(.+)$")

# No adapter learns these two, so they are no part of PROMPT_VERSION.
CLOSED_BOOK_SYSTEM, CLOSED_BOOK_TASK = "You answer questions.", "Answer in one sentence, from what you know.\nQuestion: {question}"
REWRITE_SYSTEM = "You rewrite questions so that they can be understood without the conversation before them."
REWRITE_TASK = "Conversation:\n{turns}\n\nRewrite this question so that it stands alone. Write only the question.\nQuestion: {question}"


class Shot(BaseModel):
    """A worked example of the answer step."""

    model_config = ConfigDict(frozen=True)

    question: str
    passages: list[str]
    target: str  # the completion


@dataclass(frozen=True)
class Answer:
    """What a model's answer text says: the quotes as emitted, the answer, and whether it abstains."""

    text: str
    quotes: list[str]
    abstained: bool
    well_formed: bool  # an abstention alone, or at least one quote and then an answer


def plan_messages(question: str, worked_example: bool = False) -> list[Message]:
    """The prompt that asks for a search query."""
    shots = _shot(PLAN_TASK.format(question=EXAMPLE_QUESTION), EXAMPLE_QUERY) if worked_example else []
    return [Message(role="system", content=PLAN_SYSTEM), *shots, _user(PLAN_TASK.format(question=question))]


def answer_messages(question: str, passages: list[str], shots: Sequence[Shot] = ()) -> list[Message]:
    """The prompt that asks for quotes and an answer, or an abstention, after worked examples of it."""
    shown = [message for shot in shots for message in _shot(_answer_task(shot.question, shot.passages), shot.target)]
    return [Message(role="system", content=SYSTEM), *shown, _user(_answer_task(question, passages))]


def validate_messages(question: str, passages: list[str], proposal: str, worked_example: bool = False) -> list[Message]:
    """The prompt that asks for a score in [0, 1] of a proposed answer."""
    shots: list[Message] = []
    if worked_example:
        context = _context(EXAMPLE_PASSAGES)
        wrong = proposal_text([EXAMPLE_QUOTE], "A visitor can borrow three books.")
        right = proposal_text([EXAMPLE_QUOTE], EXAMPLE_ANSWER)
        shots = [
            *_shot(context + VALIDATE_TASK.format(question=EXAMPLE_QUESTION, proposal=right), score_target(True)),
            *_shot(context + VALIDATE_TASK.format(question=EXAMPLE_QUESTION, proposal=wrong), score_target(False)),
        ]
    user = _user(_context(passages) + VALIDATE_TASK.format(question=question, proposal=proposal))
    return [Message(role="system", content=SYSTEM), *shots, user]


def example_messages(example: Example, passages: dict[str, str]) -> list[Message]:
    """The prompt of a training row, as inference renders its step; `passages` are texts by chunk id."""
    texts = [passages[chunk_id] for chunk_id in example.passage_ids]
    match example.task:
        case "plan":
            return plan_messages(example.question)
        case "answer":
            return answer_messages(example.question, texts)
        case "validate":
            return validate_messages(example.question, texts, example.proposal)
        case "chat":
            return example.messages


def closed_book_messages(question: str) -> list[Message]:
    """The prompt that asks for an answer without passages."""
    return [Message(role="system", content=CLOSED_BOOK_SYSTEM), _user(CLOSED_BOOK_TASK.format(question=question))]


def rewrite_messages(question: str, turns: list[tuple[str, str]]) -> list[Message]:
    """The prompt that asks for a follow-up question as a stand-alone one; `turns` are (question, answer), oldest first."""
    shown = "\n".join(f"Q: {_flat(asked)}\nA: {_flat(answered)}" for asked, answered in turns)
    return [Message(role="system", content=REWRITE_SYSTEM), _user(REWRITE_TASK.format(turns=shown, question=question))]


def answer_target(quotes: list[str], answer: str) -> str:
    """The completion that teaches an answer: quote first, then answer."""
    return "".join(f"{QUOTE_LABEL} {quote}\n" for quote in quotes) + f"{ANSWER_LABEL} {answer}"


EXAMPLE_SHOTS = (
    Shot(question=EXAMPLE_UNANSWERED, passages=EXAMPLE_PASSAGES, target=ABSTENTION),
    Shot(question=EXAMPLE_QUESTION, passages=EXAMPLE_PASSAGES, target=answer_target([EXAMPLE_QUOTE], EXAMPLE_ANSWER)),
)


def completed(beginning: str, passages: list[str]) -> str:
    """What an answer completion that was cut off is gone on from: its quote, completed from the passages, and the answer's label; its
    whole words where that cannot be; nothing where it is a thought, which chat templates take out of what they are given."""
    if strip_thinking(beginning) != beginning:
        return ""
    quoting = re.fullmatch(r"(?i)\s*quote\s*:\s*(\S[^\n]*)", beginning)
    quote = complete_quote(quoting.group(1), passages) if quoting else None
    return answer_target([quote], "").rstrip() if quote else re.sub(r"\S+$", "", beginning).rstrip(" ")


def proposal_text(quotes: list[str], answer: str) -> str:
    """An answer as the validator sees it, on one line."""
    return " ".join([answer, *(f'("{quote}")' for quote in quotes)])


def score_target(right: bool) -> str:
    """The completion that teaches validation: one token."""
    return "1" if right else "0"


def parse_answer(text: str) -> Answer:
    """Read an answer completion; tolerant of case and of text around the two labels."""
    text = strip_thinking(text).strip()
    quotes = [q for q in (_clean_quote(m) for m in re.findall(r"(?im)^\s*quote\s*:\s*(.+?)\s*$", text)) if q]
    found = ANSWER_FOUND.search(text)
    body = re.split(r"(?im)^\s*quote\s*:", found.group(1))[0].strip() if found else re.sub(r"(?im)^\s*quote\s*:.*$", "", text).strip()
    abstained = ABSTENTION.rstrip(".").lower() in text.lower() and not quotes
    if abstained:
        return Answer(ABSTENTION, [], True, text.rstrip(".") == ABSTENTION.rstrip("."))
    return Answer(body, quotes, False, bool(quotes and found and body))


def parse_score(text: str) -> float | None:
    """The one score in [0, 1] that a validation text states, or None."""
    match = re.fullmatch(r"\s*(?:score\s*[:=]?\s*)?(0(?:\.\d+)?|1(?:\.0+)?|\.\d+)\.?\s*", strip_thinking(text), re.IGNORECASE)
    return float(match.group(1)) if match else None


def parse_query(text: str) -> str:
    """The first line of a plan completion, without a label or quotation marks."""
    lines = strip_thinking(text).strip().splitlines()
    return re.sub(r"(?i)^\s*(search )?query\s*:\s*", "", lines[0]).strip(" \"'") if lines else ""


def strip_thinking(text: str) -> str:
    """A reasoning model's text without its think block, closed or cut off."""
    return re.sub(r"(?s)<think>.*?(</think>|$)", "", text) if "<think>" in text else text.rpartition("</think>")[2]


def _answer_task(question: str, passages: list[str]) -> str:
    """Passages, task, question and, last, so that all questions over the same passages begin alike, the sentences nearest to it."""
    nearest = "\n".join(f"- {sentence}" for sentence in nearest_sentences(question, passages, NEAREST)) or "(none)"
    return _context(passages) + ANSWER_TASK.format(question=question, nearest=nearest)


def _context(passages: list[str]) -> str:
    shown = "\n\n".join(f"[{number}] {_in_lines(passage)}" for number, passage in enumerate(passages, 1))
    return f"Passages:\n{shown or '(none)'}\n\n"


def _in_lines(passage: str) -> str:
    """A paragraph, or a table's row, a line."""
    return "\n".join(line for part in LINE_BREAK.split(passage) if (line := _flat(part)))


def _flat(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _clean_quote(text: str) -> str:
    """A quote without enclosing marks or a passage number such as [2]."""
    text = re.sub(r"^\[\d+\]\s*|\s*\[\d+\]$", "", text.strip()).strip()
    return text[1:-1].strip() if len(text) > 1 and text[0] in "\"“'" and text[-1] in "\"”'" else text


def _user(content: str) -> Message:
    return Message(role="user", content=content)


def _shot(user: str, assistant: str) -> list[Message]:
    return [_user(user), Message(role="assistant", content=assistant)]
