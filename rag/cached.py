"""One question, answered from the cache where it may be, else by a run, whose answer the cache then keeps."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from rag.cache import Lookup, Scope, SemanticCache
from understudy.cache_records import CacheEntry
from understudy.records import Trace


@dataclass(frozen=True)
class Cached:
    """A cache, and the scope in which it is asked."""

    cache: SemanticCache
    scope: Scope
    model: str  # the answering model's name, for the traces of hits
    accept_score: float  # validation score from which an answer counts as validated
    may_keep: Callable[[Trace], bool] = lambda _: True  # asked of every answer before it goes in

    def after(self, conversation: str) -> Cached:
        """The same in the scope of a conversation, named by its digest."""
        return replace(self, scope=replace(self.scope, conversation=conversation))


async def answer_cached(question: str, cached: Cached, run: Callable[[], Awaitable[Trace]]) -> Trace:
    """The trace of a hit, or of `run` with its cache outcome set to "miss". The caller keeps the trace.

    A hit has no steps; its metadata names the entry and the trace that made it.
    """
    cache, scope = cached.cache, cached.scope
    lookup = await asyncio.to_thread(cache.lookup, question, scope)
    if lookup.entry:
        await asyncio.to_thread(cache.count_hit, lookup.entry)
        return hit_trace(question, cached, lookup, lookup.entry)
    started = time.perf_counter()
    trace = (await run()).model_copy(update={"cache": "miss"})
    if cached.may_keep(trace):
        await asyncio.to_thread(cache.keep, trace, scope, lookup, cached.accept_score, time.perf_counter() - started)
    return trace


def answer_without_model(question: str, cached: Cached) -> Trace | None:
    """The trace of a hit, or None. No hit is let through for an audit: there is no model to make the run."""
    lookup = cached.cache.lookup(question, cached.scope, may_audit=False)
    if lookup.entry is None:
        return None
    cached.cache.count_hit(lookup.entry)
    return hit_trace(question, cached, lookup, lookup.entry)


def hit_trace(question: str, cached: Cached, lookup: Lookup, entry: CacheEntry) -> Trace:
    """The trace of a hit."""
    prior = {"cache_prior": repr(lookup.candidate.belief.prior)} if lookup.candidate else {}
    return Trace(
        id=uuid.uuid4().hex,
        tenant=cached.scope.tenant,
        question=question,
        steps=[],
        answer=entry.answer,
        abstained=False,
        citations=entry.citations,
        quotes=[citation.quote for citation in entry.citations],
        score=entry.score,
        source="model",
        cache="exact" if lookup.tier == "exact" else "semantic",
        model=cached.model,
        generation=cached.cache.retriever.generation,
        prompt_version=cached.scope.prompt_version,
        release=cached.scope.release,
        created_at=time.time(),
        metadata={"cache_entry": entry.id, "cache_trace": entry.trace_id, **prior},
    )
