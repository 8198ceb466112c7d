"""`scripts/bench agent`: a run of the agent against a notebook-style pipeline, on one server and model, question by question.

Half of the calibration questions fit our score and policy, the other half is measured. Every variant answers each question once, alone on
the server, in an order that rotates; a cache salt of its own keeps it from the prefixes that another variant has paid for. `ratio` is ours
over the peer's seconds a question, `spread` its 95 % interval over questions. A run can be made in parts: what was measured is kept in
--out, and the lines speak of all that is there. Progress and quality go to stderr and, whole, to --out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from rag.agent import Tools, run_agent
from rag.calibrate import calibrate
from rag.eval.metrics import score_trace
from rag.eval.questions import read_questions
from rag.eval.stats import compute_statistics
from rag.policy import WHOLE_GRAPH, Policy
from rag.retrieve import Retriever, open_retriever
from rag.validation import Calibration, read_calibration
from scripts.notebook_pipeline import Notebook
from serve.command import engine_for
from understudy.client import Model, ModelClient
from understudy.commands.wiring import default_model, resolve
from understudy.files import read_jsonl, write_json, write_jsonl
from understudy.progress import show_progress
from understudy.records import Message, Question, Trace
from understudy.settings.answers import Agent
from understudy.workspace import open_workspace

QUESTIONS = Path(__file__).parent.parent / "samples" / "ai-governance" / "questions" / "calibration.jsonl"
QUALITY = (
    "token_f1",
    "citation_precision",
    "abstention_accuracy",
    "validator_auroc",
    "valid_score_rate",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
)
WARM_UP = 1  # questions of the fitting half, not measured
AT_ONCE = 8
PEER = "notebook-style"

Runner = Callable[[str], Awaitable[Trace]]


class SaltedClient(ModelClient):
    """A client whose prompts share the engine's prefix cache with its own only (vLLM's `cache_salt`)."""

    def __init__(self, model: Model, salt: str) -> None:
        super().__init__(model)
        self._salt = salt

    def request(self, messages: list[Message], max_tokens: int, temperature: float, stream: bool) -> dict[str, Any]:
        """See ModelClient."""
        body = super().request(messages, max_tokens, temperature, stream)
        return body | {"extra_body": body.get("extra_body", {}) | {"cache_salt": self._salt}}


def policies(policy: Policy) -> dict[str, Policy]:
    """The measured policy, and each of its savings off alone, by name."""
    whole = {
        "planned before the first retrieval": policy.model_copy(update={"plans_first": True}),
        "quotes written out": policy.model_copy(update={"completes_quotes": False}),
        "verdict asked": policy.model_copy(update={"asks_verdict": True}),
        "further rounds": policy.model_copy(update={"goes_on_below": 1.0}),
        "whole graph": WHOLE_GRAPH,
    }
    return {"ours": policy} | {f"ours, {name}": other for name, other in whole.items() if other != policy}


def variants(model: Model, retriever: Retriever, settings: Agent, calibration: Calibration, salt: str) -> dict[str, Runner]:
    """What is measured, by name: ours, each saving off alone, the peer, and our fast mode."""

    def agent(name: str, settings: Agent, policy: Policy) -> Runner:
        tools = Tools(SaltedClient(model, f"{salt}-{name}"), retriever, settings, calibration.model_copy(update={"policy": policy}))
        return lambda question: run_agent(question, tools)

    def notebook(name: str, **savings: bool) -> Runner:
        return Notebook(SaltedClient(model, f"{salt}-{name}"), retriever, settings, **savings).run

    return {
        **{name: agent(name, settings, policy) for name, policy in policies(calibration.policy).items()},
        "whole graph, uncalibrated": notebook("uncalibrated", shares_prefix=True, asks_one_token=True),
        "… and shared prefix off": notebook("shared prefix off", asks_one_token=True),
        "… or free-text validation": notebook("free-text validation", shares_prefix=True),
        PEER: notebook(PEER),
        "ours, mode fast": agent("ours, mode fast", settings.model_copy(update={"mode": "fast"}), calibration.policy),
    }


async def measure(runners: dict[str, Runner], questions: list[Question], out: Path | None = None) -> None:
    """Ask every question, one at a time, in every variant, and add a line for each question to the file."""
    names = list(runners)
    with show_progress("questions", len(questions)) as bar:
        for number, question in enumerate(questions):
            measured = {}
            for name in names[number % len(names) :] + names[: number % len(names)]:
                started = time.perf_counter()
                trace = await runners[name](question.question)
                measured[name] = {"seconds": time.perf_counter() - started, "trace": trace.model_dump(mode="json")}
                if not trace.complete:
                    sys.exit(f"{name}: {trace.metadata.get('error')}")
            if out:
                write_jsonl(out, [*(read_jsonl(out) if out.exists() else []), {"id": question.id, "variants": measured}])
            bar.advance()


async def throughput(runner: Runner, questions: list[Question]) -> float:
    """Wall seconds a question with AT_ONCE in flight."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def ask(question: Question) -> None:
        async with gate:
            await runner(question.question)

    started = time.perf_counter()
    await asyncio.gather(*(ask(question) for question in questions))
    return (time.perf_counter() - started) / len(questions)


