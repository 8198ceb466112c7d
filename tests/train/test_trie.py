"""Prefix sharing is exact: log-probabilities and gradients equal example-by-example training."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from train.attention import NAME, QUERY_BLOCK, Branch, attend_by_branch, dense_mask
from train.trie import Row, check_architecture, distinct_tokens, merge_tries, target_logprobs, weighted_loss
from understudy.chat import Encoded
from understudy.errors import TrainingError

VOCABULARY = 7  # few tokens, so that random rows share prefixes


@pytest.fixture(scope="module", params=["branches", "dense mask"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    made = LlamaForCausalLM(config).float().eval()
    if request.param == "branches":
        attend_by_branch(made)
    return made


@st.composite
def rows(draw: st.DrawFn) -> list[Row]:
    made = []
    for _ in range(draw(st.integers(1, 6))):
        ids = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=2, max_size=12))
        made.append(Row(Encoded(ids, draw(st.integers(0, len(ids) - 1))), draw(st.sampled_from([0.5, 1.0, 2.0])), draw(st.sampled_from([None, 0.0, 3.0]))))
    return made


def loss_alone(model: LlamaForCausalLM, row: Row) -> torch.Tensor:
    ids = torch.tensor(row.encoded.ids)
    alone = {"branches": [Branch(0, len(ids), ())]} if model.config._attn_implementation == NAME else {}
    logprobs = torch.log_softmax(model(ids[None], **alone).logits[0, :-1], dim=-1).gather(1, ids[1:, None])[:, 0]
    weights = torch.full((len(ids) - max(1, row.encoded.completion),), row.weight)
    if row.first_weight is not None and row.encoded.completion > 0:
        weights[0] = row.first_weight
    return -(weights * logprobs[max(1, row.encoded.completion) - 1 :]).sum()


@settings(max_examples=40, deadline=None)
@given(batch=rows())
def test_loss_and_gradients_equal_one_by_one(model: LlamaForCausalLM, batch: list[Row]) -> None:
    model.zero_grad()
    together = weighted_loss(model, merge_tries(batch))
    together.backward()
    shared = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone = torch.stack([loss_alone(model, row) for row in batch]).sum()
    alone.backward()
    assert torch.isclose(together, alone, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            scale = parameter.grad.abs().max().clamp(min=1e-3)
            assert ((shared[name] - parameter.grad).abs().max() / scale) < 1e-4, name


@settings(max_examples=60, deadline=None)
@given(batch=rows())
def test_nodes_are_the_distinct_prefixes(batch: list[Row]) -> None:
    trie = merge_tries(batch)
    prefixes = {tuple(row.encoded.ids[: i + 1]) for row in batch for i in range(len(row.encoded.ids))}
    assert len(trie.ids) == len(prefixes) == distinct_tokens(batch)
    assert torch.equal(dense_mask(trie.branches, len(trie.ids)).sum(dim=1), trie.positions + 1)  # a node sees its ancestors and itself
    total = sum(row.weight * (len(row.encoded.ids) - max(1, row.encoded.completion)) for row in batch)
    total += sum(row.first_weight - row.weight for row in batch if row.first_weight is not None and row.encoded.completion > 0)
    assert float(trie.weights.sum()) == pytest.approx(total)


def test_one_row_is_a_plain_sequence(model: LlamaForCausalLM) -> None:
    row = Row(Encoded([1, 2, 3, 4], 2))
    trie = merge_tries([row])
    assert trie.ids.tolist() == [1, 2, 3, 4]
    assert float(-target_logprobs(model, trie).sum().detach()) == pytest.approx(float(loss_alone(model, row).detach()), rel=1e-5)


def test_long_branches_are_cut_into_blocks_without_a_difference() -> None:
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    dense = LlamaForCausalLM(config).float()
    blocked = LlamaForCausalLM(config).float()
    blocked.load_state_dict(dense.state_dict())
    attend_by_branch(blocked)
    shared = torch.randint(0, 50, (2 * QUERY_BLOCK + 7,)).tolist()
    batch = merge_tries([Row(Encoded(shared + torch.randint(0, 50, (length,)).tolist(), len(shared))) for length in (1, 9, QUERY_BLOCK + 3)])
    losses = [weighted_loss(model, batch) for model in (dense, blocked)]
    assert torch.isclose(*losses, rtol=1e-5)
    for loss in losses:
        loss.backward()
    for name, parameter in dense.named_parameters():
        assert torch.allclose(parameter.grad, blocked.get_parameter(name).grad, rtol=1e-3, atol=1e-5), name


def test_sliding_windows_are_refused() -> None:
    check_architecture(SimpleNamespace(model_type="llama"))
    with pytest.raises(TrainingError):
        check_architecture(SimpleNamespace(model_type="m", sliding_window=64))
    with pytest.raises(TrainingError):
        check_architecture(SimpleNamespace(model_type="m", layer_types=["full_attention", "linear_attention"]))
