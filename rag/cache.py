"""The semantic cache: validated answers given again to the same question (exact tier) and to one that asks the same (semantic tier).

An entry belongs to a scope: everything besides the question that its answer depends on. What may be stored, when an entry
survives a new corpus generation, and what tells whether a hit would have been right, is said here; when a hit is allowed in
`rag.cache_decision`, what sets two questions apart in `rag.cache_guard`.
"""

from __future__ import annotations

import random
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Literal

import numpy as np

from rag.cache_decision import Belief, Parameters, believe, prior_probability
from rag.cache_guard import Comparison, compare, question_digest
from rag.cache_index import VectorIndex
from rag.eval.metrics import token_f1
from rag.retrieve import Retriever
from understudy.cache_records import CacheEntry
from understudy.digests import digest_of
from understudy.records import Trace
from understudy.settings.answers import Cache
from understudy.store import Store

NEIGHBOURS = 4  # entries that the guard reads; eight find 1 % more hits and take twice the time
LONGEST = 1000  # characters; longer questions are not cached
FLOOR = 0.6  # cosine below which nothing is asked the same
WORTH_OBSERVING = 0.05  # prior probability from which an outcome teaches something about an entry
REFRESH_SECONDS = 1.0  # how long another process's entries may stay unseen
OVERLAP_SECONDS = 60.0  # clocks of processes may differ by so much
SCOPES_IN_MEMORY = 64
SAME_ANSWER_F1 = 0.8  # token-F1 from which two answers say the same
SAME_PASSAGE_F1 = 0.5  # enough where both cite the same passage


@dataclass(frozen=True)
class Scope:
    """What an answer depends on besides the question."""

    tenant: str
    model: str  # resolved: the base's id, name@digest12, or a remote's name and address
    prompt_version: str
    mode: str = "agentic"
    filters: Mapping[str, object] = field(default_factory=dict)
    conversation: str = ""  # digest of the turns before
    release: str | None = None

    @property
    def digest(self) -> str:
        """The key under which entries are kept."""
        return digest_of([self.tenant, self.model, self.prompt_version, self.mode, dict(self.filters), self.conversation, self.release])


@dataclass(frozen=True)
class Candidate:
    """An entry near the question, and what was made of it."""

    entry: CacheEntry
    cosine: float
    comparison: Comparison
    belief: Belief


@dataclass(frozen=True)
class Lookup:
    """What the cache says of a question. `vector` is its embedding, None where the exact tier answered."""

    tier: Literal["exact", "semantic", "miss"]
    entry: CacheEntry | None  # to be answered with
    candidate: Candidate | None  # of a hit, or what a run's answer tells something about
    vector: np.ndarray | None


