"""The precision matrix: one adapter over several forms of its base's weights, and which pair to serve.

Reference is PEFT over what the adapter was trained on (NF4 for a QLoRA run). Every pair is computed in float32, so that a difference
is that of the weights and not of rounding on the way; a row by the engine, in its own arithmetic, is added for what is served now.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from serve.identity import load_tokenizer
from serve.proof_rows import choose_spread, dataset_of, fitting, read_rows, steps_shown
from serve.reference import Scorer, import_torch_patiently
from serve.served import Server
from serve.weigh import CONFIDENCE, RESAMPLES, Floats
from understudy.adapters import AdapterManifest, find_adapter, require_served, verify_adapter
from understudy.chat import Encoded
from understudy.digests import digest_of
from understudy.engines import RunningEngine
from understudy.errors import AdapterError, NotFoundError
from understudy.files import read_json, write_json
from understudy.models import find_weights
from understudy.progress import Progress
from understudy.records import SCHEMA_VERSION
from understudy.workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MATRIX = "matrix.json"
ROWS = 32


@dataclass(frozen=True)
class Pair:
    """Weights and what becomes of the adapter on them."""

    name: str
    weights: Path
    nf4: bool = False  # quantised while loading, as QLoRA trains
    adapter: str = "beside"  # beside, merged (the sum rounded to bfloat16), none
    served: bool = True  # whether the engine can serve it here


def list_pairs(manifest: AdapterManifest, base: Path, served: Path) -> list[Pair]:
    """The pairs of an adapter, the trained one first. `base`: its base as added; `served`: the weights its manifest names."""
    if manifest.quantisation == "none":
        return [Pair("base + adapter", base), Pair("merged into the base", base, adapter="merged"), Pair("base alone", base, adapter="none")]
    return [
        Pair("NF4 + adapter", base, nf4=True, served=False),
        Pair("dequantised NF4 + adapter", served),
        Pair("bf16 base + adapter", base),
        Pair("merged into dequantised NF4", served, adapter="merged"),
        Pair("merged into the bf16 base", base, adapter="merged"),
        Pair("dequantised NF4 alone", served, adapter="none"),
    ]


def measure_matrix(
    workspace: Workspace, adapter_name: str, engine: RunningEngine, report: Callable[[str], None], progress: Callable[[str, int], Progress]
) -> dict[str, Any]:
    """Score every pair over rows of the adapter's dataset; the result is the command's JSON, kept beside the adapter as matrix.json.

    An interrupted run goes on with the next pair.
    Raises NotFoundError where the adapter, its dataset or weights are missing, AdapterError where PEFT cannot load it.
    """
    import_torch_patiently()
    began = time.monotonic()
    manifest, folder = find_adapter(workspace, adapter_name)
    require_served(manifest)
    verify_adapter(folder)
    served, base = find_weights(workspace, manifest.served_base_digest), find_weights(workspace, manifest.base_digest)
    rows = read_rows(dataset_of(workspace, manifest), manifest.served_name, steps_shown(manifest))
    unseen = [row for row in rows if row.split == "validation"]
    encoded = fitting(choose_spread(unseen or rows, ROWS), load_tokenizer(served), workspace.config.serve.max_model_len)
    if not encoded:
        raise NotFoundError("no row of the dataset fits the engine's context", "raise serve.max_model_len")
    pairs = list_pairs(manifest, base, served)
    scores: dict[str, list[Floats]] = {}
    facts: dict[str, dict[str, Any]] = {}
    with progress("scoring", (len(pairs) + 1) * len(encoded)) as bar:
        for pair in pairs:
            report(f"{pair.name}, {len(encoded)} rows")
            facts[pair.name] = {"weights": pair.weights.name, "adapter": pair.adapter, "nf4": pair.nf4, "served": pair.served}
            kept = workspace.runs / f"matrix-{digest_of([manifest.digest, pair.name, [row.ids for row in encoded]])[:16]}.json"
            scores[pair.name] = _kept_or_scored(kept, partial(load_pair, pair, folder), encoded, bar)
        with Server(engine.url, engine.merged or engine.base, manifest.served_name, engine.api_key) as server:
            name = f"the engine now ({engine.precision}, {'merged' if engine.merged else 'adapter beside the base'})"
            scores[name] = _scored(lambda row: server.logprobs(manifest.served_name, row), encoded, bar)
            facts[name] = {"weights": served.name, "adapter": "merged" if engine.merged else "beside", "nf4": False, "served": True}
    table = [{"pair": name, **facts[name], **row} for name, row in weigh_pairs(scores, pairs[0].name).items()]
    result = {
        "schema_version": SCHEMA_VERSION, "adapter": manifest.served_name, "digest": manifest.digest, "reference": pairs[0].name, "rows": len(encoded),
        "answer_tokens": sum(len(row.ids) - row.completion for row in encoded), "unseen": bool(unseen), "matrix": table,
        "recommended": recommend(table), "seconds": round(time.monotonic() - began, 1), "created_at": time.time(),
    }  # fmt: skip
    write_json(folder / MATRIX, result)
    for file in workspace.runs.glob("matrix-*.json"):
        file.unlink()
    return result


def load_pair(pair: Pair, adapter: Path) -> PreTrainedModel:
    """The pair's model in float32 arithmetic, on the CPU. Raises AdapterError."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
    options: dict[str, Any] = {"quantization_config": quantised, "device_map": "cpu"} if pair.nf4 else {}
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            str(pair.weights), dtype=torch.float32, local_files_only=True, trust_remote_code=False, **options
        )
        if pair.adapter != "none":
            model = PeftModel.from_pretrained(model, str(adapter))
    except (OSError, ValueError, RuntimeError) as error:
        raise AdapterError(f"PEFT cannot load the adapter over {pair.weights.name}: {error}", "`understudy adapters verify` checks its files") from error
    if pair.adapter == "merged":
        model = model.merge_and_unload().to(torch.bfloat16).float()
    return model.eval()


