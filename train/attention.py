"""Attention over a token trie, block by block: few scores are computed where a node may not attend.

A dense [nodes, nodes] mask computes every pair and throws most away. Here a block of consecutive queries meets the
keys that any of them may attend to, under the part of the mask that concerns them (docs/training.md, "Prefix sharing").
On GPUs the same mask is FlexAttention's (arXiv:2412.05496), and SDPA with the dense mask stays for what it does not take.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

NAME = "token-trie"
FLEX = "flex_attention"  # as transformers calls it
QUERY_BLOCK = 128  # queries of one block
ROUND = 64  # nodes, and keys of a block, are multiples of it: a CPU library keeps a compiled kernel for every new shape


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


@dataclass(frozen=True)
class Block:
    """Queries [start, end) and the keys that any of them may attend to."""

    start: int
    end: int
    runs: tuple[tuple[int, int], ...]  # [start, end) runs of keys, in order
    bias: Tensor  # [queries, keys] added to the scores: 0, or -inf where the query may not attend to the key


def rounded_up(count: int) -> int:
    """The next multiple of ROUND."""
    return -(-count // ROUND) * ROUND


@lru_cache(maxsize=16)  # every layer asks for the same, of every batch at work
def plan_blocks(branches: tuple[Branch, ...], dtype: torch.dtype) -> tuple[Block, ...]:
    """Blocks that cover the branches' nodes in order; where keys are short of a round number, others join that no query may attend to."""
    nodes = branches[-1].end
    mask = dense_mask(list(branches), nodes)
    blocks = []
    for start in range(0, nodes, QUERY_BLOCK):
        end = min(nodes, start + QUERY_BLOCK)
        met = mask[start:end].any(dim=0)
        spare = (~met).nonzero()[: rounded_up(int(met.sum())) - int(met.sum()), 0]
        keys = met.index_fill(0, spare, True).nonzero()[:, 0]
        allowed = mask[start:end, keys]
        blocks.append(Block(start, end, runs_of(keys.tolist()), torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, float("-inf"))))
    return tuple(blocks)


def attend(
    _module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, scaling: float, branches: list[Branch], **_: Any
) -> tuple[Tensor, None]:
    """Attention of one trie, as transformers calls it.

    query [1, heads, nodes, d]; key and value [1, kv_heads, nodes, d]; branches cover the nodes in order.
    Returns ([1, nodes, heads, d], None).
    """
    blocks = plan_blocks(tuple(branches), query.dtype)
    attended: Tensor = TrieAttention.apply(query[0], key[0], value[0], scaling, blocks)  # type: ignore[no-untyped-call]
    return attended[None].transpose(1, 2), None


class TrieAttention(torch.autograd.Function):
    """Blockwise softmax attention; the backward pass is FlashAttention's (arXiv:2205.14135, appendix B), with the probabilities kept.

    Slicing inside autograd would fill a zero gradient of full size for every slice; here gradients add up in place.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, blocks: tuple[Block, ...]) -> Tensor:
        """query [heads, nodes, d], key and value [groups, nodes, d] → [heads, nodes, d]; softmax computes in float32."""
        query = query * scaling
        out = torch.empty_like(query)
        kept = []
        for block in blocks:
            queries = by_group(query, block, key.shape[0])
            scores = torch.matmul(queries, gather(key, block.runs).transpose(1, 2))
            scores.view(query.shape[0], block.end - block.start, -1).add_(block.bias)
            chances = torch.softmax(scores, dim=-1)
            out[:, block.start : block.end] = torch.matmul(chances, gather(value, block.runs)).view(query.shape[0], block.end - block.start, -1)
            kept.append(chances)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.scaling, ctx.blocks = scaling, blocks
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Gradients of query, key and value, in their shapes; those of key and value add up in float32."""
        query, key, value, *kept = ctx.saved_tensors
        of_query = torch.empty_like(query)
        of_key, of_value = (torch.zeros(t.shape, dtype=torch.float32) for t in (key, value))
        for block, chances in zip(ctx.blocks, kept, strict=True):
            above, queries = (by_group(t, block, key.shape[0]) for t in (grads[0], query))
            of_chances = torch.matmul(above, gather(value, block.runs).transpose(1, 2))
            of_scores = torch._softmax_backward_data(of_chances, chances, -1, chances.dtype)
            of_query[:, block.start : block.end] = torch.matmul(of_scores, gather(key, block.runs)).view(query.shape[0], block.end - block.start, -1)
            scatter_add(of_key, block.runs, torch.matmul(of_scores.transpose(1, 2), queries))
            scatter_add(of_value, block.runs, torch.matmul(chances.transpose(1, 2), above))
        return of_query.mul_(ctx.scaling), of_key.to(key.dtype), of_value.to(value.dtype), None, None


def by_group(heads: Tensor, block: Block, groups: int) -> Tensor:
    """The block's part of [heads, nodes, d] as [groups, heads/groups × queries, d]: heads that share a key beside each other."""
    return heads[:, block.start : block.end].reshape(groups, -1, heads.shape[2])


def gather(nodes: Tensor, runs: tuple[tuple[int, int], ...]) -> Tensor:
    """The runs of [groups, nodes, d], one after the other."""
    return torch.cat([nodes[:, start:end] for start, end in runs], dim=1) if len(runs) > 1 else nodes[:, runs[0][0] : runs[0][1]]


def scatter_add(nodes: Tensor, runs: tuple[tuple[int, int], ...], gathered: Tensor) -> None:
    """Add what belongs to the runs, one after the other, to [groups, nodes, d] in place."""
    place = 0
    for start, end in runs:
        nodes[:, start:end] += gathered[:, place : place + end - start]
        place += end - start


def attend_by_branch(model: Any) -> None:
    """Make a transformers model's attention this module's; its forward pass then needs `branches`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    model.set_attn_implementation(NAME)


def attend_on_gpu(model: Any) -> None:
    """Make a transformers model's attention FlexAttention where it is compiled (Triton is there), else leave it SDPA with a dense mask."""
    if importlib.util.find_spec("triton"):
        model.set_attn_implementation(FLEX)


def ancestry(branches: list[Branch]) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention's `mask_mod` of the trie: a key is a query's ancestor or itself if the walk through the trie enters the
    query between entering and leaving the key, so that two numbers a node tell it (Euler tour)."""
    nodes = branches[-1].end
    parents = [node - 1 for node in range(nodes)]
    for branch in branches:
        parents[branch.start] = branch.ancestors[-1][1] - 1 if branch.ancestors else -1
    children: list[list[int]] = [[] for _ in range(nodes)]
    for node, parent in enumerate(parents):
        if parent >= 0:
            children[parent].append(node)
    enter, leave, clock = [0] * nodes, [0] * nodes, 0
    stack = [(node, True) for node in reversed(range(nodes)) if parents[node] < 0]
    while stack:
        node, is_entering = stack.pop()
        if is_entering:
            enter[node], clock = clock, clock + 1
            stack += [(node, False), *((child, True) for child in reversed(children[node]))]
        else:
            leave[node] = clock
    entered, left = torch.tensor(enter), torch.tensor(leave)

    def may_attend(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        at = entered.to(query.device)[query]
        return (entered.to(query.device)[key] <= at) & (at < left.to(query.device)[key])

    return may_attend


def flex_mask(branches: list[Branch], device: torch.device) -> BlockMask:
    """The trie's mask as FlexAttention takes it."""
    from torch.nn.attention.flex_attention import create_block_mask

    nodes = branches[-1].end
    return create_block_mask(ancestry(branches), None, None, nodes, nodes, device=str(device))
