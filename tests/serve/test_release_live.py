"""Releases on the session's real engine: a model for each step of a run, and an alias at the gateway of another process."""

from __future__ import annotations

import asyncio
import time

import openai
import pytest

from rag.agent import run_agent
from rag.retrieve import Retriever
from tests.conftest import BASE, Served
from tests.rag.conftest import retriever, shared_embedder  # noqa: F401 - fixtures
from tests.serve.test_gateway_live import TURNS, client, url  # noqa: F401 - fixtures
from understudy.adapters import find_adapter
from understudy.cli import main
from understudy.commands.wiring import resolve_steps, tools_for
from understudy.files import write_json
from understudy.records import Trace
from understudy.releases import Release, add_release

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


def released(served: Served, alias: str, answer: str, others: str) -> Release:
    adapters = {"plan": others, "answer": answer, "validate": others}
    made = Release.model_validate({"alias": alias, "tenant": "default", "generation": "g", "adapters": adapters, "prompt_version": "p"})
    add_release(served.workspace, made)
    return made


def test_a_run_takes_its_steps_from_two_models_of_one_engine(engine_session: Served, retriever: Retriever) -> None:  # noqa: F811
    made = released(engine_session, "two-models", "base", engine_session.adapter)

    async def run() -> Trace:
        async with tools_for(engine_session.workspace, resolve_steps(engine_session.workspace, "two-models", engine_session.running), retriever) as tools:
            return await run_agent("When is the kiln fired?", tools)

    trace = asyncio.run(run())
    asked = {step.name: step.model for step in trace.steps if step.model}
    assert trace.complete and trace.release == made.name and trace.model == "base"
    assert asked == {"plan": engine_session.adapter, "answer": "base", "validate": engine_session.adapter}


def test_an_alias_follows_promotion_and_rollback_in_a_gateway_that_runs(engine_session: Served, client: openai.OpenAI) -> None:  # noqa: F811
    name, workspace = engine_session.adapter, engine_session.workspace
    manifest, folder = find_adapter(workspace, name)
    releases = [released(engine_session, "live-act", answer, answer) for answer in ("base", name)]

    def answers() -> str:
        return client.chat.completions.create(model="live-act", messages=TURNS, max_tokens=2).model

    def typed(*words: str) -> int:
        return main(["--workspace", str(workspace.root), "release", *words, "--json"])

    assert typed("promote", releases[1].name) == 3  # neither proven nor evaluated
    write_json(folder / "proof.json", {"digest": manifest.digest, "passed": True, "engine": {"base_digest": manifest.served_base_digest}})
    try:
        with pytest.raises(openai.NotFoundError):
            answers()
        assert typed("promote", releases[0].name, "--force") == 0 and answers() == BASE
        assert typed("promote", releases[1].name, "--force") == 0 and answers() == name
        assert typed("rollback", "live-act") == 0 and answers() == BASE
    finally:
        (folder / "proof.json").unlink()
        time.sleep(1.1)
