"""Fit a model's validation score, its decision to abstain and its policy, on questions that are neither trained on nor evaluated.

Each question goes through the whole graph, every round of it, and then once through what may be left out: first the plan before the
first retrieval, then also the copied part of quotes. What answered no worse is the model's policy. Every such comparison uses scores
and decisions fitted without the question's fold.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rag.agent import Tools, run_agent
from rag.eval.evidence import Corpus
from rag.eval.metrics import Row, score_trace, validator_auroc, worth
from rag.policy import WHOLE_GRAPH, Policy, is_worth_taking, worth_going_on_below
from rag.prompts import PROMPT_VERSION, Shot
from rag.retrieve import Retriever
from rag.shots import choose_shots
from rag.validation import ANSWERABLE_SIGNALS, FREE_SIGNALS, RIGHT_SIGNALS, SIGNALS, UNFITTED, Calibration, constant, fit_logistic, write_calibration
from understudy.digests import digest_of
from understudy.errors import EndpointError
from understudy.progress import Progress
from understudy.records import Chunk, Question, Trace
from understudy.settings.answers import Agent

FOLDS = 5
FITTING = 2  # raised where the same runs are fitted differently, so that calibrations made before are made again
WITHOUT_PLAN = Policy(plans_first=False)
WITH_COPIED_QUOTES = Policy(plans_first=False, completes_quotes=True)


@dataclass(frozen=True)
class Tried:
    """One attempt of a run, before a calibration had a say."""

    signals: dict[str, float]
    abstained: bool
    row: Row  # its metrics

    @property
    def is_right(self) -> bool:
        """As the validator's AUROC counts it."""
        return bool(self.row["is_right"])

    def points(self, abstains: bool) -> float:
        """What it is worth once it is decided whether to abstain."""
        return worth(self.row, abstains)


@dataclass(frozen=True)
class Arm:
    """A way through the graph: each question's attempts, round by round, and the calibration fitted without the question's fold."""

    attempts: list[list[Tried]]
    fits: list[Calibration]

    def decided(self, place: int, tried: Tried) -> tuple[float, bool, bool]:
        """(score, whether it is an abstention, whether it is right) of an attempt of the question at `place`."""
        abstains = tried.abstained or self.fits[place].abstains(tried.signals)
        is_right = not tried.row["answerable"] if abstains else tried.is_right
        return self.fits[place].score(tried.signals, abstains), abstains, is_right

    @property
    def points(self) -> list[float]:
        """Of each question's first attempt."""
        return [tried[0].points(self.decided(place, tried[0])[1]) for place, tried in enumerate(self.attempts)]

    def given_up(self, other: Arm) -> list[float]:
        """How many more points each question had the other way."""
        return [theirs - ours for ours, theirs in zip(self.points, other.points, strict=True)]

    @property
    def auroc(self) -> float | None:
        """Of the scores of first attempts, answers and abstentions alike."""
        decided = [self.decided(place, tried[0]) for place, tried in enumerate(self.attempts)]
        return validator_auroc([score for score, _, _ in decided], [is_right for _, _, is_right in decided])

    def gains(self) -> tuple[list[float], list[float]]:
        """(score of the first attempt, points that the later ones added) of each question; the best attempt is chosen as a run does."""
        scores, gains = [], []
        for place, tried in enumerate(self.attempts):
            decided = [self.decided(place, attempt) for attempt in tried]
            order = [(attempt.signals["verbatim"] > 0 and not abstains, score) for attempt, (score, abstains, _) in zip(tried, decided, strict=True)]
            best = max(range(len(tried)), key=order.__getitem__)
            scores.append(decided[0][0])
            gains.append(tried[best].points(decided[best][1]) - tried[0].points(decided[0][1]))
        return scores, gains


def calibration_key(questions_digest: str, retriever: Retriever, weights: str, settings: Agent) -> str:
    """Digest of everything a calibration rests on; `weights` is the digest of the model's."""
    decided_by = [FITTING, settings.max_false_abstentions, settings.max_rounds]
    return digest_of([questions_digest, retriever.generation, retriever.settings.model_dump(), PROMPT_VERSION, weights, *decided_by])


