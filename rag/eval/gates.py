"""Gates: whether a model may take over, by limits on its paired differences that were set before it was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rag.eval.metrics import METRICS
from rag.eval.stats import Draws
from understudy.errors import UsageError
from understudy.settings.evaluating import Gate


@dataclass(frozen=True)
class GateResult:
    """One gate on one model. Differences and the limit are signed so that more is better, whichever way the metric is read."""

    metric: str
    model: str
    against: str
    rule: Literal["min_gain", "max_loss"]
    limit: float  # the difference that must be reached: min_gain, or −max_loss
    confidence: float
    difference: float | None
    low: float | None
    high: float | None
    n: int
    status: Literal["pass", "fail", "undecided"]
    more_questions: int | None  # until the gate decides 4 times in 5, if the difference stays as it is; None: no number would, or none is needed

    def as_json(self) -> dict[str, Any]:
        """With the limit under the name it was set by."""
        rest = {key: round(value, 6) if isinstance(value, float) else value for key, value in asdict(self).items() if key not in ("rule", "limit")}
        return {**rest, self.rule: abs(self.limit), "passed": self.status == "pass"}


def check_gates(gates: Mapping[str, Gate], names: Sequence[str]) -> None:
    """Raise UsageError for a gate on no metric, or against a model that is not measured."""
    for metric, gate in gates.items():
        if metric not in METRICS or not METRICS[metric].better:
            known = ", ".join(name for name, found in METRICS.items() if found.better)
            raise UsageError(f"evaluate.gates: {metric} is no metric that can be better or worse", f"one of: {known}")
        if gate.against not in names:
            raise UsageError(f"the gate on {metric} is against {gate.against}, which is not among the models", f"add {gate.against} to --models")


def judge(draws: Draws, gates: Mapping[str, Gate], candidates: Sequence[str]) -> list[GateResult]:
    """Every gate on every candidate but the one it is against."""
    return [_judge(draws, metric, gate, name) for name in candidates for metric, gate in gates.items() if name != gate.against]


def _judge(draws: Draws, metric: str, gate: Gate, name: str) -> GateResult:
    sign = -1.0 if METRICS[metric].better == "lower" else 1.0
    found = draws.difference(gate.against, name, metric, gate.confidence)
    rule: Literal["min_gain", "max_loss"] = "max_loss" if gate.min_gain is None else "min_gain"
    limit = -(gate.max_loss or 0.0) if gate.min_gain is None else gate.min_gain
    n = int(draws.defined(metric, gate.against, name).sum())
    if found.value is None or found.low is None or found.high is None:
        return GateResult(metric, name, gate.against, rule, limit, gate.confidence, found.value, None, None, n, "undecided", None)
    low, high = sorted((sign * found.low, sign * found.high))
    difference = sign * found.value
    is_reached = low > limit if rule == "min_gain" else low >= limit  # a gain is more than its limit, a loss may equal it
    status: Literal["pass", "fail", "undecided"] = "pass" if is_reached else "fail" if high < limit else "undecided"
    detectable = draws.precision(gate.against, name, metric).detectable(gate.confidence)
    more = questions_needed(difference - limit, detectable, n) if status == "undecided" and detectable is not None else None
    return GateResult(metric, name, gate.against, rule, limit, gate.confidence, difference, low, high, n, status, more)


def questions_needed(distance: float, detectable: float, n: int) -> int | None:
    """How many more questions, about as many more documents, tell a difference at this distance from the limit 4 times in 5, `detectable`
    being the distance that n questions tell. None where the difference lies on the limit.
    """
    if abs(distance) < 1e-9:
        return None
    return max(1, math.ceil(n * (detectable / distance) ** 2) - n)


def state_gates(results: Sequence[GateResult]) -> list[tuple[str, str]]:
    """(sentence, yes or no) for every model that gates were put to."""
    sentences = []
    for name in dict.fromkeys(result.model for result in results):
        of_model = [result for result in results if result.model == name]
        parts = {status: [_spoken(result) for result in of_model if result.status == status] for status in ("fail", "undecided")}
        if not any(parts.values()):
            sentences.append((f"{name} may take over: it passes every gate ({', '.join(METRICS[r.metric].label for r in of_model)}).", "yes"))
            continue
        reasons = [f"it fails {'; '.join(parts['fail'])}"] * bool(parts["fail"]) + [f"undecided: {'; '.join(parts['undecided'])}"] * bool(parts["undecided"])
        sentences.append((f"{name} may not take over yet: {'; '.join(reasons)}.", "no"))
    return sentences


def _spoken(result: GateResult) -> str:
    label = METRICS[result.metric].label
    if result.difference is None or result.low is None or result.high is None:
        return f"{label} against {result.against}, which these questions do not measure"
    limit = f"must gain more than {result.limit:g}" if result.rule == "min_gain" else f"may lose at most {-result.limit + 0.0:g}"
    needed = ""
    if result.status == "undecided":
        count = f"{result.more_questions:,} more question{'s' * (result.more_questions > 1)}" if result.more_questions else "no number of questions"
        needed = f"; {'about ' * bool(result.more_questions)}{count} would tell"
    numbers = f"{result.difference:+.3g}, {100 * result.confidence:g} % interval {result.low:+.3g} to {result.high:+.3g}".replace("-", "−")
    return f"{label} against {result.against} ({numbers}; {limit}{needed})"
