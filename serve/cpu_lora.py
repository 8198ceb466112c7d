"""LoRA that does not cost a copy of the weights per token on vLLM's CPU backend: a `vllm.general_plugins` entry point.

vLLM's torch fallback gathers A and B once per *token* (vllm/lora/ops/torch_ops/lora_ops.py), and where the batch mixes base
and adapter rows it indexes slot -1, so that base rows get the adapter of the last slot. Here rows are grouped by adapter once
a step, a layer's slices (q, k, v; gate, up) are packed into one pair of matrices per adapter, and every group costs two matrix
products: `x @ down.T`, then `@ up.T` added in place. This module is the arithmetic and the registration; the class that
vLLM instantiates is in `serve.punica`.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch

logger = logging.getLogger(__name__)

STOCK = "UNDERSTUDY_STOCK_LORA"  # set to 1, vLLM keeps its own LoRA arithmetic (to compare)
WRAPPER = "serve.punica.GroupedPunicaWrapper"

# Up to this many rows float32 is faster than bfloat16 on a CPU: oneDNN takes about 14 µs to set a small product up, MKL 3 µs.
FEW_ROWS = 16

Rows = slice | torch.Tensor  # which rows of a batch: a run, or indices


@dataclass(frozen=True)
class Packed:
    """One adapter's weights for one layer, all slices in one pair of matrices."""

    down: torch.Tensor  # [ranks of all slices, input]
    up: torch.Tensor  # [output, ranks of all slices], zero off the slices' own blocks
    down32: torch.Tensor  # the same in float32, for steps of few rows
    up32: torch.Tensor


def group_rows(slots: torch.Tensor) -> list[tuple[int, Rows]]:
    """(adapter slot, its rows) for each adapter in a batch; rows with slot -1 belong to none and are left out.

    `slots` is [rows]. An adapter whose rows stand together gets a slice, which costs no gather.
    """
    values, lengths = torch.unique_consecutive(slots, return_counts=True)
    runs: dict[int, list[tuple[int, int]]] = {}
    start = 0
    for slot, length in zip(values.tolist(), lengths.tolist(), strict=True):
        if slot >= 0:
            runs.setdefault(slot, []).append((start, start + length))
        start += length
    return [(slot, slice(*spans[0]) if len(spans) == 1 else (slots == slot).nonzero().view(-1)) for slot, spans in runs.items()]


def pack(a_stacked: tuple[torch.Tensor, ...], b_stacked: tuple[torch.Tensor, ...], slot: int) -> Packed | None:
    """The slot's weights of one layer without their zero padding; None where the adapter leaves the layer alone.

    `a_stacked[i]` is [slots, 1, max rank, input], `b_stacked[i]` [slots, 1, output of slice i, max rank].
    """
    downs, ups = [], []
    for a, b in zip(a_stacked, b_stacked, strict=True):
        down, up = a[slot, 0], b[slot, 0]
        used = (down != 0).any(dim=1) & (up != 0).any(dim=0)
        downs.append(down[used])
        ups.append(up[:, used])
    if not any(down.shape[0] for down in downs):
        return None
    blocks = ups[0].new_zeros(sum(up.shape[0] for up in ups), sum(up.shape[1] for up in ups))
    row = column = 0
    for up in ups:
        blocks[row : row + up.shape[0], column : column + up.shape[1]] = up
        row, column = row + up.shape[0], column + up.shape[1]
    down = torch.cat(downs)
    return Packed(down, blocks, down.float(), blocks.float())


def add_low_rank(y: torch.Tensor, x: torch.Tensor, rows: Rows, packed: Packed, scale: float) -> None:
    """`y[rows] += scale * x[rows] @ down.T @ up.T`, over as many columns as `up` has outputs."""
    chosen, target = x[rows], y[:, : packed.up.shape[0]]  # vocabulary padding can differ between model and adapter
    small = chosen.shape[0] <= FEW_ROWS
    down, up = (packed.down32, packed.up32) if small else (packed.down, packed.up)
    hidden = chosen.to(down.dtype) @ down.t()  # [rows, ranks]
    up = up[: target.shape[1]].t()
    if isinstance(rows, torch.Tensor):
        target.index_add_(0, rows, (hidden @ up).to(y.dtype), alpha=scale)
    elif hidden.dtype == y.dtype:
        target[rows].addmm_(hidden, up, alpha=scale)
    else:
        target[rows].add_(hidden @ up, alpha=scale)


def register() -> None:
    """Make vLLM's CPU platform take `serve.punica`; called by vLLM in each of its processes. Elsewhere it does nothing."""
    try:
        from vllm.platforms import current_platform

        if os.environ.get(STOCK) == "1" or not current_platform.is_cpu():
            return
        platform = type(current_platform)
        stock = platform.get_punica_wrapper
        if getattr(stock, "_understudy", False):
            return

        def get_punica_wrapper(_cls: type) -> str:
            return _wrapper_name(stock())

        get_punica_wrapper._understudy = True  # type: ignore[attr-defined]
        platform.get_punica_wrapper = classmethod(get_punica_wrapper)
    except Exception as error:  # whatever it is: a plugin must never keep vLLM from starting
        _leave_stock(error)


def _wrapper_name(stock: str) -> str:
    """Ours where this vLLM's internals are the ones it was written for, else the stock one."""
    try:
        from serve.punica import check_internals

        check_internals()
    except Exception as error:
        _leave_stock(error)
        return stock
    return WRAPPER


def _leave_stock(error: Exception) -> None:
    logger.warning("understudy: vLLM keeps its own (slower) CPU LoRA, because its internals are not the known ones: %r", error)
