"""What the share of training done decides: the learning rate, the layers that learn, and when to end."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from train.checkpoint import Position
from train.recipe import Recipe

if TYPE_CHECKING:
    from torch.nn import Parameter

LAYER = re.compile(r"\.layers\.(\d+)\.")


def share_done(position: Position, batches_in_epoch: int, recipe: Recipe) -> float:
    """Progress, 1 or more at the end: by epochs, or by time or steps where the recipe bounds those and they run out first."""
    shares = [(position.epoch + position.batch / batches_in_epoch) / recipe.epochs]
    if recipe.max_minutes:
        shares.append(position.seconds / (recipe.max_minutes * 60))
    if recipe.max_steps:
        shares.append(position.steps / recipe.max_steps)
    return max(shares)


def learning_rate(done: float, recipe: Recipe) -> float:
    """Linear warm-up, then the recipe's decay over the progress `done` in [0, 1]; linear and cosine end at zero."""
    warm = min(1.0, (done + 1e-3) / recipe.warmup_ratio) if recipe.warmup_ratio else 1.0
    decay = {"linear": 1.0 - done, "cosine": (1.0 + math.cos(math.pi * done)) / 2, "constant": 1.0}[recipe.lr_scheduler_type]
    return recipe.learning_rate * warm * decay


def thaw(parameters: Mapping[str, Parameter], done: float, recipe: Recipe) -> None:
    """Let the layers learn whose time has come: the last at once, the first when `unfreeze_ratio` of training is done."""
    if not recipe.unfreeze_ratio:
        return
    layer_of = {name: int(found[1]) for name in parameters if (found := LAYER.search(name))}
    layers = sorted(set(layer_of.values()), reverse=True)
    thawed = set(layers[: max(1, math.ceil(len(layers) * done / recipe.unfreeze_ratio))])
    for name, layer in layer_of.items():
        parameters[name].requires_grad_(layer in thawed)


def has_stalled(position: Position, recipe: Recipe) -> bool:
    """Whether the last `early_stopping_patience` validations brought no new best."""
    losses = [loss for _, loss in position.validation]
    return recipe.early_stopping_patience is not None and len(losses) - 1 - losses.index(min(losses)) >= recipe.early_stopping_patience if losses else False
