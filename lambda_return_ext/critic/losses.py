"""The training loss: what the configuration turns on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lambda_return_ext import compute_lambda_value_loss, lambda_value_loss_varlen
from lambda_return_ext.critic.config import ValueLossConfig
from lambda_return_ext.critic.data import Packing


def count_terms(loss_mask: Tensor, packing: Packing | None = None) -> Tensor:
    """Over how much the means of the loss are taken: tokens of right solutions, of wrong ones, and pairs.

    Add the counts of all ranks and micro-batches of a step up, and give the sum to `value_loss`.

    Args:
        loss_mask: bool [2 N, T] or packed [total], the tokens that the loss sees.
        packing: where packed solutions lie; None where they are padded.

    Returns:
        [3], int64.
    """
    right, wrong = _sum_rows(loss_mask, packing).chunk(2)
    return torch.stack([right.sum(), wrong.sum(), ((right > 0) & (wrong > 0)).sum()])


def value_loss(
    config: ValueLossConfig,
    values: Tensor,
    attention_mask: Tensor,
    loss_mask: Tensor,
    terminal_rewards: Tensor,
    packing: Packing | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of N right and N wrong solutions, and its terms before their coefficients.

    A regression term is (loss of right + loss of wrong) / 2, each side the mean over its own tokens, so that
    the longer side does not outweigh the other. With the counts of several ranks and micro-batches the results are
    these solutions' parts of the means over all: their sum is the loss of all solutions in one batch.

    Args:
        config: which terms are on.
        values: [2 N, T] or packed [total], the right solutions first, then the wrong ones in the same order.
        attention_mask: bool, the shape of the values.
        loss_mask: bool, the shape of the values, the tokens that the loss sees.
        terminal_rewards: [2 N].
        packing: where packed solutions lie; None where they are padded.
        counts: [3], the sum of `count_terms` over all; None takes those of these solutions.

    Returns:
        The scalar to minimise, and `value/lambda_loss`, `value/mc_loss`, `value/pairwise_loss` where they are on.
    """
    counts = count_terms(loss_mask, packing) if counts is None else counts
    loss = values.new_zeros(())
    terms = {}
    if config.use_lambda_return or config.use_mc_mse:
        name, coef = ("lambda", config.lambda_return.coef) if config.use_lambda_return else ("mc", config.mc_mse_coef)
        of_right, of_wrong = _side_losses(config, values, attention_mask, loss_mask, terminal_rewards, packing, counts)
        terms[f"value/{name}_loss"] = (of_right + of_wrong) / 2
        loss = loss + coef * terms[f"value/{name}_loss"]
    if config.use_pairwise:
        terms["value/pairwise_loss"] = _pairwise_loss(values, loss_mask, packing, counts[2])
        loss = loss + config.pairwise_coef * terms["value/pairwise_loss"]
    return loss, {name: term.detach() for name, term in terms.items()}


def _side_losses(
    config: ValueLossConfig,
    values: Tensor,
    attention_mask: Tensor,
    loss_mask: Tensor,
    terminal_rewards: Tensor,
    packing: Packing | None,
    counts: Tensor,
) -> list[Tensor]:
    """The regression loss of right and of wrong solutions."""
    gamma, lam = config.gamma_lam
    rewards = terminal_rewards.chunk(2)
    if packing is None:
        sides = zip(values.chunk(2), rewards, attention_mask.chunk(2), loss_mask.chunk(2), counts[:2], strict=True)
        return [
            compute_lambda_value_loss(v, reward, attention, mask, gamma, lam, normalizer=count)
            for v, reward, attention, mask, count in sides
        ]
    pairs, split = len(rewards[0]), packing.right_tokens
    bounds = packing.cu_seqlens[: pairs + 1], packing.cu_seqlens[pairs:] - split
    packed = zip((values[:split], values[split:]), rewards, bounds, (loss_mask[:split], loss_mask[split:]), strict=True)
    return [
        lambda_value_loss_varlen(*side, gamma=gamma, lam=lam, normalizer=counts[i]) for i, side in enumerate(packed)
    ]


def _pairwise_loss(values: Tensor, loss_mask: Tensor, packing: Packing | None, pairs: Tensor) -> Tensor:
    """-log sigmoid(mean of right - mean of wrong), summed over pairs of which both sides have a token."""
    counts = _sum_rows(loss_mask, packing)
    means = _sum_rows(values.float().masked_fill(~loss_mask, 0.0), packing) / counts.clamp(min=1)
    right, wrong = means.chunk(2)
    valid = (counts > 0).chunk(2)
    losses = -nn.functional.logsigmoid(right - wrong)
    return losses.masked_fill(~(valid[0] & valid[1]), 0.0).sum() / pairs.clamp(min=1)


def _sum_rows(x: Tensor, packing: Packing | None) -> Tensor:
    """The sum over each solution, [2 N]; of a mask, in int64."""
    if packing is None:
        return x.sum(1)
    exact = x.long() if x.dtype == torch.bool else x
    lengths = packing.cu_seqlens.diff()
    if exact.is_floating_point():
        return torch.segment_reduce(exact, "sum", lengths=lengths, unsafe=True)
    before = nn.functional.pad(exact.cumsum(0), (1, 0))
    return before[packing.cu_seqlens.long()].diff()
