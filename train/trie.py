"""Prefix-shared batches: examples merged into a token trie, each distinct prefix token computed once.

A node attends to its ancestors and itself, and its position is its depth, so every root-to-leaf path sees
exactly what it would see alone; losses and gradients equal example-by-example training up to rounding.
The idea is tree attention as used for speculative decoding (SpecInfer, arXiv:2305.09781), applied to
training. It holds for full causal attention only: sliding windows and recurrent layers are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from understudy.chat import Encoded
from understudy.errors import TrainingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Row:
    """An encoded example and the weight of each of its completion tokens in the loss."""

    encoded: Encoded
    weight: float = 1.0


@dataclass(frozen=True)
class TrieBatch:
    """Examples merged into one trie; nodes are in topological order."""

    ids: torch.Tensor  # [nodes] token of each node
    positions: torch.Tensor  # [nodes] depth
    mask: torch.Tensor  # [nodes, nodes] bool, True where the row's node may attend to the column's
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
    weights: dict[int, float] = {}
    for row in rows:
        node = -1
        for depth, token in enumerate(row.encoded.ids):
            child = children.get((node, token))
            if child is None:
                child = children[node, token] = len(ids)
                ids.append(token)
                parents.append(node)
                depths.append(depth)
            if depth >= max(1, row.encoded.completion):  # the first token of all has nothing to predict it
                weights[child] = weights.get(child, 0.0) + row.weight
            node = child
    mask = np.zeros((len(ids), len(ids)), dtype=bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node, : parent + 1] = mask[parent, : parent + 1]
        mask[node, node] = True
    learnt = sorted(weights)
    return TrieBatch(
        ids=torch.tensor(ids),
        positions=torch.tensor(depths),
        mask=torch.from_numpy(mask),
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


def target_logprobs(model: PreTrainedModel, batch: TrieBatch) -> torch.Tensor:
    """Log-probabilities [targets] (float32) of the batch's targets; the head runs on the positions that need it."""
    attention = torch.zeros(batch.mask.shape, dtype=model.dtype).masked_fill_(~batch.mask, torch.finfo(model.dtype).min)
    hidden = backbone(model)(
        input_ids=batch.ids[None].to(model.device),
        position_ids=batch.positions[None].to(model.device),
        attention_mask=attention[None, None].to(model.device),
        use_cache=False,
    ).last_hidden_state[0]
    logits = model.get_output_embeddings()(hidden[batch.sources.to(hidden.device)]).float()
    targets = batch.targets.to(logits.device)
    chosen: torch.Tensor = logits.gather(1, targets[:, None])[:, 0] - torch.logsumexp(logits, dim=1)
    return chosen


def weighted_loss(model: PreTrainedModel, batch: TrieBatch) -> torch.Tensor:
    """Summed weighted negative log-likelihood of the batch, a scalar; divide by the weight of the whole step."""
    logprobs = target_logprobs(model, batch)
    return -(logprobs * batch.weights.to(logprobs.device)).sum()


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
