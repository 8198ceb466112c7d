"""Releases by alias: what is kept, what is live, and that an interrupted decision has not happened."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from understudy.errors import NotFoundError, StorageError, UsageError
from understudy.releases import (
    DECISIONS,
    ENGINE,
    Canary,
    Release,
    Standing,
    add_release,
    aliases,
    decide,
    decisions,
    find_release,
    on_trial,
    promoted,
    releases_of,
    rolled_back,
    standing,
    stopped,
)
from understudy.workspace import Workspace, create_workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return create_workspace(str(tmp_path / "workspace"), "remotes: {far: {base_url: 'http://127.0.0.1:9/v1', model: m}}\n")


def release(alias: str = "eu-act", answer: str = "base", generation: str = "g1") -> Release:
    adapters = {"plan": "base", "answer": answer, "validate": "base"}
    return Release.model_validate(
        {"alias": alias, "tenant": "default", "generation": generation, "adapters": adapters, "prompt_version": "p", "endpoint": ENGINE}
    )


def promote(workspace: Workspace, made: Release) -> None:
    decide(workspace, made.alias, "promoted", lambda before: (made.digest, promoted(before, made.digest)))


def test_a_release_is_named_by_its_content_and_found_by_alias_digest_or_what_is_live(workspace: Workspace) -> None:
    first, second = release(), release(generation="g2")
    assert add_release(workspace, first) and add_release(workspace, second) and not add_release(workspace, first)
    assert aliases(workspace) == ["eu-act"] and releases_of(workspace, "eu-act") == [first, second] and first.name != second.name
    assert find_release(workspace, "eu-act") == second and find_release(workspace, first.name) == first
    promote(workspace, first)
    assert find_release(workspace, "eu-act") == first and find_release(workspace, second.name[: len("eu-act@") + 5]) == second
    for unknown in ("eu-act@ffff", "other", "../eu-act"):
        with pytest.raises(NotFoundError, match="no release"):
            find_release(workspace, unknown)
    path = workspace.releases / "eu-act" / f"{first.digest}.json"
    path.write_text(path.read_text().replace("g1", "g3"))
    with pytest.raises(StorageError, match="not the release of its digest"):
        find_release(workspace, first.name)


@pytest.mark.parametrize("alias", ["live", "rag", "base", "far", "held", "smollm2-135m-instruct", "Upper", "a/b", ""])
def test_an_alias_that_means_something_else_is_refused(workspace: Workspace, alias: str) -> None:
    (workspace.adapters / "held").mkdir(parents=True)
    with pytest.raises(UsageError):
        add_release(workspace, release(alias))
    assert aliases(workspace) == []


def test_promotions_roll_back_one_by_one_and_a_trial_goes_first(workspace: Workspace) -> None:
    made = [release(generation=f"g{number}") for number in range(4)]
    for each in made:
        add_release(workspace, each)
    digests = [each.digest for each in made]
    with pytest.raises(UsageError, match="nothing is live"):
        on_trial(standing(workspace, "eu-act"), Canary(release=digests[1], share=0.1, began_at=0.0))
    for each in made[:3]:
        promote(workspace, each)
    canary = Canary(release=digests[3], share=0.5, began_at=1.0)
    decide(workspace, "eu-act", "canary", lambda before: (canary.release, on_trial(before, canary)))
    assert standing(workspace, "eu-act") == Standing(live=digests[2], canary=canary, former=digests[:2])
    for live in (digests[2], digests[1], digests[0]):
        decide(workspace, "eu-act", "rolled back", rolled_back)
        assert standing(workspace, "eu-act").live == live and standing(workspace, "eu-act").canary is None
    with pytest.raises(UsageError, match="nothing to go back to"):
        decide(workspace, "eu-act", "rolled back", rolled_back)
    with pytest.raises(UsageError, match="over already"):
        decide(workspace, "eu-act", "stopped", lambda before: stopped(before, canary))
    assert [decision.action for decision in decisions(workspace, "eu-act")][4:] == ["promoted"] * 3 + ["canary"] + ["rolled back"] * 3


def test_a_promotion_cut_off_at_any_byte_has_not_happened_and_the_next_one_works(workspace: Workspace) -> None:
    first, second = release(), release(generation="g2")
    for each in (first, second):
        add_release(workspace, each)
    promote(workspace, first)
    log = workspace.releases / "eu-act" / DECISIONS
    before = log.read_bytes()
    promote(workspace, second)
    whole = log.read_bytes()
    for cut in range(len(before), len(whole), 61):
        log.write_bytes(whole[:cut])
        assert standing(workspace, "eu-act") == Standing(live=first.digest)
        promote(workspace, second)
        assert standing(workspace, "eu-act") == Standing(live=second.digest, former=[first.digest])
        decide(workspace, "eu-act", "rolled back", rolled_back)
        assert standing(workspace, "eu-act").live == first.digest


def test_decisions_at_once_follow_one_another(workspace: Workspace) -> None:
    made = [release(generation=f"g{number}") for number in range(6)]
    for each in made:
        add_release(workspace, each)

    def keep_deciding(each: Release) -> None:
        for _ in range(4):
            with contextlib.suppress(UsageError):  # it is live already, or nothing is left to go back to
                promote(workspace, each)
                decide(workspace, "eu-act", "rolled back", rolled_back)

    with ThreadPoolExecutor(len(made)) as threads:
        list(threads.map(keep_deciding, made))
    log = decisions(workspace, "eu-act")
    for before, after in pairwise(log):
        if after.action == "promoted":
            assert after.standing == promoted(before.standing, after.release)
        elif after.action == "rolled back":
            assert (after.release, after.standing) == rolled_back(before.standing)
    assert len(log) > 12 and standing(workspace, "eu-act") == log[-1].standing
