"""train, adapters ls/show/verify/import/export, retriever tune."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from understudy.adapters import find_adapter, manifests, verify_adapter
from understudy.commands import Outcome, report, workspace_of
from understudy.progress import show_progress


def train(args: Namespace) -> Outcome:
    """Train an adapter, or say what training would do."""
    from train.recipe import load_recipe

    workspace = workspace_of(args)
    named = args.recipe if args.recipe and "=" not in args.recipe else None
    settings = args.settings if named or not args.recipe else [args.recipe, *args.settings]
    recipe = load_recipe(named or workspace.config.recipe, settings)
    if args.dry_run:
        from train.dry_run import dry_run

        result, lines = dry_run(workspace, recipe)
        return Outcome(result, lines)
    from serve.pausing import borrowed, find_serving
    from train.sft import train as run

    if not args.borrow and (serving := find_serving(workspace)) is not None and serving.state == "serving":
        report(f"an engine is served at {serving.url} and holds its memory; `understudy train --borrow` pauses it while it trains")
    with borrowed(workspace, report) if args.borrow else nullcontext():
        result = run(workspace, recipe, report, show_progress)
    if os.environ.get("RANK", "0") != "0":  # of several processes, one prints
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    loss = result["loss"]
    validation = "" if loss["validation"] is None else f", validation {loss['validation']:.3f}"
    return Outcome(
        result,
        [
            f"adapter {result['adapter']}: loss {loss['first']:.3f} → {loss['last']:.3f}{validation}; {result['seconds']:.0f} s,"
            f" {result['tokens_per_second']:.0f} tokens/s ({result['distinct_tokens_per_second']:.0f} distinct), in {result['path']}"
        ],
    )


def adapters_ls(args: Namespace) -> Outcome:
    """List the registered adapters."""
    workspace = workspace_of(args)
    rows = [
        {
            "name": m.name,
            "adapter": m.served_name,
            "base": m.base,
            "method": m.method,
            "rank": m.rank,
            "path": workspace.relative(path),
            "proven": (path / "proof.json").exists(),
        }
        for m, path in manifests(workspace)
    ]
    lines = [f"{r['adapter']}  {r['method']}, rank {r['rank']}, over {r['base']}{'  proof on file' if r['proven'] else ''}" for r in rows]
    return Outcome({"adapters": rows}, lines or ["no adapters yet"])


def adapters_show(args: Namespace) -> Outcome:
    """An adapter's manifest."""
    manifest, path = find_adapter(workspace_of(args), args.adapter)
    shown = manifest.model_dump(exclude={"question_digests"})
    return Outcome(manifest.model_dump(), [f"{key}: {value}" for key, value in shown.items()] + [f"path: {path}"])


def adapters_verify(args: Namespace) -> Outcome:
    """Check an adapter's files; raises AdapterError where they differ."""
    manifest = verify_adapter(find_adapter(workspace_of(args), args.adapter)[1])
    return Outcome({"adapter": manifest.served_name, "verified": True}, [f"{manifest.served_name} is whole"])


def adapters_import(args: Namespace) -> Outcome:
    """Register an adapter made elsewhere."""
    from train.exchange import import_adapter

    result = import_adapter(workspace_of(args), Path(args.folder), args.name, args.base, args.dataset)
    lineage = {"unknown": "what it was trained on is unknown", "stated": "its dataset is as you state"}[result["lineage"]]
    lines = [f"adapter {result['adapter']}, to be served on {result['served_base']}; {lineage}; in {result['path']}"]
    return Outcome(result, [*lines, f"next: `understudy prove {result['adapter']}`"])


def adapters_export(args: Namespace) -> Outcome:
    """Write an adapter outside the workspace."""
    from train.exchange import export_adapter

    result = export_adapter(workspace_of(args), args.adapter, Path(args.folder), args.format)
    return Outcome(result, [f"{result['adapter']} as {result['format']} in {result['path']}, {result['bytes'] / 2**20:.0f} MiB"])


def retriever_tune(args: Namespace) -> Outcome:
    """Tune the embedder, or cross-validate the tuning by document."""
    from train.recipe import load_retriever_recipe

    workspace, recipe = workspace_of(args), load_retriever_recipe(args.settings)
    if args.folds:
        from train.recall import cross_validate

        result = cross_validate(workspace, recipe, args.folds, report, show_progress)
        return Outcome(result, _recall_lines(result["recall"]))
    from train.retriever import tune_retriever

    result = tune_retriever(workspace, recipe, report, show_progress)
    loss = result["loss"]
    return Outcome(
        result,
        [
            f"embedder {result['embedder']}: {result['pairs']} pairs, loss {loss['first']:.3f} → {loss['last']:.3f}, {result['seconds']:.0f} s",
            *_recall_lines(result["recall"]),
            f"to use it: `understudy config set models.embedder={result['embedder']}`, then `understudy index rebuild`",
        ],
    )


def _recall_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Recall before and after, a line for each ranking and k."""
    if not rows:
        return ["recall not measured: the dataset has no validation questions"]
    lines = []
    for row in rows:
        interval = "" if row["low"] is None else f" [{row['low']:+.3f}, {row['high']:+.3f}]"
        lines.append(f"  recall@{row['k']:<2} {row['ranking']}: {row['before']:.3f} → {row['after']:.3f}, {row['difference']:+.3f}{interval}, n={row['n']}")
    return lines