async def calibrate(
    questions: list[Question],
    key: str,
    tools: Tools,
    folder: Path,
    concurrency: int,
    progress: Callable[[str, int], Progress],
    training: Iterable[Trace] = (),
) -> dict[str, Any]:
    """Run the agent over the questions, fit, keep the calibration in the folder; returns the command's JSON. Raises EndpointError.

    A model without an adapter gets worked examples from the training traces first (rag.shots).
    """
    keyed = [question for question in questions if question.has_answer_key]
    ways = [WHOLE_GRAPH, WITHOUT_PLAN] + ([WITH_COPIED_QUOTES] if tools.client.model.continues else [])
    gate = asyncio.Semaphore(concurrency)
    async with tools:
        shots = [] if tools.client.model.has_adapter else await choose_shots(tools, training, concurrency, progress)
        with progress("calibrating", len(keyed) * len(ways)) as bar:

            async def ask(question: Question, way: Policy) -> Trace:
                async with gate:
                    trace = await run_agent(question.question, _tools_for(tools, way, shots))
                    bar.advance()
                    return trace

            traces = [await asyncio.gather(*(ask(question, way) for question in keyed)) for way in ways]
    whole = [place for place, of_question in enumerate(zip(*traces, strict=True)) if all(trace.complete for trace in of_question)]
    if not whole:
        why = next((trace.metadata["error"] for trace in traces[0] if "error" in trace.metadata), "give the questions their answers")
        raise EndpointError("no calibration question was answered", why)
    chunks = Corpus.of(tools.retriever.chunks)
    attempts = {way: [attempts_of(of_way[place], keyed[place], chunks) for place in whole] for way, of_way in zip(ways, traces, strict=True)}
    limit = tools.settings.max_false_abstentions
    calibration = fit_calibration(key, tools.client.model.name, attempts, limit).model_copy(update={"shots": shots})
    write_calibration(folder, calibration)
    return calibration_json(calibration)


def _tools_for(tools: Tools, way: Policy, shots: list[Shot]) -> Tools:
    """Tools that send every question one way: no score is accepted, and only the whole graph has more than one round."""
    rounds = tools.settings.max_rounds if way == WHOLE_GRAPH else 1
    settings = tools.settings.model_copy(update={"mode": "agentic", "accept_score": 1.0, "max_rounds": rounds})
    return replace(tools, settings=settings, calibration=UNFITTED.model_copy(update={"policy": way, "shots": shots}), teacher=None)


def fit_calibration(key: str, model: str, attempts: dict[Policy, list[list[Tried]]], limit: float) -> Calibration:
    """The calibration of each question's attempts, by the way it was sent: the whole graph first, the cheapest way last.

    `limit` is the largest share of the answerable questions on which to abstain.
    """
    arms = {way: Arm(tried, cross_fit([t[0] for t in tried], FREE_SIGNALS, limit)) for way, tried in attempts.items()}
    whole = arms[WHOLE_GRAPH]
    way = [way for way, arm in arms.items() if arm is whole or not is_worth_taking(arm.given_up(whole))][-1]
    first = [tried[0] for tried in attempts[way]]
    asks = verdict_helps(first)
    signals = RIGHT_SIGNALS if asks else FREE_SIGNALS
    has_rounds = any(len(tried) > 1 for tried in whole.attempts)
    policy = way.model_copy(update={"asks_verdict": asks, "goes_on_below": worth_going_on_below(*whole.gains()) if has_rounds else 1.0})
    judged = Arm(attempts[way], cross_fit(first, signals, limit))
    kinds = [[fit.abstains(t.signals) != kind for t, fit in zip(first, judged.fits, strict=True) if t.row["answerable"] == kind] for kind in (True, False)]
    fit = fit_signals(first, signals, limit)
    return fit.model_copy(
        update={
            "key": key,
            "model": model,
            "questions": len(first),
            "auroc": judged.auroc,
            "abstention_accuracy": sum(sum(kind) / len(kind) for kind in kinds) / 2 if all(kinds) else None,
            "policy": policy,
        }
    )


def attempts_of(trace: Trace, question: Question, chunks: dict[str, Chunk]) -> list[Tried]:
    """The attempts of a run whose answers were all validated, in order."""
    attempts = []
    for place, step in enumerate(trace.steps):
        if step.name == "validate":
            said = next(earlier.parsed for earlier in reversed(trace.steps[:place]) if earlier.name == "answer")
            made = {"steps": trace.steps[: place + 1], "answer": str(said["answer"]), "quotes": said["quotes"], "abstained": bool(said["abstained"])}
            signals = {name: float(str(step.parsed[name])) for name in SIGNALS}
            attempts.append(Tried(signals, bool(said["abstained"]), score_trace(trace.model_copy(update=made), question, chunks)))
    return attempts


