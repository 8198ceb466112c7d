"""The cache over a real corpus, store and embedder; the agent behind it answers through a scripted OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rag.agent import Tools, run_agent
from rag.cache import Scope, SemanticCache, agrees, is_storable
from rag.cache_decision import DEFAULT
from rag.cached import Cached, answer_cached
from rag.retrieve import Retriever, open_retriever
from tests.conftest import workspace_of_notes
from tests.rag.test_agent import Endpoint
from understudy.client import ModelClient
from understudy.commands import Outcome, answers, caching, setting_up
from understudy.commands.wiring import cache_scope
from understudy.errors import NotFoundError
from understudy.records import Passage, Step, Trace
from understudy.settings.answers import Agent, Cache
from understudy.workspace import Workspace

QUESTION, ANSWER = "When is the kiln fired?", "On Tuesdays at seven."
WRITTEN = {"plan": "kiln firing", "answer": f"Quote: fired on Tuesdays at seven\nAnswer: {ANSWER}", "validate": "1"}
NOTES = {
    "kiln.txt": "The kiln is fired on Tuesdays at seven in the morning. The glaze cools for nine hours.",
    "barn.txt": "The barn doors are painted green every third summer by the village school.",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, Retriever]:
    """Made once; tests keep apart by their scopes."""
    workspace = workspace_of_notes(tmp_path_factory.mktemp("cache"), NOTES)
    return workspace, open_retriever(workspace)


class Asker:
    """Asks through the cache, and tells what came of it."""

    def __init__(self, workspace: Workspace, retriever: Retriever, endpoint: Endpoint, name: str) -> None:
        self.workspace, self.retriever, self.endpoint, self.now, self.chance = workspace, retriever, endpoint, 1000.0, 0.5
        self.scope = Scope(tenant="default", model=name, prompt_version="p")
        self.settings = Cache()
        endpoint.reply = lambda step, _: WRITTEN[step]

    @property
    def cache(self) -> SemanticCache:
        return SemanticCache(self.workspace.store, self.retriever, self.settings, DEFAULT, clock=lambda: self.now, chance=lambda: self.chance)

    def ask(self, question: str = QUESTION, **scope: object) -> Trace:
        cached = Cached(self.cache, dataclasses.replace(self.scope, **scope), "base", 0.5)  # type: ignore[arg-type]

        async def run() -> Trace:
            async with ModelClient(self.endpoint.model) as client:
                tools = Tools(client, self.retriever, Agent(max_rounds=1))
                return await answer_cached(question, cached, lambda: run_agent(question, tools))

        trace = asyncio.run(run())
        self.workspace.store.put_trace(trace)
        return trace


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    yield made
    made.server.shutdown()


@pytest.fixture
def asker(corpus: tuple[Workspace, Retriever], endpoint: Endpoint, request: pytest.FixtureRequest) -> Asker:
    endpoint.asked, endpoint.finish = [], "stop"
    return Asker(*corpus, endpoint, request.node.name)


def test_a_question_asked_again_is_answered_from_the_cache(asker: Asker) -> None:
    first, exact, semantic = asker.ask(), asker.ask(" when is the KILN fired?!"), asker.ask("At what time is the kiln fired?")
    assert [trace.cache for trace in (first, exact, semantic)] == ["miss", "exact", "semantic"]
    assert asker.endpoint.asked == ["plan", "answer", "validate"]  # one run only
    for hit in (exact, semantic):
        assert (hit.answer, hit.citations, hit.steps, hit.complete) == (ANSWER, first.citations, [], True)
        assert hit.metadata["cache_trace"] == first.id
    [entry] = asker.workspace.store.cache_entries("default", asker.scope.digest)
    assert entry.hits == 2


def test_a_near_miss_runs(asker: Asker) -> None:
    asker.ask()
    for near_miss in ("When is the kiln not fired?", "When is the kiln cleaned?", "When is the barn fired?", "Why is the kiln fired?", "When is kiln 2 fired?"):
        assert asker.cache.lookup(near_miss, asker.scope).tier == "miss", near_miss


def test_an_answer_counts_in_its_scope_only(asker: Asker) -> None:
    asker.ask()
    changes: list[dict[str, Any]] = [
        {"tenant": "b"}, {"model": "another"}, {"prompt_version": "q"}, {"mode": "fast"}, {"filters": {"tag": "x"}}, {"conversation": "c"}, {"release": "r"},
    ]  # fmt: skip
    for change in changes:
        assert asker.cache.lookup(QUESTION, dataclasses.replace(asker.scope, **change)).tier == "miss", change
    assert asker.cache.lookup(QUESTION, asker.scope).tier == "exact"


@pytest.mark.parametrize(
    "answer", ["The documents do not answer this question.", "Answer: On Tuesdays.", "Quote: fired on Sundays at noon\nAnswer: On Sundays."]
)
def test_an_abstention_and_an_answer_without_its_quotes_are_not_kept(asker: Asker, answer: str) -> None:
    asker.endpoint.reply = lambda step, _: {**WRITTEN, "answer": answer}[step]
    asker.ask()
    assert asker.workspace.store.cache_entries("default", asker.scope.digest) == []


def test_an_answer_that_was_not_validated_is_not_kept(asker: Asker) -> None:
    asker.endpoint.reply = lambda step, _: {**WRITTEN, "validate": "0"}[step]
    asker.ask()
    assert asker.ask().cache == "miss"


@pytest.mark.parametrize("finish", [None, "length"])
def test_an_answer_that_was_cut_off_is_not_kept(asker: Asker, finish: str | None) -> None:
    asker.endpoint.finish = finish
    asker.ask()
    assert asker.workspace.store.cache_entries("default", asker.scope.digest) == []


def test_an_entry_expires(asker: Asker) -> None:
    asker.ask()
    asker.now += 29 * 86_400
    assert asker.ask().cache == "exact"
    asker.now += 2 * 86_400
    assert asker.ask("At what time is the kiln fired?").cache == "miss"


def test_the_least_recently_used_entry_goes(asker: Asker) -> None:
    scope = dataclasses.replace(asker.scope, tenant="small")
    asker.scope, asker.settings = scope, Cache(max_entries=1)
    asker.ask()
    asker.now += 1
    asker.ask("Is the kiln fired on Tuesdays?")
    assert [entry.question for entry in asker.workspace.store.cache_entries("small")] == ["Is the kiln fired on Tuesdays?"]


def test_a_process_that_runs_long_forgets_what_was_evicted(asker: Asker) -> None:
    asker.scope, asker.settings = dataclasses.replace(asker.scope, tenant="long"), Cache(max_entries=1)
    cache = asker.cache
    for number in range(6):
        trace = asker.ask(f"Is kiln {number} fired on Tuesdays?")
        cache.keep(trace, asker.scope, cache.lookup(f"Is kiln {number} of the school fired on Tuesdays?", asker.scope), 0.5, 1.0)
        asker.now += 2
    index, _ = cache._indexes[asker.scope.digest]
    assert index.rows <= 3


def test_an_entry_survives_a_new_generation_only_while_retrieval_returns_what_it_cites(asker: Asker) -> None:
    asker.ask()
    kept = asker.retriever
    asker.retriever = dataclasses.replace(kept, generation="g2")
    assert asker.ask().cache == "exact"
    [entry] = asker.workspace.store.cache_entries("default", asker.scope.digest)
    assert entry.generation == "g2"

    cited = entry.chunk_ids[0]

    class Elsewhere(Retriever):
        def search(self, queries: list[str], k: int | None = None, *_: object) -> list[Passage]:  # type: ignore[override]
            return [passage for passage in kept.search(queries, k) if passage.chunk.id != cited]

    asker.retriever = Elsewhere(**{f.name: getattr(kept, f.name) for f in dataclasses.fields(kept)} | {"generation": "g3"})
    assert asker.cache.lookup(QUESTION, asker.scope).tier == "miss"
    assert asker.workspace.store.cache_entries("default", asker.scope.digest) == []


def test_entries_of_another_process_are_found_and_removed_ones_are_not_answered(asker: Asker) -> None:
    mine = asker.cache
    assert mine.lookup("At what time is the kiln fired?", asker.scope).tier == "miss"
    asker.ask()  # through a cache of its own
    asker.now += 2
    assert mine.lookup("At what time is the kiln fired?", asker.scope).tier == "semantic"
    asker.workspace.store.remove_cache_entries([entry.id for entry in asker.workspace.store.cache_entries("default", asker.scope.digest)])
    assert mine.lookup("At what time is the kiln fired?", asker.scope).tier == "miss"


def test_a_run_that_was_made_anyway_teaches_the_entry(asker: Asker) -> None:
    asker.ask()
    asker.chance = 0.0  # every hit is audited
    asker.ask("At what time is the kiln fired?")
    asker.endpoint.reply = lambda step, _: {**WRITTEN, "answer": "Quote: The glaze cools for nine hours\nAnswer: For 9 hours."}[step]
    asker.ask("When will the kiln be fired?")
    entry = next(e for e in asker.workspace.store.cache_entries("default", asker.scope.digest) if e.question == QUESTION)
    assert [seen.correct for seen in entry.observations][:1] == [True]
    assert not all(seen.correct for e in asker.workspace.store.cache_entries("default", asker.scope.digest) for seen in e.observations)


def test_what_says_that_an_answer_was_right(asker: Asker) -> None:
    trace = asker.ask()
    [entry] = asker.workspace.store.cache_entries("default", asker.scope.digest)

    def verdict(**changes: object) -> bool | None:
        return agrees(entry, trace.model_copy(update=changes), 0.5)

    assert verdict() is True
    assert verdict(answer="It is fired on Tuesdays at seven.") is True  # the same passage
    assert verdict(answer="It is fired on Tuesdays at seven.", citations=[]) is False
    assert verdict(answer="Not on Tuesdays at seven.") is False
    assert verdict(answer="On Tuesdays at 8.") is False
    assert verdict(abstained=True, citations=[]) is False
    assert verdict(score=0.2) is None
    assert verdict(complete=False) is None
    assert is_storable(trace, 0.5)
    assert not is_storable(trace.model_copy(update={"steps": [Step(name="answer", finish_reason="")]}), 0.5)


def test_a_question_too_long_to_read_is_neither_kept_nor_looked_up(asker: Asker) -> None:
    assert asker.ask("what " * 30_000).cache == "miss"
    assert asker.workspace.store.cache_entries("default", asker.scope.digest) == []


def test_the_commands_tell_and_take_corrections(asker: Asker) -> None:
    workspace = asker.workspace

    def run(command: Callable[[Namespace], Outcome], **arguments: object) -> dict[str, Any]:
        return command(Namespace(workspace=str(workspace.root), set=[], **arguments)).result

    workspace.store.remove_cache_entries([entry.id for entry in workspace.store.cache_entries("default")])
    asker.scope = cache_scope(workspace, "base", "agentic")
    asker.ask()
    hit = asker.ask("At what time is the kiln fired?")
    told = run(caching.cache_explain, question="When is the kiln not fired?", model="base", mode=None)
    assert told["decision"] == "miss"
    assert told["candidates"][0]["findings"] == ["negation"]
    assert run(caching.cache_explain, question="At what time is the kiln fired?", model="base", mode=None)["decision"] == "semantic"
    before = run(caching.cache_ls)["totals"]["wrong_hits"]
    assert run(caching.cache_wrong, trace=hit.id[:12])["removed"] is False
    assert run(caching.cache_explain, question="At what time is the kiln fired?", model="base", mode=None)["decision"] == "miss"
    listed = run(caching.cache_ls)
    assert listed["totals"]["wrong_hits"] == before + 1
    assert listed["entries"][0]["observations"] == 1
    assert run(caching.cache_wrong, trace=asker.ask().id)["removed"] is True
    assert run(caching.cache_clear) == {"removed": 0}


def test_ask_answers_from_the_cache_where_no_engine_runs(asker: Asker) -> None:
    workspace = asker.workspace

    def ask(question: str, **changes: object) -> dict[str, Any]:
        arguments = {"model": "base", "mode": None, "start": False, "no_cache": False, "json": True} | changes
        return answers.ask(Namespace(workspace=str(workspace.root), set=["cache.audit=1"], question=question, **arguments)).result  # no model could check it

    asker.scope, asker.now = cache_scope(workspace, "base", "agentic"), time.time()
    asker.ask()
    for question, tier in ((QUESTION, "exact"), ("At what time is the kiln fired?", "semantic")):
        told = ask(question)
        assert (told["answer"], told["cache"], told["steps"]) == (ANSWER, tier, [])
        kept = workspace.store.trace(told["trace_id"])
        assert kept is not None
        assert kept.cache == tier
    for question, changes in (("Who paints the barn doors?", {}), (QUESTION, {"no_cache": True}), (QUESTION, {"mode": "fast"})):
        with pytest.raises(NotFoundError, match="no server is running") as raised:
            ask(question, **changes)
        assert "serve" in raised.value.remedy


def test_doctor_tells_of_the_cache(asker: Asker) -> None:
    def check(*settings: str) -> dict[str, str]:
        checks = setting_up.doctor(Namespace(workspace=str(asker.workspace.root), set=list(settings), json=True)).result["checks"]
        return next(dict(one) for one in checks if one["name"] == "cache")

    asker.ask()
    count = asker.workspace.store.count_cache_entries("default")
    told = check()
    assert (told["status"], told["remedy"]) == ("ok", "")
    assert told["detail"].startswith(f"{count} of at most 100000 entries, kept 30 days; the calibration that ships")
    assert "cache.max_entries" in check(f"cache.max_entries={count}")["remedy"]
    assert "cache calibrate" in check("models.embedder=another")["remedy"]
    assert "switched off" in check("cache.enabled=false")["detail"]
