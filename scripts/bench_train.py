"""Training against TRL's SFTTrainer (and Unsloth on a GPU that has it): same base, rows, precision, learning rate and machine.

`scripts/bench train --workspace W [--parts ...]`, W with a dataset built. Every run is a process of its own (bench_train_run.py).
Parts: `sharing` (five questions over one passage: a chunk, or with `--passage-tokens` also what stands after it) and `apart` (rows that
share no passage) time steps at three settings of each side and compare the best; `loss` gives TRL `--seconds` of training at each of three
settings, on the dataset as built with at most three rows a question, and then measures when ours reaches the lowest held-out loss that
any of them had.
Ratios are of wall time; processor seconds stand beside them, because a busy machine moves those less.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from train.batches import Batcher
from train.dataset import newest_dataset, read_dataset
from train.recipe import Recipe
from train.trie import Row, merge_tries
from understudy.models import model_path
from understudy.records import Chunk, Example
from understudy.workspace import open_workspace

OUT = Path(".bench/train")
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
OURS_TOO = {"OMP_WAIT_POLICY": "PASSIVE"}  # as the command line has it; on a quiet machine the peer is faster without
OURS = tuple({"tokens_per_batch": tokens, "batches_per_step": 2} for tokens in (768, 1536, 3072))
TRL: tuple[dict[str, Any], ...] = (
    {"per_device_train_batch_size": 8, "train_sampling_strategy": "group_by_length"},
    {"per_device_train_batch_size": 8, "padding_free": True, "max_length": None},
    {"per_device_train_batch_size": 1, "packing": True, "packing_strategy": "bfd", "max_length": 2048},
)
TRL_TO_LOSS: tuple[dict[str, Any], ...] = (  # as many rows a step as ours have; with 4 rows, or 8 of like length, its loss rose after half a minute
    {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
    {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "learning_rate": 4e-4},
    {"per_device_train_batch_size": 8, "padding_free": True, "max_length": None, "learning_rate": 4e-4},
)
ROWS_PER_QUESTION, HELDOUT_ROWS, EXAMPLES = 3, 48, 240  # the last: rows a timed part has
Unit = list[dict[str, Any]]


def main() -> None:
    """Print a JSON line for each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workspace", required=True)
    parser.add_argument("--parts", nargs="+", default=["sharing", "apart", "loss"], choices=["sharing", "apart", "loss"])
    parser.add_argument("--base", help="default: the workspace's models.base")
    parser.add_argument("--quantisation", default="nf4", choices=["nf4", "none"])
    parser.add_argument("--steps", type=int, default=3, help="steps of a timed run of the peer, the first of which does not count")
    parser.add_argument("--passage-tokens", type=int, nargs="+", default=[0], help="part `sharing`, once for each: the least length of its passages")
    parser.add_argument("--seconds", type=float, default=150, help="training time of the peer in part `loss`")
    parser.add_argument("--curves", type=Path, default=OUT / "curves", help="where part `loss` writes its curves: this name with .json and .svg")
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    for part in options.parts:
        if part == "sharing":
            for tokens in options.passage_tokens:
                print(json.dumps({"passage_tokens": tokens} | bench.speed(part, bench.five_questions(tokens))), flush=True)
        else:
            print(json.dumps(bench.loss() if part == "loss" else bench.speed(part, bench.apart())), flush=True)


class Bench:
    """The rows, and the runs over them."""

    def __init__(self, options: argparse.Namespace) -> None:
        workspace = self.workspace = open_workspace(options.workspace, [])
        self.options, self.base = options, model_path(workspace, options.base or workspace.config.models.base)
        self.tokenizer = AutoTokenizer.from_pretrained(str(self.base), local_files_only=True)
        self.examples, self.passages, _ = read_dataset(newest_dataset(workspace))
        self.peers = ["trl", *(["unsloth"] if importlib.util.find_spec("unsloth") and torch.cuda.is_available() else [])]
        self.peak = matrix_peak()

    def speed(self, part: str, units: list[Unit]) -> dict[str, Any]:
        """Examples/s of steps of each side at each of its settings; the best of each is compared."""
        runs = []
        for ours, theirs in zip(OURS, TRL, strict=True):  # in turns, so that a slow minute hits both
            runs += [self.run("ours", ours, units, steps=3 * self.options.steps)]
            runs += [self.run(peer, theirs, units, steps=self.options.steps) for peer in self.peers]
        return self.compared(f"train/{part}", units, runs)

    def loss(self) -> dict[str, Any]:
        """When each side reaches the held-out loss that TRL has at the end of its time."""
        units, heldout = self.as_built("train"), self.as_built("validation")
        random.Random(0).shuffle(heldout)
        kept: list[Unit] = []
        while heldout and sum(map(len, kept)) < HELDOUT_ROWS:
            kept.append(heldout.pop())
        trials = [self.run("trl", setting, units, heldout=kept, seconds=self.options.seconds, evaluate_every=2) for setting in TRL_TO_LOSS]
        theirs = min(trials, key=lowest_loss)
        target = lowest_loss(theirs)
        ours = self.run("ours", {"tokens_per_batch": 256, "batches_per_step": 2}, units, heldout=kept, seconds=self.options.seconds, evaluate_every=6)
        theirs_at = next(point for point in theirs["curve"] if point["loss"] <= target)
        ours_at = next((point for point in ours["curve"] if point["loss"] <= target), None)  # None: not in the peer's time
        self.write_curves([ours, *trials])
        line = self.compared("train/loss", units, [ours, theirs])
        same = min(ours["curve"][-1]["examples"], theirs["curve"][-1]["examples"])
        return line | {
            "ours": ours_at and round(ours_at["seconds"], 1),
            "peer": round(theirs_at["seconds"], 1),
            "ratio": ours_at and round(theirs_at["seconds"] / ours_at["seconds"], 2),
            "processor_ratio": ours_at and round(theirs_at["processor_seconds"] / ours_at["processor_seconds"], 2),
            "unit": f"seconds to a held-out loss of {target:.3f} a token",
            "loss_after_as_many_examples": {run["trainer"]: [same, round(loss_at(run["curve"], same), 3)] for run in (ours, theirs)},
            "peer_trials": [{"setting": t["setting"], "examples_per_second": t["examples_per_second"], "loss": round(lowest_loss(t), 3)} for t in trials],
        }

    def compared(self, name: str, units: list[Unit], runs: list[dict[str, Any]]) -> dict[str, Any]:
        """A line that sets the best run of ours against TRL's best, with every run beside."""
        ours, theirs = (max((run for run in runs if run["trainer"] == side), key=lambda run: run["examples_per_second"]) for side in ("ours", "trl"))
        tries = [merge_tries([row_of(row) for row in unit]) for unit in units]
        tokens, distinct, rows = (sum(values) for values in zip(*((t.tokens, len(t.ids), t.rows) for t in tries), strict=True))
        learnt = sum(len(t.targets) for t in tries)
        details = []
        for run in runs:
            computed = distinct if run["trainer"] == "ours" else tokens
            rate = run["examples_per_second"] / rows
            share = rate * self.operations(computed, learnt) / self.peak
            figures = {"tokens_per_second": tokens * rate, "distinct_tokens_per_second": distinct * rate, "matrix_peak_share": share}
            kept = {key: run[key] for key in ("trainer", "setting", "examples_per_second", "examples_per_processor_second", "peak_memory_bytes")}
            details.append(kept | {key: round(value, 3) for key, value in figures.items()})
        return {
            "bench": name,
            "ours": ours["examples_per_second"],
            "peer": theirs["examples_per_second"],
            "peer_name": f"TRL SFTTrainer {theirs['setting']}",
            "ratio": round(ours["examples_per_second"] / theirs["examples_per_second"], 2),
            "processor_ratio": round(ours["examples_per_processor_second"] / theirs["examples_per_processor_second"], 2),
            "unit": "examples/s",
            "n": rows,
            "spread": [ours["spread"], theirs["spread"]],
            "sharing": round(tokens / distinct, 2),
            "matrix_peak_gflops": round(self.peak / 1e9),
            "runs": details,
        }

    def operations(self, tokens: int, learnt: int) -> float:
        """Floating-point operations of matrices for so many tokens, forwards and backwards: 4 for a frozen weight, 6 for one of the adapter;
        the head at the targets alone; attention's scores left out."""
        config, recipe = AutoConfig.from_pretrained(str(self.base), local_files_only=True), Recipe()
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        wide, keys, inner = config.num_attention_heads * head, config.num_key_value_heads * head, config.intermediate_size
        shapes = [(config.hidden_size, wide), *[(config.hidden_size, keys)] * 2, (wide, config.hidden_size), *[(config.hidden_size, inner)] * 3]
        frozen, adapter = sum(a * b for a, b in shapes), sum(recipe.rank * (a + b) for a, b in shapes)
        return config.num_hidden_layers * tokens * (4 * frozen + 6 * adapter) + 4 * learnt * config.vocab_size * config.hidden_size

    def run(self, trainer: str, setting: dict[str, Any], units: list[Unit], **how: Any) -> dict[str, Any]:
        """One run in its own process."""
        job = {"heldout": [], "seconds": 1e9, "steps": 10**6, "evaluate_every": 10**6} | how
        job |= {"trainer": trainer, "setting": setting, "units": units, "base": str(self.base), "quantisation": self.options.quantisation}
        path = OUT / f"{trainer}.json"
        job["out"] = str(OUT / f"{trainer}.result.json")
        path.write_text(json.dumps(job), encoding="utf-8")
        command = [sys.executable, str(Path(__file__).with_name("bench_train_run.py")), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT | (OURS_TOO if trainer == "ours" else {}))
        if done.returncode:
            raise SystemExit(f"{trainer} {setting} failed:\n{done.stderr[-3000:]}")
        measured = json.loads(Path(job["out"]).read_text(encoding="utf-8"))
        first, last = measured["steps"][0], measured["steps"][-1]
        examples = last["examples"] - first["examples"]
        per_step = [(b["examples"] - a["examples"]) / (b["seconds"] - a["seconds"]) for a, b in zip(measured["steps"], measured["steps"][1:], strict=False)]
        measured["examples_per_second"] = round(examples / (last["seconds"] - first["seconds"]), 3)
        measured["examples_per_processor_second"] = round(examples / (last["processor_seconds"] - first["processor_seconds"]), 3)
        measured["spread"] = [round(q, 2) for q in (min(per_step), statistics.median(per_step), max(per_step))]
        print(f"{trainer} {setting}: {measured['examples_per_second']} examples/s", file=sys.stderr, flush=True)
        return measured | {"trainer": trainer, "setting": setting}

    def as_built(self, split: str) -> list[Unit]:
        """The dataset's sets of passages as the product batches them, at most three rows a question."""
        by_question: dict[str, list[Example]] = defaultdict(list)
        for example in self.examples:
            if example.split == split:
                by_question[example.question].append(example)
        rng = random.Random(0)
        capped = [e for rows in by_question.values() for e in rng.sample(rows, min(len(rows), ROWS_PER_QUESTION))]
        batches = Batcher(capped, self.passages, self.tokenizer, Recipe()).epoch(0, 0)
        return [[{"ids": row.encoded.ids, "completion": row.encoded.completion} for row in batch] for batch in batches]

    def five_questions(self, passage_tokens: int) -> list[Unit]:
        """Five answer rows over the first passage of their set, that and what follows it up to `passage_tokens`: what shares most."""
        by_set: dict[tuple[str, ...], list[Example]] = defaultdict(list)
        for example in self.examples:
            if example.split == "train" and example.task == "answer":
                by_set[tuple(example.passage_ids)].append(example.model_copy(update={"passage_ids": example.passage_ids[:1]}))
        units = [rows[:5] for rows in by_set.values() if len(rows) >= 5][: EXAMPLES // 5]
        first = {unit[0].passage_ids[0] for unit in units}
        batcher = Batcher([], {chunk_id: self.with_what_follows(chunk_id, passage_tokens) for chunk_id in first}, self.tokenizer, Recipe())
        return [[encoded(batcher, row) for row in unit] for unit in units]

    def with_what_follows(self, chunk_id: str, tokens: int) -> str:
        """A chunk, and as many of its document's next ones (at its end, of those before) as make it so many tokens."""
        chunk = self.workspace.store.chunks_by_id([chunk_id])[chunk_id]
        document, chunks = self.workspace.store.document(chunk.document_id) or (None, [])
        assert document is not None
        text, nearest = chunk.text, sorted(chunks, key=lambda other: (other.ordinal < chunk.ordinal, abs(other.ordinal - chunk.ordinal)))
        taken: list[Chunk] = []
        while nearest and (not taken or len(self.tokenizer(text).input_ids) < tokens):
            taken.append(nearest.pop(0))
            text = document.text[min(c.start for c in taken) : max(c.end for c in taken)]
        return text

    def apart(self) -> list[Unit]:
        """One answer row of each set: no two share more than the system prompt."""
        seen: set[str] = set()
        units: list[Unit] = []
        batcher = Batcher([], self.passages, self.tokenizer, Recipe())
        for example in self.examples:
            if example.split == "train" and example.task == "answer" and not seen & set(example.passage_ids):
                seen |= set(example.passage_ids)
                units.append([encoded(batcher, example)])
        return units[:EXAMPLES]

    def write_curves(self, runs: list[dict[str, Any]]) -> None:
        """The held-out curves, as JSON and overlaid in an SVG; ours comes first."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        names = ["ours", *(f"TRL, {', '.join(f'{key} {value}' for key, value in run['setting'].items() if value)}" for run in runs[1:])]
        curves = {name: run["curve"] for name, run in zip(names, runs, strict=True)}
        self.options.curves.parent.mkdir(parents=True, exist_ok=True)
        self.options.curves.with_suffix(".json").write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")
        with pyplot.rc_context({"svg.hashsalt": "understudy", "svg.fonttype": "none"}):
            figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
            for (name, curve), colour in zip(curves.items(), ("#4c78a8", "#e45756", "#f2a13b", "#8c6d9f"), strict=True):
                axes.plot([p["seconds"] for p in curve], [p["loss"] for p in curve], "o-", markersize=3, color=colour, label=name)
            axes.set(xlabel="seconds of training", ylabel="held-out loss per token (nats)")
            axes.grid(alpha=0.3)
            axes.legend()
            figure.savefig(self.options.curves.with_suffix(".svg"), metadata={"Date": None})


def encoded(batcher: Batcher, example: Example) -> dict[str, Any]:
    """An example's token ids, its passages in the order of inference."""
    row = batcher._row(example, example.passage_ids).encoded
    return {"ids": row.ids, "completion": row.completion}


def row_of(row: dict[str, Any]) -> Row:
    """As the trie takes it."""
    from understudy.chat import Encoded

    return Row(Encoded(row["ids"], row["completion"]))


def lowest_loss(run: dict[str, Any]) -> float:
    """Of its held-out curve."""
    return float(min(point["loss"] for point in run["curve"]))


def loss_at(curve: list[dict[str, float]], examples: float) -> float:
    """Held-out loss at the last evaluation after at most so many examples (at the first, if that is later)."""
    before = [point["loss"] for point in curve if point["examples"] <= examples]
    return before[-1] if before else curve[0]["loss"]


def matrix_peak() -> float:
    """The most bf16 operations a second that a product of matrices reached here."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    best = 0.0
    for rows, inner, columns in ((1536, 576, 1536), (2048, 2048, 2048), *(((8192, 8192, 8192),) if device == "cuda" else ())):
        left, right = (torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in ((rows, inner), (inner, columns)))
        for _ in range(20):
            if device == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            left @ right
            if device == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2 * rows * inner * columns / (time.perf_counter() - began))
    return best


if __name__ == "__main__":
    main()
