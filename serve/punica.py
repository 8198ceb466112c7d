"""The class that vLLM's CPU backend instantiates for LoRA when `serve.cpu_lora` is registered."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from serve.cpu_lora import Packed, Rows, add_low_rank, group_rows, pack

Stack = tuple[torch.Tensor, ...]

# What this file was written against; another set of parameters means that vLLM has moved on.
KNOWN_PARAMETERS = {
    "update_metadata": ["self", "mapping", "lora_index_to_id", "max_loras", "vocab_size", "kwargs"],
    "add_lora_linear": ["self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices", "buffer", "kwargs"],
    "add_lora_logits": ["self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "buffer", "kwargs"],
    "add_lora_embedding": ["self", "y", "x", "lora_b_stacked", "add_inputs", "kwargs"],
}


def check_internals() -> None:
    """Raises TypeError where the stock wrapper's methods are not the known ones."""
    for name, expected in KNOWN_PARAMETERS.items():
        found = list(inspect.signature(getattr(PunicaWrapperCPU, name)).parameters)
        if found != expected:
            raise TypeError(f"{name} takes {found}, not {expected}")
    for name in ("token_lora_indices", "sampler_indices"):
        if not isinstance(getattr(PunicaWrapperCPU, name, None), property):
            raise TypeError(f"{name} is not a property")


class GroupedPunicaWrapper(PunicaWrapperCPU):  # type: ignore[misc]  # vLLM is not analysed
    """Two matrix products per adapter and layer; whatever it does not know goes to the stock implementation."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._token_groups: list[tuple[int, Rows]] = []
        self._sampler_groups: list[tuple[int, Rows]] = []
        self._packed: dict[int, tuple[Stack, int, dict[int, Packed | None]]] = {}  # by the identity of a layer's last B stack

    def update_metadata(self, mapping: LoRAMapping, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **options: Any) -> None:
        """Group the step's rows by adapter, once for all layers."""
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **options)
        self._token_groups = group_rows(self.token_lora_indices)
        self._sampler_groups = group_rows(self.sampler_indices)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: Stack,
        lora_b_stacked: Stack,
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: Stack | None = None,
        **options: Any,
    ) -> None:
        """`y += scale * x @ A.T @ B.T`, each row with its own adapter, slice by slice of the output."""
        if not self._token_groups:
            return
        flat_y, flat_x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        if buffer is not None or options or flat_x.shape[0] != self.token_lora_indices.shape[0] or sum(output_slices) != y.shape[-1]:
            super().add_lora_linear(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, buffer=buffer, **options)
            return
        for slot, rows in self._token_groups:
            packed = self._weights(lora_a_stacked, lora_b_stacked, slot)
            if packed is not None:
                add_low_rank(flat_y, flat_x, rows, packed, scale)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,  # noqa: ARG002
        **options: Any,  # noqa: ARG002
    ) -> None:
        """The same for the language head, whose stock version copies vocabulary × rank for every sampled row.

        Prompt log-probabilities of a batch that mixes adapters leave an adapted language head out.
        """
        flat_y, flat_x = y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1])
        groups = self._sampler_groups
        if flat_x.shape[0] != self.sampler_indices.shape[0]:
            # Prompt log-probabilities: rows of one request, and vLLM does not say whose. (The stock version ends the engine here.)
            groups = [(groups[0][0], slice(None))] if len(groups) == 1 and (self.sampler_indices >= 0).all() else []
        for slot, rows in groups:
            packed = self._weights((lora_a_stacked,), (lora_b_stacked,), slot)
            if packed is not None:
                add_low_rank(flat_y, flat_x, rows, packed, scale)

    def add_lora_embedding(self, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, add_inputs: bool = True, **options: Any) -> None:
        """`y += x @ B.T` for the embedding layer; nothing where no adapter of the batch touches it."""
        if not add_inputs:
            super().add_lora_embedding(y, x, lora_b_stacked, add_inputs, **options)
            return
        for slot, rows in self._token_groups:
            up = lora_b_stacked[slot, 0]
            if up.any():
                y[rows] += (x[rows].to(up.dtype) @ up.t()).to(y.dtype)

    def _weights(self, a_stacked: Stack, b_stacked: Stack, slot: int) -> Packed | None:
        """The slot's packed weights, packed anew when vLLM has written an adapter into the layer (tensor versions count writes)."""
        stacks = (*a_stacked, *b_stacked)
        if any(stack.is_inference() for stack in stacks):  # these do not count writes
            return pack(a_stacked, b_stacked, slot)
        version = sum(stack._version for stack in stacks)
        known = self._packed.get(id(stacks[-1]))
        if known is None or known[1] != version:
            known = (stacks, version, {})  # holding the stacks keeps the id from being used again
            self._packed[id(stacks[-1])] = known
        by_slot = known[2]
        if slot not in by_slot:
            by_slot[slot] = pack(a_stacked, b_stacked, slot)
        return by_slot[slot]
