"""A checkpoint is whole or not there, and one that cannot be read or written says so."""

from __future__ import annotations

import itertools
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from train.checkpoint import Position, TrainingState, load_checkpoint, newest_checkpoint, save_checkpoint
from train.optimiser import make_optimizer
from train.recipe import Recipe
from understudy.errors import StorageError


class Killed(BaseException):
    """The process ends here."""


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

    def __init__(self, run: Path, model: Any, recipe: Recipe) -> None:
        self.run, parameters = run, {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.state = TrainingState(parameters, make_optimizer(parameters.values(), recipe))
        self.save(7)

    def save(self, steps: int) -> None:
        self.state.position = Position(steps=steps)
        save_checkpoint(self.run, self.state)

    def load(self) -> Position:
        self.state.position = Position()
        load_checkpoint(self.run, self.state)
        return self.state.position

    def folder(self) -> Path:
        folder = newest_checkpoint(self.run)
        assert folder is not None
        return folder


@pytest.fixture
def saved(make_model: Callable[[Recipe], Any], tmp_path: Path) -> Saved:
    recipe = Recipe(rank=4)
    return Saved(tmp_path / "run", make_model(recipe), recipe)


def test_a_full_disk_leaves_the_checkpoint_before(saved: Saved) -> None:
    with full_disk(), pytest.raises(StorageError, match="cannot write"):
        saved.save(8)
    assert saved.load().steps == 7
    assert [path.name for path in saved.run.iterdir() if path.is_dir()] == [saved.folder().name]


def test_a_new_checkpoint_takes_the_place_of_the_one_before(saved: Saved) -> None:
    saved.save(8)
    assert saved.load().steps == 8
    assert [path.name for path in saved.run.iterdir() if path.is_dir()] == [saved.folder().name]


@pytest.mark.parametrize("call", ["mkdir", "fsync", "rename", "rmtree"])
def test_killed_anywhere_in_a_save_a_whole_checkpoint_is_there(saved: Saved, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every moment of a save at which a process may die, by the system calls it makes: the state is then the old one or the new one."""

    owner = {"mkdir": Path, "fsync": os, "rename": Path, "rmtree": shutil}[call]
    whole = getattr(owner, call)
    for moment in itertools.count(1):  # its first such call, its second, and so on until it makes no more
        calls = itertools.count(1)

        def dies(*arguments: Any, calls: Iterator[int] = calls, moment: int = moment, **options: Any) -> Any:
            if next(calls) == moment:
                raise Killed
            return whole(*arguments, **options)

        before = saved.load().steps
        monkeypatch.setattr(owner, call, dies)
        try:
            saved.save(before + 1)
        except Killed:
            assert saved.load().steps in (before, before + 1)
        else:
            break
        finally:
            monkeypatch.undo()
    assert moment > 1


def test_what_a_killed_save_left_is_not_a_checkpoint(saved: Saved) -> None:
    folder = saved.folder()
    folder.rename(folder.with_name(f".{folder.name}.partial"))
    assert saved.load() == Position()
    saved.save(8)
    assert saved.load().steps == 8


@pytest.mark.parametrize("file", ["position.json", "state.safetensors"])
def test_a_truncated_checkpoint_is_an_error_that_says_what_to_do(saved: Saved, file: str) -> None:
    path = saved.folder() / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(StorageError, match="checkpoint") as caught:
        saved.load()
    assert caught.value.remedy
