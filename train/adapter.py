"""Write a trained adapter: weights, configuration, manifest, model card, metrics and curves, in one whole folder."""

from __future__ import annotations

import importlib.metadata
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag.prompts import PROMPT_VERSION
from train.card import draw_training, model_card
from train.checkpoint import Position
from train.memory import peak_bytes
from train.methods import save_method
from train.metrics import FILE as METRICS
from train.metrics import TENSORBOARD
from train.recipe import Recipe
from understudy.adapters import CONFIG, WEIGHTS, AdapterManifest, adapter_digest
from understudy.chat import template_digest
from understudy.digests import digest_of_file
from understudy.files import read_json, read_jsonl, whole_folder, write_json, write_jsonl, write_text
from understudy.models import weights_digest
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
    rows: tuple[int, int]  # of it, learnt and validated on
    key: str
    start: AdapterManifest | None = None  # the adapter that training began from


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
        run = workspace.runs / source.key
        if (run / TENSORBOARD).is_dir():
            shutil.copytree(run / TENSORBOARD, scratch / TENSORBOARD)
        rows = read_jsonl(run / METRICS)
        write_jsonl(scratch / METRICS, rows)
        write_text(scratch / "loss.svg", draw_training(rows, position.validation))
        write_text(scratch / "README.md", model_card(manifest, source.dataset_summary, source.rows))
        write_json(scratch / RESULT, {"key": source.key, "result": result})
    return result


def _manifest(tokenizer: PreTrainedTokenizerBase, position: Position, source: AdapterSource, digest: str) -> AdapterManifest:
    recipe, learnt = source.recipe, [source.dataset_summary, *([source.start.model_dump()] if source.start else [])]
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
        recipe=recipe.model_dump(exclude={"dataset"}),  # a path of this machine; its digest is above
        seed=recipe.seed,
        method=recipe.method,
        rank=recipe.rank,
        alpha=recipe.alpha,
        targets=recipe.targets,
        packages={name: importlib.metadata.version(name) for name in PACKAGES},
        metrics={"loss_first": position.losses[0], "loss_last": _last(position), "loss_validation": _validation(position, source.recipe)},
        tenants=sorted({each for part in learnt for each in part["tenants"]}),
        group_ids=sorted({each for part in learnt for each in part["group_ids"]}),
        question_digests=sorted({each for part in learnt for each in part["question_digests"]}),
        created_at=time.time(),
    )


def _result(position: Position, source: AdapterSource, manifest: AdapterManifest, path: str) -> dict[str, Any]:
    return {
        "adapter": manifest.served_name,
        "digest": manifest.digest,
        "path": path,
        "examples": source.rows[0],
        "tokens": position.tokens,
        "seconds": round(position.seconds, 1),
        "tokens_per_second": round(position.tokens / position.seconds, 1),
        "distinct_tokens_per_second": round(position.distinct_tokens / position.seconds, 1),
        "loss": {"first": position.losses[0], "last": _last(position), "validation": _validation(position, source.recipe)},
        "peak_memory_bytes": peak_bytes(),
        "steps": position.steps,
    }


def _last(position: Position) -> float:
    tail = position.losses[-10:]
    return sum(tail) / len(tail)


def _validation(position: Position, recipe: Recipe) -> float | None:
    losses = [loss for _, loss in position.validation]
    return (min(losses) if recipe.load_best_model_at_end else losses[-1]) if losses else None
