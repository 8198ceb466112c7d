"""Write a trained adapter: weights, configuration, manifest, model card and loss curve, in one whole folder."""

from __future__ import annotations

import importlib.metadata
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rag.prompts import PROMPT_VERSION
from train.checkpoint import Position
from train.methods import METHODS, save_method
from train.recipe import Recipe
from understudy.adapters import CONFIG, WEIGHTS, adapter_digest
from understudy.chat import template_digest
from understudy.digests import digest_of_file
from understudy.files import read_json, whole_folder, write_json, write_text
from understudy.models import weights_digest
from understudy.records import AdapterManifest
from understudy.workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
RESULT = "training.json"  # the run's key and the command's JSON, to return when the same run is asked for again


@dataclass(frozen=True)
class AdapterSource:
    """Where an adapter comes from."""

    workspace: Workspace
    recipe: Recipe
    base_id: str
    base: Path
    served_base: Path
    dataset: str
    dataset_summary: dict[str, Any]
    key: str


def find_finished_run(workspace: Workspace, name: str, key: str) -> dict[str, Any] | None:
    """The result of a finished run with this key, or None."""
    for path in (workspace.adapters / name).glob(f"*/{RESULT}"):
        result = read_json(path)
        if result["key"] == key:
            return dict(result["result"]) | {"reused": True}
    return None


def write_adapter(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, position: Position, source: AdapterSource) -> dict[str, Any]:
    """Register the adapter under its digest; returns the `train` command's JSON."""
    recipe, workspace = source.recipe, source.workspace
    staging = workspace.runs / source.key / "adapter"
    with whole_folder(staging) as scratch:
        save_method(model, recipe, scratch, source.base_id)
    digest = adapter_digest(staging, weights_digest(source.served_base))
    manifest = _manifest(tokenizer, position, source, digest)
    target = workspace.adapters / recipe.name / digest
    result = _result(position, source, manifest, workspace.relative(target))
    with whole_folder(target) as scratch:
        for name in (WEIGHTS, CONFIG):
            (scratch / name).write_bytes((staging / name).read_bytes())
        write_json(scratch / "manifest.json", manifest.model_dump())
        write_json(scratch / "losses.json", {"train": position.losses, "validation": position.validation})
        write_text(scratch / "loss.svg", loss_curve(position))
        write_text(scratch / "README.md", model_card(manifest))
        write_json(scratch / RESULT, {"key": source.key, "result": result})
    return result


def _manifest(tokenizer: PreTrainedTokenizerBase, position: Position, source: AdapterSource, digest: str) -> AdapterManifest:
    recipe, summary = source.recipe, source.dataset_summary
    return AdapterManifest(
        name=recipe.name,
        digest=digest,
        base=source.base_id,
        base_digest=weights_digest(source.base),
        served_base_digest=weights_digest(source.served_base),
        quantisation=recipe.quantisation,
        tokenizer_digest=digest_of_file(source.base / "tokenizer.json"),
        chat_template_digest=template_digest(tokenizer),
        prompt_version=PROMPT_VERSION,
        dataset_digest=source.dataset,
        recipe=recipe.model_dump(),
        seed=recipe.seed,
        method=recipe.method,
        rank=recipe.rank,
        alpha=recipe.alpha,
        targets=recipe.targets,
        packages={name: importlib.metadata.version(name) for name in PACKAGES},
        metrics={"loss_first": position.losses[0], "loss_last": _last(position), "loss_validation": _validation(position)},
        tenants=summary["tenants"],
        group_ids=summary["group_ids"],
        question_digests=summary["question_digests"],
        created_at=time.time(),
    )


def _result(position: Position, source: AdapterSource, manifest: AdapterManifest, path: str) -> dict[str, Any]:
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "adapter": manifest.served_name,
        "digest": manifest.digest,
        "path": path,
        "examples": source.dataset_summary["examples"]["train"],
        "tokens": position.tokens,
        "seconds": round(position.seconds, 1),
        "tokens_per_second": round(position.tokens / position.seconds, 1),
        "distinct_tokens_per_second": round(position.distinct_tokens / position.seconds, 1),
        "loss": {"first": position.losses[0], "last": _last(position), "validation": _validation(position)},
        "peak_memory_bytes": peak,
        "steps": position.steps,
    }


def _last(position: Position) -> float:
    tail = position.losses[-10:]
    return sum(tail) / len(tail)


def _validation(position: Position) -> float | None:
    return position.validation[-1][1] if position.validation else None


def loss_curve(position: Position) -> str:
    """An SVG of the training and validation loss by step."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "understudy", "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
        axes.plot(range(1, len(position.losses) + 1), position.losses, color="#4c78a8", linewidth=1, label="training")
        if position.validation:
            axes.plot(*zip(*position.validation, strict=True), "o-", color="#e45756", label="validation")
        axes.set(xlabel="optimiser step", ylabel="loss per token (nats)")
        axes.grid(alpha=0.3)
        axes.legend()
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return buffer.getvalue()


def model_card(manifest: AdapterManifest) -> str:
    """The adapter's README.md in the form model hubs read."""

    def figure(name: str) -> str:
        value = manifest.metrics.get(name)
        return "–" if value is None else f"{value:.3f}"

    return f"""---
base_model: {manifest.base}
library_name: peft
tags: [{manifest.method}, rag, understudy]
---
# {manifest.served_name}

An adapter ({manifest.method}) that plans, answers with verbatim quotes, abstains and validates over retrieved passages.
It works only with the prompts of version `{manifest.prompt_version}` and on the weights it was trained on.

| | |
|---|---|
| base | {manifest.base} ({"dequantised NF4" if manifest.quantisation == "nf4" else "bf16"} weights `{manifest.served_base_digest[:12]}`) |
| dataset | `{manifest.dataset_digest[:12]}` |
| method | {METHODS[manifest.method].source}: rank {manifest.rank}, alpha {manifest.alpha}, {", ".join(manifest.targets)} |
| loss per token | first {figure("loss_first")}, last {figure("loss_last")}, validation {figure("loss_validation")} |

`manifest.json` holds its whole lineage; `proof.json` and `evaluation.json`, where present, what was shown of it.
"""
