"""`scripts/bench sweep`: one thing of the default recipe or dataset changed at a time, and what it does to validation rows.

`scripts/bench sweep --workspace W [key=value …]`: keys are a recipe's, or `no_support` and `dose` of `dataset build`; datasets are added to W. `grouped=false`
deals the same rows in batches of the same sizes whatever their passages, so that fewer share a prefix. Every run
trains --steps steps on its own rows and answers for the same ones, the default dataset's validation rows. A line each: `ours` and `peer` are
the loss of answers (nats a token) with and without the change; beside it what the first token decides, to answer or to abstain.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from rag.eval.metrics import validator_auroc
from rag.prompts import ABSTENTION, QUOTE_LABEL
from train.base import keep_freed_memory, load_trainable
from train.batches import Batcher
from train.dataset import build_dataset, read_dataset
from train.recipe import Recipe
from train.sft import fit
from train.trie import Row, merge_tries, source_states, weighted_loss
from understudy.chat import Encoded
from understudy.config import parse_overrides
from understudy.models import model_path
from understudy.progress import show_progress
from understudy.records import Example
from understudy.workspace import open_workspace

CHANGES = ["rank=4", "rank=64", "learning_rate=3e-4", "learning_rate=3e-3", "no_support=0", "no_support=0.5", "dose=0", "dose=3"]
OF_DATASET = ("no_support", "dose")


class Shuffled(Batcher):
    """The same rows in as large batches, drawn from all sets of passages."""

    def epoch(self, seed: int, epoch: int) -> list[list[Row]]:
        """As the batches that they replace, every row once."""
        batches = super().epoch(seed, epoch)
        rows = [row for batch in batches for row in batch]
        random.Random(f"shuffled/{seed}/{epoch}").shuffle(rows)
        left = iter(rows)
        return [list(islice(left, len(batch))) for batch in batches]


def run_one(root: str, change: str, steps: int) -> dict[str, Any]:
    """Train with the change, in this process; what validation rows say."""
    from transformers import AutoTokenizer

    keep_freed_memory()
    workspace, values = open_workspace(root, []), parse_overrides([change] if change else [])
    of_dataset = {key: values.pop(key) for key in OF_DATASET if key in values}
    batcher_class = Batcher if values.pop("grouped", True) else Shuffled
    recipe = Recipe.model_validate({"steps": ["answer"], "epochs": 9, "max_steps": steps, "checkpoint_minutes": 600} | values)
    default, changed = (workspace.datasets / build_dataset(workspace, **options)["dataset"] for options in ({}, of_dataset))
    base = model_path(workspace, workspace.config.models.base)
    tokenizer = AutoTokenizer.from_pretrained(str(base), local_files_only=True)
    rows, passages, _ = read_dataset(changed)
    asked, shown, _ = read_dataset(default)
    batcher = batcher_class([e for e in rows if e.split == "train" and e.task == "answer"], passages, tokenizer, recipe)
    held = [e for e in asked if e.split == "validation" and e.task == "answer"]
    model = load_trainable(base, recipe)
    with tempfile.TemporaryDirectory() as run:
        fit(model, batcher, Batcher([], {}, tokenizer, recipe), recipe, Path(run), lambda line: print(line, file=sys.stderr), show_progress)
    model.eval()
    answered = [e for e in held if e.target != ABSTENTION]
    return {"loss": answer_loss(model, Batcher(answered, shown, tokenizer, recipe)), **decisions(model, held, shown, tokenizer, recipe)}


@torch.no_grad()
def answer_loss(model: Any, batcher: Batcher) -> float:
    """Mean loss of a completion token."""
    loss = tokens = 0.0
    for rows in batcher.canonical():
        batch = merge_tries([Row(row.encoded) for row in rows])
        with torch.autocast(model.device.type, torch.bfloat16):
            loss += float(weighted_loss(model, batch))
        tokens += float(batch.weights.sum())
    return loss / tokens


@torch.no_grad()
def decisions(model: Any, examples: list[Example], passages: dict[str, str], tokenizer: Any, recipe: Recipe) -> dict[str, float]:
    """What the first token decides: the share of the answerable that it abstains from, of the others that it does not, and the AUROC of its odds."""
    quote, abstain = (tokenizer(text, add_special_tokens=False).input_ids[0] for text in (QUOTE_LABEL, ABSTENTION))
    odds: list[float] = []
    answerable: list[bool] = []
    for rows in Batcher(examples, passages, tokenizer, recipe).canonical():
        asked = {tuple(row.encoded.ids[: row.encoded.completion]): row.encoded.ids[row.encoded.completion] != abstain for row in rows}
        batch = merge_tries([Row(Encoded([*prompt, quote], len(prompt))) for prompt in asked])  # a target each, in their order
        with torch.autocast(model.device.type, torch.bfloat16):
            logits = model.get_output_embeddings()(source_states(model, batch))[:, [quote, abstain]].float()
        odds += (logits[:, 0] - logits[:, 1]).tolist()
        answerable += asked.values()
    answers = [odd > 0 for odd in odds]
    false = [not answer for answer, can in zip(answers, answerable, strict=True) if can]
    missed = [answer for answer, can in zip(answers, answerable, strict=True) if not can]
    return {
        "false_abstentions": sum(false) / len(false),
        "answers_without_support": sum(missed) / len(missed),
        "auroc": validator_auroc(odds, answerable) or 0.0,
    }


def main() -> None:
    """The default first, then a line a change."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workspace", required=True)
    parser.add_argument("changes", nargs="*", metavar="key=value", default=CHANGES)
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps of each run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs side by side, a thread each")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(run_one(args.workspace, args.one, args.steps)))
        return

    def apart(change: str) -> dict[str, Any]:
        script = [sys.executable, __file__, "--workspace", args.workspace, "--steps", str(args.steps), "--one", change]
        done = subprocess.run(script, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return dict(json.loads(done.stdout.splitlines()[-1]))

    peer = None
    with ThreadPoolExecutor(args.jobs) as threads:
        for change, found in zip(["", *args.changes], threads.map(apart, ["", *args.changes]), strict=True):
            loss = found.pop("loss")
            peer = peer or loss
            line = {"bench": "sweep", "ours": round(loss, 4), "peer": round(peer, 4), "peer_name": "default", "ratio": round(loss / peer, 3)}
            decided = {key: round(value, 3) for key, value in found.items()}
            print(json.dumps(line | {"unit": "nats a token", "n": args.steps, "change": change or "none", **decided}), flush=True)


if __name__ == "__main__":
    main()