def fit_signals(tried: list[Tried], signals: tuple[str, ...], max_false_abstentions: float) -> Calibration:
    """The two fits, from where on an answer stands, and how much likelier a question is answerable than not."""
    given = [t for t in tried if not t.abstained]
    are_right = [t.is_right for t in given]
    answerable = [bool(t.row["answerable"]) for t in tried]
    prior = math.log(sum(answerable) / (len(answerable) - sum(answerable))) if len(set(answerable)) == 2 else 0.0
    decision = fit_logistic(ANSWERABLE_SIGNALS, [t.signals for t in tried], answerable, balanced=True)
    return Calibration(
        key="",
        model="",
        questions=len(tried),
        right=fit_logistic(signals, [t.signals for t in given], are_right) or constant(are_right),
        answerable=decision,
        threshold=answering_threshold(tried, max_false_abstentions),
        auroc=None,
        abstention_accuracy=None,
        prior=prior,
    )


def answering_threshold(tried: list[Tried], max_false_abstentions: float) -> float:
    """The probability from which an answer stands: 0.5, or lower where that would abstain on too large a share of the answerable questions.

    Each question's probability is of a fit without its fold, and one loss more is reckoned with than there was: the share expected of
    new questions then stays within the limit (conformal risk control, arXiv:2208.02814; exact for a fit on other data). Abstentions
    that the model itself chose count too and cannot be taken back.
    """
    chances, own = [], 0
    for held in folds_of(len(tried)):
        rest = [t for place, t in enumerate(tried) if place not in held]
        decision = fit_logistic(ANSWERABLE_SIGNALS, [t.signals for t in rest], [bool(t.row["answerable"]) for t in rest], balanced=True)
        answerable = [tried[place] for place in held if tried[place].row["answerable"]]
        own += sum(t.abstained for t in answerable)
        chances += [decision.probability(t.signals) if decision else 0.5 for t in answerable if not t.abstained]
    spare = math.floor(max_false_abstentions * (len(chances) + own + 1)) - 1 - own
    return min(0.5, sorted(chances)[max(0, spare)]) if max(0, spare) < len(chances) else 0.5


def folds_of(count: int) -> list[set[int]]:
    """The places of so many questions, dealt into folds."""
    order = np.random.default_rng(0).permutation(count)
    return [set(order[fold::FOLDS].tolist()) for fold in range(FOLDS)]


def cross_fit(tried: list[Tried], signals: tuple[str, ...], max_false_abstentions: float) -> list[Calibration]:
    """For each question the fits without its own fold."""
    folds = folds_of(len(tried))
    fits = [fit_signals([t for place, t in enumerate(tried) if place not in held], signals, max_false_abstentions) for held in folds]
    return [next(fit for fit, held in zip(fits, folds, strict=True) if place in held) for place in range(len(tried))]


def verdict_helps(tried: list[Tried]) -> bool:
    """Whether a score that knows the verdict foretells better, by its cross-validated log loss, which answers are right."""
    without, knowing = (_losses(tried, signals) for signals in (FREE_SIGNALS, RIGHT_SIGNALS))
    return is_worth_taking([ours - theirs for ours, theirs in zip(without, knowing, strict=True)])


def _losses(tried: list[Tried], signals: tuple[str, ...]) -> list[float]:
    """The cross-validated log loss, in nats, of each answer's score; 0 for an abstention."""
    losses = []
    for fit, t in zip(cross_fit(tried, signals, 1.0), tried, strict=True):
        chance = fit.right.probability(t.signals) if fit.right and not t.abstained else 1.0
        losses.append(-math.log(max(1e-9, chance if t.is_right or t.abstained else 1 - chance)))
    return losses


def calibration_json(calibration: Calibration) -> dict[str, Any]:
    """The `calibrate` command's JSON."""
    fits = {"right": calibration.right, "answerable": calibration.answerable}
    return {
        "model": calibration.model,
        "questions": calibration.questions,
        "auroc": calibration.auroc,
        "abstention_accuracy": calibration.abstention_accuracy,
        "weights": {name: dict(zip(fit.signals, fit.weights, strict=True)) for name, fit in fits.items() if fit},
        "policy": calibration.policy.model_dump(),
        "worked_examples": [shot.question for shot in calibration.shots],
    }
