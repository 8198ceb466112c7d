"""QLoRA fine-tuning, an explicit loop over prefix-shared batches: resolve, wire, fit."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from train.adapter import AdapterSource, find_finished_run, write_adapter
from train.base import keep_freed_memory, load_trainable, served_base
from train.batches import Batcher
from train.checkpoint import Position, load_checkpoint, save_checkpoint
from train.dataset import newest_dataset, read_dataset
from train.methods import serving_warning
from train.recipe import Recipe
from train.trie import TrieBatch, merge_tries, weighted_loss
from understudy.digests import digest_of
from understudy.errors import TrainingError
from understudy.models import model_path, weights_digest
from understudy.progress import Progress
from understudy.workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VALIDATION_BATCHES = 12  # of the validation rows: a bounded share of the time

SAMPLED_BATCHES = 16  # that a method chooses by


def train(workspace: Workspace, recipe: Recipe, report: Callable[[str], None], progress: Callable[[str, int], Progress]) -> dict[str, Any]:
    """Train an adapter on the newest dataset; the result is the command's JSON.

    The same dataset, base and recipe make one run: finished, its adapter is returned; interrupted, it goes on
    from its last checkpoint. Raises TrainingError before the first step for whatever would waste the run.
    """
    from transformers import AutoTokenizer

    keep_freed_memory()
    dataset = newest_dataset(workspace)
    examples, passages, summary = read_dataset(dataset)
    base_id = recipe.base or workspace.config.models.base
    base = model_path(workspace, base_id)
    key = digest_of([dataset.name, weights_digest(base), recipe.model_dump()])
    if found := find_finished_run(workspace, recipe.name, key):
        report("this recipe was already trained on this dataset and base: its adapter is reused")
        return found
    tokenizer = AutoTokenizer.from_pretrained(str(base), local_files_only=True)
    train_rows, validation_rows = ([e for e in examples if e.split == split] for split in ("train", "validation"))
    batcher = Batcher(train_rows, passages, tokenizer, recipe)
    validator = Batcher(validation_rows, passages, tokenizer, recipe)
    check_rows(batcher, len(train_rows))
    if warning := serving_warning(recipe.method):
        report(warning)
    report(f"{len(train_rows)} rows in {len(batcher.units)} sets of passages; loading {base_id} as {recipe.quantisation}")
    model = load_trainable(base, recipe, lambda: first_batches(batcher, recipe))
    served = served_base(workspace.models, base, base_id, recipe.quantisation)
    run = workspace.runs / key
    position = fit(model, batcher, validator, recipe, run, report, progress)
    source = AdapterSource(workspace, recipe, base_id, base, served, dataset.name, summary, key)
    result = write_adapter(model, tokenizer, position, source)
    shutil.rmtree(run, ignore_errors=True)
    return result


def first_batches(batcher: Batcher, recipe: Recipe) -> list[TrieBatch]:
    """Some batches of the first epoch, for methods that choose by gradients what to train."""
    return [merge_tries(rows) for rows in batcher.epoch(recipe.seed, 0)[:SAMPLED_BATCHES]]


def check_rows(batcher: Batcher, count: int) -> None:
    """Find what would waste a run before it starts; raises TrainingError."""
    if count < 2:
        raise TrainingError(f"{count} training rows are too few", "import more answers with `understudy traces import`, then build the dataset again")
    if not batcher.units:
        raise TrainingError("every row is longer than the recipe's max_length", "raise max_length, or lower ingest.chunk_tokens or retrieval.k")


def fit(
    model: PreTrainedModel,
    batcher: Batcher,
    validator: Batcher,
    recipe: Recipe,
    run: Path,
    report: Callable[[str], None],
    progress: Callable[[str, int], Progress],
) -> Position:
    """The training loop. Raises TrainingError when a gradient is not finite; the last checkpoint stays."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=recipe.weight_decay)
    position = load_checkpoint(run, parameters, optimizer)
    if position.steps:
        report(f"resuming at step {position.steps}, after {position.seconds:.0f} s of training")
    epochs = [batcher.epoch(recipe.seed, epoch) for epoch in range(recipe.epochs)]
    total = sum(len(batches) for batches in epochs)
    saved = time.monotonic()
    with progress("training", 1000) as bar:
        shown = 0
        while (done := share_done(position, total, recipe)) < 1.0:
            began = time.monotonic()
            batches = [merge_tries(rows) for rows in epochs[position.epoch][position.batch : position.batch + recipe.batches_per_step]]
            loss = take_step(model, optimizer, batches, learning_rate(done, recipe), recipe.max_grad_norm)
            advance(position, batches, len(epochs[position.epoch]), loss, time.monotonic() - began)
            now_done = int(1000 * min(1.0, share_done(position, total, recipe)))
            bar.advance(
                now_done - shown,
                note=f"step {position.steps}, loss {mean(position.losses[-10:]):.3f}, {position.distinct_tokens / position.seconds:.0f} tokens/s",
            )
            shown = now_done
            if time.monotonic() - saved > recipe.checkpoint_minutes * 60:
                save_checkpoint(run, parameters, optimizer, position)
                saved = time.monotonic()
    save_checkpoint(run, parameters, optimizer, position)
    if not position.validation or position.validation[-1][0] != position.steps:
        validation = validation_loss(model, validator)
        if validation is not None:
            position.validation.append((position.steps, validation))
    return position


