"""The training loss: what the configuration turns on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lambda_return_ext import compute_lambda_value_loss, lambda_value_loss_varlen
from lambda_return_ext.critic.config import ValueLossConfig
from lambda_return_ext.critic.data.batches import Batch, Packing


def count_terms(config: ValueLossConfig, batch: Batch, balanced: bool = True) -> Tensor:
    """Over how much the means of the loss are taken: values of the upper half, of the lower one, and pairs.

    Where the loss is not balanced all values count to the first. Where it is a mean over sequences, rollouts that have
    a value stand in place of values.

    Add the counts of all ranks and micro-batches of a step up, and give the sum to `value_loss`.

    Args:
        config: how the loss is reduced.
        batch: `loss_mask` says which values the loss sees.
        balanced: the loss is the mean of those of two halves.

    Returns:
        [3], int64.
    """
    values = sum_rows(batch.loss_mask, batch.packing)
    counted = (values > 0).long() if config.reduction == "sequence" else values
    halves = [(counted * half).sum() for half in (batch.upper | (not balanced), ~batch.upper & balanced)]
    pairs = values.new_zeros(())
    if config.use_pairwise:
        right, wrong = values.chunk(2)
        pairs = ((right > 0) & (wrong > 0)).sum()
    return torch.stack([*halves, pairs])


def value_loss(
    config: ValueLossConfig,
    values: Tensor,
    batch: Batch,
    counts: Tensor | None = None,
    lam: Tensor | None = None,
    balanced: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch, and its terms before their coefficients.

    A regression term is the mean over all values, or balanced: (loss of the upper half + loss of the lower one) / 2,
    each the mean over its own values, so that the longer side of pairs does not outweigh the other. With the counts of
    several ranks and micro-batches the results are these rollouts' parts of the means over all: their sum is the loss
    of all rollouts in one batch.

    Args:
        config: which terms are on.
        values: [R, T] or packed [total].
        batch: masks, rewards and packing; on the device of the values. Where `output_mask` is there, the loss sees only
            a window of it, and the return runs from the true end.
        counts: [3], the sum of `count_terms` over all; None takes those of this batch.
        lam: 0-dim, lambda at this step; None takes that of the configuration.
        balanced: the regression is balanced.

    Returns:
        The scalar to minimise, and `value/lambda_loss`, `value/mc_loss`, `value/pairwise_loss` where they are on.
    """
    if lam is None or not config.use_lambda_return:
        lam = torch.tensor(config.gamma_lam[1], dtype=torch.float64, device=values.device)
    counts = count_terms(config, batch, balanced) if counts is None else counts
    loss = values.new_zeros(())
    terms = {}
    if config.use_lambda_return or config.use_mc_mse:
        name, coef = ("lambda", config.lambda_return.coef) if config.use_lambda_return else ("mc", config.mc_mse_coef)
        if balanced:
            upper = spread_rows(batch.upper, batch)
            sides = [
                _regression_loss(config, values, batch, batch.loss_mask & side, counts[k], lam)
                for k, side in enumerate((upper, ~upper))
            ]
            terms[f"value/{name}_loss"] = (sides[0] + sides[1]) / 2
        else:
            terms[f"value/{name}_loss"] = _regression_loss(config, values, batch, batch.loss_mask, counts[0], lam)
        loss = loss + coef * terms[f"value/{name}_loss"]
    if config.use_pairwise:
        terms["value/pairwise_loss"] = _pairwise_loss(values, batch.loss_mask, batch.packing, counts[2])
        loss = loss + config.pairwise_coef * terms["value/pairwise_loss"]
    return loss, {name: term.detach() for name, term in terms.items()}


def _regression_loss(
    config: ValueLossConfig, values: Tensor, batch: Batch, loss_mask: Tensor, normalizer: Tensor, lam: Tensor
) -> Tensor:
    """The loss of the values that `loss_mask` chooses against their targets, over `normalizer`."""
    how: dict[str, Any] = {
        "gamma": config.gamma_lam[0],
        "lam": lam,
        "rewards": batch.step_rewards,
        "output_mask": batch.output_mask,
        "loss": config.error,
        "delta": config.huber_delta,
        "reduction": f"{config.reduction}_mean",
        "normalizer": normalizer,
    }
    if batch.packing is None:
        return compute_lambda_value_loss(values, batch.terminal_rewards, batch.attention_mask, loss_mask, **how)
    return lambda_value_loss_varlen(values, batch.terminal_rewards, batch.packing.cu_seqlens, loss_mask, **how)


def spread_rows(rows: Tensor, batch: Batch) -> Tensor:
    """One number for each rollout, [R], brought to its places: [R, 1], or packed [total]."""
    if batch.packing is None:
        return rows[:, None]
    return rows.repeat_interleave(batch.packing.cu_seqlens.diff(), output_size=len(batch.loss_mask))


def _pairwise_loss(values: Tensor, loss_mask: Tensor, packing: Packing | None, pairs: Tensor) -> Tensor:
    """-log sigmoid(mean of right - mean of wrong), summed over pairs of which both sides have a token."""
    counts = sum_rows(loss_mask, packing)
    means = sum_rows(values.float().masked_fill(~loss_mask, 0.0), packing) / counts.clamp(min=1)
    right, wrong = means.chunk(2)
    valid = (counts > 0).chunk(2)
    losses = -nn.functional.logsigmoid(right - wrong)
    return losses.masked_fill(~(valid[0] & valid[1]), 0.0).sum() / pairs.clamp(min=1)


def sum_rows(x: Tensor, packing: Packing | None) -> Tensor:
    """The sum over each rollout, [R]; of a mask, in int64."""
    if packing is None:
        return x.sum(1)
    exact = x.long() if x.dtype == torch.bool else x
    lengths = packing.cu_seqlens.diff()
    if exact.is_floating_point():
        return torch.segment_reduce(exact, "sum", lengths=lengths, unsafe=True)
    before = nn.functional.pad(exact.cumsum(0), (1, 0))
    return before[packing.cu_seqlens.long()].diff()


def window_mask(loss_mask: Tensor, packing: Packing | None, where: Tensor, size: int) -> Tensor:
    """A window of each rollout's values; all of them where there are no more than `size`.

    Args:
        loss_mask: bool [R, T] or packed [total], all places of values.
        packing: where packed rollouts lie; None where they are padded.
        where: [R], in [0, 1): where between its first and its last place the window lies.
        size: number of values in a window.

    Returns:
        bool, the shape of the loss mask.
    """
    outputs = sum_rows(loss_mask, packing)
    skipped = (where * (outputs - size + 1).clamp(min=1)).long()
    if packing is None:
        number = loss_mask.cumsum(1)  # the first output token is 1
        skipped = skipped[:, None]
    else:
        lengths = packing.cu_seqlens.diff().long()
        number = loss_mask.cumsum(0) - (outputs.cumsum(0) - outputs).repeat_interleave(lengths)
        skipped = skipped.repeat_interleave(lengths)
    return loss_mask & (number > skipped) & (number <= skipped + size)
