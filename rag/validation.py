"""The validation score and the decision to abstain: signals of one answer, weighed on a calibration split.

One-token verdicts of a small model are near chance, and whether it abstains depends on how often its training
did. The likelihood it gave its answer, how far its first token leant towards abstaining, and how well question,
passages and quotes match are informative and free. Two logistic regressions over them, fitted on questions of
their own, say how likely an answer is right, and whether to answer at all.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from rag.citations import find_quote
from rag.index import tokenize
from rag.policy import WHOLE_GRAPH, Policy
from rag.prompts import ABSTENTION, QUOTE_LABEL, Answer, Shot, parse_score, strip_thinking
from understudy.completions import Completion
from understudy.files import read_json, write_json
from understudy.records import Passage

FILE = "calibration.json"
VERSION = 3
ANSWERABLE_SIGNALS = ("answer_odds", "lexical", "dense", "passage_overlap")  # known at the first token, whatever is answered
FREE_SIGNALS = ("answer_odds", "answer_logprob", "said_overlap", "quote_lead", "from_best")  # of an answer that was given
RIGHT_SIGNALS = (*FREE_SIGNALS, "verdict")  # where the verdict is asked for
SIGNALS = tuple(dict.fromkeys(("verbatim", *RIGHT_SIGNALS, *ANSWERABLE_SIGNALS)))
RIDGE = 3.0  # L2 penalty: a calibration split is small
STATED = re.compile(r"(?i)\bscore\b[\"'*\s]*[:=][\"'*\s]*(0(?:\.\d+)?|1(?:\.0+)?|\.\d+)(?![\d.]*[\d/%])")
SENTENCE_END = re.compile(r"(?<=[.!?;:])\s+")
UNSEEN = 1e-4  # probability of a first token that the endpoint did not list


class Logistic(BaseModel):
    """Weights of the standardised signals; the probability is a logistic function of their sum."""

    model_config = ConfigDict(frozen=True)

    signals: list[str]
    means: list[float]
    scales: list[float]
    weights: list[float]
    bias: float

    def probability(self, signals: dict[str, float], prior: float = 0.0) -> float:
        """In [0, 1]; `prior` is added to the log-odds."""
        x = (np.array([signals[name] for name in self.signals]) - self.means) / self.scales
        return 0.5 + 0.5 * math.tanh(0.5 * (float(x @ np.array(self.weights)) + self.bias + prior))  # the logistic function, without overflow


class Calibration(BaseModel):
    """What a model's signals are worth, by the questions of a calibration split."""

    model_config = ConfigDict(frozen=True)

    version: int = VERSION  # of the signals and of how they are fitted
    key: str  # digest of what it was fitted on: questions, corpus, prompts, retrieval
    model: str
    questions: int
    right: Logistic | None  # that an answer is right; None where none was given
    answerable: Logistic | None  # that the passages answer the question, both kinds weighing the same; None without both kinds
    auroc: float | None  # of the score, of answers and abstentions alike, cross-validated
    abstention_accuracy: float | None  # of `answerable`, cross-validated, mean of both kinds
    threshold: float = 0.5  # the least probability of `answerable` at which an answer stands
    prior: float = 0.0  # log-odds that a question is answerable, which `answerable` leaves out
    policy: Policy = WHOLE_GRAPH
    shots: list[Shot] = []  # worked examples of the answer step, chosen on training questions; none: those of rag.prompts

    def abstains(self, signals: dict[str, float]) -> bool:
        """Whether to abstain although the model answered."""
        return self.answerable is not None and self.answerable.probability(signals) < self.threshold

    def score(self, signals: dict[str, float], abstained: bool) -> float:
        """Probability in [0, 1] that the answer, or the abstention, is right."""
        if abstained and self.answerable:
            return 1.0 - self.answerable.probability(signals, self.prior)
        return self.right.probability(signals) if self.right and not abstained else plain_score(signals, abstained)


UNFITTED = Calibration(key="", model="", questions=0, right=None, answerable=None, auroc=None, abstention_accuracy=None)  # decides nothing


def signals_of(question: str, passages: list[Passage], answer: Answer, verbatim: float, written: Completion, verdict: float | None) -> dict[str, float]:
    """The signals of one answer; `verbatim` is the share of its quotes that stand in the passages shown."""
    quoted, said, *sentences = overlaps(question, [" ".join(answer.quotes), " ".join([*answer.quotes, answer.text]), *sentences_of(passages)])
    return {
        **first_signals(question, passages, written),
        "verdict": 0.5 if verdict is None else verdict,
        "answer_logprob": written.mean_logprob or 0.0,
        "verbatim": verbatim,
        "said_overlap": said,
        "quote_lead": quoted - max(sentences, default=0.0),
        "from_best": share_from_best(answer.quotes, passages),
    }


def first_signals(question: str, passages: list[Passage], written: Completion) -> dict[str, float]:
    """The signals that are known once the first token is written."""
    return {
        "answer_odds": answer_odds(written),
        "passage_overlap": overlaps(question, [" ".join(passage.chunk.text for passage in passages)])[0],
        "lexical": max((passage.scores.lexical or 0.0 for passage in passages), default=0.0),
        "dense": max((passage.scores.dense or 0.0 for passage in passages), default=0.0),
    }