class SemanticCache:
    """Looks up, stores and learns; one for many questions at once, of one tenant's corpus."""

    def __init__(
        self,
        store: Store,
        retriever: Retriever,
        settings: Cache,
        parameters: Parameters,
        clock: Callable[[], float] = time.time,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.store, self.retriever, self.settings, self.parameters = store, retriever, settings, parameters
        self._clock, self._chance = clock, chance
        self._lock = Lock()
        self._indexes: OrderedDict[str, tuple[VectorIndex, float]] = OrderedDict()  # by scope: the index, when it was refreshed

    def lookup(self, question: str, scope: Scope, may_audit: bool = True) -> Lookup:
        """The entry to answer with, if any. A small share of would-be semantic hits is let through as misses, to be checked, if `may_audit`."""
        entry = self._valid(CacheEntry.make_id(scope.digest, question_digest(question)))
        if entry:
            return Lookup("exact", entry, None, None)
        if len(question) > LONGEST:
            return Lookup("miss", None, None, None)
        vector = self.retriever.embed([question])[0]
        passing = [candidate for candidate in self.candidates(question, vector, scope) if not candidate.comparison.findings]
        best = max(passing, key=lambda candidate: candidate.belief.lower, default=None)
        audited = may_audit and self._chance() < self.settings.audit
        if best and self.allows(best) and not audited and (entry := self._valid(best.entry.id)):
            return Lookup("semantic", entry, best, vector)
        worth = best is not None and best.belief.prior >= WORTH_OBSERVING
        return Lookup("miss", None, best if worth else None, vector)

    def allows(self, candidate: Candidate) -> bool:
        """Whether the error bound allows the entry's answer."""
        return not candidate.comparison.findings and candidate.belief.lower >= 1.0 - self.settings.error_bound

    def candidates(self, question: str, vector: np.ndarray, scope: Scope) -> list[Candidate]:
        """The nearest entries of the scope, nearest first."""
        found = []
        with self._lock:
            index = self._index(scope)
            near = index.nearest(vector, NEIGHBOURS)
            for entry_id, cosine in near:
                if cosine < FLOOR:
                    break
                entry = self.store.cache_entry(entry_id)
                if entry is None:
                    index.discard(entry_id)
                    continue
                comparison = compare(entry.question, question)
                prior = prior_probability(self.parameters, cosine, comparison)
                found.append(Candidate(entry, cosine, comparison, believe(self.parameters, prior, entry.observations)))
        return found

    def keep(self, trace: Trace, scope: Scope, lookup: Lookup, accept_score: float, seconds: float) -> bool:
        """Store a run's answer, if it is whole, cited in full, not an abstention and validated; note what it says of the candidate."""
        if lookup.candidate and (verdict := agrees(lookup.candidate.entry, trace, accept_score)) is not None:
            self.store.observe_cache(lookup.candidate.entry.id, lookup.candidate.belief.prior, verdict)
        if not is_storable(trace, accept_score) or lookup.vector is None:
            return False
        now, digest = self._clock(), question_digest(trace.question)
        entry = CacheEntry(
            id=CacheEntry.make_id(scope.digest, digest),
            tenant=scope.tenant,
            scope=scope.digest,
            question=trace.question,
            question_digest=digest,
            answer=trace.answer,
            citations=trace.citations,
            score=trace.score or 0.0,
            document_ids=sorted({citation.document_id for citation in trace.citations}),
            chunk_ids=sorted({citation.chunk_id for citation in trace.citations}),
            generation=trace.generation,
            trace_id=trace.id,
            seconds=seconds,
            created_at=now,
            expires_at=now + 86_400 * self.settings.ttl_days,
            used_at=now,
        )
        if not self.store.put_cache_entry(entry, self.retriever.embedder.fingerprint, lookup.vector):
            return False
        self.store.trim_cache(scope.tenant, self.settings.max_entries, now)
        with self._lock:
            self._index(scope).add([entry.id], lookup.vector.reshape(1, -1))
        return True

    def count_hit(self, entry: CacheEntry) -> None:
        """Count a hit."""
        self.store.count_cache_hit(entry.id, self._clock())

    def _valid(self, entry_id: str) -> CacheEntry | None:
        """The entry, if it has not expired and holds for the live corpus; one that does not is removed."""
        entry = self.store.cache_entry(entry_id)
        if entry is None:
            return None
        if (entry.expires_at is None or entry.expires_at > self._clock()) and self._survives(entry):
            return entry
        self.store.remove_cache_entries([entry.id])
        return None

    def _survives(self, entry: CacheEntry) -> bool:
        """Whether retrieval, asked as the run asked it, still returns every passage that the entry cites; noted if so."""
        if entry.generation == self.retriever.generation:
            return True
        trace = self.store.trace(entry.trace_id)
        steps = trace.steps if trace else []
        queries = [entry.question, *(str(step.parsed.get("query", "")) for step in steps if step.name == "retrieve")]
        rounds = max(1, sum(step.name == "retrieve" for step in steps))  # each round shows passages that the one before did not
        found = self.retriever.search(queries, self.retriever.settings.k * rounds)
        if not set(entry.chunk_ids) <= {passage.chunk.id for passage in found}:
            return False
        self.store.keep_cache_entry(entry.id, self.retriever.generation)
        return True

    def _index(self, scope: Scope) -> VectorIndex:
        """The scope's index, with what any process has added up to REFRESH_SECONDS ago."""
        key, now = scope.digest, self._clock()
        index, refreshed = self._indexes.pop(key, (VectorIndex(), float("-inf")))
        if index.rows > 2 * self.settings.max_entries:  # evicted entries are not taken out one by one
            index, refreshed = VectorIndex(), float("-inf")
        if now - refreshed >= REFRESH_SECONDS:
            index.add(*self.store.cache_vectors(scope.tenant, key, self.retriever.embedder.fingerprint, since=max(0.0, refreshed - OVERLAP_SECONDS)))
            refreshed = now
        self._indexes[key] = (index, refreshed)
        while len(self._indexes) > SCOPES_IN_MEMORY:
            self._indexes.popitem(last=False)
        return index


def is_storable(trace: Trace, accept_score: float) -> bool:
    """Whether an answer may be given again: a whole run that stopped by itself, every quote verbatim, validated, no abstention."""
    finished = [step.finish_reason for step in trace.steps if step.name == "answer"][-1:] == ["stop"]
    cited = bool(trace.citations) and len(trace.citations) >= len(trace.quotes)
    return trace.complete and finished and cited and not trace.abstained and trace.score is not None and trace.score >= accept_score


def agrees(entry: CacheEntry, trace: Trace, accept_score: float) -> bool | None:
    """Whether a run that was made although the entry was near says that the entry's answer was right.

    Right: both state the same numbers and neither denies what the other says, and their token-F1 is SAME_ANSWER_F1, or
    SAME_PASSAGE_F1 where they cite the same passage. An abstention says wrong. None, which teaches nothing, where the run is
    broken off or its answer was not validated.
    """
    if not trace.complete or trace.score is None or trace.score < accept_score:
        return None
    if trace.abstained:
        return False
    same_numbers = re.findall(r"\d+", entry.answer) == re.findall(r"\d+", trace.answer)
    denies = any(finding.startswith(("negation", "opposite", "number")) for finding in compare(entry.answer, trace.answer).findings)
    same_passage = any(
        mine.document_id == other.document_id and mine.start < other.end and other.start < mine.end for mine in entry.citations for other in trace.citations
    )
    return same_numbers and not denies and token_f1(trace.answer, entry.answer) >= (SAME_PASSAGE_F1 if same_passage else SAME_ANSWER_F1)


def take_wrong_hit(store: Store, trace: Trace) -> CacheEntry | None:
    """Take a person's word that the cached answer of a trace was wrong: a semantic hit teaches the entry's threshold, an exact one removes
    the entry. Returns the entry, or None where the answer is not from one that is still there."""
    entry = store.cache_entry(trace.metadata.get("cache_entry", ""))
    if entry is None:
        return None
    store.count_wrong_hit(entry.id)
    if trace.cache == "semantic":
        store.observe_cache(entry.id, float(trace.metadata["cache_prior"]), False)
    else:
        store.remove_cache_entries([entry.id])
    return entry
