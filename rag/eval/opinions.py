"""What people and judges said of a run, as its report's JSON and page state it."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

from rag.eval.agreement import agreement, summarise
from rag.eval.compare import read_report
from rag.eval.contest import PREFERENCES, Contest, open_contest
from rag.eval.judge import judgements, summarise_judge
from rag.eval.labels import FILE, choices_of, joint_choices, labels_of, read_labels
from rag.eval.page import templates
from understudy.errors import StorageError
from understudy.files import read_json, write_json, write_text

BEGIN, END = "<!-- opinions -->", "<!-- end of opinions -->"


def add_opinions(folder: Path) -> dict[str, Any]:
    """Write the opinions that lie in a run's folder into its report.json and report.html; returns the report. Raises StorageError.

    Without any, nothing is written.
    """
    report, page = read_report(folder / "report.json"), folder / "report.html"
    opinions = read_opinions(folder)
    if not opinions:
        return report
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise StorageError(f"{page} has no place for opinions", "repeat the evaluation: what was answered is not asked again")
    section = templates().get_template("opinions.html.j2").render(opinions=opinions, preferences=PREFERENCES)
    write_text(page, before + begin + section + end + after)
    write_json(folder / "report.json", {**report, "opinions": opinions})
    return {**report, "opinions": opinions}


def read_opinions(folder: Path) -> list[dict[str, Any]]:
    """People's and every judge's opinion of each two models, from the files in the run's folder."""
    judged = [(path, read_json(path)) for path in judgements(folder)]
    pairs = [(label.a, label.b) for label in read_labels(folder / FILE)] + [(record["a"], record["b"]) for _, record in judged]
    opinions = []
    for a, b in dict.fromkeys(pairs):
        contest = open_contest(folder, [a, b])
        people = summarise_people(contest)
        opinions += [people] if people["n"] else []
        opinions += [summarise_judge(contest, path) for path, record in judged if (record["a"], record["b"]) == (a, b)]
    return opinions


def summarise_people(contest: Contest) -> dict[str, Any]:
    """What people preferred together, how often they found both answers good or bad, and their agreement with the judge-free metrics and
    with one another."""
    labels = labels_of(contest.folder, contest.a, contest.b)
    kept = [of_reviewer[question_id].choice for of_reviewer in labels.values() for question_id in contest.ids if question_id in of_reviewer]
    labelled = {choice: kept.count(choice) for choice in ("a", "b", "both", "neither")}
    choices = {reviewer: choices_of(of_reviewer, contest.ids) for reviewer, of_reviewer in labels.items()}
    between = [
        {"reviewers": [first, second], **agreement(choices[first], choices[second], contest.clusters)} for first, second in combinations(sorted(choices), 2)
    ]
    return {
        "rater": "people",
        **summarise(contest, joint_choices(labels, contest.ids), {}),
        "labels": labelled,
        "reviewers": sorted(choices),
        "between": between,
    }
