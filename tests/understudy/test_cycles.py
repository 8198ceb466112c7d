"""Cycles on disk: what was cut off has not happened, nothing is done twice, and the regression set stays what it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from understudy.cli import main
from understudy.cycles import STAGES, Cycle, Done, Seen, Stage, cycles, frozen_set, last_seen, new_cycle, run_stages
from understudy.errors import NotFoundError, StorageError, UsageError
from understudy.files import locked
from understudy.workspace import Workspace, create_workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return create_workspace(str(tmp_path / "w"))


def counting(ran: list[str], verdicts: dict[str, Done]) -> dict[str, Stage]:
    """Stages that note that they ran, each with what those before it came to."""

    def stage(name: str) -> Callable[[Cycle], Done]:
        def run(cycle: Cycle) -> Done:
            ran.append(name)
            return verdicts.get(name, Done(outcome={"before": list(cycle.outcomes)}))

        return run

    return {name: stage(name) for name in ("one", "two", "three")}


def test_a_log_cut_off_at_any_byte_goes_on_and_no_whole_stage_runs_again(workspace: Workspace) -> None:
    stages = counting([], {"three": Done(outcome={"é": 1}, verdict="ready", reason="done")})
    whole = run_stages(new_cycle(workspace, {"live": None}), stages, lambda _: None)
    file = whole.folder / STAGES
    content = file.read_bytes()
    for cut in range(content.index(b"\n") + 1, len(content) + 1, 7):
        file.write_bytes(content[:cut])
        [kept] = cycles(workspace)
        ran: list[str] = []
        again = run_stages(kept, counting(ran, {"three": Done(outcome={"é": 1}, verdict="ready", reason="done")}), lambda _: None)
        assert ran == ["one", "two", "three"][content[:cut].count(b"\n") - 1 :]
        assert again.outcomes == whole.outcomes and [line.outcome for line in cycles(workspace)[0].lines] == list(whole.outcomes.values())


def test_a_verdict_ends_a_cycle_and_a_first_line_cut_off_is_no_cycle(workspace: Workspace) -> None:
    ran: list[str] = []
    ended = run_stages(new_cycle(workspace, {}), counting(ran, {"two": Done(verdict="refused", reason="no")}), lambda _: None)
    assert ran == ["one", "two"] and ended.end is not None and ended.end.reason == "no"
    (workspace.cycles / "0002").mkdir()
    (workspace.cycles / "0002" / STAGES).write_bytes(b'{"stage": "beg')
    assert [cycle.name for cycle in cycles(workspace)] == ["0001"] and new_cycle(workspace, {}).name == "0002"
    (workspace.cycles / "0001" / STAGES).write_bytes(b"{}\n")
    with pytest.raises(StorageError, match="none of its own"):
        cycles(workspace)


def test_past_and_unfinished_cycles_are_listed(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    begun = {"tenant": "default", "alias": "notes"}
    listed = ["--workspace", str(workspace.root), "cycle", "ls"]
    assert main(listed) == 0 and capsys.readouterr().out == "no cycle has begun\n"
    run_stages(new_cycle(workspace, begun), counting([], {"two": Done(verdict="refused", reason="worse \x1b[2J")}), lambda _: None)
    run_stages(new_cycle(workspace, begun), counting([], {}), lambda _: None).enter("left", Done(verdict="abandoned"), 0.0)
    new_cycle(workspace, {**begun, "tenant": "other"})
    new_cycle(workspace, begun)
    assert main([*listed, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["cycles"]
    assert [(row["cycle"], row["stage"], row["verdict"]) for row in rows] == [
        ("0001", "two", "refused"),
        ("0002", "three", "abandoned"),
        ("0004", "begin", None),
    ]
    assert main(listed) == 0
    shown = capsys.readouterr().out
    assert "refused: worse" in shown and "\x1b" not in shown and "has not ended" in shown


def test_what_was_seen_counts_once_its_cycle_has_ended(workspace: Workspace) -> None:
    first = new_cycle(workspace, {})
    first.see(Seen(traces=["a"]))
    assert last_seen(cycles(workspace)) == Seen()
    first.enter("release", Done(verdict="canary"), 0)
    given_up = new_cycle(workspace, {})
    given_up.see(Seen(traces=["a", "b"]))
    given_up.enter("left", Done(verdict="abandoned"), 0)
    assert last_seen(cycles(workspace)).traces == ["a"]


def test_a_regression_set_changes_only_when_told(workspace: Workspace, tmp_path: Path) -> None:
    source = tmp_path / "questions.jsonl"
    with pytest.raises(NotFoundError):
        frozen_set(workspace, source, refreeze=False)
    source.write_text('{"question": "a"}\n')
    digest, copy = frozen_set(workspace, source, refreeze=False)
    source.write_text('{"question": "b"}\n')
    with pytest.raises(UsageError, match="not the one that was frozen") as refused:
        frozen_set(workspace, source, refreeze=False)
    assert "--refreeze" in refused.value.remedy and copy.read_text() == '{"question": "a"}\n'
    assert (
        frozen_set(workspace, source, refreeze=True)[0] != digest == json.loads((workspace.cycles / "regression.jsonl").read_text().splitlines()[0])["digest"]
    )
    source.write_text('{"question": "a"}\n')
    assert frozen_set(workspace, source, refreeze=True) == (digest, copy)
    copy.write_text("{}\n")
    with pytest.raises(StorageError, match="not the regression set"):
        frozen_set(workspace, source, refreeze=False)


def test_a_lock_that_is_held_is_refused_and_not_waited_for(workspace: Workspace) -> None:
    with (
        locked(workspace.cycles / ".lock"),
        pytest.raises(StorageError, match="another cycle is at work"),
        locked(workspace.cycles / ".lock", "another cycle is at work"),
    ):
        pass
