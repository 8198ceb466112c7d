"""Each method: a shared batch gives the gradients of rows one by one, and what is saved is, elsewhere, what was trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.train.conftest import target_logprobs
from train.attention import Branch, attend_by_branch, dense_mask
from train.methods import METHODS, add_sparse, prepare, rooted, rooted_mask, save_method, serving_warning
from train.recipe import MethodName, Recipe
from train.trie import Row, TrieBatch, merge_tries, weighted_loss
from understudy.chat import Encoded
from understudy.errors import TrainingError
from understudy.files import read_json

SPARSE_METHODS = ("fishmask", "far")
ROWS = [Row(Encoded(ids, completion)) for ids, completion in (([1, 2, 3, 4, 5], 3), ([1, 2, 3, 9, 8, 7], 3), ([1, 2, 6, 6], 2), ([4, 4, 4], 1))]


def recipe_of(method: str) -> Recipe:
    return Recipe.model_validate({"method": method, "rank": 2, "virtual_tokens": 3, "quantisation": "none" if method in SPARSE_METHODS else "nf4"})


@pytest.fixture
def make_base() -> Callable[[bool], LlamaForCausalLM]:
    """The same frozen float32 base each time, for training or as anybody has it."""

    def make(for_training: bool) -> LlamaForCausalLM:
        torch.manual_seed(0)
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        base = LlamaForCausalLM(LlamaConfig(vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=2, initializer_range=0.2, **heads))
        if for_training:
            attend_by_branch(base)
        return base.requires_grad_(False).eval()

    return make


def first_step(model: Any, batches: list[TrieBatch], rate: float = 0.1) -> None:
    """Move the method's weights from where they change nothing."""
    sum(weighted_loss(model, batch) for batch in batches).backward()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data -= rate * parameter.grad.sign()
            parameter.grad = None


def gradients(model: Any, batches: list[TrieBatch]) -> dict[str, torch.Tensor]:
    sum(weighted_loss(model, batch) for batch in batches).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


def alone(model: Any) -> list[torch.Tensor]:
    """Log-probabilities of each row's completion by the model's own forward pass."""
    found = []
    with torch.no_grad():
        for row in ROWS:
            ids = torch.tensor(row.encoded.ids)
            logits = model(input_ids=ids[None]).logits[0, -len(ids) :]  # without those of virtual tokens
            found.append(logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[row.encoded.completion - 1 :, 0])
    return found


def elsewhere(base: Any, folder: Path, method: str) -> Any:
    """The saved adapter on a base that knows nothing of this project."""
    if method in SPARSE_METHODS:
        add_sparse(base, folder)
        return base
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(folder)).eval()


@pytest.mark.parametrize("method", get_args(MethodName))
def test_a_shared_batch_is_rows_one_by_one_and_the_saved_adapter_is_the_trained_one(
    method: str, make_base: Callable[[bool], LlamaForCausalLM], tmp_path: Path
) -> None:
    recipe, together, one_by_one = recipe_of(method), [merge_tries(ROWS)], [merge_tries([row]) for row in ROWS]
    assert len(together[0].ids) < sum(len(batch.ids) for batch in one_by_one)
    untouched = alone(make_base(False))
    model = prepare(make_base(True), recipe, lambda: together)
    if not method.endswith("_tuning"):
        assert torch.allclose(torch.cat([target_logprobs(model, batch) for batch in one_by_one]), torch.cat(untouched), atol=1e-5)
    first_step(model, together)
    shared, single = gradients(model, together), gradients(model, one_by_one)
    assert shared.keys() == single.keys() and shared
    for name, gradient in single.items():
        assert (shared[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max().clamp(min=1e-3), name

    save_method(model, recipe, tmp_path, "some-base")
    assert read_json(tmp_path / "adapter_config.json")["base_model_name_or_path"] == "some-base"
    with torch.no_grad():
        trained = [target_logprobs(model, batch) for batch in one_by_one]
    for here, there, before in zip(trained, alone(elsewhere(make_base(False), tmp_path, method)), untouched, strict=True):
        assert torch.allclose(here, there, atol=1e-5)
        assert not torch.allclose(here, before, atol=1e-4)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_virtual_tokens_under_a_dense_mask_as_on_a_gpu(method: str, make_base: Callable[[bool], LlamaForCausalLM]) -> None:
    batch = merge_tries(ROWS)
    models = [prepare(make_base(by_branch), recipe_of(method), list) for by_branch in (True, False)]
    assert torch.allclose(*(target_logprobs(model, batch) for model in models), atol=1e-5)


def test_a_root_is_seen_by_every_node_and_sees_itself_causally() -> None:
    branches = [Branch(0, 3, ()), Branch(3, 5, ((0, 2),)), Branch(5, 6, ((0, 1), (3, 4))), Branch(6, 8, ())]
    wanted = torch.ones(10, 10, dtype=torch.bool).tril()
    wanted[2:, 2:] = dense_mask(branches, 8)
    assert torch.equal(dense_mask(rooted(branches, 2), 10), wanted)
    bias = torch.zeros(1, 1, 8, 8).masked_fill_(~dense_mask(branches, 8), torch.finfo(torch.float32).min)
    assert torch.equal(rooted_mask(bias, 2)[0, 0] == 0, wanted)


def test_sparse_methods_choose_as_many_entries_as_lora_has_and_far_whole_nodes(make_base: Callable[[bool], LlamaForCausalLM]) -> None:
    batches = [merge_tries(ROWS)]
    for method in SPARSE_METHODS:
        layers = {name: m for name, m in prepare(make_base(True), recipe_of(method), lambda: batches).named_modules() if hasattr(m, "shira_indices")}
        assert len(layers) == 2 * (7 if method == "fishmask" else 3)
        for name, layer in layers.items():
            rows, columns = layer.shira_indices["default"]
            assert len(rows) == 2 * sum(layer.base_layer.weight.shape)
            if method == "far":
                nodes = columns if name.endswith("down_proj") else rows
                assert len(set(nodes.tolist())) == 5  # of 24: 80 entries of 16 each
    with pytest.raises(TrainingError, match="names none of them"):
        prepare(make_base(True), recipe_of("far").model_copy(update={"targets": ["q_proj"]}), lambda: batches)
    with pytest.raises(TrainingError, match="no batches"):
        prepare(make_base(True), recipe_of("fishmask"), list)


def test_only_lora_trains_without_a_warning() -> None:
    assert {method for method in get_args(MethodName) if serving_warning(method) is None} == {"lora"}
    assert METHODS.keys() == set(get_args(MethodName))
    with pytest.raises(ValueError, match="quantisation=none"):
        Recipe(method="fishmask")
    assert Recipe(method="ia3").learning_rate > Recipe().learning_rate
    assert Recipe(method="ia3", learning_rate=1e-5).learning_rate == 1e-5
