"""The same layers in fewer passes over memory: LoRA projections, RMS norms and gated MLPs as one autograd function each.

PEFT and transformers build these of small operations, each of which reads and writes whole activations, and keep
more of them for the backward pass than it needs. The mathematics is theirs; in low precision a sum is rounded once
where they round it two or three times. The derivatives by hand follow Unsloth's way of doing LoRA, for any device.
A module that is not what it seems (another adapter method, dropout, merged weights, another norm) keeps its own forward.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

COPIES_SHARE = 0.25  # of the memory that is free, at most, for bf16 copies of 4-bit weights
COPY = "bf16_copy"
GATED_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "SmolLM3MLP")


def fuse_layers(model: nn.Module) -> None:
    """Give a PEFT model's plain LoRA linears, and its RMS norms and gated MLPs where they are the usual ones, the forwards of this module."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        own: Callable[..., Tensor] = module.forward
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), nn.Linear):
            module.forward = partial(forward_lora, module, own)
        elif is_rms_norm(module):
            module.forward = partial(forward_norm, module, own)
        elif is_gated_mlp(module):
            module.forward = partial(forward_mlp, module)


def keep_copies(model: nn.Module) -> int:
    """Keep bf16 copies of a CPU model's 4-bit weights where they fit; returns their bytes.

    A forward and a backward pass both compute with the dequantised weight; the copy is that weight, made once.
    On a GPU the memory is what 4 bits are for.
    """
    quantised: list[Any] = [module for module in model.modules() if is_quantised(module)]
    size: int = sum(2 * module.in_features * module.out_features for module in quantised)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if any(module.weight.device.type != "cpu" for module in quantised) or size > COPIES_SHARE * free:
        return 0
    for module in quantised:
        setattr(module, COPY, dequantised(module))
    return size


def is_quantised(module: nn.Module) -> bool:
    """Whether the module is one of bitsandbytes' 4-bit linears."""
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None


def dequantised(module: Any) -> Tensor:
    """The [out, in] bf16 weight that a 4-bit linear computes with."""
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(module.weight.data, module.weight.quant_state)
    return weight.to(torch.bfloat16)


def frozen_weight(module: Any, dtype: torch.dtype) -> Tensor:
    """A frozen linear's [out, in] weight in the dtype to compute in."""
    if not is_quantised(module):
        return module.weight.to(dtype)  # type: ignore[no-any-return]
    kept = getattr(module, COPY, None)
    return (dequantised(module) if kept is None else kept).to(dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, else the input's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def forward_lora(module: Any, own: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A LoRA linear's forward; `own` is PEFT's, for whatever is not plain LoRA without dropout."""
    active = module.active_adapters
    is_plain = len(active) == 1 and active[0] in module.lora_A and active[0] not in module.lora_variant
    if not is_plain or module.disable_adapters or module.merged or args or kwargs or not isinstance(module.lora_dropout[active[0]], nn.Identity):
        return own(x, *args, **kwargs)
    down, up, base = module.lora_A[active[0]], module.lora_B[active[0]], module.get_base_layer()
    if base.weight.requires_grad or up.bias is not None or (base.bias is not None and base.bias.requires_grad):
        return own(x)
    projected: Tensor = LoraLinear.apply(x.to(compute_dtype(x)), down.weight, up.weight, base, module.scaling[active[0]])  # type: ignore[no-untyped-call]
    return projected


class LoraLinear(torch.autograd.Function):
    """x Wᵀ + bias + scaling · x Aᵀ Bᵀ with W frozen; what is kept is x and x Aᵀ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, base: Any, scaling: float) -> Tensor:
        """x [..., in], down [rank, in], up [out, rank] → [..., out] in x's dtype."""
        flat = x.reshape(-1, x.shape[-1])
        bias = None if base.bias is None else base.bias.to(x.dtype)
        out = functional.linear(flat, frozen_weight(base, x.dtype), bias)
        inner = flat @ down.to(x.dtype).T
        out.addmm_(inner, up.to(x.dtype).T, alpha=scaling)
        ctx.save_for_backward(flat, inner, down, up)
        ctx.base, ctx.scaling = base, scaling
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        """Gradients of x, down and up."""
        flat, inner, down, up = ctx.saved_tensors
        above = grads[0].reshape(-1, grads[0].shape[-1]).to(flat.dtype)
        of_inner = (above @ up.to(flat.dtype)) * ctx.scaling
        of_x = of_down = of_up = None
        if ctx.needs_input_grad[0]:
            of_x = above @ frozen_weight(ctx.base, flat.dtype)
            of_x.addmm_(of_inner, down.to(flat.dtype))
            of_x = of_x.view(*grads[0].shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            of_down = (of_inner.T @ flat).to(down.dtype)
        if ctx.needs_input_grad[2]:
            of_up = (above.T @ inner).to(up.dtype) * ctx.scaling
        return of_x, of_down, of_up, None, None


def is_rms_norm(module: nn.Module) -> bool:
    """Whether the module computes weight · x / √(mean x² + ε), rounded as Llama's does: some that are called so do not."""
    if not hasattr(module, "variance_epsilon") or not isinstance(getattr(module, "weight", None), Tensor) or module.weight.requires_grad:
        return False
    weight: Tensor = module.weight  # type: ignore[assignment]
    probe = torch.linspace(-3, 2, 2 * weight.numel(), device=weight.device, dtype=weight.dtype).view(2, -1)
    with torch.no_grad():
        return torch.equal(module(probe), normalised(probe, weight, float(module.variance_epsilon))[0])  # type: ignore[arg-type]


def normalised(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """(the normalised x in its dtype, 1 / √(mean x² + ε) [..., 1] in float32)."""
    wide = x.float()
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * (wide * inverse).to(x.dtype), inverse


def forward_norm(module: Any, own: Callable[..., Tensor], x: Tensor) -> Tensor:
    """An RMS norm's forward."""
    if module.weight.requires_grad:
        return own(x)
    scaled: Tensor = RmsNorm.apply(x, module.weight, float(module.variance_epsilon))  # type: ignore[no-untyped-call]
    return scaled


class RmsNorm(torch.autograd.Function):
    """RMS norm (arXiv:1910.07467) of frozen weight, computed in float32; what is kept is x and a number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """x [..., hidden], weight [hidden] → [..., hidden]."""
        out, inverse = normalised(x, weight, epsilon)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of x."""
        x, weight, inverse = ctx.saved_tensors
        above = (grads[0] * weight).float()
        unit = x.float().mul_(inverse)
        along = (above * unit).mean(-1, keepdim=True)
        return above.sub_(unit.mul_(along)).mul_(inverse).to(x.dtype), None, None


def is_gated_mlp(module: nn.Module) -> bool:
    """Whether the module is down(silu(gate(x)) · up(x)): by its class, because others with the same parts scale between them."""
    from transformers.activations import SiLUActivation

    return type(module).__name__ in GATED_MLPS and isinstance(module.act_fn, SiLUActivation | nn.SiLU)


def forward_mlp(module: Any, x: Tensor) -> Tensor:
    """A gated MLP's forward."""
    projected: Tensor = module.down_proj(GatedSilu.apply(module.gate_proj(x), module.up_proj(x)))  # type: ignore[no-untyped-call]
    return projected


class GatedSilu(torch.autograd.Function):
    """silu(gate) · up, of which only gate and up are kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """Two tensors of one shape → a third."""
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of gate and up."""
        gate, up = ctx.saved_tensors
        of_gate = torch.ops.aten.silu_backward(grads[0] * up, gate)
        return of_gate, functional.silu(gate).mul_(grads[0])
