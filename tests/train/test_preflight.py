"""What is found, and shown, before the first step."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rag.prompts import example_messages
from train.batches import Batcher
from train.preflight import CONTEXT, LEARNT, RESET, check_disk, check_layers, check_leaks, check_rows, describe_memory, describe_rows, sample_of, shown_row
from train.recipe import Recipe
from understudy.chat import render_prompt
from understudy.errors import StorageError, TrainingError, UsageError
from understudy.records import Example

Make = Callable[..., Batcher]


@pytest.fixture
def batcher_of(examples: list[Example], passages: dict[str, str], tokenizer: PreTrainedTokenizerFast) -> Make:
    """A batcher of the first rows, changed."""

    def make(count: int = 5, recipe: Recipe | None = None, **changes: Any) -> Batcher:
        return Batcher([example.model_copy(update=changes) for example in examples[:count]], passages, tokenizer, recipe or Recipe())

    return make


def test_sound_rows_pass_and_are_described(batcher_of: Make, tokenizer: PreTrainedTokenizerFast) -> None:
    batcher = batcher_of()
    check_rows(batcher)
    [line] = describe_rows(batcher, tokenizer)
    assert line.startswith("5 rows, ")
    assert "every target ends in <|end|>" in line


def test_too_few_rows_and_only_long_ones_are_refused(batcher_of: Make) -> None:
    with pytest.raises(TrainingError, match="1 training rows are too few"):
        check_rows(batcher_of(1))
    with pytest.raises(TrainingError, match="longer than the recipe's max_length"):
        check_rows(batcher_of(recipe=Recipe(max_length=64)))
    tokens = sorted(len(row.encoded.ids) for batch in batcher_of().epoch(0, 0) for row in batch)
    with pytest.raises(TrainingError, match="1 training rows are too few: 4 are longer"):
        check_rows(batcher_of(recipe=Recipe(max_length=tokens[0])))


def test_a_row_without_a_target_is_named(batcher_of: Make) -> None:
    with pytest.raises(TrainingError, match=r"5 of 5 rows cannot be learnt, such as .*thing 0.*no target to learn"):
        check_rows(batcher_of(target=""))


def test_a_target_without_an_end_is_named(batcher_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from understudy.chat import Encoded, encode_example

    def without_end(*arguments: Any) -> Encoded:  # as an encoder does that truncates on the right
        whole = encode_example(*arguments)
        return Encoded(whole.ids[:-1], whole.completion)

    monkeypatch.setattr("train.batches.encode_example", without_end)
    with pytest.raises(TrainingError, match="no end of sequence after its target"):
        check_rows(batcher_of())


def test_repeated_and_left_out_rows_are_told_with_the_longest(examples: list[Example], passages: dict[str, str], tokenizer: PreTrainedTokenizerFast) -> None:
    [_, repeated] = describe_rows(Batcher(examples[:5] * 2, passages, tokenizer, Recipe()), tokenizer)
    assert repeated == "5 rows repeat another, token for token"
    batcher = Batcher(examples[:5], passages, tokenizer, Recipe(max_length=120))
    longest, example = max(batcher.census.left_out, key=lambda pair: pair[0])
    left_out = describe_rows(batcher, tokenizer)[1]
    assert left_out.startswith(f"left out, longer than 120 tokens: {len(batcher.census.left_out)} rows; the longest: {longest} tokens, {example.task} row of")


def test_a_question_or_a_group_on_both_sides_is_a_leak(examples: list[Example]) -> None:
    first, second = examples[0], examples[5]
    check_leaks([first], [second])
    with pytest.raises(TrainingError, match="share 1 questions, such as 'How long"):
        check_leaks([first], [second, first])
    with pytest.raises(TrainingError, match="share 1 groups of documents"):
        check_leaks([first.model_copy(update={"group_ids": ["a", "b"]})], [second.model_copy(update={"group_ids": ["b"]})])


def test_layers_that_the_model_lacks_are_refused(make_model: Callable[[Recipe], Any]) -> None:
    config = make_model(Recipe(rank=4, layers_to_transform=[1])).config
    check_layers(config, Recipe(layers_to_transform=[0, 1]))
    with pytest.raises(UsageError, match="no layer 2"):
        check_layers(config, Recipe(layers_to_transform=[1, 2]))


def test_a_disk_without_room_for_checkpoints_is_refused(make_model: Callable[[Recipe], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(Recipe(rank=4))
    check_disk(tmp_path / "runs" / "key", model)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1, 1))  # type: ignore[attr-defined]
    with pytest.raises(StorageError, match="0 MB free, and this run needs"):
        check_disk(tmp_path / "runs" / "key", model)


def test_the_largest_batchs_memory_is_told_and_warned_of(make_model: Callable[[Recipe], Any], batcher_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(rank=4)
    model, batches = make_model(recipe), batcher_of().epoch(0, 0)
    assert describe_memory(model, recipe, batches).endswith("take about 0.0 GB besides the model")
    monkeypatch.setattr("train.preflight.free_bytes", lambda: 1000)
    assert "and 0.0 GB are free" in describe_memory(model, recipe, batches)


@pytest.mark.parametrize("task", ["plan", "answer", "validate"])
def test_the_marked_part_is_the_completion_with_its_end_of_turn(
    examples: list[Example], passages: dict[str, str], tokenizer: PreTrainedTokenizerFast, task: str
) -> None:
    example = next(example for example in examples if example.task == task)
    prompt = render_prompt(tokenizer, example_messages(example, passages))
    assert shown_row(tokenizer, example, passages, in_colour=True)[1] == f"{CONTEXT}{prompt}{RESET}{LEARNT}{example.target}<|end|>{RESET}"
    assert shown_row(tokenizer, example, passages, in_colour=False)[1] == f"{prompt}«{example.target}<|end|>»"


def test_a_documents_control_characters_do_not_reach_the_terminal(batcher_of: Make, passages: dict[str, str], tokenizer: PreTrainedTokenizerFast) -> None:
    sample = sample_of(batcher_of(target="\x1b[2Jgone"))
    assert sample.task == "answer"
    assert "\x1b[2J" not in shown_row(tokenizer, sample, passages, in_colour=True)[1]
