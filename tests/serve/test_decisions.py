"""What is decided by measurement: the rules, and that a decision is kept for as long as its ground; the engines are scripted servers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.arguments import EngineSpec, ServedAdapter
from serve.load import Load, Reply, measure, read_prompts
from serve.measured import Measured, fingerprint, recall, remember
from serve.merge import decide_merge, judge
from serve.speculate import Verdict, compare, decide_speculation
from serve.tune import GRID, descend, is_better, tune
from tests.scripted import Endpoint, status
from tests.serve.test_arguments import make_spec
from understudy.engines import RunningEngine
from understudy.errors import AdapterError, EngineError
from understudy.files import write_json
from understudy.progress import show_progress
from understudy.records import Message
from understudy.settings.serving import Serve
from understudy.workspace import Workspace, create_workspace

PROMPTS = [[Message(role="user", content=f"What is {number}?")] for number in range(6)]


def figures(tokens_per_second: float, alone: float = 1.0, faults: int = 0) -> Measured:
    return Measured([tokens_per_second, 1.01 * tokens_per_second], 0.1, alone, faults)


@pytest.fixture
def prompted(workspace: Workspace, make_document: Callable[..., Any]) -> Workspace:
    """A workspace with a document to make prompts of."""
    workspace.store.add_document(*make_document("notes.txt", [f"The kiln number {number} is fired on Tuesdays." for number in range(6)]))
    return workspace


# ---- the load


def test_a_load_is_measured_request_by_request(endpoint: Endpoint) -> None:
    endpoint.reply = lambda _step, prompt: f"It is {prompt}"
    load = measure(endpoint.model.base_url, ["a", "b"], PROMPTS, 3)
    assert load.texts == [f"It is What is {number}?" for number in range(6)] and load.faults == []
    assert {body["model"] for body in endpoint.bodies} == {"a", "b"} and all(body["ignore_eos"] for body in endpoint.bodies)
    assert len({body["cache_salt"] for body in endpoint.bodies}) == 1
    assert 0 < load.first_token <= load.latency <= load.seconds and load.tokens_per_second > 0
    measure(endpoint.model.base_url, ["a"], PROMPTS, 3, to_the_end=True)
    assert len({body["cache_salt"] for body in endpoint.bodies}) == 2 and "ignore_eos" not in endpoint.bodies[-1]


def test_a_request_that_fails_is_counted_and_a_run_that_fails_raises(endpoint: Endpoint) -> None:
    endpoint.faults = [status(500)]
    assert len(measure(endpoint.model.base_url, ["a"], PROMPTS, 1).faults) == 1
    endpoint.faults = [status(500)] * 6
    with pytest.raises(EngineError, match="500"):
        measure(endpoint.model.base_url, ["a"], PROMPTS, 2)


def test_prompts_come_from_the_corpus_where_there_is_no_dataset(prompted: Workspace) -> None:
    prompts = read_prompts(prompted, 4)
    assert len(prompts) == 4 == len({prompt[-1].content for prompt in prompts}) and "kiln number" in prompts[0][-1].content
    assert prompts == read_prompts(prompted, 4)


# ---- decisions


def test_a_decision_is_kept_until_its_ground_changes(workspace: Workspace) -> None:
    spec = make_spec(adapters=[ServedAdapter("a@0123456789ab", Path("/a"), 8)])
    remember(workspace, "merge", fingerprint(spec), {"use": True})
    remember(workspace, "speculation", "k", {"use": False})
    assert recall(workspace, "merge", fingerprint(dataclasses.replace(spec, port=9))) == {"use": True}
    changed = [{"base_digest": "e" * 64}, {"adapters": []}, {"cores": 64}, {"settings": Serve(max_num_seqs=3)}]
    assert not any(recall(workspace, "merge", fingerprint(dataclasses.replace(spec, **change))) for change in changed)


@pytest.mark.parametrize(
    ("merged", "proven", "use"),
    [(figures(120, 0.9), True, True), (figures(120, 0.9), False, False), (figures(105, 0.9), True, False), (figures(120, 1.1), True, False)],
)
def test_merging_is_for_what_is_proven_and_faster_in_both_ways(merged: Measured, proven: bool, use: bool) -> None:
    decision = judge(figures(100, 1.0), merged, proven)
    assert decision["use"] is use
    assert ("merged into its base" in decision["because"].partition(":")[0]) is use and ("not proven" in decision["because"]) is not proven


@pytest.mark.parametrize(
    ("verdict", "use"), [(Verdict(8, 0, 1.2, 1.0), True), (Verdict(8, 1, 1.2, 1.2), False), (Verdict(8, 0, 1.02, 1.1), False), (Verdict(8, 0, 1.5, 0.9), False)]
)
def test_speculation_is_for_equal_answers_and_a_gain(verdict: Verdict, use: bool) -> None:
    assert verdict.use is use and ("taken" in str(verdict)) is use


def test_an_answer_that_fails_is_a_different_one() -> None:
    good, bad = Reply("a", 1, 0.1, 1.0), Reply("a", 1, 0.1, 1.0, "broke off")
    plain = (Load(2.0, [good, good]), Load(1.0, [good]))
    assert compare(plain, (Load(1.0, [good, good]), Load(1.0, [good]))) == Verdict(2, 0, 2.0, 1.0)
    assert compare(plain, (Load(1.0, [good, bad]), Load(1.0, [good]))).different == 1
    assert compare(plain, (Load(1.0, [good, good]), Load(1.0, [bad]))).different == 1


Opened = list[EngineSpec]


def trials(endpoint: Endpoint, opened: Opened, answers: Callable[[EngineSpec], str] = lambda _: "the same") -> Callable[..., Any]:
    """Engines of any spec: the scripted server, which answers as `answers` says."""

    @contextmanager
    def open_trial(spec: EngineSpec, *_: object) -> Iterator[RunningEngine]:
        opened.append(spec)
        text = answers(spec)
        endpoint.reply = lambda _step, _prompt: text
        yield RunningEngine(url=endpoint.model.base_url, pid=1, base="base-id", base_digest="d" * 64, models=["base-id"])

    return open_trial


def test_speculation_is_probed_once_and_left_off_where_answers_differ(prompted: Workspace, endpoint: Endpoint) -> None:
    opened: Opened = []
    said: list[str] = []
    spec = make_spec(settings=Serve(speculative_tokens=4))
    probe = trials(endpoint, opened, lambda each: f"answered with {each.speculative_tokens}")
    for _ in range(2):
        assert decide_speculation(prompted, spec, said.append, probe) == spec
    assert [each.speculative_tokens for each in opened] == [0, 4]
    assert "left off: 5 of 5 greedy answers differ" in said[-1]


def test_nothing_is_measured_at_a_restart(prompted: Workspace, endpoint: Endpoint) -> None:
    opened: Opened = []
    spec = make_spec(settings=Serve(speculative_tokens=4, merge="auto"), adapters=[ServedAdapter("a@0123456789ab", Path("/a"), 8)])
    assert decide_speculation(prompted, spec, print, trials(endpoint, opened), may_measure=False) == spec
    assert decide_merge(prompted, spec, lambda *_: None, print, trials(endpoint, opened), may_measure=False) == spec
    assert opened == []


def test_two_adapters_are_not_merged(prompted: Workspace) -> None:
    said: list[str] = []
    spec = make_spec(settings=Serve(merge="auto"), adapters=[ServedAdapter(f"{name}@0123456789ab", Path("/a"), 8) for name in "ab"])
    assert decide_merge(prompted, spec, lambda *_: None, said.append) == spec and "lone adapter" in said[0]


def test_what_cannot_be_merged_is_served_beside_its_base(prompted: Workspace, endpoint: Endpoint) -> None:
    spec = make_spec(settings=Serve(merge="auto"), adapters=[ServedAdapter("a@0123456789ab", Path("/a"), 8)])

    def merge(*_: object) -> None:
        raise AdapterError("no such layer")

    said: list[str] = []
    opened: Opened = []
    for _ in range(2):
        assert decide_merge(prompted, spec, merge, said.append, trials(endpoint, opened)) == spec
    assert "no such layer" in said[-1] and len(opened) == 1  # kept


def test_a_merged_adapter_is_kept_and_served_by_its_own_weights(prompted: Workspace) -> None:
    adapter = ServedAdapter("a@0123456789ab", Path("/a"), 8)
    spec = make_spec(settings=Serve(merge="auto"), adapters=[adapter])
    remember(prompted, "merge", fingerprint(spec, "merge"), {"use": True, "because": "faster"})
    merged: list[str] = []

    def merge(name: str, folder: Path) -> None:
        merged.append(name)
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"sum")

    for _ in range(2):
        found = decide_merge(prompted, spec, merge, print)
        assert (found.merged, found.adapters, found.base_path) == (adapter.name, [], prompted.merged / adapter.name)
        assert found.base_digest != spec.base_digest
    assert merged == [adapter.name]


# ---- tuning


def test_descent_takes_what_is_better_beyond_noise_and_no_slower_alone() -> None:
    speeds = {(256, 8): 90.0, (512, 8): 140.0, (1024, 8): 141.0, (512, 16): 200.0, (512, 32): 300.0}
    tried: list[tuple[int, int]] = []

    def try_out(settings: dict[str, Any]) -> Measured | None:
        key = (settings["a"], settings["b"])
        tried.append(key)
        return None if key == (512, 16) else figures(speeds[key], 2.0 if key == (512, 32) else 1.0)

    best, _ = descend({"a": 256, "b": 8}, figures(90.0), {"a": [256, 512, 1024], "b": [8, 16, 32]}, try_out)
    assert best == {"a": 512, "b": 8}
    assert tried == [(512, 8), (1024, 8), (512, 16), (512, 32)]
    assert not is_better(figures(200, faults=1), figures(100), figures(100))


def test_tuning_writes_what_is_better_and_goes_on_where_it_stopped(prompted: Workspace, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: Opened = []
    spec = make_spec(settings=Serve())

    def measured(*_: object) -> Measured:
        if len(opened) == 3:
            opened.append(spec)
            raise KeyboardInterrupt
        return figures(200.0 if opened[-1].settings.max_num_batched_tokens == 512 else 100.0)

    monkeypatch.setattr("serve.tune.measure_engine", measured)
    with pytest.raises(KeyboardInterrupt):
        tune(prompted, spec, print, show_progress, True, trials(endpoint, opened))
    assert yaml.safe_load((prompted.root / "understudy.yaml").read_text()) == {"gateway": {"max_body_mib": 0.1}}
    before = len(opened)
    result = tune(prompted, spec, print, show_progress, True, trials(endpoint, opened))
    assert len(opened) - before == len(result["trials"]) - 2 == 5 and result["changed"] == {"max_num_batched_tokens": 512} and result["gain"] == 2.0
    assert create_workspace(str(prompted.root)).config.serve.max_num_batched_tokens == 512
    assert tune(prompted, spec, print, show_progress, False, trials(endpoint, []))["written"] is False


def test_a_machine_that_was_busy_at_first_changes_nothing(prompted: Workspace, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: Opened = []
    monkeypatch.setattr("serve.tune.measure_engine", lambda *_: figures(100.0 if len(opened) == 1 else 200.0))
    result = tune(prompted, make_spec(), print, show_progress, True, trials(endpoint, opened))
    assert (result["changed"], result["written"], len(opened)) == ({}, False, 7)


def test_settings_that_cannot_run_are_passed_over(prompted: Workspace) -> None:
    @contextmanager
    def broken(*_: object) -> Iterator[RunningEngine]:
        raise EngineError("no memory")
        yield

    with pytest.raises(EngineError, match="settings in force"):
        tune(prompted, make_spec(), print, show_progress, True, broken)


def test_the_grid_changes_no_answer() -> None:
    assert {name for grid in GRID.values() for name in grid} == {"max_num_batched_tokens", "max_num_seqs"}


def test_decisions_survive_a_file_of_another_shape(workspace: Workspace) -> None:
    write_json(workspace.engine_file.with_name("decisions.json"), {"merge": 3})
    assert recall(workspace, "merge", "k") is None
