"""Replay: training that goes on from an adapter repeats a part of what that learnt, so that it is not forgotten.

Experience replay (Rolnick et al., arXiv:1811.11682): rows of earlier data are mixed with the new ones. A row is known by its question's
digest in the adapter's manifest, so what counts as learnt is what really was.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from understudy.digests import digest_of
from understudy.records import Example


@dataclass(frozen=True)
class Replay:
    """What was learnt before, and how much of it is repeated."""

    learnt: frozenset[str]  # digests of questions
    share: float  # of the training rows, in [0, 1]; 1: everything learnt


def replay_some(examples: list[Example], replay: Replay, seed: int) -> tuple[list[Example], dict[str, Any]]:
    """(the examples without the learnt ones that are not repeated, the counts of training rows).

    Questions stay or go with all their rows, in an order that the seed draws. Validation rows all stay.
    """
    digests = {example.question: digest_of(example.question) for example in examples}
    train = Counter(digests[example.question] for example in examples if example.split == "train")
    learnt = sorted((digest for digest in train if digest in replay.learnt), key=lambda digest: digest_of([seed, digest]))
    new = sum(rows for digest, rows in train.items() if digest not in replay.learnt)
    wanted = float("inf") if replay.share == 1 else replay.share / (1 - replay.share) * new
    repeated: set[str] = set()
    rows = 0
    for digest in learnt:
        if rows >= wanted:
            break
        repeated.add(digest)
        rows += train[digest]
    left_out = set(learnt) - repeated
    kept = [example for example in examples if example.split != "train" or digests[example.question] not in left_out]
    return kept, {"share": replay.share, "new": new, "repeated": rows, "left_out": sum(train[digest] for digest in left_out)}
