"""A checkpoint is whole or not there, and one that cannot be read or written says so."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from train.checkpoint import FOLDER, Position, load_checkpoint, save_checkpoint
from train.recipe import Recipe
from understudy.errors import StorageError


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 4 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Saved:
    """A model with a checkpoint at step 7."""

    def __init__(self, run: Path, model: Any) -> None:
        self.run, self.parameters = run, {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.parameters.values())
        save_checkpoint(run, self.parameters, self.optimizer, Position(steps=7))

    def load(self) -> Position:
        return load_checkpoint(self.run, self.parameters, self.optimizer)


@pytest.fixture
def saved(make_model: Callable[[Recipe], Any], tmp_path: Path) -> Saved:
    return Saved(tmp_path / "run", make_model(Recipe(rank=4)))


def test_a_full_disk_leaves_the_checkpoint_before(saved: Saved) -> None:
    with full_disk(), pytest.raises(StorageError):
        save_checkpoint(saved.run, saved.parameters, saved.optimizer, Position(steps=8))
    assert saved.load().steps == 7
    assert [path.name for path in saved.run.iterdir() if path.is_dir()] == [FOLDER]


def test_what_a_killed_save_left_is_not_a_checkpoint(saved: Saved) -> None:
    (saved.run / FOLDER).rename(saved.run / f".{FOLDER}.partial")
    assert saved.load() == Position()
    save_checkpoint(saved.run, saved.parameters, saved.optimizer, Position(steps=8))
    assert saved.load().steps == 8


@pytest.mark.parametrize("file", ["position.json", "state.safetensors"])
def test_a_truncated_checkpoint_is_an_error_that_says_what_to_do(saved: Saved, file: str) -> None:
    path = saved.run / FOLDER / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(StorageError, match="checkpoint") as caught:
        saved.load()
    assert caught.value.remedy
