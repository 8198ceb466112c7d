"""Aliases at the gateway: live releases, trials, shadows and stops, and no answer by a wrong release while they change."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest

from serve.gateway.gateway import Gateway
from serve.gateway.routing import ReleaseBook, is_chosen
from tests.conftest import copy_of
from tests.rag.conftest import shared_embedder  # noqa: F401 - a fixture
from tests.rag.test_agent import QUESTION, RIGHT
from tests.scripted import Endpoint, scripted, status
from tests.serve.doors import TURNS, engine_of, opened
from tests.serve.test_gateway import error_of
from tests.serve.test_gateway_names import register
from understudy.records import Trace
from understudy.releases import Canary, Release, add_release, decide, decisions, on_trial, promoted, rolled_back, standing
from understudy.workspace import Workspace, open_workspace

ALIAS = "eu-act"
Use = Callable[[httpx.AsyncClient, Gateway], Awaitable[Any]]


@pytest.fixture(scope="module")
def notes(notes_workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Workspace, Endpoint, dict[str, str]]]:
    """A corpus, a scripted engine, and adapters that it serves, the last for a tenant of its own."""
    with scripted() as endpoint:
        made = copy_of(notes_workspace, tmp_path_factory.mktemp("releases"))
        names = {name: register(made, name, endpoint, {}, []) for name in ("one", "two", "checker", "spare")}
        names["theirs"] = register(made, "theirs", endpoint, {}, ["other"])
        yield made, endpoint, names


@pytest.fixture
def desk(notes: tuple[Workspace, Endpoint, dict[str, str]]) -> Iterator[Desk]:
    workspace, endpoint, names = notes
    endpoint.reply = lambda step, _: RIGHT[step]
    endpoint.faults, endpoint.bodies = [], []
    made = Desk(open_workspace(str(workspace.root), [f"releases.default={ALIAS}", "cache.enabled=false"]), endpoint, names)
    yield made
    endpoint.faults = []
    log = workspace.releases / ALIAS / "decisions.jsonl"
    log.unlink(missing_ok=True)


class Desk:
    """A workspace, its engine, and releases of one alias."""

    def __init__(self, workspace: Workspace, endpoint: Endpoint, names: dict[str, str]) -> None:
        self.workspace, self.endpoint, self.names = workspace, endpoint, names

    def release(self, answer: str, validate: str | None = None) -> Release:
        name = self.names.get(answer, answer)
        adapters = {"plan": name, "answer": name, "validate": self.names.get(validate or answer, validate or answer)}
        made = Release.model_validate({"alias": ALIAS, "tenant": "default", "generation": "g", "adapters": adapters, "prompt_version": "p"})
        add_release(self.workspace, made)
        return made

    def promote(self, release: Release) -> None:
        decide(self.workspace, ALIAS, "promoted", lambda before: (release.digest, promoted(before, release.digest)))

    def trial(self, release: Release, share: float, **options: Any) -> Canary:
        canary = Canary(release=release.digest, share=share, began_at=1.0, **options)
        decide(self.workspace, ALIAS, "canary", lambda before: (release.digest, on_trial(before, canary)))
        return canary

    def through(self, use: Use) -> Any:
        async def run() -> Any:
            async with opened(self.workspace, engine_of(self.endpoint)) as (client, gateway):
                return await use(client, gateway)

        return asyncio.run(run())

    def trace(self, answer: httpx.Response) -> Trace:
        found = self.workspace.store.trace(answer.json()["understudy"]["trace_id"])
        assert found is not None
        return found


async def ask(client: httpx.AsyncClient, question: str = QUESTION, model: str = "rag", **more: Any) -> httpx.Response:
    return await client.post("/v1/chat/completions", json={"model": model, "messages": [{"role": "user", "content": question}], **more})


def models_of(trace: Trace) -> list[str]:
    return [step.model for step in trace.steps if step.model]


def test_an_alias_is_its_live_release_to_rag_and_to_plain_chat(desk: Desk) -> None:
    first, second = desk.release("one", "checker"), desk.release("two")

    async def use(client: httpx.AsyncClient, _: Gateway) -> list[httpx.Response]:
        nothing = [await ask(client), await ask(client, model=ALIAS)]
        desk.promote(first)
        asked = [await ask(client), await client.post("/v1/chat/completions", json={"model": ALIAS, "messages": TURNS})]
        desk.promote(second)  # holds from the next request on
        after = [await ask(client), await client.post("/v1/chat/completions", json={"model": ALIAS, "messages": TURNS})]
        decide(desk.workspace, ALIAS, "rolled back", rolled_back)
        back = [await ask(client), await client.get("/v1/models"), await ask(client, model=first.name), await client.get("/metrics")]
        return [*nothing, *asked, *after, *back]

    unset, unknown, rag, plain, rag_second, plain_second, back, models, pinned, metrics = desk.through(use)
    assert unset.status_code == 503 and "nothing is live" in error_of(unset)["message"] and unknown.status_code == 404
    one, two, checker = (desk.names[name] for name in ("one", "two", "checker"))
    for answer, release, steps in ((rag, first, [one, one, checker]), (rag_second, second, [two, two, two]), (back, first, [one, one, checker])):
        assert answer.json()["understudy"]["release"] == release.name and models_of(desk.trace(answer)) == steps
    assert plain.status_code == plain_second.status_code == 200 and pinned.status_code == 404
    assert [body["model"] for body in desk.endpoint.bodies] == [one, one, checker, one, two, two, two, two, one, one, checker]
    assert ALIAS in [row["id"] for row in models.json()["data"]]
    assert f'understudy_release_answers_total{{outcome="answered",release="{first.name}",role="live"}} 2.0' in metrics.text
    assert f'understudy_release_answers_total{{outcome="relayed",release="{second.name}",role="live"}} 1.0' in metrics.text
    assert f'"release": "{second.name}"' in (desk.workspace.logs / "gateway.jsonl").read_text()


def test_a_trial_answers_its_share_and_a_conversation_stays_where_it_began(desk: Desk) -> None:
    first, second = desk.release("one"), desk.release("two")
    desk.promote(first)
    canary = desk.trial(second, 0.4)
    questions = [f"When is kiln {number} fired?" for number in range(9)]

    async def use(client: httpx.AsyncClient, _: Gateway) -> tuple[list[httpx.Response], list[httpx.Response]]:
        begun = [await ask(client, question) for question in questions]
        turns = [{"role": "user", "content": "{}"}, {"role": "assistant", "content": "On Tuesdays."}, {"role": "user", "content": "At what time?"}]
        went_on = [await ask(client, "", messages=[{**turns[0], "content": question}, *turns[1:]]) for question in questions]
        return begun, went_on

    desk.endpoint.reply = lambda step, _: {**RIGHT, "rewrite": "At what time on Tuesdays is the kiln fired?"}[step]
    begun, went_on = desk.through(use)
    released = [answer.json()["understudy"]["release"] for answer in begun]
    assert released == [answer.json()["understudy"]["release"] for answer in went_on] and set(released) == {first.name, second.name}
    drawn = sum(is_chosen(canary, str(number)) for number in range(4000)) / 4000
    assert drawn == pytest.approx(0.4, abs=0.03)
    lines = next((desk.workspace.releases / ALIAS).glob("trial-*.jsonl")).read_text().splitlines()
    assert len(lines) == 18 and sum('"live": null' in line for line in lines) == 2 * released.count(second.name)


def test_a_trial_of_a_tenant_leaves_the_others_and_compares_with_what_it_may(desk: Desk) -> None:
    first, second = desk.release("one"), desk.release("two")
    desk.promote(first)
    book = ReleaseBook(desk.workspace)
    for share, shadow, legal, others in (
        (1.0, False, {(second.name, True, True)}, (first.name, False, True)),  # all of theirs: the other tenants are what it is compared with
        (0.5, False, {(second.name, True, True), (first.name, False, True)}, (first.name, False, False)),
        (1.0, True, {(first.name, False, True)}, (first.name, False, False)),
    ):
        desk.trial(second, share, tenants=["legal"], shadow=shadow)
        found = {tenant: [book.route(ALIAS, tenant, str(number)) for number in range(40)] for tenant in ("legal", "default")}
        seen = {tenant: {(route.answers.name, route.is_canary, route.canary is not None) for route in routes if route} for tenant, routes in found.items()}
        assert seen == {"legal": legal, "default": {others}}
        assert {route.shadow is not None for route in found["legal"] if route} == {shadow}


def test_a_candidate_that_fails_is_stopped_and_the_decision_says_why(desk: Desk) -> None:
    first, second = desk.release("one"), desk.release("checker")
    desk.promote(first)
    desk.trial(second, 0.5)
    bad = desk.names["checker"]

    def break_checker(handler: Any) -> None:
        desk.endpoint.faults.append(break_checker)
        if desk.endpoint.bodies[-1]["model"] == bad:
            status(400)(handler)
        else:
            step = desk.endpoint.asked[-1]
            handler.answer(RIGHT[step], desk.endpoint.bodies[-1])

    desk.endpoint.faults = [break_checker]

    async def use(client: httpx.AsyncClient, _: Gateway) -> list[httpx.Response]:
        answers = []
        for number in range(120):
            answers.append(await ask(client, f"When is kiln {number} fired?"))
            if standing(desk.workspace, ALIAS).canary is None:
                break
        return [*answers, await ask(client, "When was that?")]

    *answers, after = desk.through(use)
    last = decisions(desk.workspace, ALIAS)[-1]
    assert last.action == "stopped" and last.release == second.digest and "failed runs" in last.reason and last.evidence["tests"]["error"]["mean"] > 0.5
    assert len(answers) < 120 and 0 < sum(answer.status_code == 502 for answer in answers) < 40
    assert after.json()["understudy"]["release"] == first.name


def test_a_shadow_is_asked_and_not_shown(desk: Desk) -> None:
    first, second = desk.release("one"), desk.release("two")
    desk.promote(first)
    desk.trial(second, 1.0, shadow=True)

    async def use(client: httpx.AsyncClient, gateway: Gateway) -> tuple[list[httpx.Response], httpx.Response]:
        answers = []
        for question in (QUESTION, "When are the kilns fired?"):
            answers.append(await ask(client, question))
            await gateway.trials.settle()
        return answers, await client.get("/metrics")

    before = len(list(desk.workspace.store.traces("default")))
    answers, metrics = desk.through(use)
    assert {answer.json()["understudy"]["release"] for answer in answers} == {first.name}
    kept = list(desk.workspace.store.traces("default"))[before:]
    shadows = [trace for trace in kept if trace.metadata.get("shadow")]
    assert [(trace.release, trace.question) for trace in shadows] == [(second.name, QUESTION), (second.name, "When are the kilns fired?")]
    assert all(set(models_of(trace)) == {desk.names["two"]} for trace in shadows)
    [path] = [
        found for found in (desk.workspace.releases / ALIAS).glob("trial-*.jsonl") if '"live": null' not in (text := found.read_text()) and "canary" in text
    ]
    assert len(path.read_text().splitlines()) == 2
    assert f'understudy_release_answers_total{{outcome="answered",release="{second.name}",role="shadow"}} 2.0' in metrics.text


def test_what_cannot_be_served_takes_no_other_releases_name(desk: Desk) -> None:
    first, gone, foreign = desk.release("one"), desk.release("spare@0123456789ab"), desk.release("theirs")

    async def use(client: httpx.AsyncClient, _: Gateway) -> list[httpx.Response]:
        desk.promote(first)
        desk.trial(gone, 1.0)
        stopped = await ask(client)
        assert standing(desk.workspace, ALIAS).canary is None
        desk.promote(gone)
        answers = [stopped, await ask(client), await ask(client, model=ALIAS)]
        desk.promote(foreign)
        return [*answers, await ask(client), await client.get("/v1/models")]

    stopped, rag, plain, theirs, models = desk.through(use)
    assert stopped.json()["understudy"]["release"] == first.name
    assert next(decision.reason for decision in decisions(desk.workspace, ALIAS) if decision.action == "stopped").startswith("it cannot answer")
    for answer in (rag, plain):
        assert answer.status_code == 503 and f"{gone.name} cannot answer" in error_of(answer)["message"]
    assert theirs.status_code == 404 and "theirs" not in theirs.text and ALIAS not in [row["id"] for row in models.json()["data"]]


@pytest.mark.slow
def test_no_answer_is_by_a_wrong_release_while_they_change(desk: Desk) -> None:
    """Promotions, rollbacks and trials beside 96 questions: each trace's steps are its release's, and none begins by one that was over."""
    releases = [desk.release("one", "checker"), desk.release("two"), desk.release("checker", "two")]
    of_digest = {release.digest: release for release in releases}
    of_name = {release.name: release for release in releases}
    desk.promote(releases[0])
    periods: list[tuple[float, set[str]]] = [(0.0, {releases[0].name})]  # since when at the latest these may answer
    begun: list[float] = [0.0]  # since when at the earliest

    async def change(over: asyncio.Event) -> None:
        number = 0
        while not over.is_set():
            number += 1
            chosen, stands = releases[number % 3], standing(desk.workspace, ALIAS)
            began = time.time()
            if number % 4 == 0 and (stands.former or stands.canary):
                await asyncio.to_thread(decide, desk.workspace, ALIAS, "rolled back", rolled_back)
            elif stands.live != chosen.digest:
                await asyncio.to_thread(desk.trial if number % 4 == 2 else desk.promote, chosen, *([0.5] if number % 4 == 2 else []))
            stands = standing(desk.workspace, ALIAS)
            names = {of_digest[digest].name for digest in (stands.live, stands.canary.release if stands.canary else None) if digest}
            begun.append(began)
            periods.append((time.time(), names))
            await asyncio.sleep(0.01)

    async def use(client: httpx.AsyncClient, _: Gateway) -> list[tuple[float, float, httpx.Response]]:
        answers = []
        over = asyncio.Event()

        async def converse(person: int) -> None:
            for turn in range(12):
                began = time.time()
                answer = await ask(client, f"When is kiln {person}-{turn} fired?")
                answers.append((began, time.time(), answer))

        changing = asyncio.ensure_future(change(over))
        await asyncio.gather(*(converse(person) for person in range(8)))
        over.set()
        await changing
        return answers

    used: Counter[str] = Counter()
    for began, ended, answer in desk.through(use):
        assert answer.status_code == 200, answer.text
        trace = desk.trace(answer)
        release = of_name[str(trace.release)]
        assert models_of(trace) == [release.adapters[step.name] for step in trace.steps if step.model]  # type: ignore[index]
        assert answer.json()["understudy"]["model"] == release.adapters["answer"]
        ends = [*(at for at, _ in periods[1:]), time.time()]
        allowed = set().union(*(names for start, end, (_, names) in zip(begun, ends, periods, strict=True) if start <= ended and end >= began))
        assert release.name in allowed
        used.update(release.adapters.values())
        used[release.name] += 1
    assert sum(used[name] for name in of_name) == 96 and all(used[name] for name in of_name) and len(periods) > 5
    assert Counter(body["model"] for body in desk.endpoint.bodies) == Counter({name: used[name] for name in desk.names.values() if used[name]})
