"""Judge-free metrics: SQuAD's for answers, and ours for citations, abstention, support and validation (DESIGN.md, Definitions).

`score_trace` turns one run into a row of numbers, `aggregate` turns rows into a model's metrics. A number that
is undefined for a row is None and is left out; a run that failed counts as a wrong answer, not as a missing one.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rag.citations import find_quote
from rag.eval.evidence import first_retrieved, locate_gold, locate_shown, shown_chunks, unsupported_sentences
from rag.prompts import parse_score
from understudy.records import Chunk, Question, Trace

Row = dict[str, float | None]
Numbers = NDArray[np.float64]
Estimator = Callable[[Numbers], Numbers]  # how often each row was drawn [resamples, rows] → the metric [resamples]

RIGHT_F1 = 0.5  # token-F1 from which on an answer counts as right, for the validator's AUROC


@dataclass(frozen=True)
class Metric:
    """How a metric is read."""

    label: str
    group: str
    meaning: str
    better: Literal["higher", "lower", ""] = "higher"
    unit: Literal["share", "seconds", "tokens", "money", "count"] = "share"
    is_binary: bool = False  # each row is 0 or 1
    weight: str = ""  # the row key that holds how many items the row's share is over; "": rows count alike


METRICS: dict[str, Metric] = {
    "token_f1": Metric("Token-F1", "Answers", "SQuAD's word overlap with the expert's answer; answerable questions"),
    "gold_recall": Metric("Gold recall", "Answers", "share of the expert's words that the answer has"),
    "exact_match": Metric("Exact match", "Answers", "the expert's answer, word for word", is_binary=True),
    "unsupported_rate": Metric("Unsupported sentences", "Answers", "answer sentences that no passage supports", "lower", weight="sentences"),
    "citation_precision": Metric("Citation precision", "Citations", "emitted quotes that are verbatim and the right evidence"),
    "citation_recall": Metric("Citation recall", "Citations", "expert's quotes that the answer cites verbatim"),
    "abstention_accuracy": Metric("Abstention accuracy", "Abstention", "answers where there is an answer, abstains where not; mean of the two", is_binary=True),
    "false_abstention_rate": Metric("False abstentions", "Abstention", "answerable questions that it refused", "lower", is_binary=True),
    "validator_auroc": Metric("Validator AUROC", "Validation", "how well the validation score tells right from wrong; 0.5 is chance"),
    "valid_score_rate": Metric("Readable scores", "Validation", "validations that state one score from 0 to 1", weight="validations"),
    "recall_at_k": Metric("Recall@k", "Retrieval", "expert's quotes found in the first retrieval's passages"),
    "latency_p50": Metric("Latency, median", "Cost", "seconds of a whole run", "lower", "seconds"),
    "latency_p95": Metric("Latency, 95th percentile", "Cost", "seconds of a whole run", "lower", "seconds"),
    "model_steps": Metric("Model steps", "Cost", "steps that asked the model, mean of a run; a round of the whole graph has three", "lower", "count"),
    "escalation_rate": Metric("Escalated", "Cost", "runs that a teacher answered or would have: scored below agent.escalate_below", "lower", is_binary=True),
    "prompt_tokens": Metric("Prompt tokens", "Cost", "mean of a run", "lower", "tokens"),
    "cached_tokens": Metric("… of them cached", "Cost", "mean of a run", "", "tokens"),
    "completion_tokens": Metric("Completion tokens", "Cost", "mean of a run", "lower", "tokens"),
    "cost": Metric("Money", "Cost", "mean of a run, at the endpoint's prices", "lower", "money"),
}


def normalize_answer(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles, single spaces."""
    text = "".join(character for character in text.lower() if character not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(prediction: str, answer: str | Sequence[str]) -> float:
    """SQuAD's F1 over bags of words, the best over the accepted answers."""
    return max(_overlap(prediction, gold)[2] for gold in _accepted(answer))


def exact_match(prediction: str, answer: str | Sequence[str]) -> float:
    """1.0 where the prediction is an accepted answer in SQuAD's normal form, else 0.0."""
    return float(any(normalize_answer(prediction) == normalize_answer(gold) for gold in _accepted(answer)))


def gold_recall(prediction: str, answer: str | Sequence[str]) -> float:
    """Share of the gold answer's normalised tokens in the prediction, the best over the accepted answers."""
    return max(_overlap(prediction, gold)[1] for gold in _accepted(answer))


def score_trace(trace: Trace, question: Question, chunks: dict[str, Chunk], prices: tuple[float, float] | None = None) -> Row:
    """One run's row; `prices` is money per million prompt and completion tokens."""
    row = _answer_scores(trace, question) | _evidence_scores(trace, question, chunks)
    validations = [step for step in trace.steps if step.name == "validate"]
    readable = sum(parse_score(step.text) is not None for step in validations)
    prompt_tokens = sum(step.usage.prompt_tokens for step in trace.steps)
    completion_tokens = sum(step.usage.completion_tokens for step in trace.steps)
    row |= {
        "complete": float(trace.complete),
        "valid_score_rate": readable / len(validations) if validations else None,
        "validations": float(len(validations)),
        "seconds": sum(step.seconds for step in trace.steps) if trace.steps else None,
        "model_steps": float(sum(step.name != "retrieve" for step in trace.steps)) if trace.steps else None,
        "escalation_rate": float(bool(trace.metadata.get("escalated") or trace.metadata.get("low_score"))) if trace.complete else None,
        "prompt_tokens": float(prompt_tokens) if trace.steps else None,
        "cached_tokens": float(sum(step.usage.cached_tokens for step in trace.steps)) if trace.steps else None,
        "completion_tokens": float(completion_tokens) if trace.steps else None,
        "cost": (prompt_tokens * prices[0] + completion_tokens * prices[1]) / 1e6 if prices else None,
    }
    return row


def aggregate(rows: Sequence[Row]) -> dict[str, float | None]:
    """A model's metrics over its rows; None where a metric is defined for no row."""
    ones = np.ones((1, len(rows)))
    values = {name: float(estimator(rows, name)(ones)[0]) for name in METRICS}
    return {name: None if np.isnan(value) else value for name, value in values.items()}


def estimator(rows: Sequence[Row], metric: str) -> Estimator:
    """The metric as a function of how often each row was drawn, so that a bootstrap evaluates all resamples at once.

    Where no drawn row defines the metric, the result is NaN.
    """
    if metric == "validator_auroc":
        return _auroc(rows)
    if metric.startswith("latency_p"):
        return _quantile(column(rows, "seconds"), float(metric.removeprefix("latency_p")) / 100)
    values = column(rows, metric)
    if metric == "abstention_accuracy":
        kind = column(rows, "answerable")
        kinds = [_mean(np.where(kind == wanted, values, np.nan)) for wanted in (1.0, 0.0)]
        return lambda drawn: (kinds[0](drawn) + kinds[1](drawn)) / 2
    weight = METRICS[metric].weight
    return _mean(values, column(rows, weight) if weight else None)


def validator_auroc(scores: Sequence[float], are_right: Sequence[bool]) -> float | None:
    """The chance that a right answer's score exceeds a wrong one's, ties counting half; None without both kinds."""
    rows: list[Row] = [{"score": score, "is_right": float(right)} for score, right in zip(scores, are_right, strict=True)]
    value = float(_auroc(rows)(np.ones((1, len(rows))))[0])
    return None if np.isnan(value) else value


def column(rows: Sequence[Row], key: str) -> Numbers:
    """One key of every row, NaN where it is undefined."""
    return np.array([np.nan if (value := row.get(key)) is None else value for row in rows], dtype=np.float64)


def _answer_scores(trace: Trace, question: Question) -> Row:
    """Answer and abstention metrics; an abstention and a failed run predict nothing, as in SQuAD 2.0."""
    row: Row = dict.fromkeys(
        ("token_f1", "exact_match", "gold_recall", "answerable", "abstention_accuracy", "false_abstention_rate", "is_right", "score"), None
    )
    if not question.has_answer_key:
        return row
    abstained = trace.abstained and trace.complete
    prediction = trace.answer if trace.complete and not abstained else ""
    row["answerable"] = float(question.answerable)
    if question.answers is None:
        row["abstention_accuracy"] = row["is_right"] = float(abstained)
    else:
        f1 = token_f1(prediction, question.answers)
        row |= {
            "token_f1": f1,
            "exact_match": exact_match(prediction, question.answers),
            "gold_recall": gold_recall(prediction, question.answers),
        }
        row["abstention_accuracy"] = float(trace.complete and not abstained)
        row["false_abstention_rate"] = float(abstained)
        row["is_right"] = float(trace.complete and not abstained and f1 >= RIGHT_F1)
    row["score"] = trace.score if trace.complete else None
    return row


def _evidence_scores(trace: Trace, question: Question, chunks: dict[str, Chunk]) -> Row:
    """Citation, retrieval and support metrics."""
    shown = shown_chunks(trace, chunks)
    gold = locate_gold(question, shown, chunks) if question.answerable or not question.has_answer_key else []
    emitted = [locate_shown(quote, shown) for quote in (trace.quotes if trace.complete else [])]
    verbatim = [quote for quote in emitted if quote.spans]
    row: Row = dict.fromkeys(("citation_precision", "citation_recall", "recall_at_k", "unsupported_rate"), None)
    if gold:
        right = sum(any(quote.overlaps(wanted) for wanted in gold) for quote in verbatim)
        row["citation_precision"] = right / len(emitted) if emitted else 0.0
        row["citation_recall"] = sum(any(wanted.overlaps(quote) for quote in verbatim) for wanted in gold) / len(gold)
        retrieved = first_retrieved(trace, chunks)
        row["recall_at_k"] = sum(any(find_quote(wanted.text, chunk.text) for chunk in retrieved) for wanted in gold) / len(gold)
    unsupported, sentences = unsupported_sentences(trace.answer, shown) if trace.complete and not trace.abstained else (0, 0)
    row["sentences"] = float(sentences)
    row["unsupported_rate"] = unsupported / sentences if sentences else None
    return row


def _accepted(answer: str | Sequence[str]) -> list[str]:
    """The accepted answers; nothing accepted means, as in SQuAD 2.0, that the empty answer is."""
    answers = [answer] if isinstance(answer, str) else list(answer)
    return [text for text in answers if normalize_answer(text)] or [""]


def _overlap(prediction: str, gold: str) -> tuple[float, float, float]:
    """Precision, recall and F1 over bags of normalised tokens; two empty bags agree (SQuAD 2.0)."""
    predicted, wanted = Counter(normalize_answer(prediction).split()), Counter(normalize_answer(gold).split())
    if not predicted or not wanted:
        return (float(predicted == wanted),) * 3
    shared = (predicted & wanted).total()
    precision, recall = shared / predicted.total(), shared / wanted.total()
    return precision, recall, 2 * precision * recall / (precision + recall) if shared else 0.0


def _mean(values: Numbers, weights: Numbers | None = None) -> Estimator:
    """The (weighted) mean over the rows where the value is defined."""
    counted = np.where(np.isnan(values), 0.0, 1.0 if weights is None else weights)
    products = np.where(counted > 0, values, 0.0) * counted
    return lambda drawn: _ratio(drawn @ products, drawn @ counted)


def _quantile(values: Numbers, share: float) -> Estimator:
    """The smallest value that at least `share` of the drawn rows do not exceed (nearest rank)."""
    order = np.argsort(values)[: int((~np.isnan(values)).sum())]
    if not len(order):
        return lambda drawn: np.full(len(drawn), np.nan)

    def evaluate(drawn: Numbers) -> Numbers:
        cumulated = np.cumsum(drawn[:, order], axis=1)  # [resamples, defined rows]
        total = cumulated[:, -1:]
        places = (cumulated < share * total - 1e-9).sum(axis=1).clip(max=len(order) - 1)
        return np.where(total[:, 0] > 0, values[order][places], np.nan)

    return evaluate


def _auroc(rows: Sequence[Row]) -> Estimator:
    """Area under the ROC curve of `score` against `is_right`, as a Mann–Whitney statistic."""
    scores, is_right = column(rows, "score"), column(rows, "is_right")
    right, wrong = np.flatnonzero(~np.isnan(scores) & (is_right == 1)), np.flatnonzero(~np.isnan(scores) & (is_right == 0))
    gap = scores[right][:, None] - scores[wrong][None, :]
    wins = (gap > 0) + 0.5 * (gap == 0)  # [right, wrong]

    def evaluate(drawn: Numbers) -> Numbers:
        of_right, of_wrong = drawn[:, right], drawn[:, wrong]
        return _ratio(((of_right @ wins) * of_wrong).sum(axis=1), of_right.sum(axis=1) * of_wrong.sum(axis=1))

    return evaluate


def _ratio(numerator: Numbers, denominator: Numbers) -> Numbers:
    quotient: Numbers = np.divide(numerator, denominator, out=np.full(len(numerator), np.nan), where=denominator > 0)
    return quotient