def take_step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, batches: list[TrieBatch], rate: float, max_norm: float) -> float:
    """One optimiser step over the batches; returns the mean loss per weighted token. Raises TrainingError when the gradient is not finite."""
    model.train()
    total_weight = sum(float(batch.weights.sum()) for batch in batches)
    loss = 0.0
    for batch in batches:
        with torch.autocast(model.device.type, torch.bfloat16):  # the float32 LoRA weights compute in the base's dtype
            part = weighted_loss(model, batch) / total_weight
        part.backward()  # type: ignore[no-untyped-call]
        loss += part.item()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    if not torch.isfinite(norm):
        raise TrainingError(f"the gradient is not finite (loss {loss:.3f})", "train again with a lower learning_rate")
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return loss


def share_done(position: Position, total_batches: int, recipe: Recipe) -> float:
    """Progress in [0, 1] by batches, or by time where the recipe sets max_minutes and time runs out first."""
    by_batches = position.batches / total_batches
    return max(by_batches, position.seconds / (recipe.max_minutes * 60)) if recipe.max_minutes else by_batches


def learning_rate(done: float, recipe: Recipe) -> float:
    """Linear warm-up, then linear decay to zero over the progress `done`."""
    warm = min(1.0, (done + 1e-3) / recipe.warmup_ratio) if recipe.warmup_ratio else 1.0
    return recipe.learning_rate * warm * (1.0 - done)


def advance(position: Position, batches: list[TrieBatch], batches_in_epoch: int, loss: float, seconds: float) -> None:
    """Move the position past a step."""
    position.batches += len(batches)
    position.batch += len(batches)
    if position.batch >= batches_in_epoch:
        position.epoch, position.batch = position.epoch + 1, 0
    position.steps += 1
    position.seconds += seconds
    position.tokens += sum(batch.tokens for batch in batches)
    position.distinct_tokens += sum(len(batch.ids) for batch in batches)
    position.losses.append(loss)


@torch.no_grad()
def validation_loss(model: PreTrainedModel, validator: Batcher) -> float | None:
    """Mean loss per weighted token over the first validation batches, or None where there are none."""
    model.eval()
    loss = weight = 0.0
    for number, rows in enumerate(validator.canonical()):
        if number == VALIDATION_BATCHES:
            break
        batch = merge_tries(rows)
        with torch.autocast(model.device.type, torch.bfloat16):
            loss += float(weighted_loss(model, batch))
        weight += float(batch.weights.sum())
    return loss / weight if weight else None


def mean(values: list[float]) -> float:
    """Mean of a non-empty list."""
    return sum(values) / len(values)
