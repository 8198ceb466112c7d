"""Memory that training takes: what a batch keeps for its backward pass, counted from the model's shapes, and what the process holds.

The count follows Korthikanti et al. (arXiv:2205.05198), for a Llama-like layer with LoRA under autocast to two-byte floats.
"""

from __future__ import annotations

import resource
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from train.attention import NAME, QUERY_BLOCK, Branch
from train.recipe import Recipe
from train.trie import TrieBatch, backbone

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OPTIMISER_BYTES = {"adamw_torch": 12, "paged_adamw_8bit": 6}  # per trained parameter: float32 gradient and two moments
HEAD_BYTES = 14  # per target and vocabulary entry at the peak: logits in two and in four bytes, their exponentials and gradients


def activation_bytes(model: PreTrainedModel, recipe: Recipe, batch: TrieBatch) -> int:
    """Bytes that the decoder keeps of a batch for its backward pass; under gradient checkpointing, of one layer and all layers' inputs."""
    config: Any = model.config
    nodes = len(batch.ids)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries, keys = head * config.num_attention_heads, head * config.num_key_value_heads
    hidden, inner = config.hidden_size, config.intermediate_size
    norms = 2 * (4 + 2) * hidden  # what enters both, in float32, and what leaves them
    attention = 2 * (2 * queries + 2 * keys)  # queries, keys, values, and what is attended to
    feed_forward = 2 * 4 * inner  # gate, its activation, up, and their product
    adapters = 2 * recipe.rank * len(recipe.targets)
    layer = int(nodes * (norms + attention + feed_forward + adapters))
    if backbone(model).config._attn_implementation == NAME:
        layer += 2 * config.num_attention_heads * sum(attended_pairs(branch) for branch in batch.branches)  # the probabilities
    if recipe.gradient_checkpointing:
        return layer + int(config.num_hidden_layers * nodes * 2 * hidden)
    return int(config.num_hidden_layers * layer)


def attended_pairs(branch: Branch) -> int:
    """Queries × keys of a branch's blocks: every ancestor, and of the branch itself what does not come after the query's block."""
    size = branch.end - branch.start
    ancestors = sum(end - start for start, end in branch.ancestors)
    return size * ancestors + size * (size + min(size, QUERY_BLOCK)) // 2


def head_bytes(model: PreTrainedModel, batch: TrieBatch) -> int:
    """Bytes of the logits at their peak, when the backward pass begins."""
    return HEAD_BYTES * len(batch.targets) * int(model.config.vocab_size)


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
