"""`scripts/bench verdict`: how well verdicts tell right answers from wrong ones, over the judged rows of a dataset's validation split.

A line an adapter: AUROC of log P("1") - log P("0") after the validation prompt, by PEFT over the served weights in float32, overall and by kind of
wrong answer; `peer` is the base's, `spread` a 95 % percentile bootstrap over questions. The rows are those of the newest dataset, the adapters may
have learnt from others: `dataset build --validations 1` last makes for more rows to judge.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import numpy as np

from rag.eval.metrics import validator_auroc
from rag.prompts import example_messages, score_target
from serve.identity import load_tokenizer
from serve.reference import Scorer, load_plain, load_reference
from train.dataset import newest_dataset, read_dataset
from understudy.adapters import find_adapter
from understudy.chat import encode_example
from understudy.models import find_weights, model_path
from understudy.progress import show_progress
from understudy.records import Example
from understudy.workspace import Workspace, open_workspace

RESAMPLES = 2000


def judge(workspace: Workspace, name: str, rows: list[Example], passages: dict[str, str]) -> list[float]:
    """The verdict on each row as log-odds; NAME is an adapter's, or `base`."""
    if name == "base":
        weights, model = (folder := model_path(workspace, workspace.config.models.base)), load_plain(folder)
    else:
        manifest, folder = find_adapter(workspace, name)
        weights = find_weights(workspace, manifest.served_base_digest)
        model = load_reference(weights, folder)
    tokenizer, scorer = load_tokenizer(weights), Scorer(model)
    odds = []
    with show_progress(f"judging with {name}", len(rows)) as bar:
        for row in rows:
            right, wrong = (encode_example(tokenizer, example_messages(row, passages), score_target(verdict)) for verdict in (True, False))
            odds.append(float(scorer.logprobs(right)[0] - scorer.logprobs(wrong)[0]))
            bar.advance()
    return odds


def auroc(odds: list[float], rows: list[Example], kinds: set[str]) -> float | None:
    """Of the good rows against the wrong ones of these kinds."""
    kept = [(score, row.kind == "good") for score, row in zip(odds, rows, strict=True) if row.kind in kinds | {"good"}]
    return validator_auroc([score for score, _ in kept], [is_right for _, is_right in kept])


def interval(odds: list[float], rows: list[Example]) -> list[float]:
    """95 %, by a bootstrap that draws whole questions."""
    questions = sorted({row.trace_id for row in rows})
    places = {question: [place for place, row in enumerate(rows) if row.trace_id == question] for question in questions}
    rng = np.random.default_rng(0)
    found = []
    for _ in range(RESAMPLES):
        drawn = [place for question in rng.choice(len(questions), len(questions)) for place in places[questions[question]]]
        value = validator_auroc([odds[place] for place in drawn], [rows[place].kind == "good" for place in drawn])
        found += [value] if value is not None else []
    return [round(float(q), 3) for q in np.quantile(found, [0.025, 0.975])]


def main() -> None:
    """One line an adapter, after the base's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workspace", required=True)
    parser.add_argument("--adapters", required=True, help="names, comma-separated")
    args = parser.parse_args()
    workspace = open_workspace(args.workspace, [])
    examples, passages, _ = read_dataset(newest_dataset(workspace))
    rows = [example for example in examples if example.task == "validate" and example.split == "validation"]
    kinds = sorted({row.kind for row in rows} - {"good"})
    if not kinds or all(row.kind != "good" for row in rows):
        sys.exit("the dataset's validation split has no judged rows of both kinds")
    peer = None
    for name in ["base", *args.adapters.split(",")]:
        odds = judge(workspace, name, rows, passages)
        value = auroc(odds, rows, set(kinds)) or 0.0
        peer = value if peer is None else peer
        line: dict[str, Any] = {"bench": "verdict", "ours": round(value, 3), "peer": round(peer, 3), "peer_name": "base", "ratio": round(value / peer, 2)}
        by_kind = {kind: [round(auroc(odds, rows, {kind}) or 0.0, 3), sum(row.kind == kind for row in rows)] for kind in kinds}
        print(json.dumps(line | {"unit": "AUROC", "n": len(rows), "spread": interval(odds, rows), "adapter": name, "by_kind": by_kind}), flush=True)


if __name__ == "__main__":
    main()
