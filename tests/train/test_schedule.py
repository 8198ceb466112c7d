"""What the progress decides: rates stay under their peak, and shares run to one."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.checkpoint import Position
from train.recipe import Recipe
from train.schedule import has_stalled, learning_rate, share_done

RECIPE = Recipe(learning_rate=5e-3)


@pytest.mark.parametrize(("kind", "half", "end"), [("linear", 0.5, 0.0), ("cosine", 0.5, 0.0), ("constant", 1.0, 1.0)])
@given(done=st.floats(0, 1), warmup=st.sampled_from([0.0, 0.03, 0.5]))
def test_the_learning_rate_rises_to_its_peak_and_falls_to_its_end(kind: str, half: float, end: float, done: float, warmup: float) -> None:
    recipe = RECIPE.model_copy(update={"lr_scheduler_type": kind, "warmup_ratio": warmup})
    assert 0 <= learning_rate(done, recipe) <= RECIPE.learning_rate
    assert learning_rate(0.5, recipe) == pytest.approx(half * RECIPE.learning_rate)
    assert learning_rate(1.0, recipe) == pytest.approx(end * RECIPE.learning_rate)
    assert learning_rate(0.0, recipe) <= learning_rate(warmup, recipe) or not warmup


@given(epoch=st.integers(0, 3), batch=st.integers(0, 49), steps=st.integers(0, 50), seconds=st.floats(0, 600))
def test_whatever_runs_out_first_ends_the_run(epoch: int, batch: int, steps: int, seconds: float) -> None:
    recipe = RECIPE.model_copy(update={"epochs": 3, "max_steps": 40, "max_minutes": 5.0})
    position = Position(epoch=epoch, batch=batch, steps=steps, seconds=seconds)
    assert (share_done(position, 50, recipe) >= 1) == (epoch == 3 or steps >= 40 or seconds >= 300)


@given(losses=st.lists(st.floats(0, 9, allow_nan=False), max_size=9), patience=st.integers(1, 4))
def test_a_run_has_stalled_when_the_last_validations_are_no_better_than_those_before(losses: list[float], patience: int) -> None:
    recipe = RECIPE.model_copy(update={"eval_steps": 1, "early_stopping_patience": patience})
    recent, before = losses[-patience:], losses[:-patience]
    assert has_stalled(Position(validation=list(enumerate(losses))), recipe) == bool(before and min(recent) >= min(before))
    assert not has_stalled(Position(validation=[(0, math.inf), (1, math.inf), (2, math.inf)]), RECIPE)
