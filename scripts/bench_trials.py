"""How often a trial stops a candidate that is exactly as bad as allowed, and how soon one that is worse; simulated answers.

Beside it the usual way: a two-sample z-test at the same level, looked at after every answer from the thirtieth of each side on.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from statistics import NormalDist, median

import numpy as np

from serve.release.trial import Line, Observation, Trial, quantities
from understudy.settings.serving import Releases

SETTINGS = Releases()
QUANTITIES = quantities(SETTINGS)
LEAST = 30  # answers of each side before the z-test looks


@dataclass(frozen=True)
class Candidate:
    """How much worse than the live release; the live one scores 0.75 on average, abstains 20 % of the time, fails 3 %."""

    score: float = 0.0
    abstention: float = 0.0
    error: float = 0.0
    slowdown: float = 1.0

    def answer(self, rng: np.random.Generator, is_canary: bool) -> Observation:
        """One answer of either side. Scores are Bernoulli, which varies most; run times log-normal."""
        worse = float(is_canary)
        return Observation(
            score=float(rng.random() < 0.75 - worse * self.score),
            abstained=bool(rng.random() < 0.2 + worse * self.abstention),
            failed=bool(rng.random() < 0.03 + worse * self.error),
            seconds=float(rng.lognormal(0.0, 0.5) * self.slowdown**worse),
        )


@dataclass
class Peeking:
    """The z-tests, one a quantity, at the same share of the false-alarm rate."""

    sums: dict[tuple[str, bool], tuple[float, int]] = field(default_factory=dict)

    def add(self, observation: Observation, is_canary: bool) -> bool:
        """Whether one of score, abstention and error is significantly worse now."""
        for name, value in (("score", -(observation.score or 0.0)), ("abstention", observation.abstained), ("error", observation.failed)):
            total, count = self.sums.get((name, is_canary), (0.0, 0))
            self.sums[name, is_canary] = (total + float(value), count + 1)
        return any(self._is_worse(name, quantity.limit) for name, quantity in QUANTITIES.items() if name != "latency")

    def _is_worse(self, name: str, limit: float) -> bool:
        (live, n), (new, m) = (self.sums.get((name, side), (0.0, 0)) for side in (False, True))
        if min(n, m) < LEAST:
            return False
        p, q = abs(live / n), abs(new / m)
        deviation = (p * (1 - p) / n + q * (1 - q) / m) ** 0.5
        return new / m - live / n - limit > NormalDist().inv_cdf(1 - SETTINGS.false_alarm / 4) * max(deviation, 1e-9)


def run(candidate: Candidate, share: float, answers: int, rng: np.random.Generator) -> tuple[int | None, bool]:
    """(the canary's answers until the trial stopped it, None where it did not; whether peeking stopped it)."""
    trial, peeking = Trial(SETTINGS), Peeking()
    stopped, alarmed = None, False
    for _ in range(answers):
        is_canary = bool(rng.random() < share)
        observation = candidate.answer(rng, is_canary)
        if stopped is None:
            trial.add(Line(canary=observation) if is_canary else Line(live=observation))
            stopped = trial.counts["canary"] if trial.verdict else None
        alarmed = alarmed or peeking.add(observation, is_canary)
    return stopped, alarmed


def report(name: str, found: list[tuple[int | None, bool]]) -> None:
    """Print what came of the trials of one candidate. The z-test has nothing to say of run times."""
    stops = sorted(stop for stop, _ in found if stop is not None)
    ours, peer = len(stops) / len(found), None if "slow" in name else sum(alarmed for _, alarmed in found) / len(found)
    spread = [round(1.96 * (rate * (1 - rate) / len(found)) ** 0.5, 4) for rate in (ours, peer) if rate is not None]
    row = {
        "bench": f"trials: {name}",
        "ours": ours,
        "peer": peer,
        "peer_name": "z-test looked at after every answer",
        "ratio": round(ours / peer, 3) if peer else None,
    }
    after = {"median": median(stops), "p90": stops[int(0.9 * len(stops))]} if stops else None
    print(json.dumps({**row, "unit": "share of trials stopped", "n": len(found), "spread": spread, "canary_answers_until_stop": after}), flush=True)


def main() -> None:
    """Print one line a candidate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=200, help="of each candidate")
    parser.add_argument("--answers", type=int, default=2000, help="of both sides together, in each trial")
    parser.add_argument("--share", type=float, default=0.1, help="of the canary")
    parser.add_argument("--only", default="", metavar="TEXT", help="candidates whose name has this in it")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    allowed = Candidate(SETTINGS.max_score_loss, SETTINGS.max_abstention_rise, SETTINGS.max_error_rise, SETTINGS.max_slowdown)
    for name, candidate in {
        "the same": Candidate(),
        "as bad as allowed in everything": allowed,
        "score 0.2 lower": Candidate(score=0.2),
        "score 0.4 lower": Candidate(score=0.4),
        "30 points more abstentions": Candidate(abstention=0.3),
        "every second run fails": Candidate(error=0.47),
        "every run fails": Candidate(error=0.97),
        "three times as slow": Candidate(slowdown=3.0),
    }.items():
        if args.only not in name:
            continue
        report(name, [run(candidate, args.share, args.answers, rng) for _ in range(args.trials)])


if __name__ == "__main__":
    main()
