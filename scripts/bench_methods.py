"""`scripts/bench methods`: the training methods on a workspace's newest dataset, the same batches for each.

Each run is a process of its own: it trains on the batches of the first --steps steps (rate decayed to zero by then), then takes the validation loss
as `train` does. `ours` is the method's validation loss, `peer` LoRA's in the same call, both in nats a weighted token, `spread` the method's lowest and
highest over --seeds at the better rate. The validation rows choose between the rates given, for every method alike.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

from train.recipe import MethodName, Recipe
from understudy.adapters import is_served


def run_one(workspace_root: str, recipe: Recipe, steps: int) -> dict[str, Any]:
    """Train in this process; what is measured."""
    from transformers import AutoTokenizer

    from train.base import keep_freed_memory, load_trainable
    from train.batches import Batcher
    from train.dataset import newest_dataset, read_dataset
    from train.sft import first_batches, fit
    from understudy.models import model_path
    from understudy.progress import show_progress
    from understudy.workspace import open_workspace

    class FirstBatches(Batcher):
        def epoch(self, seed: int, epoch: int) -> list[Any]:
            return super().epoch(seed, epoch)[: steps * recipe.batches_per_step]

    keep_freed_memory()
    workspace = open_workspace(workspace_root)
    examples, passages, _ = read_dataset(newest_dataset(workspace))
    base = model_path(workspace, recipe.base or workspace.config.models.base)
    tokenizer = AutoTokenizer.from_pretrained(str(base), local_files_only=True)
    batcher = FirstBatches([e for e in examples if e.split == "train"], passages, tokenizer, recipe)
    validator = Batcher([e for e in examples if e.split == "validation"], passages, tokenizer, recipe)
    model = load_trainable(base, recipe, lambda: first_batches(batcher, recipe))
    began = time.process_time()
    with tempfile.TemporaryDirectory() as run:
        position = fit(model, batcher, validator, recipe, Path(run), lambda line: print(line, file=sys.stderr), show_progress)
    return {
        "validation": position.validation[-1][1],
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "steps": position.steps,
        "seconds_a_step": round(position.seconds / position.steps, 2),
        "processor_seconds": round(time.process_time() - began),  # of training and validation: a busy machine moves it less
        "distinct_tokens_per_second": round(position.distinct_tokens / position.seconds),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def run_apart(workspace: str, recipe: Recipe, steps: int) -> dict[str, Any]:
    """The same in a process of its own."""
    script = [sys.executable, __file__, "--workspace", workspace, "--steps", str(steps), "--recipe", recipe.model_dump_json()]
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}  # as the command line has it
    return dict(json.loads(subprocess.run(script, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout.splitlines()[-1]))


def measure(workspace: str, method: str, quantisation: str, steps: int, rates: list[float], seeds: int) -> dict[str, Any]:
    """The best rate's figures, and the spread of its validation loss over the seeds."""
    shared = {"method": method, "quantisation": quantisation, "epochs": 1, "checkpoint_minutes": 60}
    recipes = [Recipe.model_validate(shared | ({"learning_rate": rate} if rate else {})) for rate in rates]
    tried = [(run_apart(workspace, recipe, steps), recipe) for recipe in recipes]
    best, recipe = min(tried, key=lambda pair: pair[0]["validation"])
    losses = [best["validation"], *(run_apart(workspace, recipe.model_copy(update={"seed": seed}), steps)["validation"] for seed in range(1, seeds))]
    return best | {
        "validation": statistics.mean(losses),
        "spread": [round(min(losses), 4), round(max(losses), 4)],
        "learning_rate": recipe.learning_rate,
        "rates": {r.learning_rate: round(found["validation"], 4) for found, r in tried},
    }


def main() -> None:
    """One line a method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workspace", required=True)
    parser.add_argument("--methods", default=",".join(get_args(MethodName)), help="lora is measured first, unless --lora gives its loss")
    parser.add_argument("--lora", type=float, help="LoRA's validation loss, measured before")
    parser.add_argument("--quantisation", choices=["nf4", "none"], default="none", help="none, because some methods need it")
    parser.add_argument("--steps", type=int, default=40, help="optimiser steps of each run")
    parser.add_argument("--rates", default="", help="learning rates to try, the best kept; default: the method's own")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--recipe", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.recipe:
        print(json.dumps(run_one(args.workspace, Recipe.model_validate_json(args.recipe), args.steps)))
        return
    lora, failed = args.lora, []
    for method in args.methods.split(","):
        try:
            found = measure(args.workspace, method, args.quantisation, args.steps, [float(rate or 0) for rate in args.rates.split(",")], args.seeds)
        except subprocess.CalledProcessError:  # its message is on stderr; the others are measured all the same
            failed.append(method)
            continue
        loss = found.pop("validation")
        if method == "lora" and lora is None:
            lora = loss
        row = {"bench": "methods", "ours": round(loss, 4), "peer": lora and round(lora, 4), "peer_name": "lora", "ratio": lora and round(loss / lora, 3)}
        row |= {"unit": "nats a token", "n": args.seeds, "method": method, "quantisation": args.quantisation, "served": is_served(method)}
        print(json.dumps(row | found), flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
