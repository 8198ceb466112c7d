"""The gradients of a step's batches, computed side by side on a CPU: a thread a batch.

A small model's operations are too short for several cores to share one: two threads on one batch are no faster than one, two
batches on a thread each nearly twice as fast (docs/benchmarks.md).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from train.trie import TrieBatch, weighted_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def add_gradients(model: PreTrainedModel, batches: Sequence[TrieBatch], total_weight: float) -> float:
    """Add the gradient of the batches' loss over `total_weight` to the trained parameters; returns the loss.

    Gradients are summed in the order of the batches, whatever thread ends first.
    """
    learning = [p for p in model.parameters() if p.requires_grad]

    def compute(batch: TrieBatch) -> tuple[float, tuple[Tensor | None, ...]]:
        # the float32 LoRA weights compute in the base's dtype; torch's cache of them is one for all threads, so it stays off
        with torch.autocast(model.device.type, torch.bfloat16, cache_enabled=False):
            loss = weighted_loss(model, batch) / total_weight
        return loss.item(), torch.autograd.grad(loss, learning, allow_unused=True)

    workers = workers_for(model, len(batches))
    computed = map(compute, batches) if workers == 1 else threads(workers).map(compute, batches)
    loss = 0.0
    for part, gradients in computed:
        loss += part
        for parameter, gradient in zip(learning, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
    return loss


def workers_for(model: PreTrainedModel, batches: int) -> int:
    """How many batches are computed at once: on a CPU as many as there are cores; one where chance, or what processes gather, depends on who is first."""
    ordered = any(isinstance(module, FSDPModule) or (isinstance(module, nn.Dropout) and module.p > 0) for module in model.modules())
    return 1 if model.device.type != "cpu" or ordered else max(1, min(batches, len(os.sched_getaffinity(0)), torch.get_num_threads()))


@lru_cache(maxsize=1)
def threads(workers: int) -> ThreadPoolExecutor:
    """So many threads, each with its share of the cores."""
    return ThreadPoolExecutor(workers, "gradients", torch.set_num_threads, (max(1, torch.get_num_threads() // workers),))
