"""Batches side by side give the gradients of batches in turn, and always the same ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from train.batches import Batcher
from train.gradients import add_gradients, threads, workers_for
from train.recipe import Recipe
from train.trie import TrieBatch, merge_tries
from understudy.records import Example

RECIPE = Recipe(rank=4, quantisation="none")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """As on two cores, however many this machine has or other tests use."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    threads.cache_clear()
    yield
    torch.set_num_threads(before)
    threads.cache_clear()


@pytest.fixture
def batches(examples: list[Example], passages: dict[str, str], tokenizer: PreTrainedTokenizerFast) -> list[TrieBatch]:
    return [merge_tries(rows) for rows in Batcher(examples, passages, tokenizer, RECIPE).epoch(0, 0)]


def gradients(model: Any, parts: list[list[TrieBatch]]) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    loss = sum(add_gradients(model, part, 100.0) for part in parts)
    return loss, [p.grad for p in model.parameters() if p.grad is not None]


def test_side_by_side_is_in_turn(make_model: Callable[[Recipe], Any], batches: list[TrieBatch]) -> None:
    model = make_model(RECIPE)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    assert len(batches) > 2
    together, one_by_one = gradients(model, [batches]), gradients(model, [[batch] for batch in batches])
    assert together[0] == pytest.approx(one_by_one[0], rel=1e-6)
    for found, wanted in zip(together[1], one_by_one[1], strict=True):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    for _ in range(2):
        again = gradients(model, [batches])
        assert again[0] == together[0]
        assert all(torch.equal(found, wanted) for found, wanted in zip(again[1], together[1], strict=True))


def test_as_many_at_once_as_there_are_cores_but_one_where_chance_decides(make_model: Callable[[Recipe], Any]) -> None:
    model = make_model(RECIPE)
    assert [workers_for(model, count) for count in (1, 2, 7)] == [1, 2, 2]
    assert workers_for(make_model(RECIPE.model_copy(update={"lora_dropout": 0.1})), 7) == 1