def line(name: str, ours: list[float], peer: list[float]) -> dict[str, Any]:
    """One comparison as scripts/bench prints it."""
    drawn = np.random.default_rng(0).integers(len(ours), size=(10_000, len(ours)))  # paired bootstrap over questions
    low, high = np.percentile(np.array(ours)[drawn].sum(axis=1) / np.array(peer)[drawn].sum(axis=1), [2.5, 97.5])
    mean_ours, mean_peer = statistics.mean(ours), statistics.mean(peer)
    return {
        "bench": f"agent: {name}", "ours": round(mean_ours, 3), "peer": round(mean_peer, 3), "peer_name": PEER, "ratio": round(mean_ours / mean_peer, 3),
        "unit": "s/question", "n": len(ours), "spread": [round(float(low), 3), round(float(high), 3)],
    }  # fmt: skip


async def run(model: Model, retriever: Retriever, settings: Agent, questions: list[Question], out: Path, part: int) -> dict[str, Any]:
    """Measure what is left of a part; returns everything measured so far."""
    fitting, measured_on = questions[::2], questions[1::2]
    if not read_calibration(out):
        await calibrate(fitting, "bench", Tools(SaltedClient(model, "fit"), retriever, settings), out, AT_ONCE, show_progress)
    calibration = read_calibration(out)
    assert calibration is not None
    file = out / "questions.jsonl"
    done = {row["id"] for row in read_jsonl(file)} if file.exists() else set()
    left = [question for question in measured_on if question.id not in done][:part]
    if left:
        await measure(variants(model, retriever, settings, calibration, "warm"), fitting[:WARM_UP])
        await measure(variants(model, retriever, settings, calibration, "measured"), left, file)
    at_once = (
        await throughput(variants(model, retriever, settings, calibration, "at once")["ours"], measured_on)
        if len(done) + len(left) == len(measured_on)
        else None
    )
    return summary(model.name, calibration, read_jsonl(file), {question.id: question for question in measured_on}, retriever, at_once)


def summary(
    model: str, calibration: Calibration, rows: list[dict[str, Any]], asked: dict[str, Question], retriever: Retriever, at_once: float | None
) -> dict[str, Any]:
    """The lines to print, and each variant's quality with its difference to the peer's."""
    questions = [asked[row["id"]] for row in rows]
    seconds = {name: [row["variants"][name]["seconds"] for row in rows] for name in rows[0]["variants"]}
    lines = [line(name, taken, seconds[PEER]) for name, taken in seconds.items() if name != PEER]
    if at_once is not None:
        peer = statistics.mean(seconds[PEER])
        lines.append(
            {"bench": f"agent: ours, {AT_ONCE} questions at once", "ours": round(at_once, 3), "peer": round(peer, 3), "peer_name": f"{PEER}, sequential",
             "ratio": round(at_once / peer, 3), "unit": "s/question", "n": len(rows), "spread": None}
        )  # fmt: skip
    traces = {name: [Trace.model_validate(row["variants"][name]["trace"]) for row in rows] for name in seconds}
    scored = {
        name: [score_trace(t, q, retriever.chunks) for t, q in zip(traces[name], questions, strict=True)] for name in [PEER, *(n for n in traces if n != PEER)]
    }
    found = compute_statistics(scored, [question.id for question in questions])
    quality = {}
    for name, of_variant in scored.items():
        quality[name] = {metric: asdict(found.intervals[name][metric]) for metric in QUALITY}
        quality[name]["calls"] = statistics.mean(sum(step.name != "retrieve" for step in trace.steps) for trace in traces[name])
        quality[name]["right"] = sum(row["is_right"] or 0.0 for row in of_variant)
    against = [asdict(c) for c in found.comparisons if c.metric in QUALITY]
    return {"model": model, "policy": calibration.policy.model_dump(), "lines": lines, "quality": quality, "against the peer": against}


def main() -> None:
    """Measure one model of a workspace that holds the sample corpus."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workspace", default="workspace")
    parser.add_argument("--model", help="base or an adapter; default: the newest adapter")
    parser.add_argument("--questions", type=int, default=84, help="spread over the calibration file; half of them are measured")
    parser.add_argument("--part", type=int, default=1000, help="questions measured this time")
    parser.add_argument("--out", type=Path, help="a folder that keeps what was measured; a new one when left out")
    args = parser.parse_args()
    workspace = open_workspace(args.workspace)
    retriever = open_retriever(workspace)
    questions = read_questions(QUESTIONS)
    questions = questions[:: max(1, len(questions) // args.questions)][: args.questions]
    out = args.out or Path(tempfile.mkdtemp(prefix="bench-agent-"))
    out.mkdir(parents=True, exist_ok=True)
    with engine_for(workspace, lambda text: print(text, file=sys.stderr)) as engine:
        model = resolve(workspace, args.model or default_model(workspace), engine)
        result = asyncio.run(run(model, retriever, workspace.config.agent, questions, out, args.part))
    write_json(out / "result.json", result)
    for printed in result["lines"]:
        print(json.dumps(printed), flush=True)
    for name, metrics in result["quality"].items():
        values = {key: value["value"] if isinstance(value, dict) else value for key, value in metrics.items()}
        print(f"{name:42}" + "  ".join(f"{key} {'–' if value is None else f'{value:.3g}'}" for key, value in values.items()), file=sys.stderr)
    print(f"policy {result['policy']}; everything: {out / 'result.json'}", file=sys.stderr)


if __name__ == "__main__":
    main()
