"""The review: blind pairs in a drawn order, labels that last, agreement, a page that a keyboard suffices for, and nobody else gets in."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from rag.eval.contest import Contest, find_run, open_contest, read_answers
from rag.eval.labels import FILE, Label, add_label, joint_choices, labels_of, read_labels
from rag.eval.opinions import add_opinions
from rag.eval.review import Review, build_app, draw_review
from rag.eval.run import traces_file
from tests.browser import CHROMIUM, opened_tab
from tests.rag.eval.conftest import RUN_MODELS
from understudy.commands.reviewing import review_lines
from understudy.errors import NotFoundError, UsageError
from understudy.workspace import Workspace

HOST = "127.0.0.1:8765"


def open_review(workspace: Workspace, count: int = 50, seed: int = 0, reviewer: str = "") -> Review:
    contest = open_contest(find_run(workspace.reports, None))
    chunks = {chunk.id: chunk for chunk in workspace.store.chunks("default")}
    return draw_review(contest, read_answers(contest, list), chunks, count, seed, reviewer)


def through(review: Review, use: Callable[[httpx.AsyncClient], Any], finished: list[bool] | None = None) -> Any:
    """What a coroutine over a client of the review's pages returns."""

    async def run() -> Any:
        app = build_app(review, [HOST], lambda: finished.append(True) if finished is not None else None)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=f"http://{HOST}") as client:
            return await use(client)

    return asyncio.run(run())


def test_pairs_are_blind_and_drawn_by_seed(finished_run: Workspace) -> None:
    review = open_review(finished_run)
    assert len(review.shown) == 10 and review.same == 2 and open_review(finished_run, 4).shown == review.shown[:4]
    assert open_review(finished_run, seed=1).shown != review.shown
    swapped = [review.is_swapped(place) for place in review.shown]
    assert 0 < sum(swapped) < len(swapped)

    async def every(client: httpx.AsyncClient) -> list[str]:
        return [(await client.get(f"/{review.secret}/{number}")).text for number in range(1, 11)]

    for place, page in zip(review.shown, through(review, every), strict=True):
        assert not any(name.partition("@")[0] in page for name in RUN_MODELS)
        first = page[page.index('id="answer-1"') : page.index('id="answer-2"')]
        assert ("six books" in first) == review.is_swapped(place)
        assert "<b>" not in page and "\x1b" not in page and "&lt;b&gt;" in page
        assert "✓ stands in a passage" in page and "✗ in no passage" in page and '<mark class="gold cited' in page


def test_labels_are_kept_whole_and_the_newest_holds(finished_run: Workspace) -> None:
    review = open_review(finished_run, 3)

    async def label(client: httpx.AsyncClient) -> list[tuple[int, str]]:
        found = []
        for number, choice in ((1, "first"), (2, "neither"), (1, "second"), (3, "both")):
            answer = await client.post(f"/{review.secret}/{number}", data={"choice": choice, "note": " why \n"})
            found.append((answer.status_code, answer.headers["location"].rpartition("/")[2]))
        return found

    assert through(review, label) == [(303, "2"), (303, "3"), (303, "3"), (303, "done")]
    folder = review.contest.folder
    labels, place = labels_of(folder, *RUN_MODELS)[""], review.shown[0]
    assert len(read_labels(folder / FILE)) == 4 and len(labels) == 3 and not review.waiting()
    newest = labels[review.contest.ids[place]]
    assert newest.choice == ("a" if review.is_swapped(place) else "b") and newest.note == "why"
    with (folder / FILE).open("ab") as file:
        file.write(b'{"question_id": "cut o')  # killed while writing
    assert len(labels_of(folder, *RUN_MODELS)[""]) == 3
    add_label(folder, newest)
    assert len(read_labels(folder / FILE)) == 5
    report = add_opinions(folder)
    assert report["opinions"][0]["rater"] == "people" and report["opinions"][0]["labels"]["both"] == 1
    assert report == json.loads((folder / "report.json").read_text())
    assert (folder / "report.html").read_text().count("What people and judges prefer</h2>") == 1
    assert add_opinions(folder) == report and (folder / "report.html").read_text().count("What people and judges prefer</h2>") == 1


def test_reviewers_of_the_same_pairs_decide_apart_and_their_agreement_is_reported(finished_run: Workspace) -> None:
    ana, ben = (open_review(finished_run, 4, reviewer=name) for name in ("Ana", "Ben"))
    assert ana.shown == ben.shown

    async def label(client: httpx.AsyncClient, review: Review, given: list[str]) -> str:
        for number, choice in enumerate(given, 1):
            page = (await client.get(f"/{review.secret}/{number}")).text
            assert 'aria-pressed="true">' not in page and f"Pair {number} of 4" in page  # what another decided is not shown
            await client.post(f"/{review.secret}/{number}", data={"choice": choice})
        return (await client.get(f"/{review.secret}/done")).text

    through(ana, lambda client: label(client, ana, ["first", "second", "both", "second"]))
    assert "4 questions labelled" in through(ben, lambda client: label(client, ben, ["first", "second", "neither", "both"]))
    found = ben.summary()
    [row] = found["between"]
    assert row["reviewers"] == ["Ana", "Ben"] and (row["n"], row["observed"]) == (4, 0.75) and row["kappa"] < 1
    assert found["n"] == 4 and found["reviewers"] == ["Ana", "Ben"] and sum(found["labels"].values()) == 8
    assert any(line.startswith("Ana and Ben agree on  75 % of 4, kappa") for line in review_lines(found))
    assert add_opinions(ana.contest.folder)["opinions"][0]["between"] == [row]
    page = (ana.contest.folder / "report.html").read_text()
    assert "Ana and Ben" in page and "by 2 reviewers" in page


