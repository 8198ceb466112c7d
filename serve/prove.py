"""Prove that what is served is what was trained, before an adapter takes traffic (docs: DESIGN.md, mechanism 5).

vLLM can accept an adapter and leave its output unchanged (vllm #18372, #48019), serve other weights than those asked for
(#42125), or compute something else than PEFT (#10798, #47026). So real rows of the adapter's dataset are scored twice, by the
engine over HTTP and here by PEFT over exactly the served weights, and the log-probabilities of the answers' tokens compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from serve.check import verdict_of
from serve.identity import check_base, check_files, load_tokenizer
from serve.proof_rows import choose_scored, choose_spread, dataset_of, fitting, read_rows, steps_shown
from serve.reference import Scorer, import_torch_patiently, load_plain, load_reference
from serve.repeat import keep_sample
from serve.served import Server, check_canaries, check_listing, check_token_ids
from serve.weigh import Distances, Floats, weigh
from understudy.adapters import find_adapter, require_served
from understudy.chat import Encoded
from understudy.engines import RunningEngine
from understudy.errors import EngineError
from understudy.files import write_json
from understudy.models import find_weights
from understudy.progress import Progress
from understudy.records import SCHEMA_VERSION
from understudy.workspace import Workspace

PROOF, MERGED_PROOF = "proof.json", "proof-merged.json"  # of the adapter beside its base, and merged into it
TOKEN_ROWS, SCORED_ROWS, CANARIES = 16, 16, 2


def prove(
    workspace: Workspace, adapter_name: str, engine: RunningEngine, report: Callable[[str], None], progress: Callable[[str, int], Progress]
) -> dict[str, Any]:
    """Prove an adapter on the engine that serves it; the result is the command's JSON, kept beside it as proof.json.

    Where the engine serves it merged into its base, the proof is proof-merged.json: PEFT has the two apart, and the engine's noise
    is its distance from the merged weights in float32 (there is no served base to take it from).
    Files or base weights that are not the adapter's end the proof before the engine is asked anything.
    Raises NotFoundError where the adapter, its dataset or its weights are missing, AdapterError where vLLM cannot apply its
    method, EngineError where the engine fails.
    """
    import_torch_patiently()
    began = time.monotonic()
    manifest, folder = find_adapter(workspace, adapter_name)
    require_served(manifest)
    _require_provable(engine, manifest.served_name)
    merged = workspace.merged / manifest.served_name if engine.merged == manifest.served_name else None
    report(f"proving {manifest.served_name} at {engine.url}")
    checks = [check_files(manifest, folder)]
    measured: dict[str, Any] = {}
    if checks[0].passed:
        weights = find_weights(workspace, manifest.served_base_digest)
        tokenizer = load_tokenizer(weights)
        checks.append(check_base(manifest, weights, tokenizer, engine, merged))
    if all(check.passed for check in checks):
        rows = read_rows(dataset_of(workspace, manifest), manifest.served_name, steps_shown(manifest))
        with Server(engine.url, engine.merged or engine.base, manifest.served_name, engine.api_key) as server:
            checks.append(check_listing(server, None if engine.capabilities else merged or folder))
            checks.append(check_token_ids(server, tokenizer, choose_spread(rows, TOKEN_ROWS)))
            encoded = fitting(choose_scored(rows, SCORED_ROWS), tokenizer, server.max_tokens)
            if not encoded:
                raise EngineError("no row of the dataset fits the engine's context", "raise serve.max_model_len, then serve again")
            distances, measured = measure(server, weights, folder, merged, encoded, report, progress)
            checks += weigh(distances, measured["seconds"])
            checks.append(check_canaries(server, choose_scored(rows, CANARIES)))
    result = {
        "schema_version": SCHEMA_VERSION,
        "adapter": manifest.served_name,
        "digest": manifest.digest,
        "passed": all(check.passed for check in checks),
        "verdict": verdict_of(checks),
        "checks": [check.to_json() for check in checks],
        "measured": measured,
        "engine": {"base": engine.base, "base_digest": engine.base_digest, "precision": engine.precision, "merged": bool(merged)},
        "seconds": round(time.monotonic() - began, 1),
        "created_at": time.time(),
    }
    write_json(folder / (MERGED_PROOF if merged else PROOF), result)
    return result


def _require_provable(engine: RunningEngine, adapter: str) -> None:
    if engine.capabilities is not None and not engine.capabilities.can_prove:
        lacks = [name for name, has in (("prompt_logprobs", engine.capabilities.prompt_logprobs), ("/tokenize", engine.capabilities.tokenize)) if not has]
        raise EngineError(
            f"{adapter} cannot be proven at {engine.url}, so it takes no traffic there: {engine.capabilities.kind} has no {' and no '.join(lacks)}",
            "serve it with vLLM: unset serve.url, or name a vLLM there",
        )


def measure(
    server: Server,
    weights: Path,
    adapter: Path,
    merged: Path | None,
    rows: list[Encoded],
    report: Callable[[str], None],
    progress: Callable[[str, int], Progress],
) -> tuple[Distances, dict[str, Any]]:
    """Score the rows by engine and PEFT, with and without the adapter: the distances, and what was measured for the record.

    `merged`: the folder of the weights that the engine serves in place of base and adapter.
    """
    began = time.monotonic()
    tokens = sum(len(row.ids) - row.completion for row in rows)
    report(f"scoring {tokens} answer tokens of {len(rows)} rows by the engine and by PEFT")
    with progress("proving", 4 * len(rows)) as bar:

        def scored(score: Callable[[Encoded], Floats]) -> list[Floats]:
            results = []
            for row in rows:
                results.append(score(row))
                bar.advance()
            return results

        served = scored(lambda row: server.logprobs(server.adapter, row))
        served_base = [] if merged else scored(lambda row: server.logprobs(server.base, row))
        model = load_reference(weights, adapter)
        peft = scored(Scorer(model).logprobs)
        with model.disable_adapter():
            peft_base = scored(Scorer(model).logprobs)
        record = {"rows": len(rows), "answer_tokens": tokens, "reference": str(model.dtype).removeprefix("torch.")}
        del model
        noise = _apart(served, scored(Scorer(load_plain(merged)).logprobs)) if merged else _apart(served_base, peft_base)
    without = peft_base if merged else served_base
    distances = Distances(_apart(served, peft), _apart(served, peft_base), noise, _apart(served, without))
    record |= {"nats_per_token": distances.means(), "seconds": round(time.monotonic() - began, 1)}
    return distances, record | {"sample": keep_sample(rows, served, without)}


def _apart(first: list[Floats], second: list[Floats]) -> Floats:
    """Mean |difference| per token, one value a row."""
    return np.array([np.abs(a - b).mean() for a, b in zip(first, second, strict=True)])
