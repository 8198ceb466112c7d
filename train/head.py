"""The output layer and its loss in chunks: never more than a few rows of logits in memory, however large the vocabulary.

Where the layer is frozen, the gradient is ready when the loss is: it is computed chunk by chunk in the forward pass, so that
logits are neither kept nor computed again (as in Liger Kernel, arXiv:2410.10989).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from train.attention import rounded_up
from train.fused import compute_dtype

CHUNK_VALUES = 2**23  # logits at once: 170 rows of 49,152, 55 of 152,000; 48 MiB with their float32 copy


def is_plain_head(head: nn.Module) -> bool:
    """Whether the head is a frozen linear layer, for which the chunked loss holds."""
    return type(head) is nn.Linear and not head.weight.requires_grad and (head.bias is None or not head.bias.requires_grad)


def target_logprobs_of(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities [targets] (float32) by any head, all logits at once; hidden is [targets, hidden]."""
    logits = head(hidden).float()
    chosen: Tensor = logits.gather(1, targets[:, None])[:, 0] - torch.logsumexp(logits, dim=1)
    return chosen


def summed_loss(head: nn.Module, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Σ weight · −log p(target), a float32 scalar. hidden [targets, hidden], targets [targets], weights [targets]."""
    if not is_plain_head(head):
        return -(target_logprobs_of(head, hidden, targets) * weights).sum()
    loss: Tensor = ChunkedLoss.apply(hidden.to(compute_dtype(hidden)), head.weight, head.bias, targets, weights)  # type: ignore[no-untyped-call]
    return loss


class ChunkedLoss(torch.autograd.Function):
    """Weighted cross-entropy of a frozen linear head; what is kept is the gradient of its input."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor) -> Tensor:
        """hidden [targets, hidden], weight [vocabulary, hidden] → scalar."""
        matrix, shift = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        count, spare = len(targets), rounded_up(len(targets)) - len(targets)  # the spare ones weigh nothing
        hidden, targets, weights = functional.pad(hidden, (0, 0, 0, spare)), functional.pad(targets, (0, spare)), functional.pad(weights, (0, spare))
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        rows = max(1, CHUNK_VALUES // weight.shape[0])
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            logits = functional.linear(hidden[part], matrix, shift).float()
            spread = torch.logsumexp(logits, dim=1)
            chosen = logits.gather(1, targets[part, None])[:, 0]
            loss += (weights[part] * (spread - chosen)).sum()
            if gradient is not None:
                chances = logits.sub_(spread[:, None]).exp_()
                chances.scatter_add_(1, targets[part, None], chances.new_full((len(chances), 1), -1.0))
                gradient[part] = chances.mul_(weights[part, None]).to(hidden.dtype) @ matrix
        ctx.save_for_backward(None if gradient is None else gradient[:count])
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Gradient of hidden."""
        [gradient] = ctx.saved_tensors
        return (gradient * grads[0]).to(gradient.dtype), None, None, None, None
