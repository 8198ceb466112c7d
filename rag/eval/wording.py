"""How the report says things: the verdict in one sentence for each model, and numbers as people read them."""

from __future__ import annotations

from collections.abc import Sequence

from rag.eval.metrics import METRICS
from rag.eval.stats import VERDICT_METRICS, Comparison


def takes_over(comparisons: Sequence[Comparison], name: str) -> bool:
    """Whether a model beats the baseline on every metric of the verdict, with the interval on the better side of zero."""
    return all(comparison.is_gain for comparison in verdict_pairs(comparisons, name))


def verdicts(comparisons: Sequence[Comparison], names: Sequence[str]) -> list[tuple[str, str]]:
    """(sentence, yes or no) for every name after the first, which is the baseline's."""
    baseline, *rivals = names
    if not rivals:
        return [(f"{baseline} was measured alone; name a second model to compare it with.", "")]
    sentences = [_verdict_sentence(verdict_pairs(comparisons, name), name, baseline) for name in rivals]
    return [(text, "yes" if takes_over(comparisons, name) else "no") for text, name in zip(sentences, rivals, strict=True)]


def _verdict_sentence(pairs: Sequence[Comparison], name: str, baseline: str) -> str:
    if all(pair.is_gain for pair in pairs):
        better = _listed([_in_sentence(pair) for pair in pairs])
        return f"{name} may take over from {baseline} on these questions: {better} are all better, each with its 95 % interval above zero."
    lacking = [_spoken(pair) for pair in pairs if not pair.is_gain and not pair.is_loss and pair.difference is not None]
    worse = [_spoken(pair) for pair in pairs if pair.is_loss]
    unmeasured = [_in_sentence(pair) for pair in pairs if pair.difference is None]
    reasons = [f"it is worse in {_listed(worse)}"] if worse else []
    reasons += [f"it is not shown to be better in {_listed(lacking)}"] if lacking else []
    reasons += [f"these questions do not measure {_listed(unmeasured)}"] if unmeasured else []
    return f"{name} may not take over from {baseline} yet: {'; '.join(reasons)}."


def verdict_pairs(comparisons: Sequence[Comparison], name: str) -> list[Comparison]:
    """A model's comparisons that decide the verdict."""
    return [pair for metric in VERDICT_METRICS for pair in comparisons if pair.b == name and pair.metric == metric]


def _spoken(pair: Comparison) -> str:
    """The metric with its difference and interval."""
    difference, low, high = (format_difference(value, pair.metric) for value in (pair.difference, pair.low, pair.high))
    interval = "too few questions for an interval" if pair.low is None else f"95 % interval {low} to {high}"
    return f"{_in_sentence(pair)} ({difference}, {interval})"


def _in_sentence(pair: Comparison) -> str:
    label = METRICS[pair.metric].label
    return label[0].lower() + label[1:]


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def format_number(value: float | None, metric: str) -> str:
    """A metric's value as people read it; an undefined one is a dash."""
    if value is None:
        return "–"
    unit = METRICS[metric].unit
    if unit == "seconds":
        return f"{value:.2f} s"
    return f"{value:,.0f}" if unit == "tokens" else f"{value:.3g}" if unit == "money" else f"{value:.2f}"


def format_difference(value: float | None, metric: str) -> str:
    """A signed difference, with a real minus sign."""
    if value is None:
        return "–"
    text = format_number(abs(value), metric)
    return text if not text.strip("0., s") else ("+" if value > 0 else "−") + text


def format_p(p: float | None) -> str:
    """A p-value; a dash where there is none."""
    return "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"
