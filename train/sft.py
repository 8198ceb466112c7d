"""QLoRA fine-tuning, an explicit loop over prefix-shared batches: resolve, wire, fit."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rag.prompts import PROMPT_VERSION
from train.adapter import AdapterSource, find_finished_run, write_adapter
from train.base import give_back_freed_memory, keep_freed_memory, load_trainable, served_base
from train.batches import Batcher
from train.checkpoint import Position, TrainingState, load_checkpoint, newest_checkpoint, save_checkpoint, seed_step
from train.dataset import find_dataset, read_dataset, rows_to_learn
from train.gradients import add_gradients
from train.methods import serving_warning
from train.metrics import Metrics, find_reporters
from train.optimiser import make_optimizer
from train.preflight import check_disk, check_layers, check_leaks, check_rows, describe_memory, describe_rows, sample_of, shown_row
from train.processes import Processes
from train.recipe import Recipe
from train.schedule import has_stalled, learning_rate, share_done, thaw
from train.stops import Interruption, NotFinite, explained
from train.trie import Row, TrieBatch, merge_tries, weighted_loss
from train.warm_start import find_warm_start, load_warm_start
from understudy.chat import Encoded, template_digest
from understudy.digests import digest_of, digest_of_file
from understudy.models import model_path, weights_digest
from understudy.progress import Progress, SilentProgress, is_colourful
from understudy.workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VALIDATION_BATCHES = 12  # of the validation rows: a bounded share of the time
UNDECIDING = {"report_to", "checkpoint_minutes", "dataset", "fsdp"}  # what a run may change its mind about when it goes on, and what is known by its digest
IDLE = merge_tries([Row(Encoded([0, 0], 1))])  # a pass over it costs next to nothing, and its gradient over an infinite weight is zero
SAMPLED_BATCHES = 16  # that a method chooses by
GIVE_BACK_STEPS = 32  # steps after which freed memory goes back: some tenths of a second each time


def train(workspace: Workspace, recipe: Recipe, report: Callable[[str], None], progress: Callable[[str, int], Progress]) -> dict[str, Any]:
    """Train an adapter on the newest dataset; the result is the command's JSON.

    The same dataset, base and recipe make one run: finished, its adapter is returned; interrupted, it goes on
    from its last checkpoint. Raises TrainingError before the first step for whatever would waste the run.
    """
    from transformers import AutoTokenizer

    keep_freed_memory()
    find_reporters(recipe.report_to)
    processes = Processes()
    processes.check(recipe)
    if not processes.is_main:
        report, progress = (lambda _: None), SilentProgress
    dataset = find_dataset(workspace, recipe.dataset)
    examples, passages, summary = read_dataset(dataset)
    base_id = recipe.base or workspace.config.models.base
    base = model_path(workspace, base_id)
    tokenizer = AutoTokenizer.from_pretrained(str(base), local_files_only=True)
    recipe, start = find_warm_start(workspace, recipe, base, tokenizer)
    reading = [digest_of_file(base / "tokenizer.json"), template_digest(tokenizer), PROMPT_VERSION]  # what turns rows into token ids
    key = digest_of([dataset.name, weights_digest(base), *reading, recipe.model_dump(exclude=UNDECIDING)])
    run = workspace.runs / key
    if found := find_finished_run(workspace, recipe.name, key):
        report("this recipe was already trained on this dataset and base: its adapter is reused")
        shutil.rmtree(run, ignore_errors=True)  # a run killed after its adapter was whole left it
        return found
    train_rows, validation_rows = rows_to_learn(examples, recipe.steps)
    batcher = Batcher(train_rows, passages, tokenizer, recipe)
    validator = Batcher(validation_rows, passages, tokenizer, recipe)
    check_rows(batcher)
    check_leaks(train_rows, validation_rows)
    if warning := serving_warning(recipe.method):
        report(warning)
    if newest_checkpoint(run) is None and processes.is_main:
        sample = shown_row(tokenizer, sample_of(batcher), passages, in_colour=True) if is_colourful(sys.stderr) else []
        for line in [*describe_rows(batcher, tokenizer), *sample]:
            report(line)
    report(f"{len(train_rows)} rows in {len(batcher.units)} sets of passages; loading {base_id} as {recipe.quantisation}")
    model = load_trainable(base, recipe, lambda: first_batches(batcher, recipe))
    check_layers(model.config, recipe)
    if start:
        load_warm_start(model, start[1])
    if recipe.fsdp:
        report(processes.shard(model))
    check_disk(run, model)
    report(describe_memory(model, recipe, batcher.epoch(recipe.seed, 0)))
    with processes.main_first():
        served = served_base(workspace.models, base, base_id, recipe.quantisation)
    position = fit(model, batcher, validator, recipe, run, report, progress, processes)
    with processes.main_first():
        if found := find_finished_run(workspace, recipe.name, key):  # which the main process has just written
            return found
        rows = batcher.census.rows, validator.census.rows
        source = AdapterSource(workspace, recipe, base_id, base, served, dataset.name, summary, rows, key, start[0] if start else None)
        result = write_adapter(model, tokenizer, position, source)
        shutil.rmtree(run, ignore_errors=True)
        return result


def first_batches(batcher: Batcher, recipe: Recipe) -> list[TrieBatch]:
    """Some batches of the first epoch, for methods that choose by gradients what to train."""
    return [merge_tries(rows) for rows in batcher.epoch(recipe.seed, 0)[:SAMPLED_BATCHES]]


def fit(
    model: PreTrainedModel,
    batcher: Batcher,
    validator: Batcher,
    recipe: Recipe,
    run: Path,
    report: Callable[[str], None],
    progress: Callable[[str, int], Progress],
    processes: Processes | None = None,
) -> Position:
    """The training loop. Raises TrainingError when a gradient is not finite or memory runs out, KeyboardInterrupt when asked to stop; a checkpoint stays."""
    processes = processes or Processes()
    state = start_or_resume(model, recipe, run, report)
    position = state.position
    epoch = batcher.epoch(recipe.seed, position.epoch)
    saved = time.monotonic()
    with Metrics(run, recipe.report_to, position.steps, processes.is_main) as metrics, Interruption(report) as interruption, progress("training", 1000) as bar:
        shown = 0
        while (done := share_done(position, len(epoch), recipe)) < 1.0 and not has_stalled(position, recipe):
            began = time.monotonic()
            batches = epoch[position.batch : position.batch + recipe.batches_per_step]
            rate = learning_rate(done, recipe)
            thaw(state.parameters, done, recipe)
            seed_step(recipe.seed, position.steps, processes.index)
            with explained(run, position.steps + 1, batches, batcher.describe):
                step = take_step(model, state.optimizer, [merge_tries(rows) for rows in processes.share(batches)], rate, recipe.max_grad_norm, processes)
            advance(position, len(batches), len(epoch), step)
            if position.steps % GIVE_BACK_STEPS == 0:
                give_back_freed_memory()
            measured = {"step": position.steps, "loss": step.loss, "learning_rate": rate, "grad_norm": step.grad_norm}
            if recipe.eval_steps and position.steps % recipe.eval_steps == 0:
                measured |= validate(model, validator, state, recipe)
            is_due = time.monotonic() - saved > recipe.checkpoint_minutes * 60
            seconds, must_stop, must_save = processes.greatest([time.monotonic() - began, interruption.asked, is_due])
            position.seconds += seconds
            metrics.log(measured | {"tokens_per_second": step.distinct_tokens / seconds, "seconds": position.seconds})
            now_done = int(1000 * min(1.0, share_done(position, len(epoch), recipe)))
            note = f"step {position.steps}, loss {mean(position.losses[-10:]):.3f}, {position.distinct_tokens / position.seconds:.0f} tokens/s"
            bar.advance(now_done - shown, note=note)
            shown = now_done
            if must_stop or must_save:
                save(run, state, processes)
                saved = time.monotonic()
            if must_stop:
                report(f"stopped after step {position.steps}; its checkpoint is in {newest_checkpoint(run)}")
                raise KeyboardInterrupt
            if position.batch == 0 and position.epoch < recipe.epochs:
                epoch = batcher.epoch(recipe.seed, position.epoch)
    save(run, state, processes)
    if not position.validation or position.validation[-1][0] != position.steps:
        validate(model, validator, state, recipe)
    for name, tensor in state.best.items():
        state.parameters[name].data.copy_(tensor)
    return position


def start_or_resume(model: PreTrainedModel, recipe: Recipe, run: Path, report: Callable[[str], None]) -> TrainingState:
    """The state of a run at its newest checkpoint, or at its beginning."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    state = TrainingState(parameters, make_optimizer(parameters.values(), recipe))
    load_checkpoint(run, state)
    if state.position.steps:
        report(f"resuming at step {state.position.steps}, after {state.position.seconds:.0f} s of training")
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return state


