"""Judge-free metrics: SQuAD's for answers, and ours for citations, abstention, support and validation (DESIGN.md, Definitions).

`score_trace` turns one run into a row of numbers, `aggregate` turns rows into a model's metrics. A number that
is undefined for a row is None and is left out; a run that failed counts as a wrong answer, not as a missing one.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rag.citations import find_quote
from rag.eval.estimators import Estimator, Means, Numbers, auroc, mean, quantile
from rag.eval.evidence import Quote, first_retrieved, locate_gold, locate_shown, relevant_chunks, shown_chunks, unsupported_sentences
from rag.eval.ranked import ndcg_at_k, precision_at_k, reciprocal_rank
from rag.eval.reliability import calibration_error
from rag.eval.rouge import rouge_l
from rag.prompts import parse_answer, parse_score
from understudy.records import Chunk, Question, Trace

Row = dict[str, float | None]

QUANTILES = {
    "latency_p50": ("seconds", 0.5),
    "latency_p95": ("seconds", 0.95),
    "latency_p99": ("seconds", 0.99),
    "first_token_p50": ("first_token_seconds", 0.5),
    "first_token_p95": ("first_token_seconds", 0.95),
}
RIGHT_F1 = 0.5  # token-F1 from which on an answer counts as right, for the validator's AUROC
ANSWER_KEYS = (
    *("token_f1", "exact_match", "gold_recall", "rouge_l", "semantic_similarity", "answerable", "is_right", "score"),
    *("abstention_accuracy", "abstention_precision", "abstention_recall", "false_abstention_rate"),
)


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
    "token_f1": Metric("Token-F1", "Answers", "words shared with the expert's answer, neither missing nor too many (SQuAD's F1)"),
    "gold_recall": Metric("Gold recall", "Answers", "share of the expert's words that the answer has"),
    "exact_match": Metric("Exact match", "Answers", "the expert's answer, word for word", is_binary=True),
    "rouge_l": Metric("ROUGE-L", "Answers", "longest common run of words with the expert's answer, gaps allowed"),
    "semantic_similarity": Metric("Semantic similarity", "Answers", "how near its meaning is to the expert's answer: cosine by the workspace's embedder"),
    "unsupported_rate": Metric("Unsupported sentences", "Answers", "answer sentences that no passage supports", "lower", weight="sentences"),
    "unsupported_rate_nli": Metric("… by NLI", "Answers", "answer sentences that no passage entails, by evaluate.nli", "lower", weight="nli_sentences"),
    "answer_format_rate": Metric("Answers in form", "Answers", "an abstention alone, or a quote and then an answer, as the prompt asks", is_binary=True),
    "citation_precision": Metric("Citation precision", "Citations", "emitted quotes that are verbatim and the right evidence"),
    "citation_recall": Metric("Citation recall", "Citations", "expert's quotes that the answer cites verbatim"),
    "abstention_accuracy": Metric("Abstention accuracy", "Abstention", "answers where there is an answer, abstains where not; mean of the two", is_binary=True),
    "abstention_precision": Metric("Abstention precision", "Abstention", "share of its abstentions that are right"),
    "abstention_recall": Metric("Abstention recall", "Abstention", "share of the unanswerable questions on which it abstains", is_binary=True),
    "false_abstention_rate": Metric("False abstentions", "Abstention", "answerable questions that it refused", "lower", is_binary=True),
    "validator_auroc": Metric("Validator AUROC", "Validation", "how well the validation score tells right from wrong; 0.5 is chance"),
    "calibration_error": Metric("Calibration error", "Validation", "mean distance of the score from how often it is right, in 10 bands", "lower"),
    "valid_score_rate": Metric("Readable scores", "Validation", "validations that state one score from 0 to 1", weight="validations"),
    "recall_at_k": Metric("Recall@k", "Retrieval", "expert's quotes found in the first retrieval's passages"),
    "precision_at_k": Metric("Precision@k", "Retrieval", "passages of the first retrieval that hold an expert's quote"),
    "mrr": Metric("MRR", "Retrieval", "1 ÷ the rank of the first passage that holds an expert's quote"),
    "ndcg_at_k": Metric("nDCG@k", "Retrieval", "how near the ranking is to the best one"),
    "latency_p50": Metric("Latency, median", "Cost", "seconds of a whole run", "lower", "seconds"),
    "latency_p95": Metric("Latency, 95th percentile", "Cost", "seconds of a whole run", "lower", "seconds"),
    "latency_p99": Metric("Latency, 99th percentile", "Cost", "seconds of a whole run", "lower", "seconds"),
    "first_token_p50": Metric("First token, median", "Cost", "seconds until the answer begins, where it is streamed", "lower", "seconds"),
    "first_token_p95": Metric("First token, 95th percentile", "Cost", "seconds until the answer begins, where it is streamed", "lower", "seconds"),
    "tokens_per_second": Metric("Tokens per second", "Cost", "completion tokens ÷ seconds of one run's model steps", unit="count", weight="model_seconds"),
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
    model_seconds = sum(step.seconds for step in trace.steps if step.name != "retrieve")
    was_run = bool(trace.steps) and trace.source == "model"  # what was imported has neither our clock nor our counts
    row |= {
        "complete": float(trace.complete),
        "answer_format_rate": _has_form(trace),
        "valid_score_rate": readable / len(validations) if validations else None,
        "validations": float(len(validations)),
        "seconds": sum(step.seconds for step in trace.steps) if was_run else None,
        "first_token_seconds": _first_token_seconds(trace) if was_run else None,
        "model_seconds": model_seconds if was_run else None,
        "tokens_per_second": completion_tokens / model_seconds if was_run and model_seconds > 0 else None,
        "model_steps": float(sum(step.name != "retrieve" for step in trace.steps)) if was_run else None,
        "escalation_rate": float(bool(trace.metadata.get("escalated") or trace.metadata.get("low_score"))) if was_run and trace.complete else None,
        "prompt_tokens": float(prompt_tokens) if was_run else None,
        "cached_tokens": float(sum(step.usage.cached_tokens for step in trace.steps)) if was_run else None,
        "completion_tokens": float(completion_tokens) if was_run else None,
        "cost": (prompt_tokens * prices[0] + completion_tokens * prices[1]) / 1e6 if prices and was_run else None,
    }
    return row


def worth(row: Row, abstains: bool) -> float:
    """What an answer or an abstention is worth, in [0, 1]: token-F1, or its mean with citation recall where there are quotes to cite."""
    if not row["answerable"]:
        return float(abstains)
    earned = [row[name] for name in ("token_f1", "citation_recall") if row[name] is not None]
    return 0.0 if abstains else sum(number or 0.0 for number in earned) / len(earned)


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
        return auroc(column(rows, "score"), column(rows, "is_right"))
    if metric == "calibration_error":
        return _calibration_error(rows)
    if metric in QUANTILES:
        key, share = QUANTILES[metric]
        return quantile(column(rows, key), share)
    values = column(rows, metric)
    if metric == "abstention_accuracy":
        kind = column(rows, "answerable")
        kinds = [mean(np.where(kind == wanted, values, np.nan)) for wanted in (1.0, 0.0)]
        return Means(tuple(part for kind in kinds for part in kind.parts))
    weight = METRICS[metric].weight
    return mean(values, column(rows, weight) if weight else None)


def validator_auroc(scores: Sequence[float], are_right: Sequence[bool]) -> float | None:
    """The chance that a right answer's score exceeds a wrong one's, ties counting half; None without both kinds."""
    rows: list[Row] = [{"score": score, "is_right": float(right)} for score, right in zip(scores, are_right, strict=True)]
    value = float(estimator(rows, "validator_auroc")(np.ones((1, len(rows))))[0])
    return None if np.isnan(value) else value


def column(rows: Sequence[Row], key: str) -> Numbers:
    """One key of every row, NaN where it is undefined."""
    return np.array([np.nan if (value := row.get(key)) is None else value for row in rows], dtype=np.float64)


def _answer_scores(trace: Trace, question: Question) -> Row:
    """Answer and abstention metrics; an abstention and a failed run predict nothing, as in SQuAD 2.0."""
    row: Row = dict.fromkeys(ANSWER_KEYS)
    if not question.has_answer_key:
        return row
    abstained = trace.abstained and trace.complete
    prediction = trace.answer if trace.complete and not abstained else ""
    row["answerable"] = float(question.answerable)
    row["abstention_precision"] = float(not question.answerable) if abstained else None
    if question.answers is None:
        row["abstention_accuracy"] = row["abstention_recall"] = row["is_right"] = float(abstained)
    else:
        f1 = token_f1(prediction, question.answers)
        row |= {
            "token_f1": f1,
            "exact_match": exact_match(prediction, question.answers),
            "gold_recall": gold_recall(prediction, question.answers),
            "rouge_l": rouge_l(prediction, question.answers),
        }
        row["abstention_accuracy"] = float(trace.complete and not abstained)
        row["false_abstention_rate"] = float(abstained)
        row["is_right"] = float(trace.complete and not abstained and f1 >= RIGHT_F1)
    row["score"] = trace.score if trace.complete else None
    return row


def _evidence_scores(trace: Trace, question: Question, chunks: dict[str, Chunk]) -> Row:
    """Citation, retrieval and support metrics; the last two of runs that were given passages, in any mode but closed-book, retrieval's of
    those that retrieved here: the passages of an imported answer are what was recovered of them, however it was found."""
    has_passages = trace.metadata.get("mode") != "closed-book"
    shown = shown_chunks(trace, chunks)
    gold = locate_gold(question, shown, chunks) if question.answerable or not question.has_answer_key else []
    emitted = [locate_shown(quote, shown) for quote in (trace.quotes if trace.complete else [])]
    verbatim = [quote for quote in emitted if quote.spans]
    row: Row = dict.fromkeys(("citation_precision", "citation_recall", "recall_at_k", "precision_at_k", "mrr", "ndcg_at_k", "unsupported_rate"))
    if gold:
        right = sum(any(quote.overlaps(wanted) for wanted in gold) for quote in verbatim)
        row["citation_precision"] = right / len(emitted) if emitted else 0.0
        row["citation_recall"] = sum(any(wanted.overlaps(quote) for quote in verbatim) for wanted in gold) / len(gold)
        row |= _retrieval_scores(trace, gold, chunks) if has_passages and trace.source != "imported" else {}
    unsupported, sentences = unsupported_sentences(trace.answer, shown) if has_passages and trace.complete and not trace.abstained else (0, 0)
    row["sentences"] = float(sentences)
    row["unsupported_rate"] = unsupported / sentences if sentences else None
    return row


def _retrieval_scores(trace: Trace, gold: list[Quote], chunks: dict[str, Chunk]) -> Row:
    """Of the first retrieval; a passage is relevant when it holds a gold quote. Metrics of order are None where the trace has kept none.

    A run that retrieved nothing counts as one that found nothing.
    """
    retrieved, is_ranked = first_retrieved(trace, chunks)
    found = [any(find_quote(wanted.text, chunk.text) for wanted in gold) for chunk in retrieved]
    relevant = len(relevant_chunks(gold, chunks) | {chunk.id for chunk, is_relevant in zip(retrieved, found, strict=True) if is_relevant})
    return {
        "recall_at_k": sum(any(find_quote(wanted.text, chunk.text) for chunk in retrieved) for wanted in gold) / len(gold),
        "precision_at_k": precision_at_k(found),
        "mrr": reciprocal_rank(found) if is_ranked else None,
        "ndcg_at_k": ndcg_at_k(found, relevant) if is_ranked else None,
    }


def _has_form(trace: Trace) -> float | None:
    """Whether the last answer written has the form asked for; None where none was asked for, or it was cut short to abstain."""
    written = [step for step in trace.steps if step.name == "answer" and step.text]
    if not written or trace.metadata.get("mode") == "closed-book":
        return None
    has_form = parse_answer(written[-1].text).well_formed
    return None if not has_form and trace.abstained and written[-1].finish_reason == "length" else float(has_form)


def _first_token_seconds(trace: Trace) -> float | None:
    """From the start of the run to the first token of its first answer, where that was streamed."""
    before = 0.0
    for step in trace.steps:
        if step.name == "answer":
            return None if step.first_token_seconds is None else before + step.first_token_seconds
        before += step.seconds
    return None


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


def _calibration_error(rows: Sequence[Row]) -> Estimator:
    """Expected calibration error of `score` against `is_right`."""
    scores, is_right = column(rows, "score"), column(rows, "is_right")
    known = np.flatnonzero(~np.isnan(scores) & ~np.isnan(is_right))
    evaluate = calibration_error(scores[known], is_right[known])
    return lambda drawn: evaluate(drawn[:, known])
