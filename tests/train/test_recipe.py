"""What cannot work in a recipe is refused before anything is loaded."""

from __future__ import annotations

from typing import get_args

import pytest

from train.recipe import MethodName, Recipe, load_recipe
from understudy.errors import UsageError


def test_the_default_recipe_is_the_defaults() -> None:
    assert load_recipe("default", []) == Recipe()


@pytest.mark.parametrize(
    ("setting", "fault"),
    [
        ("lr_schedule_type=cosine", "did you mean lr_scheduler_type?"),
        ("lr_scheduler_type=sine", "lr_scheduler_type"),
        ("load_best_model_at_end=true", "load_best_model_at_end: Value error, needs eval_steps"),
        ("early_stopping_patience=2", "early_stopping_patience: Value error, needs eval_steps"),
        ("layers_to_transform=[]", "layers_to_transform"),
        ("targets=[]", "targets"),
        ("learning_rate=.inf", "learning_rate: Input should be a finite number"),
        ("lora_dropout=1", "lora_dropout"),
        ("method=ia3 use_rslora=true", "ia3 has no use_rslora"),
        ("fsdp=true", "set method=lora quantisation=none"),
        ("method=prefix_tuning gradient_checkpointing=true", "exclude each other"),
    ],
)
def test_what_cannot_work_is_named(setting: str, fault: str) -> None:
    with pytest.raises(UsageError, match=fault.replace("?", r"\?")):
        load_recipe("default", setting.split())


@pytest.mark.parametrize("digest", ["01234567", "12e45678", "0x12", "abcdef01"])
def test_the_beginning_of_a_datasets_digest_is_no_number(digest: str) -> None:
    assert load_recipe("default", [f"dataset={digest}", "rank=8"]) == Recipe(dataset=digest, rank=8)


@pytest.mark.parametrize("method", get_args(MethodName))
def test_a_recipe_written_whole_is_read_again(method: str) -> None:
    recipe = Recipe.model_validate({"method": method, "quantisation": "none"})
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
