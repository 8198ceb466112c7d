"""Whether what people ask, and how it is answered, has moved away from what a model was measured on.

Four signals of every run: its question, the best passage's cosine, whether it abstained, the score of an answer. Each is compared between
a reference and the recent runs by a two-sample test that assumes no shape; p-values are corrected for the number of signals (Holm 1979).
A change counts where it is significant and large enough to matter: with many runs, any two weeks differ significantly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import fisher_exact, ks_2samp, mannwhitneyu

from rag.eval.stats import holm
from understudy.records import Trace

FEWEST = 30  # runs on either side, below which a signal is not tested
MOST = 500  # questions of either side that are compared, drawn at random: the test takes their square
PERMUTATIONS = 999
LEAST_DELTA = 0.147  # Cliff's delta; less is negligible (Romano et al. 2006)
LEAST_RATE = 0.05  # difference of two shares
LEAST_ENERGY = 0.005  # energy coefficient: about half of the questions come from one new document (docs/drift.md)
Embed = Callable[[list[str]], np.ndarray]


@dataclass(frozen=True)
class Signal:
    """One signal's comparison; figures are None where there are too few runs."""

    name: str  # questions, retrieval, abstentions, scores
    n_reference: int
    n_recent: int
    reference: float | None = None  # mean, or share
    recent: float | None = None
    test: str = ""
    p: float | None = None
    p_holm: float | None = None
    effect: float | None = None
    effect_name: str = ""
    is_changed: bool = False
    is_worse: bool = False
    note: str = ""


@dataclass(frozen=True)
class Found:
    """What a test says: p-value, effect, whether the effect is large enough to matter, and whether it is to the worse."""

    test: str
    p: float
    effect: float
    effect_name: str
    matters: bool
    is_worse: bool


def compare(reference: Sequence[Trace], recent: Sequence[Trace], embed: Embed, confidence: float = 0.99, seed: int = 0) -> list[Signal]:
    """The four signals of recent runs against a reference; `embed` gives unit vectors [n, dim] of questions."""
    random = np.random.default_rng(seed)
    before, after = [trace.question for trace in reference], [trace.question for trace in recent]
    moved = questions_moved(embed, before, after, random) if min(len(before), len(after)) >= FEWEST else None
    signals = [
        _signal("questions", (len(before), len(after)), None, moved),
        _compare("retrieval", retrieval_scores(reference), retrieval_scores(recent), moved_down),
        _compare("abstentions", [float(trace.abstained) for trace in reference], [float(trace.abstained) for trace in recent], rate_rose),
        _compare("scores", answer_scores(reference), answer_scores(recent), moved_down),
    ]
    return corrected(signals, confidence)


def _compare(name: str, reference: list[float], recent: list[float], test: Callable[[list[float], list[float]], Found]) -> Signal:
    n = len(reference), len(recent)
    if min(n) < FEWEST:
        return _signal(name, n, None, None)
    return _signal(name, n, (float(np.mean(reference)), float(np.mean(recent))), test(reference, recent))


def _signal(name: str, n: tuple[int, int], means: tuple[float, float] | None, found: Found | None) -> Signal:
    """One signal before correction: changed and worse as far as its effect goes."""
    if found is None:
        return Signal(name, *n, note=f"too few: {FEWEST} on either side are needed")
    reference, recent = means or (None, None)
    return Signal(*(name, *n, reference, recent, found.test, found.p, None, found.effect, found.effect_name), is_changed=found.matters, is_worse=found.is_worse)


def key_of(trace: Trace, name: str) -> str | None:
    """What of a name answered: a release of that alias, or a version of that model; None where something else did."""
    for answered in (trace.release or "", trace.model):
        if answered == name or answered.startswith(f"{name}@"):
            return answered
    return None


def newest_of(traces: Sequence[Trace], name: str) -> tuple[str, list[Trace]]:
    """(the newest release or version of a name that answered, its runs): others are not comparable. The name and no runs where none did."""
    keys = [key_of(trace, name) for trace in traces]
    latest = max((trace.created_at, key) for trace, key in zip(traces, keys, strict=True) if key)[1] if any(keys) else name
    return latest, [trace for trace, key in zip(traces, keys, strict=True) if key == latest]


def corrected(signals: Sequence[Signal], confidence: float) -> list[Signal]:
    """The signals with p-values for all of them together, and what holds at this confidence."""
    tested = [signal for signal in signals if signal.p is not None]
    p_values = dict(zip((signal.name for signal in tested), holm([signal.p or 0.0 for signal in tested]), strict=True))
    made = []
    for signal in signals:
        p = p_values.get(signal.name)
        is_changed = p is not None and p < 1 - confidence and signal.is_changed
        made.append(replace(signal, p_holm=p, is_changed=is_changed, is_worse=is_changed and signal.is_worse))
    return made


