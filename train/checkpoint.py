"""Checkpoints: adapter weights, optimiser state and position, whole or not there, never a pickle.

Each is a folder of its own, and the one before is removed once the next is whole: killed anywhere, one is there to go on from.
There is no random state to keep: every step seeds its own (`seed_step`).
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from understudy.digests import digest_of
from understudy.errors import StorageError
from understudy.files import read_json, whole_folder, write_json

PREFIX = "checkpoint-"  # then the number of steps


@dataclass
class Position:
    """Where training stands: everything about it that is not a tensor."""

    epoch: int = 0
    batch: int = 0  # batches done in this epoch
    steps: int = 0  # optimiser steps done
    seconds: float = 0.0  # spent training, over all runs
    tokens: int = 0  # tokens of the rows, unshared
    distinct_tokens: int = 0  # tokens computed
    losses: list[float] = field(default_factory=list)  # per token, one a step
    validation: list[tuple[int, float]] = field(default_factory=list)  # (step, loss per token)


@dataclass
class TrainingState:
    """What a checkpoint holds."""

    parameters: dict[str, torch.nn.Parameter]  # those that are trained, by name
    optimizer: torch.optim.Optimizer
    position: Position = field(default_factory=Position)
    best: dict[str, Tensor] = field(default_factory=dict)  # weights of the best validation, by name, where the recipe keeps them


def newest_checkpoint(run: Path) -> Path | None:
    """The folder of a run's newest whole checkpoint, or None."""
    whole = [folder for folder in run.glob(f"{PREFIX}*") if (folder / "position.json").exists()]
    return max(whole, key=lambda folder: int(folder.name.removeprefix(PREFIX)), default=None)


def save_checkpoint(run: Path, state: TrainingState) -> None:
    """Write the run's next checkpoint, then remove those before it. Raises StorageError, with the one before intact."""
    tensors = {f"weights/{name}": parameter.detach().cpu().contiguous() for name, parameter in state.parameters.items()}
    tensors |= {f"best/{name}": tensor.cpu().contiguous() for name, tensor in state.best.items()}
    for name, parameter in state.parameters.items():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{key}/{name}"] = torch.as_tensor(value).detach().cpu().clone().contiguous()
    target = run / f"{PREFIX}{state.position.steps:06d}"
    with whole_folder(target) as scratch:
        try:
            save_file(tensors, scratch / "state.safetensors")
        except SafetensorError as error:  # how safetensors reports a full disk
            raise StorageError(f"cannot write a checkpoint to {run}: {error}", "free space, then train again: it goes on from the checkpoint before") from error
        write_json(scratch / "position.json", asdict(state.position))
    for folder in run.glob(f"{PREFIX}*"):
        if folder != target:
            shutil.rmtree(folder, ignore_errors=True)


def load_checkpoint(run: Path, state: TrainingState) -> None:
    """Restore the run's newest checkpoint into `state`, which stays as it is where there is none. Raises StorageError, with nothing restored."""
    folder = newest_checkpoint(run)
    if folder is None:
        return
    try:
        tensors = load_file(folder / "state.safetensors")
        position = Position(**read_json(folder / "position.json"))
        weights = {name: tensors[f"weights/{name}"] for name in state.parameters}
    except (OSError, SafetensorError, StorageError, KeyError, TypeError) as error:
        raise StorageError(f"the checkpoint {folder} is damaged: {error}", f"remove {run}, then train again from the start") from error
    for name, parameter in state.parameters.items():
        parameter.data.copy_(weights[name])
        moments = {key.split("/")[1]: value for key, value in tensors.items() if key.startswith("optimizer/") and key.endswith(f"/{name}")}
        if moments:
            _restore_moments(state.optimizer, parameter, moments)
    state.best = {key.removeprefix("best/"): value for key, value in tensors.items() if key.startswith("best/")}
    position.validation = [(step, loss) for step, loss in position.validation]
    state.position = position


def seed_step(seed: int, step: int, process: int = 0) -> None:
    """Make what a step draws (dropout) depend on nothing before it: resumed or not, it draws the same."""
    torch.manual_seed(int(digest_of([seed, step, process])[:15], 16))


def _restore_moments(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, moments: dict[str, Tensor]) -> None:
    """Give a parameter its optimiser state again; bitsandbytes allocates its own (paged on a GPU) and counts steps in an int."""
    if hasattr(optimizer, "init_state"):
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, 0)
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                value.copy_(moments[key])
            else:
                optimizer.state[parameter][key] = int(moments[key])
    else:
        optimizer.state[parameter] = {key: value.to(parameter.device) if key != "step" else value for key, value in moments.items()}
