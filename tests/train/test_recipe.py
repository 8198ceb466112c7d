"""Recipes: what is shipped is valid, and what cannot work is refused before anything is loaded."""

from __future__ import annotations

import pytest

from train.recipe import FOLDER, Recipe, load_recipe
from understudy.errors import UsageError


def test_the_shipped_recipes_are_valid_and_the_default_is_the_defaults() -> None:
    names = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    assert len(names) >= 3
    assert all(load_recipe(name, []) for name in names)
    assert load_recipe("default", []) == Recipe()


@pytest.mark.parametrize(
    ("setting", "fault"),
    [
        ("lr_schedule_type=cosine", "did you mean lr_scheduler_type?"),
        ("lr_scheduler_type=sine", "lr_scheduler_type"),
        ("load_best_model_at_end=true", "load_best_model_at_end: Value error, needs eval_steps"),
        ("early_stopping_patience=2", "early_stopping_patience: Value error, needs eval_steps"),
        ("layers_to_transform=[]", "layers_to_transform"),
        ("lora_dropout=1", "lora_dropout"),
        ("name=base", "base is reserved"),
    ],
)
def test_what_cannot_work_is_named(setting: str, fault: str) -> None:
    with pytest.raises(UsageError, match=fault.replace("?", r"\?")):
        load_recipe("default", [setting])
