"""What a training run would do, without doing it: rows, truncation, memory and time, and a row with its loss mask."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from train.base import keep_freed_memory, load_trainable
from train.batches import Batcher
from train.dataset import newest_dataset, read_dataset, render
from train.recipe import Recipe
from train.sft import check_rows, first_batches
from train.trie import distinct_tokens, merge_tries, weighted_loss
from understudy.chat import encode_example
from understudy.models import model_path
from understudy.workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from understudy.records import Example

LEARNT, CONTEXT, RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"
OPTIMISER_BYTES = 16  # per trained parameter: weight, gradient and two moments in float32


def dry_run(workspace: Workspace, recipe: Recipe) -> tuple[dict[str, Any], list[str]]:
    """(JSON, lines for a person). Times one real batch, forwards and backwards, on this machine."""
    from transformers import AutoTokenizer

    keep_freed_memory()
    examples, passages, _ = read_dataset(newest_dataset(workspace))
    base = model_path(workspace, recipe.base or workspace.config.models.base)
    tokenizer = AutoTokenizer.from_pretrained(str(base), local_files_only=True)
    rows = [example for example in examples if example.split == "train"]
    batcher = Batcher(rows, passages, tokenizer, recipe)
    check_rows(batcher, len(rows))
    batches = batcher.epoch(recipe.seed, 0)
    sizes = [distinct_tokens(batch) for batch in batches]
    tokens = sum(len(row.encoded.ids) for batch in batches for row in batch)
    model = load_trainable(base, recipe, lambda: first_batches(batcher, recipe))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    typical = merge_tries(batches[sorted(range(len(sizes)), key=sizes.__getitem__)[len(sizes) // 2]])
    seconds = min(_time_step(model, typical) for _ in range(2))
    total = seconds / len(typical.ids) * sum(sizes) * recipe.epochs
    result = {
        "examples": len(rows) - batcher.too_long,
        "left_out_too_long": batcher.too_long,
        "batches": len(batches) * recipe.epochs,
        "tokens": tokens * recipe.epochs,
        "sharing": round(tokens / sum(sizes), 3),
        "trained_parameters": trained,
        "memory_bytes": _memory(model, trained, max(sizes)),
        "seconds": round(min(total, recipe.max_minutes * 60) if recipe.max_minutes else total, 1),
    }
    sample = next((example for unit in batcher.units for example in unit if example.task == "answer"), batcher.units[0][0])
    lines = [f"{key}: {value}" for key, value in result.items()]
    return result, [*lines, "", "one row; the loss falls on the green part:", coloured(tokenizer, sample, passages)]


def coloured(tokenizer: PreTrainedTokenizerBase, example: Example, passages: dict[str, str]) -> str:
    """A row as the model sees it, context dimmed and completion green."""
    encoded = encode_example(tokenizer, render(example, passages), example.target)
    context, completion = (tokenizer.decode(part) for part in (encoded.ids[: encoded.completion], encoded.ids[encoded.completion :]))
    return f"{CONTEXT}{context}{RESET}{LEARNT}{completion}{RESET}"


def _time_step(model: Any, batch: Any) -> float:
    began = time.perf_counter()
    with torch.autocast(model.device.type, torch.bfloat16):
        loss = weighted_loss(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _memory(model: Any, trained: int, nodes: int) -> int:
    """Weights, optimiser and the activations that the largest batch keeps for its backward pass: about 34 values a token,
    layer and hidden unit in 2 bytes, after Korthikanti et al., arXiv:2205.05198, and attention's probabilities."""
    config = model.config
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    activations = 34 * nodes * config.hidden_size * config.num_hidden_layers * 2
    probabilities = nodes * nodes * config.num_attention_heads * config.num_hidden_layers * 2
    return int(weights + trained * OPTIMISER_BYTES + activations + probabilities)
