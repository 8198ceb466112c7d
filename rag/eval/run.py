"""Running every model over the same questions, so that a killed run goes on where it stopped.

A run is a folder named by the digest of everything that decides its answers; each finished trace is a line of
its `traces-NAME.jsonl`, on disk before the next question is asked.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError

from rag.prompts import PROMPT_VERSION
from understudy.digests import digest_of
from understudy.errors import EndpointError, StorageError
from understudy.files import locked, read_json, write_json
from understudy.progress import Progress, show_progress
from understudy.records import Question, Trace

Runner = Callable[[Question], Awaitable[Trace]]

FIRST_FAILURES = 5  # all of the first questions failing is a broken endpoint, not a bad model
FAILURES_IN_A_ROW = 20  # so is an endpoint that dies on the way


def open_run(root: Path, identity: dict[str, object]) -> Path:
    """The folder of the run with this identity, new or to be resumed; raises StorageError.

    `identity` is what decides the answers: digests of questions and adapters, resolved names, settings, prompt version, generation.
    """
    folder = root / digest_of(identity)[:12]
    record = folder / "run.json"
    if not record.exists():
        write_json(record, identity)
    elif digest_of(read_json(record)) != digest_of(identity):
        raise StorageError(f"{record} is not about this run", f"remove {folder} and repeat")
    return folder


def require_served(folder: Path, served: dict[str, str]) -> None:
    """Note by what engine a run is answered, or raise StorageError where its answers are of another one."""
    path = folder / "served.json"
    if not path.exists():
        write_json(path, served)
    elif (before := read_json(path)) != served:
        told = " and ".join(", ".join(f"{name} {value}" for name, value in facts.items()) for facts in (before, served))
        raise StorageError(f"the answers in {folder} are of another engine: {told}", f"serve what it was, or remove {folder} to ask anew")


async def evaluate_models(
    questions: list[Question],
    runners: dict[str, Runner],
    folder: Path,
    concurrency: int,
    progress: Callable[[str, int], Progress] = show_progress,
    label: str = "evaluate",
) -> dict[str, list[Trace]]:
    """Each model's traces in the order of the questions, models one after the other, so that none slows another down.

    What the folder already holds is not asked again, except failed questions of an unfinished run. Raises
    EndpointError when nothing is being answered; what was answered until then is kept. Raises StorageError while another process asks.
    """
    traces = {}
    with locked(folder / ".lock", "this evaluation is running already"):
        for name, runner in runners.items():
            path = folder / traces_file(name)
            done = load_traces(path)
            failed = [question for question in questions if question.id in done and not done[question.id].complete]
            new = [question for question in questions if question.id not in done]
            if new:
                with progress(f"{label} {name}", len(questions)) as bar, path.open("ab") as file:
                    bar.advance(len(questions) - len(new) - len(failed))
                    first = min(FIRST_FAILURES, len(questions))
                    done |= await _ask_all(name, runner, new + failed, file, concurrency, bar, first)
            traces[name] = [done[question.id] for question in questions]
    return traces


def traces_file(name: str) -> str:
    """A model's file name in the run's folder."""
    safe = re.sub(r"[^\w.@-]", "_", name)
    return f"traces-{safe}.jsonl" if safe == name else f"traces-{safe}-{digest_of(name)[:8]}.jsonl"


def load_traces(path: Path) -> dict[str, Trace]:
    """Traces by question id, the last one of each; a line that was cut off by a kill is removed from the file."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    traces = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            trace = Trace.model_validate_json(line)
            traces[trace.metadata["question_id"]] = trace
        except (ValidationError, KeyError) as error:
            raise StorageError(f"{path} line {number} is not a trace of this run", f"remove {path.parent} and repeat") from error
    return traces


def failure_of(trace: Trace) -> str:
    """Why a run is incomplete."""
    return trace.metadata.get("error") or next((step.error for step in trace.steps if step.error), "the run was cut off")


async def _ask_all(
    name: str, runner: Runner, questions: list[Question], file: BinaryIO, concurrency: int, bar: Progress, first_failures: int
) -> dict[str, Trace]:
    """Ask the questions, `concurrency` at a time, and append each trace as it comes."""
    waiting = iter(questions)  # shared by the workers: each question is taken once
    done: dict[str, Trace] = {}
    failures = 0  # since the last success

    async def work() -> None:
        nonlocal failures
        for question in waiting:
            trace = await _ask(name, runner, question)
            _append(file, trace)
            done[question.id] = trace
            failures = 0 if trace.complete else failures + 1
            if failures >= (first_failures if failures == len(done) else FAILURES_IN_A_ROW):
                raise EndpointError(
                    f"{name} failed on {failures} questions in a row: {failure_of(trace)}",
                    "check that its server is running, then repeat: the run resumes",
                )
            bar.advance()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
    except ExceptionGroup as errors:  # one cause, seen by several workers
        raise errors.exceptions[0] from None
    return done


async def _ask(name: str, runner: Runner, question: Question) -> Trace:
    """The runner's trace, or an incomplete one that says what went wrong."""
    try:
        trace = await runner(question)
    except Exception as error:  # a question that fails is a wrong answer, whatever the cause; cancellation passes
        trace = Trace(
            id=digest_of([name, question.id, time.time()]),
            tenant=question.tenant,
            question=question.question,
            steps=[],
            answer="",
            abstained=False,
            citations=[],
            score=None,
            source="model",
            model=name,
            generation="",
            prompt_version=PROMPT_VERSION,
            complete=False,
            created_at=time.time(),
            metadata={"error": f"{type(error).__name__}: {error}"},
        )
    return trace.model_copy(update={"metadata": {**trace.metadata, "question_id": question.id}})


def _append(file: BinaryIO, trace: Trace) -> None:
    """One line, on disk when this returns. Done in the event loop: it takes milliseconds, and stays whole when a task is cancelled."""
    file.write((json.dumps(trace.model_dump(mode="json"), ensure_ascii=False) + "\n").encode())
    file.flush()
    os.fsync(file.fileno())
