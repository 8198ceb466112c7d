"""What is checked and shown before the first step: rows, masks, ends, leaks, layers, disk, memory, and a row with its loss mask."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag.prompts import example_messages
from train.batches import Batcher
from train.gradients import workers_for
from train.lint import FEWEST_ROWS
from train.memory import activation_bytes, free_bytes, head_bytes, optimiser_bytes
from train.recipe import Recipe
from train.trie import Row, distinct_tokens, merge_tries
from understudy.chat import encode_example, template_digest
from understudy.digests import digest_of
from understudy.errors import StorageError, TrainingError, UsageError
from understudy.terminal import printable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from understudy.records import Example

LEARNT, CONTEXT, RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"
SHOWN = 3  # offenders of a kind
CHECKPOINT_BYTES = 16  # per trained parameter, in float32: weight, two moments, best weight


def check_rows(batcher: Batcher) -> None:
    """Find rows that would waste a run before it starts; raises TrainingError."""
    census = batcher.census
    if census.rows < FEWEST_ROWS:
        left_out, remedy = "", "give more rows (equal ones count once); a dataset built here grows with `understudy traces import`"
        if census.left_out:
            left_out = f": {len(census.left_out)} are longer than the recipe's max_length"
            remedy = "raise max_length, or lower ingest.chunk_tokens or retrieval.k"
        raise TrainingError(f"{census.rows} training rows are too few{left_out}", remedy)
    if census.faulty:
        first = "; ".join(f"{_named(example)}: {why}" for why, example in census.faulty[:SHOWN])
        raise TrainingError(f"{len(census.faulty)} of {census.rows} rows cannot be learnt, such as {first}", "build the dataset again, or correct its file")


def check_leaks(train_rows: list[Example], validation_rows: list[Example]) -> None:
    """Raise TrainingError where a question, or a group of documents, is on both sides: the validation loss would flatter."""
    asked, groups = {_asked(example) for example in train_rows}, {group for example in train_rows for group in example.group_ids}
    questions = {example.question: None for example in validation_rows if _asked(example) in asked}
    shared = {group for example in validation_rows for group in example.group_ids} & groups
    if questions or shared:
        told = [f"{len(questions)} questions, such as {question[:60]!r}" for question in list(questions)[:1]]
        told += [f"{len(shared)} groups of documents"] if shared else []
        raise TrainingError(
            f"training and validation share {' and '.join(told)}",
            "build the dataset again; what is imported with --split calibration must ask about documents of its own",
        )


def check_layers(config: Any, recipe: Recipe) -> None:
    """Raise UsageError where the recipe names layers that the model has not."""
    beyond = [layer for layer in recipe.layers_to_transform or [] if not 0 <= layer < config.num_hidden_layers]
    if beyond:
        raise UsageError(f"layers_to_transform: there is no layer {beyond[0]}", f"{config.model_type} has layers 0 to {config.num_hidden_layers - 1}")


def check_disk(run: Path, model: PreTrainedModel) -> None:
    """Raise StorageError where two checkpoints and the adapter would not fit."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    needed = trained * (2 * CHECKPOINT_BYTES + 2 * 4)
    place = next(folder for folder in (run, *run.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise StorageError(f"{place} has {free / 1e6:.0f} MB free, and this run needs {needed / 1e6:.0f} MB", "free space, then train again")


def describe_memory(model: PreTrainedModel, recipe: Recipe, batches: list[list[Row]]) -> str:
    """What the largest of the batches will take by estimate, and a warning where that is more than is free; for a person."""
    largest = merge_tries(max(batches, key=distinct_tokens))
    together, free = workers_for(model, min(recipe.batches_per_step, len(batches))), free_bytes()
    needed = optimiser_bytes(model, recipe) + together * (activation_bytes(model, recipe, largest) + head_bytes(model, largest))
    told = f"{together} at once of the largest batch, of {len(largest.ids)} tokens, take about {needed / 1e9:.1f} GB besides the model"
    if needed > free:
        told += f", and {free / 1e9:.1f} GB are free: should memory run out, lower tokens_per_batch or set gradient_checkpointing=true"
    return told


def describe_rows(batcher: Batcher, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the rows are as token ids, and which are left out; for a person."""
    census, limit = batcher.census, batcher.max_length
    lines = [
        f"{census.rows} rows, {census.tokens} tokens, of which {census.learnt / census.tokens:.1%} are learnt; every target ends in {tokenizer.eos_token};"
        f" template {template_digest(tokenizer)[:12]}"
    ]
    if repeated := census.rows - len(census.distinct_rows):
        lines.append(f"{repeated} rows repeat another, token for token")
    if census.left_out:
        longest = sorted(census.left_out, key=lambda pair: -pair[0])[:SHOWN]
        lines.append(
            f"left out, longer than {limit} tokens: {len(census.left_out)} rows; the longest: "
            + "; ".join(f"{length} tokens, {_named(example)}" for length, example in longest)
        )
    return lines


def sample_of(batcher: Batcher) -> Example:
    """A row to show: an answer where there is one."""
    rows = [example for unit in batcher.units for example in unit]
    return next((example for example in rows if example.task == "answer"), rows[0])


def shown_row(tokenizer: PreTrainedTokenizerBase, example: Example, passages: dict[str, str], in_colour: bool) -> list[str]:
    """A row as the model sees it, for a terminal: context dimmed and completion green, or the completion between « and »."""
    encoded = encode_example(tokenizer, example_messages(example, passages), example.target)
    context, completion = (printable(tokenizer.decode(part)) for part in (encoded.ids[: encoded.completion], encoded.ids[encoded.completion :]))
    if in_colour:
        return ["one row; the loss falls on the green part:", f"{CONTEXT}{context}{RESET}{LEARNT}{completion}{RESET}"]
    return ["one row; the loss falls on what stands between « and »:", f"{context}«{completion}»"]


def _asked(example: Example) -> str:
    return digest_of(example.model_dump(include={"question", "messages"}))  # a conversation's last question may be any "and then?"


def _named(example: Example) -> str:
    return f"{example.task} row of {example.question[:60]!r} (trace {example.trace_id[:12]})"