def answer_scores(traces: Sequence[Trace]) -> list[float]:
    """The validation score of each answer that was given; an abstention's means something else."""
    return [trace.score for trace in traces if trace.score is not None and not trace.abstained]


def retrieval_scores(traces: Sequence[Trace]) -> list[float]:
    """The best passage's cosine of each run that noted it."""
    noted = (next((step.parsed["dense"] for step in trace.steps if isinstance(step.parsed.get("dense"), int | float)), None) for trace in traces)
    return [float(str(value)) for value in noted if value is not None]


def moved_down(reference: list[float], recent: list[float]) -> Found:
    """Two-sample Kolmogorov–Smirnov, which sees any change; Cliff's delta says how far, and whether down."""
    delta = 2 * float(mannwhitneyu(recent, reference).statistic) / (len(reference) * len(recent)) - 1
    return Found("Kolmogorov-Smirnov", float(ks_2samp(reference, recent).pvalue), delta, "Cliff's delta", abs(delta) >= LEAST_DELTA, delta < 0)


def rate_rose(reference: list[float], recent: list[float]) -> Found:
    """Fisher's exact test of two shares."""
    table = [[sum(side), len(side) - sum(side)] for side in (reference, recent)]
    difference = float(np.mean(recent) - np.mean(reference))
    return Found("Fisher, exact", float(fisher_exact(table).pvalue), difference, "difference", abs(difference) >= LEAST_RATE, difference > 0)


def questions_moved(embed: Embed, reference: list[str], recent: list[str], random: np.random.Generator) -> Found:
    """The permutation test of the energy distance between two sets of embedded questions, at most MOST of each. A move is no harm by itself."""
    first, second = (_vectors(embed, side, random) for side in (reference, recent))
    coefficient, p = energy_test(first, second, random)
    return Found("energy distance, permuted", p, coefficient, "energy coefficient", coefficient >= LEAST_ENERGY, is_worse=False)


def _vectors(embed: Embed, questions: list[str], random: np.random.Generator) -> np.ndarray:
    drawn = [questions[place] for place in random.permutation(len(questions))[:MOST]]
    return np.asarray(embed(drawn), dtype=np.float64)


def energy_test(a: np.ndarray, b: np.ndarray, random: np.random.Generator, permutations: int = PERMUTATIONS) -> tuple[float, float]:
    """(energy coefficient, p-value) of two samples [n, dim], [m, dim] (Székely and Rizzo 2004; Phipson and Smyth 2010 for p).

    The energy distance 2E|A−B| − E|A−A'| − E|B−B'| is 0 where the distributions are the same; the coefficient divides it by 2E|A−B|, and is at
    most 1. Estimated without bias (pairs of different rows), so that its mean is 0 without a change, whatever the number of rows.
    """
    pooled = np.concatenate([a, b])
    squares = (pooled**2).sum(axis=1)
    distances = np.sqrt(np.maximum(squares[:, None] + squares[None, :] - 2 * pooled @ pooled.T, 0.0))
    np.fill_diagonal(distances, 0.0)
    memberships = np.zeros((permutations + 1, len(pooled)))  # [draws, pooled]: 1 where a row counts as of `a`; the first draw is the truth
    memberships[0, : len(a)] = 1
    for row in memberships[1:]:
        row[random.permutation(len(pooled))[: len(a)]] = 1
    products = memberships @ distances
    inside_a = (products * memberships).sum(axis=1)
    across = products.sum(axis=1) - inside_a
    inside_b = distances.sum() - inside_a - 2 * across
    n, m = len(a), len(b)
    twice_across = 2 * across / (n * m)
    energies = twice_across - inside_a / (n * (n - 1)) - inside_b / (m * (m - 1))
    coefficient = float(energies[0] / twice_across[0]) if twice_across[0] > 0 else 0.0
    return coefficient, float((energies >= energies[0] - 1e-12).sum() / (permutations + 1))


def what_is_due(signals: Sequence[Signal]) -> tuple[list[str], list[str]]:
    """(what is due: re-embed, retrain; the advice in sentences) after a comparison."""
    changed, worse = {signal.name for signal in signals if signal.is_changed}, {signal.name for signal in signals if signal.is_worse}
    due: list[str] = []
    advice: list[str] = []
    if "retrieval" in worse:
        due.append("re-embed")
        advice.append("passages fit the questions less: ingest what is missing, or `understudy retriever tune`, then `understudy index rebuild`")
    if worse & {"abstentions", "scores"}:
        due.append("retrain")
        advice.append("answers got worse: `understudy traces import` or `traces simulate` on what is asked now, `dataset build`, then `train`")
    if "questions" in changed and not due:
        advice.append("other questions are asked, and nothing got worse: look at them (`understudy traces ls`) before anything is changed")
    if not changed:
        untested = [signal.name for signal in signals if signal.p is None]
        advice.append(f"nothing has moved{', as far as can be told: too few runs for ' + ', '.join(untested) if untested else ''}")
    return due, advice
