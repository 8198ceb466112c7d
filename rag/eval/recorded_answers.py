"""Recorded answers of a teacher as a model: it stands in the table without being asked again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from understudy.errors import UsageError
from understudy.records import Question, Trace

TEACHER = "teacher"  # the name of the recorded teacher among --models


def is_teachers(trace: Trace) -> bool:
    """Whether a whole trace holds what a teacher wrote. An expert's answer is the key itself, and no model's."""
    return trace.complete and (trace.source == "imported" or "teacher" in trace.metadata or "escalated" in trace.metadata)


def recorded_answers(questions: Sequence[Question], traces: Iterable[Trace]) -> list[Trace]:
    """The teacher's newest trace for each question, in their order; raises UsageError where there is none for some."""
    newest: dict[str, Trace] = {}
    for trace in traces:
        text = " ".join(trace.question.split())
        if is_teachers(trace) and (text not in newest or trace.created_at >= newest[text].created_at):
            newest[text] = trace
    texts = [" ".join(question.question.split()) for question in questions]
    missing = [text for text in texts if text not in newest]
    if missing:
        raise UsageError(
            f"the teacher's answers to {len(missing)} of {len(questions)} questions are not recorded, such as {missing[0]!r}",
            "record them (`understudy traces import` of its calls; experts' answers are the key), configure remotes.teacher, or leave teacher out",
        )
    return [newest[text] for text in texts]
