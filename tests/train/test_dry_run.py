"""What a dry run reckons, as far as it needs no real weights; docs/benchmarks.md holds it against runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from train.batches import Batcher
from train.dry_run import time_steps
from train.memory import activation_bytes
from train.recipe import Recipe
from train.trie import distinct_tokens, merge_tries, weighted_loss
from understudy.records import Example


@pytest.mark.parametrize("changes", [{}, {"rank": 16}, {"gradient_checkpointing": True}], ids=str)
def test_activations_are_counted_as_autograd_keeps_them(
    make_model: Callable[[Recipe], Any], examples: list[Example], passages: dict[str, str], tokenizer: PreTrainedTokenizerFast, changes: dict[str, Any]
) -> None:
    recipe = Recipe(rank=4).model_copy(update=changes)
    model = make_model(recipe)
    batch = merge_tries(max(Batcher(examples, passages, tokenizer, recipe).epoch(0, 0), key=distinct_tokens))
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.shape[-1] != model.config.vocab_size:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
        weighted_loss(model, batch)
    counted = activation_bytes(model, recipe, batch)
    if recipe.gradient_checkpointing:
        inputs = model.config.num_hidden_layers * len(batch.ids) * model.config.hidden_size * 2
        assert inputs <= sum(kept.values()) < counted < activation_bytes(model, Recipe(rank=4), batch)
    else:
        assert sum(kept.values()) == pytest.approx(counted, rel=0.1)


def test_steps_are_timed_as_they_are_taken_and_change_nothing(
    make_model: Callable[[Recipe], Any], examples: list[Example], passages: dict[str, str], tokenizer: PreTrainedTokenizerFast
) -> None:
    recipe = Recipe(rank=4)
    model = make_model(recipe)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    batches = Batcher(examples, passages, tokenizer, recipe).epoch(0, 0)
    assert time_steps(model, recipe, batches, [distinct_tokens(batch) for batch in batches]) > 0
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
