"""A run that was killed and goes on is the run that was not: the same weights, moments and losses, bit for bit."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from train.batches import Batcher
from train.checkpoint import Position, newest_checkpoint
from train.recipe import Recipe
from train.sft import fit
from understudy.errors import TrainingError
from understudy.files import read_json, read_jsonl
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

    def train(run: Path, on_step: Callable[[int], None] = lambda _: None, model: Any = None, recipe: Recipe = RECIPE) -> tuple[Position, list[str]]:
        batcher, validator = (Batcher(rows, passages, tokenizer, recipe) for rows in (examples[:36], examples[36:]))
        reported: list[str] = []
        made = model or make_model(recipe)
        position = fit(made, batcher, validator, recipe, run, reported.append, lambda label, total: Watched(label, total, on_step))
        return position, reported

    return train


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    folder = newest_checkpoint(run)
    assert folder is not None
    return load_file(folder / "state.safetensors")


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def stop_at(last: int) -> Callable[[int], None]:
    def stop(step: int) -> None:
        if step == last:
            raise KeyboardInterrupt

    return stop


def test_a_run_killed_again_and_again_ends_as_the_uninterrupted_run(train_in: Fit, make_model: Callable[[Recipe], Any], tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"max_steps": 13})  # into the second epoch
    whole, reported = train_in(tmp_path / "whole", recipe=recipe)
    assert reported == []
    assert whole.epoch == 1
    assert whole.steps == len(whole.losses) == 13
    for step in (2, 7, 12):  # killed before this step's checkpoint, so the step is done again
        with pytest.raises(KeyboardInterrupt):
            train_in(tmp_path / "killed", stop_at(step), make_model(RECIPE.model_copy(update={"seed": RECIPE.seed if step == 2 else step})), recipe)
    resumed, reported = train_in(tmp_path / "killed", model=make_model(RECIPE.model_copy(update={"seed": 99})), recipe=recipe)
    assert reported[0].startswith(f"resuming at step {step - 1},")
    assert asdict(resumed) | {"seconds": 0} == asdict(whole) | {"seconds": 0}
    wanted = tensors_of(tmp_path / "whole")
    assert {name.split("/")[0] for name in wanted} == {"weights", "optimizer"}
    assert any(tensor.any() for name, tensor in wanted.items() if name.startswith("weights/") and "lora_B" in name)
    assert_equal(tensors_of(tmp_path / "killed"), wanted)


def test_a_finished_run_started_again_takes_no_step(train_in: Fit, tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"max_steps": 2})
    first, _ = train_in(tmp_path, recipe=recipe)
    wanted = tensors_of(tmp_path)
    again, _ = train_in(tmp_path, recipe=recipe)
    assert asdict(again) == asdict(first)
    assert_equal(tensors_of(tmp_path), wanted)


def test_an_epoch_is_dealt_when_it_is_reached(train_in: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dealt: list[int] = []
    deal = Batcher.epoch
    monkeypatch.setattr(Batcher, "epoch", lambda batcher, seed, epoch: dealt.append(epoch) or deal(batcher, seed, epoch))
    position, _ = train_in(tmp_path, recipe=RECIPE.model_copy(update={"epochs": 10**9, "max_steps": 13}))
    assert position.epoch == 1 and dealt == [0, 1]


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_checkpoint(train_in: Fit, make_model: Callable[[Recipe], Any], tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"max_steps": 5})
    model = make_model(recipe)
    kept: list[dict[str, torch.Tensor]] = []

    def spoil(step: int) -> None:
        if step == 3:
            kept.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
            model.get_output_embeddings().weight.data.fill_(float("nan"))

    with pytest.raises(TrainingError, match="not finite"):
        train_in(tmp_path, spoil, model, recipe)
    assert read_json(tmp_path / "checkpoint-000003" / "position.json")["steps"] == 3
    assert_equal({name.removeprefix("weights/"): t for name, t in tensors_of(tmp_path).items() if name.startswith("weights/")}, kept[0])
    resumed, reported = train_in(tmp_path, recipe=recipe)
    assert reported[0].startswith("resuming at step 3,")
    assert all(loss == loss for loss in resumed.losses)


def test_a_step_of_rows_without_weight_is_a_step(train_in: Fit, tmp_path: Path) -> None:
    position, _ = train_in(tmp_path, recipe=RECIPE.model_copy(update={"plan_weight": 0.0, "batches_per_step": 1, "epochs": 1}))
    assert 0.0 in position.losses  # of plans alone
    assert all(loss == loss for loss in position.losses)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_dropout": 0.2, "optim": "paged_adamw_8bit", "batches_per_step": 2, "rank": 64},
        {"unfreeze_ratio": 0.6, "lr_scheduler_type": "cosine", "use_rslora": True},
        {"gradient_checkpointing": True, "eval_steps": 2, "load_best_model_at_end": True, "lr_scheduler_type": "constant"},
    ],
    ids=str,
)
def test_whatever_the_options_a_killed_run_ends_as_the_uninterrupted_run(
    train_in: Fit, make_model: Callable[[Recipe], Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    recipe = RECIPE.model_copy(update=changes | {"max_steps": 3})
    models = [make_model(recipe) for _ in range(3)]
    whole, _ = train_in(tmp_path / "whole", model=models[0], recipe=recipe)
    assert whole.steps == 3
    with pytest.raises(KeyboardInterrupt):
        train_in(tmp_path / "killed", stop_at(random.randint(2, 3)), models[1], recipe)
    resumed, _ = train_in(tmp_path / "killed", model=models[2], recipe=recipe)
    assert asdict(resumed) | {"seconds": 0} == asdict(whole) | {"seconds": 0}
    assert_equal(tensors_of(tmp_path / "killed"), tensors_of(tmp_path / "whole"))
    assert_equal(trained(models[2]), trained(models[0]))
    rows = [[row["loss"] for row in read_jsonl(tmp_path / name / "metrics.jsonl")] for name in ("whole", "killed")]
    assert rows[0] == rows[1] == whole.losses


def test_ctrl_c_ends_the_step_keeps_it_and_says_so(train_in: Fit, tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"checkpoint_minutes": 1e9, "max_steps": 4})
    said: list[str] = []

    def press(step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train_in(tmp_path, press, recipe=recipe)
    assert signal.getsignal(signal.SIGINT) is handler
    position, said = train_in(tmp_path, recipe=recipe)
    assert said[0].startswith("resuming at step 3,")  # the signal came after the second step was measured: the third was ended and kept
    assert position.steps == 4


def test_rows_whose_gradient_is_not_finite_are_written_down(train_in: Fit, make_model: Callable[[Recipe], Any], tmp_path: Path) -> None:
    model = make_model(RECIPE)
    model.get_output_embeddings().weight.data.fill_(float("inf"))
    with pytest.raises(TrainingError, match="not finite") as caught:
        train_in(tmp_path, model=model)
    dump = tmp_path / "not-finite.json"
    assert str(dump) in caught.value.message
    [row, *_] = read_json(dump)["rows"]
    assert row["trace_id"] == "t"
    assert row["target"].endswith("<|end|>")
    assert row["completion"] < len(row["ids"])


def test_memory_that_runs_out_is_an_error_that_says_how_to_go_on(train_in: Fit, make_model: Callable[[Recipe], Any], tmp_path: Path) -> None:
    model = make_model(RECIPE)

    def grow(step: int) -> None:
        if step == 2:
            model.get_base_model().model.register_forward_pre_hook(lambda *_: torch.empty(2**60))

    recipe = RECIPE.model_copy(update={"max_steps": 3})
    with pytest.raises(TrainingError, match="memory ran out at step 3") as caught:
        train_in(tmp_path, grow, model, recipe)
    assert "goes on from the last checkpoint" in caught.value.remedy
    assert train_in(tmp_path, recipe=recipe)[1][0].startswith("resuming at step 2,")


def test_the_best_weights_are_kept_and_training_ends_when_nothing_gets_better(train_in: Fit, make_model: Callable[[Recipe], Any], tmp_path: Path) -> None:
    changes = {"eval_steps": 1, "early_stopping_patience": 2, "load_best_model_at_end": True, "learning_rate": 0.5, "lr_scheduler_type": "constant"}
    recipe = RECIPE.model_copy(update=changes)
    model = make_model(recipe)
    seen: dict[int, dict[str, torch.Tensor]] = {}
    position, _ = train_in(tmp_path, lambda step: seen.update({step: trained(model)}), model, recipe)
    losses = [loss for _, loss in position.validation]
    best = losses.index(min(losses)) + 1
    assert len(losses) == position.steps == best + 2  # two validations without a new best
    assert_equal(trained(model), seen[best])


def test_layers_thaw_from_the_last_to_the_first(train_in: Fit, make_model: Callable[[Recipe], Any], tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"unfreeze_ratio": 1.0, "max_steps": 4, "warmup_ratio": 0.0})
    model = make_model(recipe)
    fresh = trained(model)
    moved: dict[int, set[str]] = {}

    def look(step: int) -> None:
        moved[step] = {name.split(".layers.")[1][0] for name, tensor in trained(model).items() if not torch.equal(tensor, fresh[name])}

    train_in(tmp_path, look, model, recipe)
    assert moved == {1: {"1"}, 2: {"1"}, 3: {"1"}, 4: {"0", "1"}}


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
