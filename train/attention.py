"""Attention over a token trie, branch by branch: scores are computed only where a node may attend.

A dense [nodes, nodes] mask computes every pair and throws most away. Here each branch's queries meet their
ancestors' keys and their own branch's, in blocks that stop at the diagonal. On two CPU cores this is three times
as fast as masked SDPA at 850 nodes, forward and backward (docs/benchmarks.md); GPUs keep the dense mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

NAME = "token-trie"
QUERY_BLOCK = 128  # queries of one block; a longer branch is cut, so that at most half of a diagonal block is wasted


@dataclass(frozen=True)
class Branch:
    """Nodes [start, end) in a line: each attends to the branch's ancestors and, causally, to the branch itself."""

    start: int
    end: int
    ancestors: tuple[tuple[int, int], ...]  # [start, end) runs of earlier nodes, in order


def runs_of(path: list[int]) -> tuple[tuple[int, int], ...]:
    """Increasing node ids as maximal [start, end) runs."""
    runs: list[tuple[int, int]] = []
    for node in path:
        if runs and runs[-1][1] == node:
            runs[-1] = (runs[-1][0], node + 1)
        else:
            runs.append((node, node + 1))
    return tuple(runs)


def dense_mask(branches: list[Branch], nodes: int) -> Tensor:
    """[nodes, nodes] bool, True where the row's node may attend to the column's."""
    mask = torch.zeros(nodes, nodes, dtype=torch.bool)
    for branch in branches:
        for start, end in branch.ancestors:
            mask[branch.start : branch.end, start:end] = True
        size = branch.end - branch.start
        mask[branch.start : branch.end, branch.start : branch.end] = torch.ones(size, size, dtype=torch.bool).tril()
    return mask


def attend(
    _module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, scaling: float, branches: list[Branch], **_: Any
) -> tuple[Tensor, None]:
    """Attention of one trie, as transformers calls it.

    query [1, heads, nodes, d]; key and value [1, kv_heads, nodes, d]; branches cover the nodes in order.
    Returns ([1, nodes, heads, d], None).
    """
    attended: Tensor = TrieAttention.apply(query[0], key[0], value[0], scaling, branches)  # type: ignore[no-untyped-call]
    return attended[None].transpose(1, 2), None


class TrieAttention(torch.autograd.Function):
    """Blockwise softmax attention; the backward pass is FlashAttention's (arXiv:2205.14135, appendix B), with the probabilities kept.

    Slicing inside autograd would fill a zero gradient of full size for every slice; here gradients add up in place.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, branches: list[Branch]) -> Tensor:
        """query [heads, nodes, d], key and value [groups, nodes, d] → [heads, nodes, d]; the softmax is in float32."""
        out = torch.empty_like(query)
        kept = []
        for start, end, runs in blocks_of(branches):
            queries = by_group(query[:, start:end], key)
            scores = torch.matmul(queries * scaling, gather(key, runs).transpose(1, 2))
            scores.view(query.shape[0], end - start, -1).add_(later_keys(end - start, scores.shape[2], scores.dtype))
            chances = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
            out[:, start:end] = torch.matmul(chances, gather(value, runs)).view(query.shape[0], end - start, -1)
            kept.append(chances)
        ctx.save_for_backward(query, key, value, out, *kept)
        ctx.scaling, ctx.branches = scaling, branches
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Gradients of query, key and value, in their shapes; those of key and value add up in float32."""
        query, key, value, out, *kept = ctx.saved_tensors
        grad = grads[0]
        of_query = torch.empty_like(query)
        of_key, of_value = (torch.zeros(t.shape, dtype=torch.float32) for t in (key, value))
        dots = (grad * out).sum(dim=2, keepdim=True)
        for (start, end, runs), chances in zip(blocks_of(ctx.branches), kept, strict=True):
            above, dot = by_group(grad[:, start:end], key), by_group(dots[:, start:end], key)
            of_scores = chances * (torch.matmul(above, gather(value, runs).transpose(1, 2)) - dot) * ctx.scaling
            of_query[:, start:end] = torch.matmul(of_scores, gather(key, runs)).view(query.shape[0], end - start, -1)
            scatter_add(of_key, runs, torch.matmul(of_scores.transpose(1, 2), by_group(query[:, start:end], key)))
            scatter_add(of_value, runs, torch.matmul(chances.transpose(1, 2), above))
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None, None


def blocks_of(branches: list[Branch]) -> Iterator[tuple[int, int, tuple[tuple[int, int], ...]]]:
    """(start, end, runs) of each block: queries [start, end) attend to the keys of the runs, the last of which ends with them."""
    for branch in branches:
        for start in range(branch.start, branch.end, QUERY_BLOCK):
            end = min(branch.end, start + QUERY_BLOCK)
            yield start, end, (*branch.ancestors, (branch.start, end))


def by_group(heads: Tensor, key: Tensor) -> Tensor:
    """[heads, nodes, d] as [groups, heads/groups × nodes, d]: the heads that share a key beside each other."""
    return heads.reshape(key.shape[0], -1, heads.shape[2])


def gather(nodes: Tensor, runs: tuple[tuple[int, int], ...]) -> Tensor:
    """The runs of [groups, nodes, d], one after the other."""
    return torch.cat([nodes[:, start:end] for start, end in runs], dim=1) if len(runs) > 1 else nodes[:, runs[0][0] : runs[0][1]]


def scatter_add(nodes: Tensor, runs: tuple[tuple[int, int], ...], gathered: Tensor) -> None:
    """Add what belongs to the runs, one after the other, to [groups, nodes, d] in place."""
    place = 0
    for start, end in runs:
        nodes[:, start:end] += gathered[:, place : place + end - start]
        place += end - start


@lru_cache(maxsize=256)
def later_keys(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """[rows, columns] bias: -inf where a key comes after its query, the last key being the last query's own; else 0."""
    return torch.full((rows, columns), float("-inf"), dtype=dtype).triu_(columns - rows + 1)


def attend_by_branch(model: Any) -> None:
    """Make a transformers model's attention this module's; its forward pass then needs `branches`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    model.set_attn_implementation(NAME)
