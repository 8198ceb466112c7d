"""Which rows are computed together: sets of passages as units, packed under a budget of distinct tokens.

Every row is seen once an epoch. The order of sets, and which distractors each set shows in what order, are drawn
anew each epoch from the seed; rows of one set always share them, so that they keep their prefix.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from train.dataset import render
from train.examples import draw_passages
from train.recipe import Recipe
from train.trie import Row, distinct_tokens
from understudy.chat import encode_example
from understudy.records import Example

PLAN_ROWS = 12  # plan rows share only their short prefix; so many make a unit


class Batcher:
    """Encodes a dataset's rows and deals them into batches."""

    def __init__(self, examples: list[Example], passages: dict[str, str], tokenizer: Any, recipe: Recipe) -> None:
        self._passages, self._tokenizer, self._recipe = passages, tokenizer, recipe
        self.too_long = 0
        self.units = self._make_units(examples)

    def epoch(self, seed: int, epoch: int) -> list[list[Row]]:
        """The batches of one epoch, in order; the same seed and epoch give the same batches."""
        rng = random.Random(f"{seed}/{epoch}")
        units = list(self.units)
        rng.shuffle(units)
        return [batch for unit in units for batch in self._split(self._encode(unit, draw_passages(unit[0], seed, epoch)))]

    def canonical(self) -> Iterator[list[Row]]:
        """Every row in the passage order of inference, for validation."""
        for unit in self.units:
            yield from self._split(self._encode(unit, unit[0].passage_ids))

    def _make_units(self, examples: list[Example]) -> list[list[Example]]:
        by_set: dict[tuple[str, ...], list[Example]] = defaultdict(list)
        for example in examples:
            if len(self._row(example, example.passage_ids).encoded.ids) > self._recipe.max_length:
                self.too_long += 1
            else:
                by_set[tuple(example.passage_ids)].append(example)
        plans = by_set.pop((), [])
        return [*by_set.values(), *(plans[i : i + PLAN_ROWS] for i in range(0, len(plans), PLAN_ROWS))]

    def _encode(self, unit: list[Example], order: list[str]) -> list[Row]:
        return [self._row(example, order) for example in unit]

    def _row(self, example: Example, order: list[str]) -> Row:
        messages = render(example.model_copy(update={"passage_ids": order}), self._passages)
        weight = {"plan": self._recipe.plan_weight, "answer": 1.0, "validate": self._recipe.validate_weight, "chat": 1.0}[example.task]
        first = self._recipe.decision_weight * example.weight if example.task == "answer" else None
        return Row(encode_example(self._tokenizer, messages, example.target), weight * example.weight, first)

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
