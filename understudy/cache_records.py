"""The records of the answer cache: an entry, what has been observed of it, and what the cache has done."""

from __future__ import annotations

from pydantic import Field

from understudy.digests import digest_of
from understudy.records import Citation, Record


class CacheObservation(Record):
    """What one question showed of a cache entry: how near it was, and whether the entry's answer was right for it."""

    similarity: float  # cosine
    correct: bool


class CacheEntry(Record):
    """A validated answer that may be given again, and what has been learnt of when it may (rag.cache)."""

    id: str  # digest of scope and normalised question
    tenant: str = "default"
    scope: str  # digest of what an answer depends on besides the question: tenant, filters, mode, models, prompts, conversation, release
    question: str
    question_digest: str
    answer: str
    citations: list[Citation]
    score: float
    document_ids: list[str]  # cited; the entry is removed with any of them
    chunk_ids: list[str]  # cited; the entry survives a new corpus generation if retrieval still returns them
    generation: str  # the corpus generation that the answer was last found to hold for
    trace_id: str  # the run that made it
    seconds: float  # that the run took, and a hit saves
    created_at: float  # seconds since the epoch
    expires_at: float | None = None
    used_at: float  # when it was made or last hit: the least recently used goes first
    hits: int = 0
    wrong_hits: int = 0  # of the hits, those that people called wrong
    observations: list[CacheObservation] = Field(default_factory=list)

    @staticmethod
    def make_id(scope: str, question_digest: str) -> str:
        """The same question in the same scope is one entry."""
        return digest_of([scope, question_digest])


class CacheTotals(Record):
    """What a tenant's cache has done, entries that are gone included."""

    hits: int = 0
    wrong_hits: int = 0
    seconds_saved: float = 0.0
