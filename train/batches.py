"""Which rows are computed together: sets of passages as units, packed under a budget of distinct tokens.

Every row is seen once an epoch. The order of sets, and which distractors each set shows in what order, are drawn
anew each epoch from the seed; rows of one set always share them, so that they keep their prefix.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rag.prompts import example_messages
from train.examples import draw_passages
from train.recipe import Recipe
from train.trie import Row, distinct_tokens
from understudy.chat import Encoded, encode_example
from understudy.records import Example

PLAN_ROWS = 12  # plan rows share only their short prefix; so many make a unit


@dataclass
class Census:
    """What a dataset's rows are as token ids, in the passage order of inference."""

    tokens: int = 0
    learnt: int = 0  # tokens on which the loss falls
    distinct_rows: set[int] = field(default_factory=set)  # hashes of their ids
    rows: int = 0
    left_out: list[tuple[int, Example]] = field(default_factory=list)  # rows longer than the recipe's max_length, with their tokens
    faulty: list[tuple[str, Example]] = field(default_factory=list)  # rows that cannot be learnt, and why


class Batcher:
    """Encodes a dataset's rows and deals them into batches."""

    def __init__(self, examples: list[Example], passages: dict[str, str], tokenizer: Any, recipe: Recipe) -> None:
        self._passages, self._tokenizer, self._recipe = passages, tokenizer, recipe
        self.census, self.max_length = Census(), recipe.max_length
        self._dealt: tuple[tuple[int, int], list[list[Row]]] | None = None  # the latest epoch
        self.units = self._make_units(examples)

    def epoch(self, seed: int, epoch: int) -> list[list[Row]]:
        """The batches of one epoch, in order; the same seed and epoch give the same batches."""
        if self._dealt is None or self._dealt[0] != (seed, epoch):
            units = list(self.units)
            random.Random(f"{seed}/{epoch}").shuffle(units)
            drawn = (self._encode(unit, draw_passages(unit[0], seed, epoch)) for unit in units)
            self._dealt = (seed, epoch), [batch for rows in drawn for batch in self._split(rows)]
        return self._dealt[1]

    def canonical(self) -> Iterator[list[Row]]:
        """Every row in the passage order of inference, for validation."""
        for unit in self.units:
            yield from self._split(self._encode(unit, unit[0].passage_ids))

    def describe(self, row: Row) -> dict[str, Any]:
        """A row for people to look at: where it comes from, its token ids, and both parts as text."""
        ids, completion = row.encoded.ids, row.encoded.completion
        prompt, target = (self._tokenizer.decode(part) for part in (ids[:completion], ids[completion:]))
        return {"trace_id": row.trace_id, "weight": row.weight, "ids": ids, "completion": completion, "prompt": prompt, "target": target}

    def _make_units(self, examples: list[Example]) -> list[list[Example]]:
        by_set: dict[tuple[str, ...], list[Example]] = defaultdict(list)
        for example in examples:
            encoded = self._row(example, example.passage_ids).encoded
            if len(encoded.ids) > self._recipe.max_length:
                self.census.left_out.append((len(encoded.ids), example))
            else:
                by_set[tuple(example.passage_ids)].append(example)
                self._count(example, encoded)
        plans = by_set.pop((), [])
        return [*by_set.values(), *(plans[i : i + PLAN_ROWS] for i in range(0, len(plans), PLAN_ROWS))]

    def _count(self, example: Example, encoded: Encoded) -> None:
        census, learnt = self.census, len(encoded.ids) - encoded.completion
        census.rows += 1
        census.tokens += len(encoded.ids)
        census.learnt += learnt
        census.distinct_rows.add(hash((tuple(encoded.ids), encoded.completion)))
        if learnt < 2:
            census.faulty.append(("no target to learn", example))
        if encoded.ids[-1] != self._tokenizer.eos_token_id:
            census.faulty.append(("no end of sequence after its target", example))

    def _encode(self, unit: list[Example], order: list[str]) -> list[Row]:
        return [self._row(example, order) for example in unit]

    def _row(self, example: Example, order: list[str]) -> Row:
        messages = example_messages(example.model_copy(update={"passage_ids": order}), self._passages)
        weight = {"plan": self._recipe.plan_weight, "answer": 1.0, "validate": self._recipe.validate_weight, "chat": 1.0}[example.task]
        first = self._recipe.decision_weight * example.weight if example.task == "answer" else None
        return Row(encode_example(self._tokenizer, messages, example.target), weight * example.weight, first, example.trace_id)

    def _split(self, rows: list[Row]) -> Iterator[list[Row]]:
        """Cut a unit where its trie would pass the budget; a single longer row stands alone."""
        batch: list[Row] = []
        for row in rows:
            if batch and distinct_tokens([*batch, row]) > self._recipe.tokens_per_batch:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch
