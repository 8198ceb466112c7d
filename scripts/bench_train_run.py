"""One trainer in a process of its own, so that its peak memory is its own: `bench_train_run.py JOB.json`, written by bench_train.py.

The job names trainer, setting, base, rows and when to stop; what was measured is written beside it. Held-out losses are computed by one
function for every trainer, outside the time that counts.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from train.base import keep_freed_memory, load_base, load_trainable
from train.recipe import Recipe
from train.sft import take_step
from train.trie import Row, TrieBatch, distinct_tokens, merge_tries, weighted_loss
from understudy.chat import Encoded

RATE, WARM_UP_STEPS, BETAS = Recipe().learning_rate, 5, (0.9, 0.99)


class Watch:
    """Counts training's time alone, notes every step and the held-out loss on the way, and says when to stop."""

    def __init__(self, job: dict[str, Any], model: Any) -> None:
        self.job, self.model = job, model
        self.heldout = [merge_tries(rows_of(unit)) for unit in job["heldout"]]
        self.steps: list[dict[str, float]] = []
        self.curve: list[dict[str, float]] = []
        self.examples = self.done = 0
        self.paused = self.paused_cpu = 0.0
        self.began, self.began_cpu = time.perf_counter(), time.process_time()

    def step(self, examples: int) -> bool:
        """Note a step; True when the job is done."""
        self.examples, self.done = self.examples + examples, self.done + 1
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now, cpu = time.perf_counter() - self.began - self.paused, time.process_time() - self.began_cpu - self.paused_cpu
        self.steps.append({"seconds": now, "processor_seconds": cpu, "examples": self.examples})
        is_last = self.done >= self.job["steps"] or now >= self.job["seconds"]
        if self.heldout and (is_last or self.done % self.job["evaluate_every"] == 0):
            self.curve.append(self.steps[-1] | {"loss": self.evaluate()})
        return is_last

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean held-out loss per completion token."""
        began, cpu = time.perf_counter(), time.process_time()
        self.model.eval()
        losses = []
        for batch in self.heldout:
            with torch.autocast(self.model.device.type, torch.bfloat16):
                losses.append(float(weighted_loss(self.model, batch)))
        self.model.train()
        self.paused += time.perf_counter() - began
        self.paused_cpu += time.process_time() - cpu
        return sum(losses) / sum(float(batch.weights.sum()) for batch in self.heldout)


def rows_of(unit: list[dict[str, Any]]) -> list[Row]:
    """Rows as the trainer takes them, every completion token of weight 1."""
    return [Row(Encoded(row["ids"], row["completion"])) for row in unit]


def batches_of(units: list[list[Row]], budget: int) -> list[TrieBatch]:
    """Whole units, one after the other, under a budget of distinct tokens."""
    batches: list[list[Row]] = []
    for unit in units:
        if batches and distinct_tokens([*batches[-1], *unit]) <= budget:
            batches[-1] = [*batches[-1], *unit]
        else:
            batches.append(unit)
    return [merge_tries(rows) for rows in batches]


def run_ours(job: dict[str, Any]) -> Watch:
    """The product's step over the job's units."""
    keep_freed_memory()
    model = load_trainable(Path(job["base"]), Recipe(quantisation=job["quantisation"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, betas=BETAS, weight_decay=0.0)
    batches = batches_of([rows_of(unit) for unit in job["units"]], job["setting"]["tokens_per_batch"])
    watch = Watch(job, model)
    together = job["setting"]["batches_per_step"]
    for step in cycle([batches[i : i + together] for i in range(0, len(batches), together)]):
        take_step(model, optimizer, step, RATE * min(1.0, (watch.done + 1) / WARM_UP_STEPS), 1.0)
        if watch.step(sum(batch.rows for batch in step)):
            return watch
    raise AssertionError("no batches")


def run_trl(job: dict[str, Any], wrap: Any = None) -> Watch:
    """TRL's SFTTrainer over the same rows, shuffled as it likes; `wrap` prepares the model where another library does."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows = [row for unit in job["units"] for row in unit]
    labels = [[-100] * row["completion"] + row["ids"][row["completion"] :] for row in rows]
    dataset = Dataset.from_dict({"input_ids": [row["ids"] for row in rows], "labels": labels})
    recipe = Recipe()
    lora = LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules=recipe.targets, lora_dropout=0.0, task_type="CAUSAL_LM")
    options = {"gradient_checkpointing": False, "max_length": 2048, "learning_rate": RATE} | job["setting"]
    arguments = SFTConfig(
        output_dir=job["out"] + ".trl",
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=WARM_UP_STEPS,
        adam_beta2=BETAS[1],
        max_steps=job["steps"],
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=0,
        **options,
    )
    per_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * len(rows)
    model, lora_config = (load_base(Path(job["base"]), job["quantisation"]), lora) if wrap is None else (wrap(job, lora), None)
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=dataset, peft_config=lora_config, processing_class=AutoTokenizer.from_pretrained(job["base"])
    )
    examples_per_step = per_step / len(trainer.train_dataset)  # packing leaves fewer, longer rows
    watch = Watch(job, trainer.model)

    class Stop(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = watch.step(examples_per_step)  # type: ignore[arg-type]

    trainer.add_callback(Stop())
    watch.began, watch.began_cpu = time.perf_counter(), time.process_time()
    trainer.train()
    return watch


def unsloth_model(job: dict[str, Any], lora: Any) -> Any:
    """The base and adapter as Unsloth makes them; needs a GPU (not run on this project's machine)."""
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(job["base"], max_seq_length=2048, load_in_4bit=job["quantisation"] == "nf4", dtype=torch.bfloat16)
    return FastLanguageModel.get_peft_model(model, r=lora.r, lora_alpha=lora.lora_alpha, target_modules=list(lora.target_modules), lora_dropout=0.0)


def main() -> None:
    """Run the job and write its result."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.manual_seed(0)
    watch = run_ours(job) if job["trainer"] == "ours" else run_trl(job, unsloth_model if job["trainer"] == "unsloth" else None)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    Path(job["out"]).write_text(json.dumps({"steps": watch.steps, "curve": watch.curve, "peak_memory_bytes": peak}), encoding="utf-8")


if __name__ == "__main__":
    main()
