"""What a critic says about each token: its value, the target, the advantage and the one-step error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lambda_return_ext import compute_lambda_return
from lambda_return_ext.critic.data.batches import Batch
from lambda_return_ext.critic.data.rollouts import Solution


class Credit(NamedTuple):
    """Per-token numbers [B, T] of a batch, or [T] of one solution; 0 where `mask` is false.

    Attributes:
        mask: bool, true at output tokens.
        values: V.
        targets: the lambda-return G.
        advantages: G - V: by how much the solution went better than expected from this token on.
        td_errors: gamma V(next output token) - V, and R - V at the last: what the next token changed.
    """

    mask: Tensor
    values: Tensor
    targets: Tensor
    advantages: Tensor
    td_errors: Tensor


def assign_credit(values: Tensor, mask: Tensor, terminal_rewards: Tensor, gamma: float, lam: float) -> Credit:
    """Credit of each output token.

    Args:
        values: [B, T].
        mask: bool [B, T], true at output tokens.
        terminal_rewards: [B].
        gamma: discount factor of the target.
        lam: lambda of the target.
    """
    values = values.float().masked_fill(~mask, 0.0)
    targets, one_step = (compute_lambda_return(values, terminal_rewards, mask, gamma, x) for x in (lam, 0.0))
    return Credit(mask, values, targets, targets - values, one_step - values)


@torch.no_grad()
def credit_solutions(
    model: nn.Module, batch: Batch, solutions: Sequence[Solution], gamma: float, lam: float
) -> list[Credit]:
    """Credit of all that follows the prompt of each solution of a batch, on the CPU."""
    values = model(batch.inputs, batch.attention_mask)
    credit = assign_credit(values, batch.loss_mask, batch.terminal_rewards, gamma, lam)
    ends = batch.attention_mask.sum(1).tolist()
    rows = [tensor.cpu() for tensor in credit]
    return [
        Credit(*(tensor[row, end - len(solution.output_ids) : end] for tensor in rows))
        for row, (solution, end) in enumerate(zip(solutions, ends, strict=True))
    ]
