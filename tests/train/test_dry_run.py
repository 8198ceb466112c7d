"""What a dry run shows and reckons, as far as it needs no real weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from train.batches import Batcher
from train.dataset import render
from train.dry_run import CONTEXT, LEARNT, OPTIMISER_BYTES, RESET, _memory, _time_step, coloured
from train.recipe import Recipe
from train.trie import merge_tries
from understudy.chat import render_prompt
from understudy.records import Example


@pytest.mark.parametrize("task", ["plan", "answer", "validate"])
def test_the_green_part_is_the_completion_with_its_end_of_turn(
    examples: list[Example], passages: dict[str, str], tokenizer: PreTrainedTokenizerFast, task: str
) -> None:
    example = next(example for example in examples if example.task == task)
    prompt = render_prompt(tokenizer, render(example, passages))
    assert coloured(tokenizer, example, passages) == f"{CONTEXT}{prompt}{RESET}{LEARNT}{example.target}<|end|>{RESET}"


def test_memory_is_the_weights_and_grows_with_what_is_trained_and_with_the_batch(make_model: Callable[[Recipe], Any]) -> None:
    model = make_model(Recipe(rank=4))
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    assert _memory(model, 0, 0) == weights
    assert _memory(model, 1000, 0) == weights + 1000 * OPTIMISER_BYTES
    by_nodes = [_memory(model, 0, nodes) for nodes in (0, 256, 512, 1024)]
    assert by_nodes == sorted(set(by_nodes))


def test_a_step_is_timed_as_it_is_trained(
    make_model: Callable[[Recipe], Any], examples: list[Example], passages: dict[str, str], tokenizer: PreTrainedTokenizerFast
) -> None:
    recipe = Recipe(rank=4)
    batch = merge_tries(Batcher(examples, passages, tokenizer, recipe).epoch(0, 0)[0])
    assert _time_step(make_model(recipe), batch) > 0
