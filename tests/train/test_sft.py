"""A run that was killed and goes on is the run that was not: the same weights, moments and losses, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from train.batches import Batcher
from train.checkpoint import FOLDER, Position
from train.recipe import Recipe
from train.sft import fit, learning_rate
from understudy.errors import TrainingError
from understudy.files import read_json
from understudy.progress import Progress
from understudy.records import Example

RECIPE = Recipe(rank=4, alpha=8, epochs=2, tokens_per_batch=512, learning_rate=5e-3, checkpoint_minutes=1e-9)  # a checkpoint after every step
Fit = Callable[..., tuple[Position, list[str]]]


class Watched(Progress):
    """Calls `on_step` when a step is done, before its checkpoint."""

    def __init__(self, label: str, total: int, on_step: Callable[[int], None]) -> None:
        super().__init__(label, total)
        self.on_step = on_step

    def advance(self, count: int = 1, note: str = "") -> None:
        super().advance(count, note)
        self.on_step(int(note.split()[1].rstrip(",")))


@pytest.fixture
def train_in(examples: list[Example], passages: dict[str, str], tokenizer: PreTrainedTokenizerFast, make_model: Callable[[Recipe], Any]) -> Fit:
    """Fit a fresh model in a folder; gives the position and what was reported."""

    def train(run: Path, on_step: Callable[[int], None] = lambda _: None, model: Any = None) -> tuple[Position, list[str]]:
        batcher, validator = (Batcher(rows, passages, tokenizer, RECIPE) for rows in (examples[:36], examples[36:]))
        reported: list[str] = []
        position = fit(model or make_model(RECIPE), batcher, validator, RECIPE, run, reported.append, lambda label, total: Watched(label, total, on_step))
        return position, reported

    return train


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / FOLDER / "state.safetensors")


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def stop_at(last: int) -> Callable[[int], None]:
    def stop(step: int) -> None:
        if step == last:
            raise KeyboardInterrupt

    return stop


def test_a_run_killed_at_every_step_ends_as_the_uninterrupted_run(train_in: Fit, make_model: Callable[[Recipe], Any], tmp_path: Path) -> None:
    whole, reported = train_in(tmp_path / "whole")
    assert reported == []
    assert whole.epoch == 2
    assert whole.steps == len(whole.losses) > 4
    for step in range(2, whole.steps + 1):  # killed before this step's checkpoint, so the step is done again
        with pytest.raises(KeyboardInterrupt):
            train_in(tmp_path / "killed", stop_at(step), make_model(RECIPE.model_copy(update={"seed": RECIPE.seed if step == 2 else step})))
    resumed, reported = train_in(tmp_path / "killed", model=make_model(RECIPE.model_copy(update={"seed": 99})))
    assert reported[0].startswith(f"resuming at step {whole.steps - 1},")
    assert asdict(resumed) | {"seconds": 0} == asdict(whole) | {"seconds": 0}
    wanted = tensors_of(tmp_path / "whole")
    assert {name.split("/")[0] for name in wanted} == {"weights", "optimizer", "random"}
    assert any(tensor.any() for name, tensor in wanted.items() if name.startswith("weights/") and "lora_B" in name)
    assert_equal(tensors_of(tmp_path / "killed"), wanted)


def test_a_finished_run_started_again_takes_no_step(train_in: Fit, tmp_path: Path) -> None:
    first, _ = train_in(tmp_path)
    wanted = tensors_of(tmp_path)
    again, _ = train_in(tmp_path)
    assert asdict(again) == asdict(first)
    assert_equal(tensors_of(tmp_path), wanted)


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_checkpoint(train_in: Fit, make_model: Callable[[Recipe], Any], tmp_path: Path) -> None:
    model = make_model(RECIPE)
    kept: list[dict[str, torch.Tensor]] = []

    def spoil(step: int) -> None:
        if step == 3:
            kept.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
            model.get_output_embeddings().weight.data.fill_(float("nan"))

    with pytest.raises(TrainingError, match="not finite"):
        train_in(tmp_path, spoil, model)
    assert read_json(tmp_path / FOLDER / "position.json")["steps"] == 3
    assert_equal({name.removeprefix("weights/"): t for name, t in tensors_of(tmp_path).items() if name.startswith("weights/")}, kept[0])
    resumed, reported = train_in(tmp_path)
    assert reported[0].startswith("resuming at step 3,")
    assert all(loss == loss for loss in resumed.losses)


@given(done=st.floats(0, 1))
def test_the_learning_rate_stays_under_its_peak_and_ends_at_zero(done: float) -> None:
    assert 0 <= learning_rate(done, RECIPE) <= RECIPE.learning_rate
    assert learning_rate(1.0, RECIPE) == 0
