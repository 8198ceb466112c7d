"""POST /v1/feedback: a person's correction becomes an expert trace, and the cache forgets what was wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from serve.gateway.errors import Refused
from serve.gateway.requests import FeedbackRequest
from understudy.records import Question, Trace
from understudy.workspace import Workspace

if TYPE_CHECKING:
    from rag.retrieve import Retriever


def find_corrected(workspace: Workspace, trace_id: str) -> Trace:
    """The trace that is corrected, of the workspace's tenant. Blocking. Raises Refused."""
    found = workspace.store.trace(trace_id)
    if found is None or found.tenant != workspace.config.tenant:
        raise Refused(404, "trace_not_found", f"there is no trace {trace_id}", "trace_id")
    return found


def take_correction(workspace: Workspace, retriever: Retriever, corrected: Trace, request: FeedbackRequest, by: str) -> dict[str, Any]:
    """Keep the right answer to the question of a trace as an expert's; `by` is the key's name. Blocking. Raises Refused.

    The same correction twice is one trace. It goes into the training split, as an import of experts' answers would.
    """
    from rag.traces import UnsupportedAnswer, expert_trace, keep_trace

    answers = [request.answer] if request.answer and request.answer.strip() else None
    question = Question(id=corrected.id, question=corrected.question, answers=answers, has_answer_key=True, quotes=request.quotes, tenant=corrected.tenant)
    try:
        trace = expert_trace(question, retriever, "train")
    except UnsupportedAnswer as error:
        raise Refused(422, error.code, error.message, "quotes" if request.quotes else "answer") from error
    keep_trace(workspace, trace.model_copy(update={"metadata": {**trace.metadata, "corrects": corrected.id, "by": by}}))
    forget_answer(workspace, corrected)
    return {"object": "feedback", "trace_id": trace.id, "corrects": corrected.id, "citations": [citation.model_dump() for citation in trace.citations]}


def forget_answer(workspace: Workspace, corrected: Trace) -> None:
    """Take a wrong answer out of the cache. An entry that was wrong for a similar question only learns from it, as with `cache wrong`."""
    from rag.cache import take_wrong_hit

    store = workspace.store
    entry = take_wrong_hit(store, corrected)
    if entry is None or corrected.cache != "semantic":
        store.remove_cache_entries([each.id for each in store.cache_entries(corrected.tenant) if each.trace_id == corrected.id])
