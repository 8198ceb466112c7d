"""PEFT's log-probabilities, with shared prefixes computed once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.reference import Scorer, shared_prefix
from understudy.chat import Encoded


@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), max_size=8))
def test_shared_prefix_is_the_longest_common_one(first: list[int], second: list[int]) -> None:
    shared = shared_prefix(first, second)
    assert first[:shared] == second[:shared]
    assert shared in (len(first), len(second)) or first[shared] != second[shared]


@pytest.fixture(scope="module")
def small_model() -> Iterator[Any]:
    """A random Llama of two layers, with a random adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=50)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model only waits for more
    yield get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)).eval()
    torch.set_num_threads(threads)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=9), min_size=1, max_size=6), st.data())
def test_scores_with_shared_prefixes_are_those_of_whole_rows(small_model: Any, sequences: list[list[int]], data: st.DataObject) -> None:
    scorer = Scorer(small_model)
    for ids in sequences:
        completion = data.draw(st.integers(1, len(ids) - 1))
        with torch.no_grad():
            whole = small_model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = [float(whole[index - 1, ids[index]]) for index in range(completion, len(ids))]
        assert scorer.logprobs(Encoded(ids, completion)) == pytest.approx(expected, abs=1e-5)


def test_the_reference_without_the_adapter_is_the_base(small_model: Any) -> None:
    row = Encoded([1, 2, 3, 4], 2)
    adapted = Scorer(small_model).logprobs(row)
    with small_model.disable_adapter():
        base = Scorer(small_model).logprobs(row)
    assert np.abs(adapted - base).mean() > 1e-3
