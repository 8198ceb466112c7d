"""Which side each trace is on: train, calibration or held-out, by whole groups, near-duplicate questions together.

A group is a document, or a top-level section where the corpus is one document. Nothing is on two sides: no group, and no pair of
near-duplicate questions. Where people have declared sides on import, theirs hold, and what would leak across them is left out.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from train.near_duplicates import joined, near_duplicate_pairs
from understudy.digests import digest_of
from understudy.records import Chunk, Split, Trace

SIDES: tuple[Split, ...] = ("train", "calibration", "held-out")  # of two sides the later one keeps what both claim
CALIBRATION_SHARE = 0.1  # of the traces, where nobody declared a calibration split
FEWEST = 5  # classes of traces, below which none is spared: the training loss alone is reported then


@dataclass
class Splits:
    """The side of each trace by id, the groups that belong to each side, and why a trace is on none."""

    sides: dict[str, Split] = field(default_factory=dict)
    groups: dict[Split, set[str]] = field(default_factory=lambda: {side: set() for side in SIDES})
    leaks: dict[str, str] = field(default_factory=dict)  # reason by trace id


class Groups:
    """The groups of chunks and traces in one corpus; `chunks` is all of it, by id."""

    def __init__(self, chunks: dict[str, Chunk]) -> None:
        self._chunks = chunks
        self._sections = len({chunk.document_id for chunk in chunks.values()}) == 1
        documents: dict[str, set[str]] = defaultdict(set)
        for chunk in chunks.values():
            documents[chunk.document].add(chunk.document_id)
        self._named = {name: next(iter(ids)) for name, ids in documents.items() if len(ids) == 1}

    def of_chunk(self, chunk: Chunk) -> str:
        """The group of a chunk."""
        return f"{chunk.document_id}#{chunk.headings[0] if chunk.headings else ''}" if self._sections else chunk.document_id

    def of_trace(self, trace: Trace) -> list[str]:
        """The groups that a trace cites; for one that cites nothing, the document it was asked about, where that is known."""
        cited = {self.of_chunk(self._chunks[c.chunk_id]) if c.chunk_id in self._chunks else c.document_id for c in trace.citations}
        written_from = self._chunks.get(trace.metadata.get("written_from", ""))
        if not cited and written_from:
            cited = {self.of_chunk(written_from)}
        named = self._named.get(trace.metadata.get("document", ""))
        return sorted(cited or ({named} if named and not self._sections else set()))

    def nearest(self, trace: Trace) -> list[str]:
        """The group of the passage that retrieval found first: a question of unknown origin goes where it has something to show."""
        retrieved = [chunk_id for step in trace.steps if step.name == "retrieve" for chunk_id in step.passage_ids if chunk_id in self._chunks]
        return [self.of_chunk(self._chunks[retrieved[0]])] if retrieved else []


def assign_splits(traces: list[Trace], groups: Groups, held_out: float = 0.0) -> Splits:
    """The split of each trace: the declared one, else a share of the groups for calibration, and `held_out` of them kept for evaluation."""
    pairs = near_duplicate_pairs([trace.question for trace in traces])
    owned = [groups.of_trace(trace) for trace in traces]
    if any(_declared(trace) != "train" for trace in traces):
        return _declared_splits(traces, owned, pairs)
    classes = joined(len(traces), pairs, [list(own or groups.nearest(trace)) for own, trace in zip(owned, traces, strict=True)])
    sides = _drawn_sides(classes, traces, held_out)
    splits = Splits()
    for trace, own, place in zip(traces, owned, classes, strict=True):
        splits.sides[trace.id] = sides[place]
        splits.groups[sides[place]].update(own)
    return splits


def _declared_splits(traces: list[Trace], owned: list[list[str]], pairs: list[tuple[int, int]]) -> Splits:
    """The sides that people declared, less the traces that would carry a group or a question of a later side into an earlier one."""
    splits = Splits()
    owners: dict[str, Split] = {}
    for trace, own in zip(traces, owned, strict=True):
        for group in own:
            owners[group] = max(owners.get(group, "train"), _declared(trace), key=SIDES.index)
    near: dict[int, Split] = {}
    classes = joined(len(traces), pairs)
    for trace, place in zip(traces, classes, strict=True):
        near[place] = max(near.get(place, "train"), _declared(trace), key=SIDES.index)
    for trace, own, place in zip(traces, owned, classes, strict=True):
        side = _declared(trace)
        if other := next((owners[group] for group in own if owners[group] != side), None):
            splits.leaks[trace.id] = f"rests on a document of the {other} split"
        elif near[place] != side:
            splits.leaks[trace.id] = f"near-duplicate of a question of the {near[place]} split"
        else:
            splits.sides[trace.id] = side
            splits.groups[side].update(own)
    return splits


def _drawn_sides(classes: list[int], traces: list[Trace], held_out: float) -> dict[int, Split]:
    """A side for each class, the same for the same traces in any order: classes are taken by digest until a side has its share."""
    sizes = Counter(classes)
    digests: dict[int, str] = {}
    for place, trace in zip(classes, traces, strict=True):
        digests[place] = min(digests.get(place, "~"), digest_of(trace.question))
    sides: dict[int, Split] = dict.fromkeys(sizes, "train")
    if len(sizes) < FEWEST:
        return sides
    waiting = sorted(sizes, key=digests.__getitem__)
    shares: tuple[tuple[Split, float], ...] = (("held-out", held_out), ("calibration", CALIBRATION_SHARE))
    for side, share in shares:
        wanted = share * len(traces)
        taken = 0
        for place in [place for place in waiting if sizes[place] <= max(1.0, 2 * wanted)]:  # one that is most of the data stays in train
            if taken >= wanted:
                break
            sides[place], taken = side, taken + sizes[place]
        waiting = [place for place in waiting if sides[place] == "train"]
    return sides


def _declared(trace: Trace) -> Split:
    """The side that its import gave a trace."""
    return next((side for side in SIDES if side == trace.metadata.get("split")), "train")
