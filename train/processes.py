"""Several processes as one run: each computes its share of a step's batches, and their gradients are summed.

`torchrun` or `accelerate launch` start them. A step is the same step whatever computes it, so one recipe gives one adapter, up to
the order of the sums. Every process holds the whole base, or with `fsdp` a share of its layers (ZeRO-3, arXiv:1910.02054, by PyTorch's FSDP2);
the adapter and its moments are small, and whole in each.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from train.recipe import Recipe
from train.trie import backbone
from understudy.errors import UsageError

if TYPE_CHECKING:
    from torch.nn import Parameter
    from transformers import PreTrainedModel

T = TypeVar("T")


class Processes:
    """The processes of this run: one, unless a launcher says otherwise in WORLD_SIZE."""

    def __init__(self) -> None:
        self._is_sharded = False
        self.count, self.index = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        if self.count > 1:
            from accelerate import PartialState

            self._state = PartialState(cpu=not torch.cuda.is_available())

    @property
    def is_main(self) -> bool:
        """Whether this process writes and reports."""
        return self.index == 0

    def check(self, recipe: Recipe) -> None:
        """Raise UsageError where a step has too few batches for every process, or there is nobody to share the base with."""
        if recipe.fsdp and self.count == 1:
            raise UsageError(
                "fsdp shares the base out among processes, and this is one", "start several: torchrun --nproc_per_node 2 .venv/bin/understudy train …"
            )
        if recipe.batches_per_step < self.count:
            raise UsageError(
                f"batches_per_step={recipe.batches_per_step} leaves some of {self.count} processes idle",
                f"set batches_per_step={self.count} or a multiple of it",
            )

    def shard(self, model: PreTrainedModel) -> str:
        """Share the frozen weights of the decoder's layers out; a layer's are gathered while it computes. Returns what each process holds, for a person."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self._state.device.type, (self.count,))
        layers = backbone(model).layers
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params={p for p in layer.parameters() if p.requires_grad})
        model.to(self._state.device)
        self._is_sharded = True
        frozen: list[Any] = [p for p in layers.parameters() if not p.requires_grad]
        return f"each of {self.count} processes holds {sum(p.to_local().numel() for p in frozen):,} of the layers' {sum(p.numel() for p in frozen):,} weights"

    def passes_to_keep_up(self, batches: int) -> int:
        """How many passes more than for its own batches this process takes, so that every process gathers every layer as often."""
        return int(self.greatest([batches])[0]) - batches if self._is_sharded else 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of a step's batches."""
        return list(items[self.index :: self.count])

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over all processes."""
        return [float(v) for v in self._gather(values).sum(dim=0)]

    def greatest(self, values: Sequence[float]) -> list[float]:
        """The maximum of each value over all processes: what they have to agree on, such as whether to stop."""
        return [float(v) for v in self._gather(values).amax(dim=0)]

    def sum_gradients(self, parameters: Sequence[Parameter]) -> None:
        """Replace every gradient by its sum over all processes, in one message."""
        if self.count == 1:
            return
        from accelerate.utils import reduce

        learning = [p for p in parameters if p.requires_grad]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in learning])
        parts = reduce(flat, reduction="sum").split([p.numel() for p in learning])
        for parameter, part in zip(learning, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The block runs in the main process, then in the others: what the first wrote, they find."""
        if self.count == 1:
            yield
            return
        with self._state.main_process_first():
            yield

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.count > 1:
            self._state.wait_for_everyone()

    def _gather(self, values: Sequence[float]) -> torch.Tensor:
        """[processes, values] in float64."""
        rows = torch.tensor([values], dtype=torch.float64)
        if self.count == 1:
            return rows
        from accelerate.utils import gather

        gathered: torch.Tensor = gather(rows.to(self._state.device))
        return gathered
