"""A release by its alias wherever a model is named: `release create`, `ask`, `evaluate`, the cache."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rag.answering import answer_question
from rag.policy import Policy
from rag.retrieve import open_retriever
from rag.validation import Calibration, write_calibration
from tests.conftest import copy_of
from tests.rag.conftest import shared_embedder  # noqa: F401 - a fixture
from tests.rag.test_agent import QUESTION, RIGHT
from tests.scripted import Endpoint, scripted
from tests.serve.doors import engine_of
from tests.serve.test_gateway_names import register
from understudy.cli import main
from understudy.commands.evaluating import candidates, make_plan
from understudy.commands.wiring import answering_tools, cache_scope, resolve, resolve_name, resolve_steps, tools_for
from understudy.errors import UsageError
from understudy.records import Trace
from understudy.workspace import Workspace, open_workspace


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with scripted() as made:
        made.reply = lambda step, _: RIGHT[step]
        yield made


@pytest.fixture(scope="module")
def workspace(notes_workspace: Workspace, tmp_path_factory: pytest.TempPathFactory, endpoint: Endpoint) -> Workspace:
    made = copy_of(notes_workspace, tmp_path_factory.mktemp("released"))
    for name in ("handbooks", "checker"):
        register(made, name, endpoint, {}, [])
    return made


def typed(workspace: Workspace, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[dict[str, Any], int]:
    capsys.readouterr()
    code = main(["--workspace", str(workspace.root), *words, "--json"])
    return json.loads(capsys.readouterr().out), code


def test_a_release_has_an_adapter_a_step_and_answers_under_its_alias(
    workspace: Workspace, endpoint: Endpoint, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    made, code = typed(workspace, capsys, "release", "create", "eu-act", "--answer", "handbooks", "--validate", "checker")
    names = {name: resolve_name(workspace, name) for name in ("handbooks", "checker")}
    assert code == 0 and made["created"] and made["adapters"] == {"plan": names["handbooks"], "answer": names["handbooks"], "validate": names["checker"]}
    assert not typed(workspace, capsys, "release", "create", "eu-act", "--answer", "handbooks", "--validate", "checker")[0]["created"]
    assert resolve_name(workspace, "eu-act") == made["release"]
    retriever = open_retriever(workspace)
    engine = engine_of(endpoint, models=["base", *names.values()])
    folder = Path(endpoint.listed[names["handbooks"]][0])
    write_calibration(folder, Calibration(key="k", model=names["handbooks"], questions=9, right=None, answerable=None, auroc=None, abstention_accuracy=None))

    async def ask(may_cache: bool) -> Trace:
        async with answering_tools(workspace, resolve_steps(workspace, "eu-act", engine), retriever, None, may_cache) as tools:
            assert tools.calibration is not None and tools.calibration.model == names["handbooks"]
            return await answer_question(QUESTION, tools)

    first, hit = (asyncio.run(ask(may_cache=True)) for _ in range(2))
    assert [step.model for step in first.steps if step.model] == [names["handbooks"], names["handbooks"], names["checker"]]
    assert [body["model"] for body in endpoint.bodies] == [step.model for step in first.steps if step.model]
    assert hit.cache == "exact" and {first.release, hit.release} == {made["release"]} and hit.model == first.model == names["handbooks"]
    scopes = {cache_scope(workspace, name, "agentic").digest for name in ("eu-act", "handbooks", "base")}
    assert len(scopes) == 3  # an answer counts under its release only
    with pytest.raises(UsageError, match="is a release"):
        resolve(workspace, "eu-act", engine)
    settled = Policy(plans_first=False, asks_verdict=False)
    write_calibration(folder, Calibration(key="k", model="m", questions=9, right=None, answerable=None, auroc=None, abstention_accuracy=None, policy=settled))
    again, _ = typed(workspace, capsys, "release", "create", "eu-act", "--answer", "handbooks", "--validate", "checker")
    assert [note.split(":")[0] for note in again["notes"]] == [f"{names['checker']} is never asked"]
    alone = tools_for(workspace, resolve_steps(workspace, "handbooks", engine), retriever)
    assert not alone.by_step and alone.release is None
    path = tmp_path / "held-out.jsonl"
    path.write_text(json.dumps({"id": "1", "question": "When is it fired?", "answer": "Tuesdays"}) + "\n")
    plan = make_plan(workspace, path, "base,handbooks,eu-act", retriever)
    assert plan.names == ["base", names["handbooks"], made["release"]] and candidates(workspace, plan.names) == plan.names[1:]


def test_what_cannot_be_a_release_is_refused_and_what_is_gone_is_told(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    set_far = ("--set", "remotes.far={base_url: 'http://127.0.0.1:9/v1', model: m}")
    for words in (
        ["rag"],
        ["checker"],
        ["x", "--answer", "far"],
        ["x", "--endpoint", "near"],
        ["x", "--endpoint", "far", "--answer", "base", "--plan", "checker"],
    ):
        answer, code = typed(workspace, capsys, "release", "create", *words, *set_far)
        assert code == 2 and answer["error"]["remedy"], words
    assert typed(workspace, capsys, "release", "create", "x", "--answer", "nobody")[1] == 1
    far, code = typed(workspace, capsys, "release", "create", "far-act", "--endpoint", "far", "--answer", "base", *set_far)
    assert code == 0
    models = resolve_steps(open_workspace(str(workspace.root), [set_far[1]]), "far-act", None)
    assert models.answer is models.validate and models.answer.name == "far" and models.release == far["release"]
    [row] = typed(workspace, capsys, "release", "ls", "far-act")[0]["aliases"]
    assert row["live"] is None and row["releases"][0]["faults"] == ["far is no configured remote any more"]
    gone, _ = typed(workspace, capsys, "release", "create", "short", "--answer", "checker")
    folder = workspace.adapters / "checker"
    folder.rename(workspace.root / "away")
    try:
        [row] = typed(workspace, capsys, "release", "ls", "short")[0]["aliases"]
        assert f"{gone['adapters']['answer']} is gone" in row["releases"][0]["faults"][0]
    finally:
        (workspace.root / "away").rename(folder)
    assert typed(workspace, capsys, "release", "ls", "nobody")[1] == 1
