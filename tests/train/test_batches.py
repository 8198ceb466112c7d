"""Batches hold every row once an epoch, in an order that the seed decides, under the budget, with the recipe's weights."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from rag.prompts import example_messages
from train.batches import Batcher
from train.recipe import Recipe
from train.trie import Row, distinct_tokens
from understudy.chat import encode_example
from understudy.records import Example

SEEDS = st.integers(0, 2**32)


def asked(tokenizer: PreTrainedTokenizerFast, row: Row) -> str:
    """What tells a row from others whatever its passages are and in which order: question, proposal and target."""
    return re.sub(r"(?s)Sentences near it:.*?<", "<", str(tokenizer.decode(row.encoded.ids)).rpartition("Question: ")[2])


def shown(tokenizer: PreTrainedTokenizerFast, row: Row) -> str:
    """A row's passages, in the order shown; empty for a plan."""
    text = str(tokenizer.decode(row.encoded.ids))
    return text.partition("Passages:\n")[2].partition("\n\nCopy")[0].partition("\n\nIs the")[0]


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, epoch=st.integers(0, 3), budget=st.integers(256, 1500), count=st.integers(1, 48))
def test_every_row_is_dealt_once_an_epoch_within_the_budget(
    examples: list[Example], passages: dict[str, str], tokenizer: PreTrainedTokenizerFast, seed: int, epoch: int, budget: int, count: int
) -> None:
    rows = examples[:count]
    batches = Batcher(rows, passages, tokenizer, Recipe(tokens_per_batch=budget)).epoch(seed, epoch)
    wanted = Counter(asked(tokenizer, Row(encode_example(tokenizer, example_messages(e, passages), e.target))) for e in rows)
    assert Counter(asked(tokenizer, row) for batch in batches for row in batch) == wanted
    assert all(distinct_tokens(batch) <= budget or len(batch) == 1 for batch in batches)


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_the_seed_and_the_epoch_decide_the_order(examples: list[Example], passages: dict[str, str], tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    first, second = (Batcher(examples, passages, tokenizer, Recipe()) for _ in range(2))
    assert first.epoch(seed, 0) == second.epoch(seed, 0)
    orders = [[row.encoded.ids for batch in first.epoch(s, e) for row in batch] for s, e in ((seed, 0), (seed, 1), (seed, 2), (seed + 1, 0), (seed + 2, 0))]
    assert any(order != orders[0] for order in orders[1:3])
    assert any(order != orders[0] for order in orders[3:])


def test_rows_of_one_set_share_an_order_that_changes_by_epoch(examples: list[Example], passages: dict[str, str], tokenizer: PreTrainedTokenizerFast) -> None:
    batcher = Batcher(examples, passages, tokenizer, Recipe())
    seen: dict[frozenset[str], set[str]] = defaultdict(set)
    for epoch in range(6):
        texts = {text for batch in batcher.epoch(0, epoch) for row in batch if (text := shown(tokenizer, row))}
        assert len(texts) == 3  # one order for each of the three sets
        for text in texts:
            seen[frozenset(text.split())].add(text)
    assert any(len(orders) > 1 for orders in seen.values())


def test_validation_shows_passages_in_the_order_of_inference(examples: list[Example], passages: dict[str, str], tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [row for batch in Batcher(examples, passages, tokenizer, Recipe()).canonical() for row in batch]
    wanted = Counter(tuple(encode_example(tokenizer, example_messages(e, passages), e.target).ids) for e in examples)
    assert Counter(tuple(row.encoded.ids) for row in rows) == wanted


def test_weights_are_the_recipes_and_only_answers_have_a_decision(
    examples: list[Example], passages: dict[str, str], tokenizer: PreTrainedTokenizerFast
) -> None:
    recipe = Recipe(decision_weight=7.0, plan_weight=0.25, validate_weight=3.0)
    wanted: Counter[tuple[str, float, float | None]] = Counter()
    for example in examples:
        alone = Row(encode_example(tokenizer, example_messages(example, passages), example.target))
        weight = {"plan": 0.25, "answer": 1.0, "validate": 3.0}[example.task] * example.weight
        wanted[(asked(tokenizer, alone), weight, 7.0 * example.weight if example.task == "answer" else None)] += 1
    rows = [row for batch in Batcher(examples, passages, tokenizer, recipe).epoch(0, 0) for row in batch]
    assert Counter((asked(tokenizer, row), row.weight, row.first_weight) for row in rows) == wanted


def test_longer_rows_are_left_out_and_counted(examples: list[Example], passages: dict[str, str], tokenizer: PreTrainedTokenizerFast) -> None:
    lengths = sorted(len(encode_example(tokenizer, example_messages(e, passages), e.target).ids) for e in examples)
    limit = lengths[len(lengths) // 2]
    batcher = Batcher(examples, passages, tokenizer, Recipe(max_length=limit))
    kept = [row for batch in batcher.canonical() for row in batch]
    assert len(batcher.census.left_out) == sum(length > limit for length in lengths) > 0
    assert sorted(len(row.encoded.ids) for row in kept) == [length for length in lengths if length <= limit]
