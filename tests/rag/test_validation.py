"""The signals of an answer, and the logistic regressions that weigh them: laws of both."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag.prompts import ABSTENTION, Answer
from rag.validation import (
    SIGNALS,
    UNSEEN,
    Calibration,
    Logistic,
    answer_odds,
    fit_logistic,
    overlaps,
    plain_score,
    read_calibration,
    read_verdict,
    signals_of,
    write_calibration,
)
from understudy.completions import Completion
from understudy.records import Chunk, Passage, Scores, Usage

Signals = dict[str, float]
SIGNALS_MADE = st.fixed_dictionaries(dict.fromkeys(SIGNALS, st.floats(-50, 50)))
LOGISTICS = st.builds(
    Logistic,
    signals=st.just(list(SIGNALS)),
    means=st.lists(st.floats(-5, 5), min_size=len(SIGNALS), max_size=len(SIGNALS)),
    scales=st.lists(st.floats(0.5, 5), min_size=len(SIGNALS), max_size=len(SIGNALS)),
    weights=st.lists(st.floats(-0.5, 0.5), min_size=len(SIGNALS), max_size=len(SIGNALS)),
    bias=st.floats(-5, 5),
)
FITTED = st.lists(st.tuples(st.fixed_dictionaries(dict.fromkeys(SIGNALS, st.integers(-3, 3).map(float))), st.booleans()), min_size=4, max_size=25)


def wrote(alternatives: dict[str, float], text: str = "", logprobs: list[float] | None = None) -> Completion:
    """A completion whose first token had these probabilities."""
    return Completion(text, Usage(), "stop", [], logprobs or [], {token: math.log(p) for token, p in alternatives.items()})


def calibration(right: Logistic | None, answerable: Logistic | None) -> Calibration:
    return Calibration(key="k", model="m", questions=1, right=right, answerable=answerable, auroc=None, abstention_accuracy=None)


def test_the_signals_say_how_question_passages_and_quotes_match(make_document: Callable[..., tuple[object, list[Chunk]]]) -> None:
    _, chunks = make_document("a.txt", ["The kiln is fired on Tuesdays.", "The barn is green."])
    passages = [Passage(chunk=c, scores=s, rank=r) for r, (c, s) in enumerate(zip(chunks, (Scores(lexical=3.0), Scores(dense=0.5)), strict=True), 1)]
    answer = Answer("On Tuesdays.", ["fired on Tuesdays"], False, True)
    signals = signals_of("When was the kiln fired?", passages, answer, 1.0, wrote({"Quote": 1.0}, logprobs=[-0.5, -1.5]), None)
    assert set(signals) == set(SIGNALS)
    assert signals == signals | {"verdict": 0.5, "answer_logprob": -1.0, "verbatim": 1.0, "lexical": 3.0, "dense": 0.5}
    assert (signals["said_overlap"], signals["passage_overlap"]) == (1 / 3, 2 / 3)  # of when, kiln, fired
    assert signals["quote_lead"] == -1 / 3  # the first sentence has both
    assert signals["from_best"] == 1.0
    nothing = signals_of("?", [], Answer(ABSTENTION, [], True, True), 0.0, wrote({}), 0.25)
    assert nothing == dict.fromkeys(SIGNALS, 0.0) | {"verdict": 0.25}


@given(quote=st.floats(1e-6, 0.5), abstention=st.floats(1e-6, 0.5))
def test_answer_odds_are_antisymmetric_and_bounded(quote: float, abstention: float) -> None:
    odds = answer_odds(wrote({"Quote": quote, " The": abstention, "I": 0.1, " ": 0.1}))
    assert odds == pytest.approx(-answer_odds(wrote({"Quote": abstention, "The": quote})))
    assert (odds > 0) == (quote > abstention) or quote == pytest.approx(abstention)
    assert abs(odds) <= math.log((1 + UNSEEN) / UNSEEN)
    assert answer_odds(wrote({"Qu": quote / 2, "Quote:": quote / 2, "The": abstention})) == pytest.approx(odds)  # ways to begin add up
    assert answer_odds(wrote({})) == 0


@given(question=st.text("abcde ?A"), texts=st.lists(st.text("abcde A"), max_size=4))
def test_overlap_is_a_share_that_more_text_never_lowers(question: str, texts: list[str]) -> None:
    shares = overlaps(question, [" ".join(texts[:count]) for count in range(len(texts) + 1)])
    assert shares == sorted(shares)
    assert all(0 <= share <= 1 for share in shares)
    assert overlaps(question, [question.upper()])[0] in (0.0, 1.0)  # 0 where it is all stop words


@pytest.mark.parametrize(
    ("alternatives", "text", "verdict"),
    [
        ({"1": 0.6, "0": 0.2, "x": 0.2}, "1", 0.75),
        ({" 1": 0.6, "0": 0.2}, "1", 0.75),
        ({"0": 0.9}, "0", 0.0),
        ({"Score": 0.9}, "Score: 0.8", 0.8),
        ({}, "1", 1.0),
        ({}, "perhaps", None),
        ({"1": 0.5, "0": 0.2, " 1": 0.1}, "1", 0.75),
    ],
)
def test_verdicts_are_read(alternatives: dict[str, float], text: str, verdict: float | None) -> None:
    assert read_verdict(wrote(alternatives, text)) == (None if verdict is None else pytest.approx(verdict))


@given(fit=LOGISTICS, signals=SIGNALS_MADE, name=st.sampled_from(SIGNALS), more=st.floats(0, 50))
def test_a_probability_follows_its_weights(fit: Logistic, signals: Signals, name: str, more: float) -> None:
    before, after = fit.probability(signals), fit.probability(signals | {name: signals[name] + more})
    assert 0 <= before <= 1
    assert (after - before) * fit.weights[SIGNALS.index(name)] >= -1e-12


def test_a_signal_that_hardly_varied_in_the_calibration_may_vary_later() -> None:
    rows = [dict.fromkeys(SIGNALS, 0.0) | {"verdict": 1 - 1e-8 * i} for i in range(10)]
    fit = fit_logistic(SIGNALS, rows, [i < 5 for i in range(10)])
    assert fit is not None
    assert 0 <= fit.probability(rows[0] | {"verdict": 0.5}) <= 1


@settings(max_examples=40, deadline=None)
@given(made=FITTED, balanced=st.booleans(), seed=st.integers(0, 9))
def test_a_fit_knows_no_order_and_turns_with_its_labels(made: list[tuple[Signals, bool]], balanced: bool, seed: int) -> None:
    rows, labels = [row for row, _ in made], [label for _, label in made]
    fit = fit_logistic(SIGNALS, rows, labels, balanced)
    if len(set(labels)) == 1:
        assert fit is None
        return
    assert fit is not None
    opposite = fit_logistic(SIGNALS, rows, [not label for label in labels], balanced)
    mixed = random.Random(seed).sample(made, len(made))
    again = fit_logistic(SIGNALS, [row for row, _ in mixed], [label for _, label in mixed], balanced)
    assert opposite is not None and again is not None
    for row in rows:
        assert opposite.probability(row) == pytest.approx(1 - fit.probability(row), abs=1e-6)
        assert again.probability(row) == pytest.approx(fit.probability(row), abs=1e-6)
    if not balanced:  # at the optimum, as many are expected right as were
        assert sum(map(fit.probability, rows)) == pytest.approx(sum(labels), abs=1e-5)


@given(right=st.integers(1, 30), wrong=st.integers(1, 30))
def test_without_a_signal_a_fit_gives_the_base_rate_and_balanced_a_half(right: int, wrong: int) -> None:
    rows, labels = [dict.fromkeys(SIGNALS, 0.5)] * (right + wrong), [True] * right + [False] * wrong
    plain, balanced = fit_logistic(SIGNALS, rows, labels), fit_logistic(SIGNALS, rows, labels, balanced=True)
    assert plain is not None and balanced is not None
    assert plain.probability(rows[0]) == pytest.approx(right / (right + wrong))
    assert balanced.probability(rows[0]) == pytest.approx(0.5)


@given(right=st.none() | LOGISTICS, answerable=st.none() | LOGISTICS, signals=SIGNALS_MADE, verdict=st.floats(0, 1), verbatim=st.floats(0, 1))
def test_a_score_is_the_probability_of_what_was_decided(
    right: Logistic | None, answerable: Logistic | None, signals: Signals, verdict: float, verbatim: float
) -> None:
    signals = signals | {"verdict": verdict, "verbatim": verbatim}
    fitted = calibration(right, answerable)
    assert 0 <= fitted.score(signals, abstained=False) <= 1
    assert fitted.score(signals, abstained=False) == (right.probability(signals) if right else plain_score(signals, False))
    assert fitted.score(signals, abstained=True) == (1 - answerable.probability(signals) if answerable else verdict)
    assert fitted.abstains(signals) == (answerable is not None and answerable.probability(signals) < 0.5)
    assert plain_score(signals, False) == pytest.approx(verdict * (1 + verbatim) / 2)


def test_a_calibration_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_calibration(tmp_path) is None
    rng = random.Random(0)
    rows = [{name: rng.gauss(0, 1) for name in SIGNALS} for _ in range(20)]
    made = calibration(fit_logistic(SIGNALS, rows, [row["verdict"] > 0 for row in rows]), None)
    write_calibration(tmp_path, made)
    assert read_calibration(tmp_path) == made
