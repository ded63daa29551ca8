"""What a critic says about each token: its value, the target, the advantage and the one-step error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lambda_return_ext import compute_lambda_return
from lambda_return_ext.critic.config import ValuePosition
from lambda_return_ext.critic.data.batches import Batch
from lambda_return_ext.critic.data.rollouts import Solution


class Credit(NamedTuple):
    """Per-token numbers [R, T] of a batch, or [T] of one solution; 0 where `mask` is false.

    Attributes:
        mask: bool, true where there is a value.
        values: V.
        targets: the lambda-return G.
        advantages: G - V: by how much the solution went better than expected from here on.
        td_errors: r + gamma V(next) - V, and r + R - V at the last: what the next token changed.
        values_after: of one solution whose values stand before their tokens too: V when the token has been read.
    """

    mask: Tensor
    values: Tensor
    targets: Tensor
    advantages: Tensor
    td_errors: Tensor
    values_after: Tensor | None = None


def assign_credit(values: Tensor, batch: Batch, gamma: float, lam: float) -> Credit:
    """Credit at each value of a padded batch.

    Args:
        values: [R, T].
        batch: masks and rewards.
        gamma: discount factor of the target.
        lam: lambda of the target.
    """
    mask = batch.loss_mask
    values = values.float().masked_fill(~mask, 0.0)
    targets, one_step = (
        compute_lambda_return(values, batch.terminal_rewards, mask, gamma, x, rewards=batch.step_rewards)
        for x in (lam, 0.0)
    )
    return Credit(mask, values, targets, targets - values, one_step - values)


@torch.no_grad()
def credit_solutions(
    model: nn.Module,
    batch: Batch,
    solutions: Sequence[Solution],
    gamma: float,
    lam: float,
    position: ValuePosition = "after",
) -> list[Credit]:
    """Credit of all that follows the prompt of each solution of a padded batch, on the CPU.

    Numbers stand at the token that is the action: with `after` those of the value that has read it, with `before` and
    `both` those of the value before it; with `both` that after it is `values_after`.

    Args:
        model: gives the values.
        batch: the solutions, in their order.
        solutions: what to cut out of it.
        gamma: discount factor of the target.
        lam: lambda of the target.
        position: where values are read.
    """
    credit = assign_credit(model(batch.inputs, batch.attention_mask), batch, gamma, lam)
    ends = batch.attention_mask.sum(1).tolist()
    columns = [tensor.cpu() for tensor in credit[:5]]
    credits = []
    for row, (solution, end) in enumerate(zip(solutions, ends, strict=True)):
        length = len(solution.output_ids)
        output = torch.tensor(solution.output_mask or (True,) * length)
        after = [column[row, end - length : end] for column in columns]
        if position == "after":
            credits.append(Credit(*after))
            continue
        values, targets, advantages, errors = (
            column[row, end - length - 1 : end - 1] * output for column in columns[1:]
        )
        values_after = after[1] * output if position == "both" else None
        credits.append(Credit(output, values, targets, advantages, errors, values_after))
    return credits


def value_changes(credit: Credit, position: ValuePosition) -> Tensor:
    """By how much V rose when each token of one solution was read, [T]; 0 where no two values tell.

    Args:
        credit: of one solution, as `credit_solutions` gives it.
        position: where values are read.
    """
    if credit.values_after is not None:
        return (credit.values_after - credit.values) * credit.mask
    places = credit.mask.nonzero()[:, 0]
    steps = credit.values[places].diff()
    # From one value to the next: the token that was read between them is the later one where values follow their
    # tokens, and the earlier one where they precede them.
    told = pad(steps, (1, 0)) if position == "after" else pad(steps, (0, 1))
    return torch.zeros_like(credit.values).index_put_((places,), told)
