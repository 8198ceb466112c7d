"""canary, promote and rollback as typed: what they need, what they refuse, and what is written down."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from rag.eval.report import build_report
from rag.prompts import PROMPT_VERSION
from serve.release.evidence import live_name, missing_evidence
from serve.release.trial import Line, Observation, keep_line, trial_file
from tests.rag.eval.conftest import ask, corpus, reply  # noqa: F401 - fixtures
from tests.scripted import Endpoint
from tests.serve.test_gateway_names import register
from understudy.cli import main
from understudy.commands.evaluating import resolved_gates
from understudy.cycle_stages import Turn
from understudy.cycles import Cycle, Done, Seen
from understudy.cycles import Line as StageLine
from understudy.files import write_json
from understudy.progress import show_progress
from understudy.releases import Release, add_release, decide, decisions, standing
from understudy.settings.evaluating import Gate
from understudy.workspace import Workspace, open_workspace

ALIAS, GATES = "eu-act", "evaluate.gates={token_f1: {against: live, max_loss: 0.02}}"
Typed = Callable[..., tuple[dict[str, Any], int]]
Evaluated = Callable[..., None]


@pytest.fixture
def typed(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> Typed:
    """A command of `release`, under the gate: its JSON and its exit code."""

    def run(*words: str, gates: str = GATES) -> tuple[dict[str, Any], int]:
        capsys.readouterr()
        code = main(["--workspace", str(workspace.root), "release", *words, "--json", "--set", gates])
        return json.loads(capsys.readouterr().out), code

    return run


@pytest.fixture
def made(workspace: Workspace, endpoint: Endpoint) -> list[Release]:
    """Two releases: one proven adapter, then another beside an adapter for validation."""
    names = {name: register(workspace, name, endpoint, {}, []) for name in ("one", "two", "checker")}
    write_json(workspace.index / "pointers.json", {"live": {"default": "g1"}, "snapshots": {}})
    releases = []
    for answer, validate in (("one", "one"), ("two", "checker")):
        adapters = {"plan": names[answer], "answer": names[answer], "validate": names[validate]}
        row = {"alias": ALIAS, "tenant": "default", "generation": "g1", "adapters": adapters, "prompt_version": PROMPT_VERSION}
        releases.append(Release.model_validate(row))
        add_release(workspace, releases[-1])
    return releases


@pytest.fixture
def evaluated(workspace: Workspace, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Evaluated:
    """Writes the report, without its page, of an evaluation in which the last of the models is right, or is not."""
    monkeypatch.setattr("rag.eval.report.render_html", lambda *_: "")
    question, answered, chunks = (request.getfixturevalue(name) for name in ("ask", "reply", "corpus"))

    def run(names: list[str], is_right: bool, generation: str = "g1", gate: Gate | None = None) -> None:
        questions = [question(id=f"q{place}", documents=[f"d{place % 4}.pdf"]) for place in range(8)]
        wrong, right = answered(answer="Dragons."), answered(answer="Up to six books.")
        traces = {name: [right if is_right or name != names[-1] else wrong] * 8 for name in names}
        about = {"questions": "q", "models": names, "generation": generation, "prompt_version": PROMPT_VERSION}
        gates = {"token_f1": gate or Gate(against=names[0], max_loss=0.02)}
        number = len(list(workspace.reports.glob("*")))
        folder = workspace.reports / f"run{number}"
        for of_model in traces.values():
            of_model[0] = of_model[0].model_copy(update={"created_at": float(number)})
        build_report(questions, traces, chunks, folder, k=2, concurrency=1, provenance=about, resamples=100, gates=gates, relative=workspace.relative)

    return run


def test_a_promotion_needs_proofs_and_an_evaluation_that_passes_its_gates(
    typed: Typed, workspace: Workspace, made: list[Release], evaluated: Evaluated
) -> None:
    first, second = made
    refused, code = typed("promote", first.name)
    assert code == 3 and "was not evaluated on its corpus" in refused["error"]["message"] and standing(workspace, ALIAS).live is None
    evaluated(["base", first.name], is_right=True, generation="g0")
    assert typed("promote", first.name)[1] == 3  # that was another corpus
    evaluated(["base", first.name], is_right=True)
    promoted, code = typed("promote", first.name)
    assert code == 0 and promoted["live"] == first.name and promoted["decision"]["evidence"]["evaluation"]["report"] == "reports/run1/report.json"
    opened = open_workspace(str(workspace.root), [GATES])
    gates = resolved_gates(opened, ["base", first.name, second.name])
    assert live_name(workspace, ALIAS) == gates["token_f1"].against == first.name and resolved_gates(opened, ["base"]) == opened.config.evaluate.gates
    evaluated(["base", second.name], is_right=True)  # against the base, and another is live now
    assert "did not put the gate on token_f1 against eu-act@" in typed("promote", ALIAS)[0]["error"]["message"]
    evaluated([first.name, second.name], is_right=False)
    assert "gate on token_f1 against eu-act@" in typed("promote", ALIAS)[0]["error"]["message"]
    forced, code = typed("promote", ALIAS, "--force", "--reason", "the auditor asked")
    assert code == 0 and forced["live"] == second.name and forced["decision"]["forced"] and forced["decision"]["reason"] == "the auditor asked"
    assert any("fail" in lacking for lacking in forced["decision"]["evidence"]["lacking"])
    back, code = typed("rollback", ALIAS)
    assert code == 0 and back["live"] == first.name and typed("rollback", ALIAS)[1] == 2
    assert [decision.action for decision in decisions(workspace, ALIAS)] == ["created", "created", "promoted", "promoted", "rolled back"]


def test_unproven_changed_or_missing_adapters_are_named(workspace: Workspace, typed: Typed, made: list[Release], endpoint: Endpoint) -> None:
    release = made[1]
    folder = {name: Path(endpoint.listed[release.adapters[step]][0]) for step, name in (("answer", "two"), ("validate", "checker"))}
    (folder["two"] / "proof.json").unlink()
    write_json(folder["checker"] / "proof.json", {"digest": folder["checker"].name, "passed": False, "engine": {"base_digest": "d" * 64}})
    lacking, _ = missing_evidence(workspace, release, with_evaluation=False)
    assert len(lacking) == 2 and "the proof of checker@" in lacking[0] and "two@" in lacking[1] and "not proven" in lacking[1]
    folder["two"].rename(workspace.root / "away")
    answer, code = typed("promote", release.name, "--force")
    assert code == 1 and "no adapter two@" in answer["error"]["message"]  # force does not bring it back
    [alias] = typed("ls", ALIAS)[0]["aliases"]
    assert any("is gone" in fault for fault in alias["releases"][1]["faults"]) and alias["releases"][0]["faults"] == []
    write_json(workspace.index / "pointers.json", {"live": {"default": "g2"}, "snapshots": {}})
    assert typed("ls", ALIAS)[0]["aliases"][0]["releases"][0]["faults"] == ["the corpus has changed since it was made: create it anew"]
    assert "the corpus has changed" in typed("promote", made[0].name)[0]["error"]["message"]


def test_a_trial_is_set_seen_and_ended(workspace: Workspace, typed: Typed, made: list[Release]) -> None:
    first, second = made
    assert typed("canary", second.name)[1] == 2  # nothing is live
    typed("promote", first.name, "--force")
    assert typed("canary", first.name)[1] == typed("canary", second.name, "--share", "1.5")[1] == 2
    tried, code = typed("canary", ALIAS, "--tenant", "legal")
    assert code == 0 and (tried["canary"]["release"], tried["canary"]["share"], tried["canary"]["tenants"]) == (second.name, 1.0, ["legal"])
    shadowed, _ = typed("canary", ALIAS, "--shadow", "--share", "0.25")
    assert shadowed["canary"]["shadow"] and [row["state"] for row in shadowed["releases"]] == ["live", "shadow"]
    canary = standing(workspace, ALIAS).canary
    assert canary is not None
    seen = Observation(score=0.5, abstained=False, failed=False, seconds=1.0)
    keep_line(trial_file(workspace, ALIAS, canary), Line(live=seen, canary=seen))
    trial = typed("ls")[0]["aliases"][0]["canary"]["trial"]
    assert trial["answers"] == {"live": 1, "canary": 1} and trial["tests"]["score"]["mean"] == 0 and trial["verdict"] == ""
    ended, _ = typed("rollback", ALIAS)
    assert ended["canary"] is None and ended["live"] == first.name
    assert main(["--workspace", str(workspace.root), "release", "ls"]) == 0


def test_a_cycle_ends_by_the_same_evidence(workspace: Workspace, made: list[Release], evaluated: Evaluated, typed: Typed) -> None:
    opened = open_workspace(str(workspace.root), [GATES, f"releases.default={ALIAS}"])

    def ended(release: Release) -> Done:
        turn = Turn(opened, [], None, workspace.root / "q", Seen(), print, show_progress, ExitStack())
        return turn.release(Cycle(workspace.cycles / "0001", [StageLine(stage="evaluate", at=0.0, seconds=0.0, outcome={"release": release.name})]))

    first, second = made
    assert (ended(first).verdict, ended(first).outcome["lacking"][0][:20]) == ("refused", "it was not evaluated")
    evaluated(["base", first.name], is_right=True)
    assert ended(first).verdict == "ready" and standing(workspace, ALIAS).live is None  # a person promotes the first
    typed("promote", first.name)
    evaluated([first.name, second.name], is_right=False)
    assert "gate on token_f1 against eu-act@" in ended(second).reason and standing(workspace, ALIAS).canary is None
    evaluated([first.name, second.name], is_right=True)
    tried = ended(second)
    canary = standing(workspace, ALIAS).canary
    assert tried.verdict == "canary" and canary is not None and (canary.release, canary.share) == (second.digest, 0.1)
    assert ended(second) == tried and standing(workspace, ALIAS).canary == canary  # killed before its line: the trial goes on
    decide(workspace, ALIAS, "canary", lambda before: (first.digest, before.model_copy(update={"canary": canary.model_copy(update={"release": first.digest})})))
    assert "another release is on trial" in ended(second).reason
