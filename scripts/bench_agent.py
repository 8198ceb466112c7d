"""`scripts/bench agent`: a run of the agent against a notebook-style pipeline, on one server and model, question by question.

Half of the calibration questions fit our score, the other half is measured. Every variant answers each question once, alone on the
server, in an order that rotates; a cache salt of its own keeps it from the prefixes that another variant has paid for. `ratio` is ours
over the peer's seconds a question; `spread` the quartiles of the ratio of single questions. Progress and quality go to stderr and, whole,
to --out.
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
from pathlib import Path
from typing import Any

from rag.agent import Tools, run_agent
from rag.calibrate import calibrate
from rag.eval.metrics import aggregate, score_trace
from rag.eval.questions import read_questions
from rag.retrieve import Retriever, open_retriever
from rag.validation import Calibration, read_calibration
from scripts.notebook_pipeline import Notebook
from serve.command import engine_for
from understudy.client import Model, ModelClient
from understudy.commands.wiring import default_model, resolve
from understudy.config import Agent
from understudy.files import write_json
from understudy.progress import show_progress
from understudy.records import Message, Question, Trace
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
WARM_UP = 2  # questions of the fitting half, not measured
AT_ONCE = 8

Runner = Callable[[str], Awaitable[Trace]]


class SaltedClient(ModelClient):
    """A client whose prompts share the engine's prefix cache with its own only (vLLM's `cache_salt`)."""

    def __init__(self, model: Model, salt: str) -> None:
        super().__init__(model)
        self._salt = salt

    def request(self, messages: list[Message], max_tokens: int, temperature: float, stream: bool) -> dict[str, Any]:
        """See ModelClient."""
        return super().request(messages, max_tokens, temperature, stream) | {"extra_body": {"cache_salt": self._salt}}


def variants(model: Model, retriever: Retriever, settings: Agent, calibration: Calibration | None, salt: str) -> dict[str, Runner]:
    """What is measured, by name: ours, each saving off alone, the peer, and our fast mode."""

    def agent(name: str, settings: Agent) -> Runner:
        tools = Tools(SaltedClient(model, f"{salt}-{name}"), retriever, settings, calibration)
        return lambda question: run_agent(question, tools)

    def notebook(name: str, **savings: bool) -> Runner:
        return Notebook(SaltedClient(model, f"{salt}-{name}"), retriever, settings, **savings).run

    return {
        "ours": agent("ours", settings),
        "ours, uncalibrated": notebook("ours, uncalibrated", shares_prefix=True, asks_one_token=True),
        "shared prefix off": notebook("shared prefix off", asks_one_token=True),
        "free-text validation": notebook("free-text validation", shares_prefix=True),
        "notebook-style": notebook("notebook-style"),
        "ours, mode fast": agent("ours, mode fast", settings.model_copy(update={"mode": "fast"})),
    }


async def measure(runners: dict[str, Runner], questions: list[Question]) -> dict[str, list[tuple[float, Trace]]]:
    """(wall seconds, trace) of every question by variant, one at a time."""
    names = list(runners)
    measured: dict[str, list[tuple[float, Trace]]] = {name: [] for name in names}
    with show_progress("questions", len(questions)) as bar:
        for number, question in enumerate(questions):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                started = time.perf_counter()
                trace = await runners[name](question.question)
                measured[name].append((time.perf_counter() - started, trace))
                if not trace.complete:
                    sys.exit(f"{name}: {trace.metadata.get('error')}")
            bar.advance()
    return measured


async def throughput(runner: Runner, questions: list[Question]) -> float:
    """Wall seconds a question with AT_ONCE in flight."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def ask(question: Question) -> None:
        async with gate:
            await runner(question.question)

    started = time.perf_counter()
    await asyncio.gather(*(ask(question) for question in questions))
    return (time.perf_counter() - started) / len(questions)


def line(name: str, peer_name: str, ours: list[float], peer: list[float]) -> dict[str, Any]:
    """One comparison as scripts/bench prints it."""
    low, _, high = statistics.quantiles([a / b for a, b in zip(ours, peer, strict=True)], n=4)
    mean_ours, mean_peer = statistics.mean(ours), statistics.mean(peer)
    return {
        "bench": f"agent: {name}", "ours": round(mean_ours, 3), "peer": round(mean_peer, 3), "peer_name": peer_name, "ratio": round(mean_ours / mean_peer, 3),
        "unit": "s/question", "n": len(ours), "spread": [round(low, 3), round(high, 3)],
    }  # fmt: skip


async def run(model: Model, retriever: Retriever, settings: Agent, questions: list[Question]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The lines to print, and each variant's quality."""
    fitting, measured_on = questions[::2], questions[1::2]
    with tempfile.TemporaryDirectory() as folder:
        tools = Tools(SaltedClient(model, "fit"), retriever, settings)
        await calibrate(fitting, "bench", tools, Path(folder), AT_ONCE, show_progress)
        calibration = read_calibration(Path(folder))
    await measure(variants(model, retriever, settings, calibration, "warm"), fitting[:WARM_UP])
    runners = variants(model, retriever, settings, calibration, "measured")
    measured = await measure(runners, measured_on)
    seconds = {name: [taken for taken, _ in rows] for name, rows in measured.items()}
    lines = [line(name, "notebook-style", seconds[name], seconds["notebook-style"]) for name in seconds if name != "notebook-style"]
    at_once = await throughput(variants(model, retriever, settings, calibration, "at once")["ours"], measured_on)
    peer = statistics.mean(seconds["notebook-style"])
    lines.append(
        {"bench": f"agent: ours, {AT_ONCE} questions at once", "ours": round(at_once, 3), "peer": round(peer, 3), "peer_name": "notebook-style, sequential",
         "ratio": round(at_once / peer, 3), "unit": "s/question", "n": len(measured_on), "spread": None}
    )  # fmt: skip
    quality = {}
    for name, rows in measured.items():
        metrics = aggregate([score_trace(trace, question, retriever.chunks) for (_, trace), question in zip(rows, measured_on, strict=True)])
        validations = statistics.mean(sum(step.name == "validate" for step in trace.steps) for _, trace in rows)
        quality[name] = {metric: metrics[metric] for metric in QUALITY} | {"validations": validations}
    return lines, quality


def main() -> None:
    """Measure one model of a workspace that holds the sample corpus."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workspace", default="workspace")
    parser.add_argument("--model", help="base or an adapter; default: the newest adapter")
    parser.add_argument("--questions", type=int, default=84, help="the first of the calibration file; half of them are measured")
    parser.add_argument("--out", type=Path, help="a JSON file for lines and quality")
    args = parser.parse_args()
    workspace = open_workspace(args.workspace)
    retriever = open_retriever(workspace)
    questions = read_questions(QUESTIONS)
    questions = questions[:: max(1, len(questions) // args.questions)][: args.questions]
    with engine_for(workspace, lambda text: print(text, file=sys.stderr)) as engine:
        model = resolve(workspace, args.model or default_model(workspace), engine)
        lines, quality = asyncio.run(run(model, retriever, workspace.config.agent, questions))
    for printed in lines:
        print(json.dumps(printed), flush=True)
    for name, metrics in quality.items():
        print(f"{name:24}" + "  ".join(f"{key} {'–' if value is None else f'{value:.3g}'}" for key, value in metrics.items()), file=sys.stderr)
    if args.out:
        write_json(args.out, {"model": model.name, "lines": lines, "quality": quality})


if __name__ == "__main__":
    main()
