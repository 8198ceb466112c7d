"""A thousand questions to three models, the process killed again and again: what was answered is never asked twice."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from rag.eval.run import load_traces, traces_file
from tests.scripted import scripted

QUESTIONS, CONCURRENCY, KILLS = 1000, 8, 4
MODELS = ("base", "tiny@0123456789ab", "teacher")
EVALUATE = """
import asyncio, json, sys, time
from pathlib import Path
from rag.eval.run import evaluate_models, open_run
from understudy.client import Model, ModelClient
from understudy.records import Message, Question, Trace

root, url, names, count, concurrency = Path(sys.argv[1]), sys.argv[2], sys.argv[3].split(","), int(sys.argv[4]), int(sys.argv[5])
questions = [Question(id=f"q{place}", question=f"Question {place}?") for place in range(count)]

async def main():
    clients = {name: ModelClient(Model(name, name, url, "none")) for name in names}

    def runner(name):
        async def ask(question):
            written = await clients[name].complete([Message(role="user", content=f"{name} {question.question}")], 16)
            return Trace(id=f"{name} {question.id}", question=question.question, steps=[], answer=written.text, abstained=False, citations=[], score=None,
                         source="model", model=name, generation="g", prompt_version="p", created_at=time.time())
        return ask

    found = await evaluate_models(questions, {name: runner(name) for name in names}, open_run(root, {"run": 1}), concurrency)
    print(json.dumps({name: [trace.answer for trace in traces] for name, traces in found.items()}))

asyncio.run(main())
"""


@pytest.mark.slow
def test_a_killed_evaluation_asks_nothing_twice_that_was_answered(tmp_path: Path) -> None:
    with scripted() as endpoint:
        endpoint.reply = lambda _, prompt: f"to {prompt}"
        command = [sys.executable, "-c", EVALUATE, str(tmp_path), endpoint.model.base_url, ",".join(MODELS), str(QUESTIONS), str(CONCURRENCY)]
        answered: list[str] = []  # on disk when the process died
        for kill in range(1, KILLS + 1):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            deadline = time.monotonic() + 120
            while len(endpoint.asked) < kill * len(MODELS) * QUESTIONS // (KILLS + 1):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.wait()
            before = Counter(prompts(endpoint.bodies))
            [folder] = (path for path in tmp_path.iterdir() if path.is_dir())
            answered = [trace.answer.removeprefix("to ") for name in MODELS for trace in load_traces(folder / traces_file(name)).values()]
            assert set(answered) <= set(before) and len(before) - len(answered) <= CONCURRENCY * kill
            marks = {prompt: before[prompt] for prompt in answered}
        last = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        asked = Counter(prompts(endpoint.bodies))
    found = json.loads(last.stdout)
    for name in MODELS:
        assert found[name] == [f"to {name} Question {place}?" for place in range(QUESTIONS)]
    assert len(asked) == len(MODELS) * QUESTIONS
    assert all(asked[prompt] == times for prompt, times in marks.items())  # nothing that was on disk was asked again
    assert asked.total() - len(asked) <= CONCURRENCY * KILLS  # only what was in flight when the process died


def prompts(bodies: list[dict[str, object]]) -> list[str]:
    return [re.sub(r"\s+", " ", body["messages"][-1]["content"]) for body in list(bodies)]  # type: ignore[index]