def weigh_pairs(scores: dict[str, list[Floats]], reference: str) -> dict[str, dict[str, float]]:
    """For each pair, over rows: loss (nats a token), its difference from the reference's, and the mean |difference| a token of log-probability.

    Intervals are 95 % percentile bootstraps over rows, paired. Losses and distances weigh every row's tokens alike.
    """
    lengths = np.array([len(row) for row in scores[reference]], dtype=float)
    picks = np.random.default_rng(0).integers(0, len(lengths), (RESAMPLES, len(lengths)))
    table = {}
    for name, rows in scores.items():
        worse = np.array([(b - a).sum() for a, b in zip(rows, scores[reference], strict=True)])  # nats by which the row is less likely
        apart = np.array([np.abs(a - b).sum() for a, b in zip(rows, scores[reference], strict=True)])
        draws = worse[picks].sum(axis=1) / lengths[picks].sum(axis=1)
        low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        loss, total = -sum(float(row.sum()) for row in rows), lengths.sum()
        figures = {"loss": loss / total, "loss_difference": worse.sum() / total, "low": low, "high": high, "distance": apart.sum() / total}
        table[name] = {key: round(float(value), 5) for key, value in figures.items()}
    return table


def recommend(table: list[dict[str, Any]]) -> str:
    """The pair to serve: the one nearest to what was trained, unless another's loss is lower beyond its interval; then the lowest of those.

    Rows of the engine's own arithmetic are no pair, and the base alone is no candidate.
    """
    candidates = [row for row in table if row["served"] and row["adapter"] != "none" and not row["pair"].startswith("the engine")]
    better = [row for row in candidates if row["high"] < 0]
    return str(min(better, key=lambda row: row["loss"])["pair"] if better else min(candidates, key=lambda row: row["distance"])["pair"])


def _kept_or_scored(kept: Path, load: Callable[[], PreTrainedModel], rows: list[Encoded], bar: Progress) -> list[Floats]:
    """A pair's scores, from the file where an interrupted run left them."""
    if kept.exists():
        bar.advance(len(rows))
        return [np.array(row) for row in read_json(kept)]
    model = load()
    scores = _scored(Scorer(model).logprobs, rows, bar)
    del model
    gc.collect()
    write_json(kept, [row.tolist() for row in scores])
    return scores


def _scored(score: Callable[[Encoded], Floats], rows: list[Encoded], bar: Progress) -> list[Floats]:
    scores = []
    for row in rows:
        scores.append(score(row))
        bar.advance()
    return scores
