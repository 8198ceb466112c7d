"""Prefix-shared batches: examples merged into a token trie, each distinct prefix token computed once.

A node attends to its ancestors and itself, and its position is its depth, so every root-to-leaf path sees
exactly what it would see alone; losses and gradients equal example-by-example training up to rounding.
The idea is tree attention as used for speculative decoding (SpecInfer, arXiv:2305.09781), applied to
training. It holds for full causal attention only: sliding windows and recurrent layers are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from train.attention import FLEX, NAME, Branch, dense_mask, flex_mask, rounded_up, runs_of
from train.head import summed_loss
from understudy.chat import Encoded
from understudy.errors import TrainingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


LOGIT_SCALES = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")


@dataclass(frozen=True)
class Row:
    """An encoded example and the weight of each of its completion tokens in the loss."""

    encoded: Encoded
    weight: float = 1.0
    first_weight: float | None = None  # of the completion's first token, where it is another
    trace_id: str = ""  # where the example comes from, for messages


@dataclass(frozen=True)
class TrieBatch:
    """Examples merged into one trie; nodes are in the order of the examples, parents first."""

    ids: torch.Tensor  # [nodes] token of each node
    positions: torch.Tensor  # [nodes] depth
    branches: list[Branch]  # the nodes each example added, in order: together all nodes
    sources: torch.Tensor  # [targets] node whose hidden state predicts the target
    targets: torch.Tensor  # [targets] token ids
    weights: torch.Tensor  # [targets] summed weights of the examples that pass through
    rows: int
    tokens: int  # tokens of all examples, unshared


def merge_tries(rows: list[Row]) -> TrieBatch:
    """Merge encoded examples (at least one, none empty) into a batch."""
    children: dict[tuple[int, int], int] = {}
    ids: list[int] = []
    parents: list[int] = []
    depths: list[int] = []
    branches: list[Branch] = []
    weights: dict[int, float] = {}
    for row in rows:
        path: list[int] = []
        fresh = len(ids)
        for depth, token in enumerate(row.encoded.ids):
            parent = path[-1] if path else -1
            node = children.setdefault((parent, token), len(ids))
            if node == len(ids):
                ids.append(token)
                parents.append(parent)
                depths.append(depth)
            path.append(node)
            if depth >= max(1, row.encoded.completion):  # the first token of all has nothing to predict it
                is_first = depth == row.encoded.completion and row.first_weight is not None
                weights[node] = weights.get(node, 0.0) + (row.first_weight if is_first and row.first_weight is not None else row.weight)
        if len(ids) > fresh:
            branches.append(Branch(fresh, len(ids), runs_of([node for node in path if node < fresh])))
    learnt = sorted(weights)
    return TrieBatch(
        ids=torch.tensor(ids),
        positions=torch.tensor(depths),
        branches=branches,
        sources=torch.tensor([parents[node] for node in learnt]),
        targets=torch.tensor([ids[node] for node in learnt]),
        weights=torch.tensor([weights[node] for node in learnt]),
        rows=len(rows),
        tokens=sum(len(row.encoded.ids) for row in rows),
    )


def distinct_tokens(rows: list[Row]) -> int:
    """Nodes of the trie the rows would make."""
    nodes: set[tuple[int, int]] = set()
    seen: dict[tuple[int, int], int] = {}
    for row in rows:
        node = -1
        for token in row.encoded.ids:
            node = seen.setdefault((node, token), len(seen))
            nodes.add((node, token))
    return len(nodes)


def weighted_loss(model: PreTrainedModel, batch: TrieBatch) -> torch.Tensor:
    """Summed weighted negative log-likelihood of the batch, a scalar; divide by the weight of the whole step."""
    hidden = source_states(model, batch)
    return summed_loss(model.get_output_embeddings(), hidden, batch.targets.to(hidden.device), batch.weights.to(hidden.device))


def source_states(model: PreTrainedModel, batch: TrieBatch) -> torch.Tensor:
    """Last hidden states [targets, hidden] of the nodes that predict the targets."""
    decoder = backbone(model)
    implementation = decoder.config._attn_implementation
    ids, positions = batch.ids, batch.positions
    attention: dict[str, Any]
    if implementation == NAME:
        spare = rounded_up(len(ids)) - len(ids)  # nodes that nothing attends to and no loss falls on
        ids, positions = (functional.pad(nodes, (0, spare)) for nodes in (ids, positions))
        attention = {"branches": [*batch.branches, *([Branch(len(batch.ids), len(ids), ())] if spare else [])]}
    elif implementation == FLEX:
        attention = {"attention_mask": flex_mask(batch.branches, model.device)}
    else:
        mask = dense_mask(batch.branches, len(batch.ids))
        bias = torch.zeros(mask.shape, dtype=model.dtype).masked_fill_(~mask, torch.finfo(model.dtype).min)
        attention = {"attention_mask": bias[None, None].to(model.device)}
    states: torch.Tensor = decoder(
        input_ids=ids[None].to(model.device), position_ids=positions[None].to(model.device), use_cache=False, **attention
    ).last_hidden_state[0]
    return states[batch.sources.to(states.device)]


def backbone(model: PreTrainedModel) -> Any:
    """The decoder stack without the head, adapters included."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.model


def check_architecture(config: Any) -> None:
    """Raise TrainingError for models whose attention is not plain causal: sharing would not be exact there."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    if kinds != {"full_attention"} or windowed:
        raise TrainingError(
            f"{config.model_type} uses {', '.join(sorted(kinds))}: prefix sharing would not be exact", "choose a model with full causal attention"
        )
    scaled = [name for name in LOGIT_SCALES if getattr(config, name, None) not in (None, 1, 1.0)]
    if scaled:
        raise TrainingError(f"{config.model_type} changes its logits after the head ({', '.join(scaled)}): the loss would not be its own", "choose another")
