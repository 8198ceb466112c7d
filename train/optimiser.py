"""The optimisers of a recipe."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from train.recipe import Recipe

if TYPE_CHECKING:
    from torch.nn import Parameter

BETAS = (0.9, 0.99)


def make_optimizer(parameters: Iterable[Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW with float32 moments, or with blockwise 8-bit ones (arXiv:2110.02861) that a GPU may page out; on a CPU they just stay in memory."""
    if recipe.optim == "adamw_torch":
        return torch.optim.AdamW(parameters, lr=recipe.learning_rate, betas=BETAS, weight_decay=recipe.weight_decay)
    from bitsandbytes.optim import PagedAdamW8bit

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer: torch.optim.Optimizer = PagedAdamW8bit(list(parameters), lr=recipe.learning_rate, betas=BETAS, weight_decay=recipe.weight_decay)
    return optimizer