@dataclass(frozen=True)
class Step:
    """What one optimiser step measured."""

    loss: float  # mean per weighted token
    grad_norm: float  # before clipping
    tokens: int  # of the rows, unshared
    distinct_tokens: int  # computed


def take_step(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, batches: list[TrieBatch], rate: float, max_norm: float, processes: Processes | None = None
) -> Step:
    """One optimiser step over this process's batches and those of the others. Raises NotFinite, with the weights as they were."""
    processes = processes or Processes()
    model.train()
    [total_weight] = processes.sum([sum(float(batch.weights.sum()) for batch in batches)])
    total_weight = total_weight or 1.0  # rows that the recipe gives no weight teach nothing
    idle_passes = processes.passes_to_keep_up(len(batches))  # asked before, so that the processes ask and gather in the same order
    loss = add_gradients(model, batches, total_weight) + sum(add_gradients(model, [IDLE], math.inf) for _ in range(idle_passes))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    processes.sum_gradients(parameters)
    loss, tokens, distinct = processes.sum([loss, sum(batch.tokens for batch in batches), sum(len(batch.ids) for batch in batches)])
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    if not torch.isfinite(norm):
        raise NotFinite(f"the gradient is not finite (loss {loss:.3f})", "train again with a lower learning_rate, or without those rows")
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return Step(loss, float(norm), int(tokens), int(distinct))


def advance(position: Position, batches: int, batches_in_epoch: int, step: Step) -> None:
    """Move the position past a step over so many batches."""
    position.batch += batches
    if position.batch >= batches_in_epoch:
        position.epoch, position.batch = position.epoch + 1, 0
    position.steps += 1
    position.tokens += step.tokens
    position.distinct_tokens += step.distinct_tokens
    position.losses.append(step.loss)


def save(run: Path, state: TrainingState, processes: Processes) -> None:
    """Write a checkpoint in the main process; none goes on before it is whole."""
    if processes.is_main:
        save_checkpoint(run, state)
    processes.wait()


def validate(model: PreTrainedModel, validator: Batcher, state: TrainingState, recipe: Recipe) -> dict[str, float]:
    """{"validation_loss"}, noted, with the weights if it is the best so far and the recipe keeps the best; empty without validation rows."""
    loss = validation_loss(model, validator)
    if loss is None:
        return {}
    if recipe.load_best_model_at_end and loss < min((before for _, before in state.position.validation), default=math.inf):
        state.best = {name: parameter.detach().clone() for name, parameter in state.parameters.items()}
    state.position.validation.append((state.position.steps, loss))
    return {"validation_loss": loss}


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
