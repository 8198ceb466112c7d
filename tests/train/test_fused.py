"""The fused layers and the chunked head compute what PEFT's, transformers' and bitsandbytes' own do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from train import head
from train.fused import COPY, GatedSilu, dequantised, frozen_weight, fuse_layers, keep_copies
from train.head import summed_loss, target_logprobs_of

HIDDEN = 64


def lora(**changes: Any) -> Any:
    """Two layers of Llama in float32 with LoRA that is not zero."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    )
    base.requires_grad_(False)
    made = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **changes))
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.1)
    return made


def outcome(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradients of what is trained."""
    model.zero_grad()
    torch.manual_seed(5)
    logits = model(torch.arange(24).view(2, 12)).logits
    logits.sin().sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: tuple[torch.Tensor, dict[str, torch.Tensor]], wanted: tuple[torch.Tensor, dict[str, torch.Tensor]]) -> None:
    assert torch.allclose(found[0], wanted[0], rtol=1e-5, atol=1e-6)
    assert set(found[1]) == set(wanted[1])
    for name, gradient in wanted[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def freeze_some(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "layers.0" in name:
            parameter.requires_grad_(False)


def disable(model: Any) -> None:
    model.base_model.disable_adapter_layers()
    model.get_input_embeddings().weight.requires_grad_(True)


@pytest.mark.parametrize("change", [lambda _model: None, freeze_some, disable, lambda model: model.base_model.model.model.norm.weight.requires_grad_(True)])
def test_a_fused_model_gives_its_own_logits_and_gradients(change: Callable[[Any], object]) -> None:
    models = [lora(), lora()]
    fuse_layers(models[1])
    for model in models:
        change(model)
    assert_same(outcome(models[1]), outcome(models[0]))


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}, {"bias": "lora_only"}, {"use_rslora": True}])
def test_other_kinds_of_lora_keep_their_own_mathematics(changes: dict[str, Any]) -> None:
    models = [lora(**changes), lora(**changes)]
    fuse_layers(models[1])
    assert_same(outcome(models[1]), outcome(models[0]))


def test_copies_are_the_weights_that_four_bits_compute_with() -> None:
    torch.manual_seed(0)
    layer = Linear4bit(128, 96, bias=False, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4")
    layer.weight.data = torch.randn(96, 128, dtype=torch.bfloat16)
    layer = layer.to("cpu").train()
    x = torch.randn(5, 128, dtype=torch.bfloat16, requires_grad=True)
    wanted = layer(x)
    without = frozen_weight(layer, torch.bfloat16)
    assert keep_copies(nn.ModuleList([layer])) == 2 * 96 * 128
    assert torch.equal(getattr(layer, COPY), dequantised(layer)) and torch.equal(getattr(layer, COPY), without)
    assert frozen_weight(layer, torch.bfloat16) is getattr(layer, COPY)
    assert torch.equal(nn.functional.linear(x, frozen_weight(layer, torch.bfloat16)), wanted)


def test_copies_are_not_kept_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Linear4bit(128, 96, bias=False, quant_type="nf4").to("cpu")
    monkeypatch.setattr("train.fused.COPIES_SHARE", 0.0)
    assert keep_copies(layer) == 0 and not hasattr(layer, COPY)


def test_the_gradient_of_a_gated_silu_is_right() -> None:
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(GatedSilu.apply, (gate, up))


class Largest(TorchDispatchMode):
    """Notes the most values that any operation's result holds."""

    values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.values = max(self.values, result.numel())
        return result


@pytest.mark.parametrize("bias", [False, True])
def test_the_chunked_head_has_the_whole_ones_loss_and_gradient_in_bounded_memory(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, count = 3001, 64
    torch.manual_seed(0)
    layer = nn.Linear(16, vocabulary, bias=bias).requires_grad_(False)
    hidden, targets, weights = torch.randn(count, 16, requires_grad=True), torch.randint(0, vocabulary, (count,)), torch.rand(count)
    wanted = -(target_logprobs_of(layer, hidden, targets) * weights).sum()
    [gradient] = torch.autograd.grad(3 * wanted, hidden)
    monkeypatch.setattr(head, "CHUNK_VALUES", 7 * vocabulary)
    with Largest() as largest:
        loss = summed_loss(layer, hidden, targets, weights)
        [found] = torch.autograd.grad(3 * loss, hidden)
    assert torch.isclose(loss, wanted, rtol=1e-6)
    assert torch.allclose(found, gradient, rtol=1e-5, atol=1e-7)
    assert largest.values <= max(7 * vocabulary, layer.weight.numel())


def test_a_head_that_is_trained_gets_its_gradient() -> None:
    layer = nn.Linear(16, 50, bias=False)
    summed_loss(layer, torch.randn(4, 16), torch.arange(4), torch.ones(4)).backward()
    assert layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0
