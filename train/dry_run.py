"""What training would do: rows, truncation, memory, time, and one row with the part that is learnt in colour."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from train.base import keep_freed_memory, load_trainable
from train.batches import Batcher
from train.dataset import find_dataset, read_dataset, rows_to_learn
from train.gradients import workers_for
from train.memory import activation_bytes, head_bytes, optimiser_bytes, peak_bytes
from train.optimiser import make_optimizer
from train.preflight import check_layers, check_leaks, check_rows, describe_rows, sample_of, shown_row
from train.recipe import Recipe
from train.sft import first_batches, take_step
from train.stops import is_out_of_memory
from train.trie import Row, distinct_tokens, merge_tries
from understudy.errors import TrainingError
from understudy.models import model_path
from understudy.progress import is_colourful
from understudy.workspace import Workspace

TIMED = (0.1, 0.3, 0.5, 0.7, 0.9)  # the steps that are timed, by size: each stands for a fifth of an epoch


def dry_run(workspace: Workspace, recipe: Recipe) -> tuple[dict[str, Any], list[str]]:
    """(JSON, lines for a person). Takes real steps on this machine, over the largest batches and then five as dealt, with a learning rate of zero.

    It is one process with the whole base, whatever `fsdp` says.
    """
    from transformers import AutoTokenizer

    keep_freed_memory()
    recipe = recipe.model_copy(update={"fsdp": False})
    examples, passages, _ = read_dataset(find_dataset(workspace, recipe.dataset))
    base = model_path(workspace, recipe.base or workspace.config.models.base)
    tokenizer = AutoTokenizer.from_pretrained(str(base), local_files_only=True)
    rows, validation = rows_to_learn(examples, recipe.steps)
    batcher = Batcher(rows, passages, tokenizer, recipe)
    check_rows(batcher)
    check_leaks(rows, validation)
    epoch, at_once = batcher.epoch(recipe.seed, 0), recipe.batches_per_step  # each has the same rows; sizes differ a little, as drawn
    steps = min(recipe.epochs * -(-len(epoch) // at_once), recipe.max_steps or sys.maxsize)
    batches = epoch[: steps * at_once]
    passes = min(recipe.epochs * len(epoch), steps * at_once) / len(batches)
    sizes = [distinct_tokens(batch) for batch in batches]
    tokens = sum(len(row.encoded.ids) for batch in batches for row in batch)
    model = load_trainable(base, recipe, lambda: first_batches(batcher, recipe))
    check_layers(model.config, recipe)
    largest = merge_tries(batches[sizes.index(max(sizes))])
    together = workers_for(model, at_once)
    seconds = passes * time_steps(model, recipe, batches, sizes)
    result = {
        "examples": batcher.census.rows,
        "left_out_too_long": len(batcher.census.left_out),
        "batches": round(passes * len(batches)),
        "steps": steps,
        "tokens": round(passes * tokens),
        "sharing": round(tokens / sum(sizes), 3),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "memory_bytes": peak_bytes(),
        "memory_of": {
            "optimiser": optimiser_bytes(model, recipe),
            "activations": together * activation_bytes(model, recipe, largest),
            "head": together * head_bytes(model, largest),
        },
        "seconds": round(min(seconds, recipe.max_minutes * 60) if recipe.max_minutes else seconds, 1),
    }
    lines = [f"{key}: {value}" for key, value in result.items()]
    return result, [*describe_rows(batcher, tokenizer), *lines, "", *shown_row(tokenizer, sample_of(batcher), passages, is_colourful(sys.stdout))]


def time_steps(model: Any, recipe: Recipe, batches: list[list[Row]], sizes: list[int]) -> float:
    """Seconds that all batches, of so many distinct tokens, will take together; they come as dealt, because the batches of a step wait for the largest of them.

    The largest of all go first, untimed: they warm the machine up and take the memory that training will. Raises TrainingError where
    they do not fit in memory.
    """
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], recipe)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    count = min(recipe.batches_per_step, len(batches))
    largest = [merge_tries(batches[place]) for place in sorted(range(len(batches)), key=sizes.__getitem__)[-count:]]
    try:
        take_step(model, optimizer, largest, 0.0, recipe.max_grad_norm)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        remedy = "lower tokens_per_batch or batches_per_step, or set gradient_checkpointing=true"
        raise TrainingError(f"memory ran out in the largest batch, of {len(largest[-1].ids)} tokens", remedy) from error
    whole = len(batches) - len(batches) % count
    by_size = sorted(range(0, whole, count), key=lambda first: sum(sizes[first : first + count]))
    seconds, computed = 0.0, 0
    for place in TIMED:
        began = time.perf_counter()
        first = by_size[int(place * len(by_size))]
        step = [merge_tries(rows) for rows in batches[first : first + count]]
        computed += take_step(model, optimizer, step, 0.0, recipe.max_grad_norm).distinct_tokens
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds += time.perf_counter() - began
    return seconds / computed * sum(sizes)
