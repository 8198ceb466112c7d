"""Personal data is taken out of a trace before it is stored: e-mail addresses, telephone numbers, and patterns of one's own.

What matches becomes a placeholder with the pattern's name, such as `[email]`. A pattern that takes too long on a text
withholds that text whole: nothing is stored that was not searched to its end. Chunks are the documents' own and stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import regex

from understudy.records import Citation, Message, Step, Trace
from understudy.settings.answers import Redaction

SECONDS = 0.25  # for one pattern on one text: a catastrophic pattern must not hold up an answer
KEPT = {"question_id", "split"}  # metadata that identifies rows, and holds nothing that a person wrote to the agent

EMAIL = r"(?<![\w.+-])[\w.+%-]{1,64}@(?:[\w-]{1,63}\.){1,8}[[:alpha:]]{2,24}(?!\w)"
PHONE = (
    r"(?<![\w+./-])(?!\d{1,4}[./-]\d{1,2}[./-]\d{1,4}(?!\d))"  # no date
    r"(?:(?:\+|00)\d(?:[ ().\-/]{0,2}\d){6,14}"  # international
    r"|\(?0\d{1,5}\)?[ .\-/]{1,2}(?:\d[ .\-/]?){4,11}\d"  # with a trunk prefix
    r"|\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4})(?!\w)"  # North American
)


@dataclass(frozen=True)
class Redactor:
    """Patterns by the name of their placeholder, applied in order."""

    patterns: dict[str, Any]  # compiled

    def text(self, text: str) -> str:
        """The text with placeholders; `[NAME: withheld]` where a pattern did not come to an end in time."""
        for name, pattern in self.patterns.items():
            try:
                text = pattern.sub(lambda _, shown=f"[{name}]": shown, text, timeout=SECONDS)
            except TimeoutError:
                return f"[{name}: withheld]"
        return text

    def value(self, value: object) -> object:
        """A JSON value with its texts redacted."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, list):
            return [self.value(item) for item in value]
        return {key: self.value(item) for key, item in value.items()} if isinstance(value, dict) else value

    def trace(self, trace: Trace) -> Trace:
        """The trace without what the patterns match; where nothing matches, an equal one."""
        if not self.patterns:
            return trace
        return trace.model_copy(
            update={
                "question": self.text(trace.question),
                "answer": self.text(trace.answer),
                "quotes": [self.text(quote) for quote in trace.quotes],
                "citations": [self._citation(citation) for citation in trace.citations],
                "steps": [self._step(step) for step in trace.steps],
                "metadata": {key: value if key in KEPT else self.text(value) for key, value in trace.metadata.items()},
            }
        )

    def _citation(self, citation: Citation) -> Citation:
        return citation.model_copy(update={"quote": self.text(citation.quote)})

    def _step(self, step: Step) -> Step:
        return step.model_copy(
            update={
                "messages": [Message(role=message.role, content=self.text(message.content)) for message in step.messages],
                "text": self.text(step.text),
                "parsed": self.value(step.parsed),
                "error": self.text(step.error),
            }
        )


def redactor_of(settings: Redaction) -> Redactor:
    """The redactor that a workspace's settings ask for."""
    named = {"email": EMAIL} if settings.email else {}
    named |= {"phone": PHONE} if settings.phone else {}
    return Redactor({name: _compiled(pattern) for name, pattern in (named | settings.patterns).items()})


@lru_cache(maxsize=64)
def _compiled(pattern: str) -> Any:
    return regex.compile(pattern)
