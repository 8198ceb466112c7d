"""Running: order, concurrency, resuming after a kill, failing questions and dead endpoints."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from rag.eval.run import evaluate_models, load_traces, open_run, require_served, traces_file
from understudy.errors import EndpointError, StorageError
from understudy.files import locked
from understudy.records import Question, Trace


class Runner:
    """Answers with the given trace and notes what it was asked; fails where told."""

    def __init__(self, trace: Trace, failing: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        self.trace, self.failing, self.asked, self.running, self.most = trace, failing, [], 0, 0

    async def __call__(self, question: Question) -> Trace:
        self.asked.append(question.id)
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0.001 if int(question.id[1:]) % 2 else 0.003)
        self.running -= 1
        if question.id in self.failing:
            raise RuntimeError(f"no answer to {question.id}")
        return self.trace.model_copy(update={"question": question.question, "answer": f"to {question.id}"})


@pytest.fixture
def questions(ask) -> list[Question]:
    return [ask(id=f"q{place}", question=f"Question {place}?") for place in range(12)]


def test_all_models_answer_all_questions_in_order(tmp_path: Path, questions, reply) -> None:
    folder = open_run(tmp_path, {"questions": "x"})
    runners = {name: Runner(reply()) for name in ("base", "new@abc")}
    found = asyncio.run(evaluate_models(questions, runners, folder, 4))
    assert list(found) == ["base", "new@abc"]
    for name, runner in runners.items():
        assert [trace.answer for trace in found[name]] == [f"to {question.id}" for question in questions]
        assert sorted(runner.asked) == sorted(question.id for question in questions)
        assert runner.most == 4
        assert len((folder / f"traces-{name}.jsonl").read_text().splitlines()) == 12


def test_a_killed_run_goes_on_after_its_torn_line(tmp_path: Path, questions, reply) -> None:
    folder = open_run(tmp_path, {"questions": "x"})
    asyncio.run(evaluate_models(questions[:5], {"base": Runner(reply())}, folder, 2))
    path = folder / "traces-base.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines()[0][: len(whole) // 20])  # cut off while being written
    runner = Runner(reply())
    found = asyncio.run(evaluate_models(questions, {"base": runner}, open_run(tmp_path, {"questions": "x"}), 2))
    assert sorted(runner.asked) == sorted(question.id for question in questions[5:])
    assert [trace.answer for trace in found["base"]] == [f"to {question.id}" for question in questions]
    assert path.read_bytes().startswith(whole) and len(load_traces(path)) == 12
    again = Runner(reply())
    assert asyncio.run(evaluate_models(questions, {"base": again}, folder, 2)) == found
    assert again.asked == []


def test_another_identity_is_another_folder(tmp_path: Path) -> None:
    one, two = open_run(tmp_path, {"k": 3}), open_run(tmp_path, {"k": 4})
    assert one != two and open_run(tmp_path, {"k": 3}) == one and len(one.name) == 12
    (one / "run.json").write_text('{"k": 5}')
    with pytest.raises(StorageError, match="not about this run"):
        open_run(tmp_path, {"k": 3})


def test_a_failing_question_becomes_an_incomplete_trace(tmp_path: Path, questions, reply) -> None:
    folder = open_run(tmp_path, {})
    found = asyncio.run(evaluate_models(questions, {"base": Runner(reply(), {"q3", "q7"})}, folder, 3))["base"]
    assert [trace.complete for trace in found] == [place not in (3, 7) for place in range(12)]
    assert found[3].metadata == {"error": "RuntimeError: no answer to q3", "question_id": "q3"}
    assert found[3].model == "base" and not found[3].abstained and found[3].steps == []
    quiet = Runner(reply())
    asyncio.run(evaluate_models(questions, {"base": quiet}, folder, 3))
    assert quiet.asked == []  # a finished run is left as it is
    more = [*questions, questions[0].model_copy(update={"id": "q99"})]
    mended = asyncio.run(evaluate_models(more, {"base": quiet}, folder, 1))["base"]
    assert quiet.asked == ["q99", "q3", "q7"]  # an unfinished one asks failed questions again, after the new ones
    assert all(trace.complete for trace in mended)


def test_five_first_failures_stop_the_run(tmp_path: Path, questions, reply) -> None:
    folder = open_run(tmp_path, {})
    broken = Runner(reply(), {question.id for question in questions})
    with pytest.raises(EndpointError, match="base failed on 5 questions in a row: RuntimeError: no answer") as caught:
        asyncio.run(evaluate_models(questions, {"base": broken}, folder, 1))
    assert len(broken.asked) == 5 and caught.value.remedy
    mended = Runner(reply())
    found = asyncio.run(evaluate_models(questions, {"base": mended}, folder, 1))["base"]
    assert len(mended.asked) == 12 and all(trace.complete for trace in found)


def test_fewer_questions_that_all_fail_stop_the_run_too(tmp_path: Path, questions, reply) -> None:
    with pytest.raises(EndpointError):
        asyncio.run(evaluate_models(questions[:2], {"base": Runner(reply(), {"q0", "q1"})}, open_run(tmp_path, {}), 8))


def test_cancellation_is_no_failure(tmp_path: Path, questions, reply) -> None:
    folder = open_run(tmp_path, {})

    async def interrupted() -> None:
        task = asyncio.create_task(evaluate_models(questions, {"base": Runner(reply())}, folder, 1))
        await asyncio.sleep(0.02)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(interrupted())
    kept = load_traces(folder / "traces-base.jsonl")
    assert 0 < len(kept) < 12 and all(trace.complete for trace in kept.values())


def test_answers_of_another_engine_are_not_gone_on_with(tmp_path: Path) -> None:
    served = {"base": "tiny", "base_digest": "d1", "precision": "bfloat16"}
    require_served(tmp_path, served)
    require_served(tmp_path, served)
    with pytest.raises(StorageError, match="of another engine: base tiny, base_digest d1, precision bfloat16 and base tiny, base_digest d2"):
        require_served(tmp_path, served | {"base_digest": "d2"})


def test_a_run_that_is_going_on_is_not_begun_beside_it(tmp_path: Path, questions, reply) -> None:  # type: ignore[no-untyped-def]
    runner = Runner(reply())
    with locked(tmp_path / ".lock"), pytest.raises(StorageError, match="this evaluation is running already"):
        asyncio.run(evaluate_models(questions, {"base": runner}, tmp_path, 2))
    assert not runner.asked


def test_a_broken_line_names_the_file_and_line(tmp_path: Path, reply) -> None:
    path = tmp_path / "traces-base.jsonl"
    path.write_text(reply(metadata={"question_id": "q1"}).model_dump_json() + "\n{}\n")
    with pytest.raises(StorageError, match="line 2"):
        load_traces(path)


def test_file_names_are_safe_and_distinct() -> None:
    assert traces_file("name@0123456789ab") == "traces-name@0123456789ab.jsonl"
    assert "/" not in traces_file("org/model") and traces_file("org/model") != traces_file("org_model")
