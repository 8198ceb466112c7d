"""What lies beside an adapter for people: the model card, and the curves of its training."""

from __future__ import annotations

import io
from typing import Any

from train.methods import METHODS
from train.metrics import Row
from understudy.adapters import AdapterManifest
from understudy.terminal import figure

DOES = {"plan": "plans searches", "answer": "answers with verbatim quotes or abstains", "validate": "validates answers"}


def model_card(manifest: AdapterManifest, dataset: dict[str, Any], rows: tuple[int, int]) -> str:
    """The adapter's README.md in the form model hubs read; `dataset` is the summary of what it learnt from, `rows` those it learnt and was validated on."""

    def metric(name: str) -> str:
        return figure(manifest.metrics.get(name))

    def counts(name: str) -> str:
        return ", ".join(f"{count} {kind}" for kind, count in sorted(dataset.get(name, {}).items())) or "–"

    served = "dequantised NF4" if manifest.quantisation == "nf4" else "bf16"
    start = manifest.recipe.get("warm_start")
    chosen: Any = manifest.recipe["steps"]
    steps = [step for step in chosen if step in dataset.get("by_step", {})]
    does, of_steps = "answers as the conversations did that it learnt from", ""
    if steps:
        does, of_steps = f"{', '.join(DOES[step] for step in steps)}, over retrieved passages", f", those of {', '.join(steps)}"
    return f"""---
base_model: {manifest.base}
library_name: peft
tags: [{manifest.method}, rag, understudy]
---
# {manifest.served_name}

An adapter ({manifest.method}) that {does}.

| | |
|---|---|
| base | {manifest.base} ({served} weights `{manifest.served_base_digest[:12]}`) |
| method | {METHODS[manifest.method].source}: {shape_of(manifest)} |
| started from | {start or "fresh weights"}, seed {manifest.seed} |
| loss per token | first {metric("loss_first")}, last {metric("loss_last")}, validation {metric("loss_validation")} |

## Data

Dataset `{manifest.dataset_digest[:12]}`: {rows[0]} rows to learn from, {rows[1]} for validation{of_steps}. The whole dataset:

| | |
|---|---|
| steps | {counts("by_step")} |
| kinds of rows | {counts("by_kind")} |
| groups of documents | {len(manifest.group_ids)}, listed in `manifest.json` |
| questions | {len(manifest.question_digests)}, by digest in `manifest.json` |
| tenants | {", ".join(manifest.tenants)} |

It may repeat what these documents say: show it to nobody who may not read them. Deleting a document does not delete what was learnt
from it; `understudy documents rm` names the adapters to train again.

## Limits

- Only with prompts of version `{manifest.prompt_version}`, and on the weights above: other weights, a merge into others, or another
  quantisation change its answers. `understudy prove` shows that a server has the right ones.
- It answers from passages that it is shown. Without them, on other subjects or in languages that its data lacks, nothing is known of it.
- Its validation score orders answers; what a score is worth has to be calibrated (`understudy calibrate`).

## Evaluation

The losses above are of its own data. `evaluation.json`, where present, compares it with its base on questions about documents that it was not
trained on, and `proof.json` what was served with what was trained. `metrics.jsonl` and `loss.svg` show the training.
"""


def shape_of(manifest: AdapterManifest) -> str:
    """What the method trains, in numbers and layers."""
    targets = ", ".join(manifest.targets)
    if manifest.method in ("prompt_tuning", "prefix_tuning"):
        return f"{manifest.recipe['virtual_tokens']} virtual tokens"
    if manifest.method in ("ia3", "bitfit"):
        return targets
    if manifest.method in ("fishmask", "far"):
        return f"as many entries as rank {manifest.rank} has, {targets}"
    return f"rank {manifest.rank}, alpha {manifest.alpha}, {targets}"


def draw_training(rows: list[Row], validation: list[tuple[int, float]]) -> str:
    """An SVG of training and validation loss above the learning rate, by optimiser step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [row["step"] for row in rows]
    with pyplot.rc_context({"svg.hashsalt": "understudy", "svg.fonttype": "none"}):
        figure, (losses, rates) = pyplot.subplots(2, 1, figsize=(7, 5), sharex=True, height_ratios=(3, 1), layout="constrained")
        losses.plot(steps, [row["loss"] for row in rows], color="#4c78a8", linewidth=1, label="training")
        if validation:
            losses.plot(*zip(*validation, strict=True), "o-", color="#e45756", label="validation")
        losses.set(ylabel="loss per token (nats)")
        losses.legend()
        rates.plot(steps, [row["learning_rate"] for row in rows], color="#54a24b", linewidth=1)
        rates.set(xlabel="optimiser step", ylabel="learning rate")
        for axes in (losses, rates):
            axes.grid(alpha=0.3)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return buffer.getvalue()
