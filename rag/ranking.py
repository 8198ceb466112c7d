"""From rankings to the passages shown: fusion, weights, diversity and how many. Pure functions over candidates."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from understudy.records import Passage, Scores

Kind = Literal["dense", "lexical"]

STALE_WEIGHT = 0.5  # of a document that is not valid now, where `retrieval.stale` is downrank


@dataclass(frozen=True)
class Finding:
    """Where one ranking of one query put a chunk."""

    query: str
    ranking: Kind
    rank: int  # 1 is best
    score: float  # cosine or BM25
    share: float  # of the fused score


@dataclass(frozen=True)
class Candidate:
    """A chunk that some ranking found, and everything that moved it."""

    chunk_id: str
    findings: list[Finding]
    boost: float = 1.0  # the document's
    stale_weight: float = 1.0
    reranked: float | None = None
    novelty_penalty: float | None = None  # similarity to what was chosen before, times 1 - mmr

    @property
    def fused(self) -> float:
        """The reciprocal-rank sum."""
        return sum(finding.share for finding in self.findings)

    @property
    def score(self) -> float:
        """What it is ordered by: the cross-encoder's score where there is one, else the fused one, times boost and stale weight."""
        return (self.fused if self.reranked is None else self.reranked) * self.boost * self.stale_weight

    def best(self, ranking: Kind) -> float | None:
        """Its best score in the dense or the lexical rankings."""
        return max((finding.score for finding in self.findings if finding.ranking == ranking), default=None)

    @property
    def scores(self) -> Scores:
        """The scores kept in a passage."""
        return Scores(dense=self.best("dense"), lexical=self.best("lexical"), fused=self.fused, reranked=self.reranked)


@dataclass(frozen=True)
class Explained:
    """A passage and why it is there."""

    passage: Passage
    candidate: Candidate
    considered: int  # candidates it was chosen from
    allowed: int | None  # chunks that filters let through; None: no filter


def fuse(rankings: list[tuple[str, Kind, list[tuple[str, float]]]], rrf_k: int) -> list[Candidate]:
    """Candidates by reciprocal rank fusion, best first; ties keep the order of first appearance.

    A ranking is (query, kind, [(chunk id, score)], best first). Score = Σ 1 / (rrf_k + rank), after Cormack, Clarke and
    Büttcher (SIGIR 2009).
    """
    findings: dict[str, list[Finding]] = defaultdict(list)
    for query, kind, found in rankings:
        for rank, (chunk_id, score) in enumerate(found, 1):
            findings[chunk_id].append(Finding(query, kind, rank, score, 1.0 / (rrf_k + rank)))
    return by_score([Candidate(chunk_id, own) for chunk_id, own in findings.items()])


def by_score(candidates: list[Candidate]) -> list[Candidate]:
    """Best first; ties keep their order."""
    return sorted(candidates, key=lambda candidate: -candidate.score)


def diversify(candidates: list[Candidate], vectors: dict[str, np.ndarray], relevance: float, count: int) -> list[Candidate]:
    """`count` candidates by maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998), in the order chosen.

    Each choice maximises relevance · score / best score - (1 - relevance) · largest cosine to a chosen one; `vectors` holds
    unit vectors [windows, dim] by chunk id, and two chunks are as near as their nearest windows; one without vectors is
    near to nothing. Ties go to the higher score.
    """
    if not candidates:
        return []
    top = max(candidate.score for candidate in candidates) or 1.0
    nearness, left = dict.fromkeys(range(len(candidates)), 0.0), list(range(len(candidates)))
    chosen: list[Candidate] = []
    while left and len(chosen) < count:
        best = max(left, key=lambda i: (relevance * candidates[i].score / top - (1 - relevance) * nearness[i], -i))
        left.remove(best)
        chosen.append(replace(candidates[best], novelty_penalty=(1 - relevance) * nearness[best]))
        own = vectors.get(candidates[best].chunk_id)
        for i in left:
            other = vectors.get(candidates[i].chunk_id)
            if own is not None and other is not None:
                nearness[i] = max(nearness[i], float((other @ own.T).max()))
    return chosen


def count_by_gap(scores: list[float], least: int, most: int) -> int:
    """How many of the scores, best first, stand before their widest gap, from `least` to `most`; the earliest of equal gaps."""
    if len(scores) <= least:
        return len(scores)
    ends = range(least, min(most, len(scores) - 1) + 1)
    return max(ends, key=lambda n: (scores[n - 1] - scores[n], -n))
