"""A candidate's answers against the live release's: what is compared, and when the candidate is found worse.

Each block sets one answer of one release against those of the other since the block before, or the two answers to one question
(shadow). Its differences go into a sequential test for each quantity; together they stop a candidate that is no worse than the
tolerances with probability `releases.false_alarm` at most, however long the trial goes on and however often it is looked at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import ValidationError

from serve.release.sequential import MeanAbove
from understudy.digests import digest_of
from understudy.records import Record, Trace
from understudy.releases import Canary
from understudy.settings.serving import Releases
from understudy.workspace import Workspace

LONGEST_BLOCK = 256  # answers that wait for one of the other release


class Observation(Record):
    """What is compared of one answer that a model wrote."""

    score: float | None  # validation score of the release's own models, None where there is none
    abstained: bool
    failed: bool
    seconds: float  # that the release's own models and the retrieval took


class Line(Record):
    """One line of a trial's file: an answer of either release, or of both to one question."""

    live: Observation | None = None
    canary: Observation | None = None


@dataclass(frozen=True)
class Quantity:
    """What is measured of a pair of answers: `worse` is at least `low`, and its mean may be up to `limit`."""

    worse: Callable[[Observation, Observation], float | None]  # (live, canary)
    low: float
    limit: float
    meaning: str


def quantities(settings: Releases) -> dict[str, Quantity]:
    """What a candidate may not be worse in."""
    return {
        "score": Quantity(_score_loss, -1.0, settings.max_score_loss, "loss of validation score"),
        "abstention": Quantity(
            lambda live, new: _both_whole(live, new, new.abstained - live.abstained), -1.0, settings.max_abstention_rise, "more abstentions"
        ),
        "error": Quantity(lambda live, new: float(new.failed - live.failed), -1.0, settings.max_error_rise, "more failed runs"),
        "latency": Quantity(
            lambda live, new: _both_whole(live, new, new.seconds > settings.max_slowdown * live.seconds),
            0.0,
            0.5,
            f"share of runs that took more than {settings.max_slowdown:g} times as long",
        ),
    }


@dataclass
class Trial:
    """A trial as far as it is."""

    settings: Releases
    waiting: dict[str, list[Observation]] = field(default_factory=lambda: {"live": [], "canary": []})  # one of them is empty
    counts: dict[str, int] = field(default_factory=lambda: {"live": 0, "canary": 0})

    def __post_init__(self) -> None:
        self._quantities = quantities(self.settings)
        self._tests = {name: MeanAbove(quantity.low, quantity.limit) for name, quantity in self._quantities.items()}

    def add(self, line: Line) -> None:
        """Take an answer, or two to one question."""
        given = {"live": line.live, "canary": line.canary}
        for arm, observation in given.items():
            self.counts[arm] += observation is not None
        if line.live and line.canary:
            self._compare([line.live], [line.canary])
            return
        for arm, other in (("live", "canary"), ("canary", "live")):
            observation = given[arm]
            if observation is None:
                continue
            if self.waiting[other]:
                sides = {arm: [observation], other: self.waiting[other]}
                self.waiting[other] = []
                self._compare(sides["live"], sides["canary"])
            else:
                self.waiting[arm] = [*self.waiting[arm], observation][-LONGEST_BLOCK:]

    @property
    def verdict(self) -> str:
        """In what the candidate is worse than it may be; empty while nothing is shown."""
        alpha = self.settings.false_alarm / len(self._tests)  # Bonferroni's share of each test
        return "; ".join(
            f"{self._quantities[name].meaning}: {test.total / test.count:+.3g} on the mean of {test.count} comparisons, where {test.limit:g} is allowed"
            for name, test in self._tests.items()
            if test.rejects(alpha)
        )

    def as_json(self) -> dict[str, Any]:
        """The evidence: an e-value of at least `stops_at` ends the trial."""
        tests = {
            name: {
                "comparisons": test.count,
                "mean": test.total / test.count if test.count else None,
                "limit": test.limit,
                "e_value": math.exp(min(test.log_wealth, 700.0)),
            }
            for name, test in self._tests.items()
        }
        return {"answers": dict(self.counts), "tests": tests, "stops_at": len(tests) / self.settings.false_alarm, "verdict": self.verdict}

    def _compare(self, live: list[Observation], canary: list[Observation]) -> None:
        for name, quantity in self._quantities.items():
            found = [value for ours in live for theirs in canary if (value := quantity.worse(ours, theirs)) is not None]
            if found:
                self._tests[name].add(fmean(found))


def observe(trace: Trace) -> Observation | None:
    """What a run showed of its release's own models, a teacher's part left out; None of an answer out of the cache."""
    if trace.cache in ("exact", "semantic"):
        return None
    teacher = trace.model if "escalated" in trace.metadata else None
    own = [step for step in trace.steps if step.name == "retrieve" or step.model != teacher]
    score, abstained = trace.score, trace.abstained
    if teacher:
        best: Mapping[str, Any] = max((step.parsed for step in own if "score" in step.parsed), key=lambda parsed: float(str(parsed["score"])), default={})
        score, abstained = best.get("score"), bool(best.get("abstained"))
    return Observation(score=score, abstained=abstained, failed=not trace.complete, seconds=sum(step.seconds for step in own))


def trial_file(workspace: Workspace, alias: str, canary: Canary) -> Path:
    """Where a trial's answers are kept."""
    return workspace.releases / alias / f"trial-{digest_of(canary.model_dump())[:12]}.jsonl"


def read_trial(path: Path, settings: Releases) -> Trial:
    """A trial taken up from its file; a line that was cut off counts for nothing."""
    trial = Trial(settings)
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else []:
        try:
            trial.add(Line.model_validate_json(line))
        except ValidationError:
            continue
    return trial


def keep_line(path: Path, line: Line) -> None:
    """Add an answer to a trial's file. A crash may lose the last ones, which is a little evidence and nothing else."""
    with path.open("ab") as file:
        file.write(b"\n" * (file.tell() > 0 and not _ends_whole(path)) + json.dumps(line.model_dump()).encode() + b"\n")


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"


def _score_loss(live: Observation, canary: Observation) -> float | None:
    if live.score is None or canary.score is None:
        return None
    return _both_whole(live, canary, live.score - canary.score)


def _both_whole(live: Observation, canary: Observation, value: float) -> float | None:
    """The value where neither run failed: what failed is counted as such, once."""
    return None if live.failed or canary.failed else float(value)