def test_what_most_reviewers_prefer_counts() -> None:
    def labels(**choices: str) -> dict[str, Label]:
        about = {"question": "?", "tenant": "default", "a": "x", "b": "y", "shown_first": "x", "created_at": 0.0}
        return {key: Label.model_validate({**about, "question_id": key, "choice": choice}) for key, choice in choices.items()}

    three = {"": labels(p="a", q="a", r="both"), "u": labels(p="b", q="a"), "v": labels(q="b")}
    assert joint_choices(three, ["p", "q", "r", "s"]) == ["tie", "a", "tie", None] and joint_choices({}, ["p"]) == [None]


def test_a_label_that_cannot_be_kept_is_said_not_to_be(finished_run: Workspace) -> None:
    review = open_review(finished_run)
    (review.contest.folder / FILE).symlink_to("/dev/full")
    answer = through(review, lambda client: client.post(f"/{review.secret}/1", data={"choice": "both"}))
    assert answer.status_code == 507 and "No space left" in answer.text


def test_only_its_own_page_may_read_or_label(finished_run: Workspace) -> None:
    review = open_review(finished_run)

    async def knock(client: httpx.AsyncClient) -> list[int]:
        path, form = f"/{review.secret}/1", {"choice": "first"}
        answers = [
            await client.get("/1"),
            await client.get("/wrong/1"),
            await client.get(f"/{review.secret}"),
            await client.get(path, headers={"Host": "evil.example:8765"}),
            await client.post(path, data=form, headers={"Origin": "https://evil.example"}),
            await client.post(path, data=form, headers={"Origin": "null"}),
            await client.post(path, json=form),
            await client.post(path, data={"choice": "maybe"}),
            await client.post(path, data=form | {"note": "x" * 5000}),
            await client.post(path, data=form | {"note": "x" * 100_000}),
            await client.post(f"/{review.secret}/99", data=form),
            await client.get(f"/{review.secret}/99"),
            await client.get(f"/{review.secret}/../{review.secret}/1"),
        ]
        page = await client.get(path, headers={"Origin": f"http://{HOST}"})
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy and page.headers["cache-control"] == "no-store"
        return [answer.status_code for answer in answers]

    assert through(review, knock) == [404, 404, 404, 421, 403, 403, 400, 400, 400, 400, 400, 404, 200]
    assert not review.labels()


def test_runs_and_models_are_found_by_name_or_refused(finished_run: Workspace) -> None:
    folder = finished_run.reports / "abc123"
    assert find_run(finished_run.reports, None) == find_run(finished_run.reports, "abc") == find_run(finished_run.reports, str(folder)) == folder
    contest: Contest = open_contest(folder, ["strong", "weak-model"])
    assert (contest.a, contest.b) == RUN_MODELS  # in the run's order, whichever way they are named
    with pytest.raises(NotFoundError, match="no finished evaluations begin with 'zzz'"):
        find_run(finished_run.reports, "zzz")
    with pytest.raises(UsageError, match="frontier is not one model of this run"):
        open_contest(folder, ["weak-model", "frontier"])
    (folder / traces_file(RUN_MODELS[0])).unlink()
    with pytest.raises(NotFoundError, match="no answers of weak-model"):
        read_answers(contest, list)


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium here")
def test_a_person_with_a_keyboard_labels_three_pairs_stops_and_goes_on(finished_run: Workspace, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "understudy.cli", "--workspace", str(finished_run.root), "evaluate", "review", "--pairs", "3", "--json"]

    def start() -> tuple[subprocess.Popen[str], str]:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert process.stderr
        return process, re.findall(r"http\S+", process.stderr.readline())[0]

    process, url = start()
    with opened_tab(tmp_path / "profile") as tab:
        tab.open(url)
        assert tab.value("document.title").startswith("Pair 1 of 3") and tab.value("document.documentElement.scrollWidth <= innerWidth")
        tab.press("n")
        tab.press("2")  # a digit in the note is no label
        tab.type(" is wrong")
        assert tab.value("document.activeElement.id") == "note" and tab.value("document.getElementById('note').value") == "2 is wrong"
        tab.press("Escape")
        tab.press("1", loads=True)
        assert tab.value("document.title").startswith("Pair 2 of 3")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert process.returncode == 130 and json.loads(out)["waiting"] == 2, out + err

        process, url = start()
        tab.open(url)
        assert tab.value("document.title").startswith("Pair 2 of 3")
        tab.press("ArrowLeft", loads=True)
        assert tab.value("document.querySelector('[aria-pressed=true]').value") == "first"
        tab.press("ArrowRight", loads=True)
        tab.press("3", loads=True)
        tab.value("document.querySelector('[value=neither]').focus()")
        tab.press("Enter", loads=True)  # by the button itself, as without the keys
        assert "3 questions labelled" in tab.value("document.querySelector('h1').textContent")
        tab.value("document.querySelector('form button').focus()")
        tab.press("Enter", loads=True)
        out, _ = process.communicate(timeout=30)
        assert not tab.faults and {requested.partition("//")[2].partition(":")[0] for requested in tab.requests if not requested.startswith("data:")} == {
            "127.0.0.1"
        }
    found = json.loads(out)
    assert process.returncode == 0 and found["waiting"] == 0 and found["n"] == 3 and found["labels"]["both"] == found["labels"]["neither"] == 1
    assert set(found["agreement"]) == {"quality", "semantic_similarity", "citation_precision", "citation_recall"}
    [noted] = [label for label in read_labels(finished_run.reports / "abc123" / FILE) if label.note]
    assert noted.note == "2 is wrong" and noted.choice in ("a", "b")