def answer_odds(written: Completion) -> float:
    """Log-odds, in nats, of answering over abstaining by the first token; 0 where the endpoint gives no log-probabilities."""
    answers = abstains = UNSEEN
    for token, logprob in written.first_alternatives.items():
        if token.strip() and QUOTE_LABEL.startswith(token.strip()):
            answers += math.exp(logprob)
        elif token.strip() and ABSTENTION.startswith(token.strip()):
            abstains += math.exp(logprob)
    return math.log(answers / abstains)


def overlaps(question: str, texts: list[str]) -> list[float]:
    """Of each text, the share in [0, 1] of the question's stems, stop words apart, that stand in it."""
    asked, *said = (set(stems) for stems in tokenize([question, *texts]))
    return [len(asked & stems) / len(asked) if asked else 0.0 for stems in said]


def sentences_of(passages: list[Passage]) -> list[str]:
    """The passages' sentences."""
    return [sentence for passage in passages for sentence in SENTENCE_END.split(passage.chunk.text)]


def share_from_best(quotes: list[str], passages: list[Passage]) -> float:
    """Share in [0, 1] of the quotes that stand in the passage which BM25 ranks first."""
    best = max(passages, key=lambda passage: passage.scores.lexical or 0.0, default=None)
    return sum(find_quote(quote, best.chunk.text) is not None for quote in quotes) / len(quotes) if best and quotes else 0.0


def read_verdict(completion: Completion) -> float | None:
    """The validator's probability of "right": a fraction that it states, else the first token's log-probabilities, else its text."""
    stated = stated_score(completion.text)
    if stated is not None and 0 < stated < 1:  # the first token of 0.9 is 0
        return stated
    right, wrong = (sum(math.exp(p) for token, p in completion.first_alternatives.items() if token.strip() == verdict) for verdict in "10")
    if right + wrong > 0:
        return right / (right + wrong)
    return stated


def stated_score(text: str) -> float | None:
    """The score in [0, 1] that a text states: bare, as `Score: 0.9`, or in a JSON object under "score"; None where it states none, or several."""
    bare = parse_score(text)
    stated = {float(number) for number in STATED.findall(strip_thinking(text))}
    return bare if bare is not None or len(stated) != 1 else stated.pop()


def unasked_verdict(calibration: Calibration | None, written: Completion) -> float | None:
    """What stands for the verdict where the model is not asked for one: its mean on the calibration split, which weighs nothing,
    else the answer's likelihood per token."""
    right = calibration.right if calibration else None
    if right and "verdict" in right.signals:
        return right.means[right.signals.index("verdict")]
    return None if written.mean_logprob is None else math.exp(written.mean_logprob)


def plain_score(signals: dict[str, float], abstained: bool) -> float:
    """The score of a model without a calibration: its verdict, halved for each quote's share that is not verbatim."""
    return signals["verdict"] * (1.0 if abstained else 0.5 + 0.5 * signals["verbatim"])


def fit_logistic(signals: tuple[str, ...], rows: list[dict[str, float]], labels: list[bool], balanced: bool = False) -> Logistic | None:
    """Ridge logistic regression by Newton's method; `balanced` gives both labels the same total weight.

    None where all labels are the same.
    """
    y = np.array(labels, dtype=float)
    if len(set(labels)) < 2:
        return None
    x = np.array([[row[name] for name in signals] for row in rows])
    means, scales = x.mean(axis=0), np.where(x.std(axis=0) > 1e-9, x.std(axis=0), 1.0)
    design = np.column_stack([(x - means) / scales, np.ones(len(x))])
    weight = np.where(y == 1, 0.5 / y.mean(), 0.5 / (1 - y.mean())) if balanced else np.ones(len(y))
    penalty = np.diag([RIDGE] * len(signals) + [0.0])
    beta = np.zeros(design.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-design @ beta))
        curvature = design.T @ (design * (weight * p * (1 - p))[:, None]) + penalty + 1e-9 * np.eye(len(beta))
        step = np.linalg.solve(curvature, design.T @ (weight * (y - p)) - penalty @ beta)
        beta += step
        if np.abs(step).max() < 1e-8:
            break
    return Logistic(signals=list(signals), means=means.tolist(), scales=scales.tolist(), weights=beta[:-1].tolist(), bias=float(beta[-1]))


def constant(labels: list[bool]) -> Logistic | None:
    """Laplace's estimate of how often the labels are true, whatever the signals; None without labels."""
    odds = (sum(labels) + 1) / (len(labels) - sum(labels) + 1)
    return Logistic(signals=[], means=[], scales=[], weights=[], bias=math.log(odds)) if labels else None


def read_calibration(folder: Path) -> Calibration | None:
    """The calibration kept beside an adapter; None without one, or where it knows other signals than these."""
    path = folder / FILE
    kept = read_json(path) if path.exists() else {}
    return Calibration.model_validate(kept) if kept.get("version") == VERSION else None


def write_calibration(folder: Path, calibration: Calibration) -> None:
    """Keep a calibration beside an adapter."""
    write_json(folder / FILE, calibration.model_dump())
