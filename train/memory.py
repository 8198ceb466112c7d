"""Memory that training takes: what a batch keeps for its backward pass, counted from the model's shapes, and what the process holds.

The count follows Korthikanti et al. (arXiv:2205.05198), for a Llama-like layer with LoRA under autocast to two-byte floats.
"""

from __future__ import annotations

import resource
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from train.attention import NAME, plan_blocks
from train.head import CHUNK_VALUES
from train.recipe import Recipe
from train.trie import TrieBatch, backbone

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OPTIMISER_BYTES = {"adamw_torch": 12, "paged_adamw_8bit": 6}  # per trained parameter: float32 gradient and two moments
HEAD_BYTES = 10  # per logit of a chunk at the peak: in two and in four bytes, and its exponential


def activation_bytes(model: PreTrainedModel, recipe: Recipe, batch: TrieBatch) -> int:
    """Bytes that the decoder keeps of a batch for its backward pass; under gradient checkpointing, of one layer and all layers' inputs."""
    config: Any = model.config
    nodes = len(batch.ids)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries, keys = head * config.num_attention_heads, head * config.num_key_value_heads
    hidden, inner = config.hidden_size, config.intermediate_size
    norms = 2 * (2 * hidden + 2 * hidden + 4)  # what enters both and what leaves them, and a number a token
    attention = 2 * (2 * queries + 2 * keys)  # queries, keys, values, and what is attended to
    feed_forward = 2 * 3 * inner  # gate, up, and their product
    adapters = 2 * recipe.rank * len(recipe.targets)
    layer = int(nodes * (norms + attention + feed_forward + adapters))
    if backbone(model).config._attn_implementation == NAME:
        pairs = sum(block.bias.numel() for block in plan_blocks(tuple(batch.branches), model.dtype))
        layer += 2 * config.num_attention_heads * pairs  # the probabilities
    if recipe.gradient_checkpointing:
        return layer + int(config.num_hidden_layers * nodes * 2 * hidden)
    return int(config.num_hidden_layers * layer)


def head_bytes(model: PreTrainedModel, batch: TrieBatch) -> int:
    """Bytes of the logits at their peak, when the backward pass begins."""
    return HEAD_BYTES * min(len(batch.targets) * int(model.config.vocab_size), CHUNK_VALUES)


def optimiser_bytes(model: PreTrainedModel, recipe: Recipe) -> int:
    """Bytes of the gradients and the optimiser's moments."""
    trained: int = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return OPTIMISER_BYTES[recipe.optim] * trained


def peak_bytes() -> int:
    """The most that was held so far: on the GPU where there is one, else by the process (resident)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_bytes() -> int:
    """What may still be taken, on the GPU or the machine."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
