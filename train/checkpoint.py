"""Checkpoints: adapter weights, optimiser state, random state and position, whole or not there, never a pickle."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from understudy.errors import StorageError
from understudy.files import read_json, whole_folder, write_json

FOLDER = "checkpoint"


@dataclass
class Position:
    """Where training stands: everything about it that is not a tensor."""

    epoch: int = 0
    batch: int = 0  # batches done in this epoch
    batches: int = 0  # batches done in all
    steps: int = 0  # optimiser steps done
    seconds: float = 0.0  # spent training, over all runs
    tokens: int = 0  # tokens of the rows, unshared
    distinct_tokens: int = 0  # tokens computed
    losses: list[float] = field(default_factory=list)  # per token, one a step
    validation: list[tuple[int, float]] = field(default_factory=list)  # (step, loss per token)


def save_checkpoint(run: Path, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, position: Position) -> None:
    """Replace the run's checkpoint. Raises StorageError, with the one before intact."""
    tensors = {f"weights/{name}": parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{key}/{name}"] = value.detach().cpu().clone().contiguous()
    tensors["random"] = torch.get_rng_state()
    with whole_folder(run / FOLDER) as scratch:
        try:
            save_file(tensors, scratch / "state.safetensors")
        except SafetensorError as error:  # how safetensors reports a full disk
            raise StorageError(f"cannot write a checkpoint to {run}: {error}", "free space, then train again: it goes on from the checkpoint before") from error
        write_json(scratch / "position.json", asdict(position))


def load_checkpoint(run: Path, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> Position:
    """Restore what save_checkpoint wrote; a fresh Position where there is none. Raises StorageError, with nothing restored."""
    folder = run / FOLDER
    if not (folder / "position.json").exists():
        return Position()
    try:
        tensors = load_file(folder / "state.safetensors")
        position = Position(**read_json(folder / "position.json"))
        weights = {name: tensors[f"weights/{name}"] for name in parameters}
        random_state = tensors["random"]
    except (OSError, SafetensorError, StorageError, KeyError, TypeError) as error:
        raise StorageError(f"the checkpoint {folder} is damaged: {error}", f"remove {run}, then train again from the start") from error
    for name, parameter in parameters.items():
        parameter.data.copy_(weights[name])
        state = {key.split("/")[1]: value for key, value in tensors.items() if key.startswith("optimizer/") and key.endswith(f"/{name}")}
        if state:
            optimizer.state[parameter] = {key: value.to(parameter.device) if key != "step" else value for key, value in state.items()}
    torch.set_rng_state(random_state)
    position.validation = [(step, loss) for step, loss in position.validation]
    return position
