"""The training loss: what the configuration turns on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lambda_return_ext import (
    compute_lambda_value_loss,
    compute_mc_value_loss,
    lambda_value_loss_varlen,
    pairwise_ranking_loss,
)
from lambda_return_ext.critic.config import ValueLossConfig
from lambda_return_ext.critic.data import Packing


def value_loss(
    config: ValueLossConfig,
    values: Tensor,
    attention_mask: Tensor,
    loss_mask: Tensor,
    terminal_rewards: Tensor,
    packing: Packing | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of N right and N wrong solutions, and its terms before their coefficients.

    A regression term is (loss of right + loss of wrong) / 2, each side the mean over its own tokens, so that
    the longer side does not outweigh the other. Over ranks and micro-batches each side's mean is to be weighted
    by its share of that side's global token count.

    Args:
        config: which terms are on.
        values: [2 N, T] or packed [total], the right solutions first, then the wrong ones in the same order.
        attention_mask: the shape of the values.
        loss_mask: the shape of the values, the tokens that the loss sees.
        terminal_rewards: [2 N].
        packing: where packed solutions lie; None where they are padded.

    Returns:
        The scalar to minimise, and `value/lambda_loss`, `value/mc_loss`, `value/pairwise_loss` where they are on.
    """
    if packing is not None:
        return _packed_value_loss(config, values, loss_mask, terminal_rewards, packing)
    pairs = values.shape[0] // 2
    right = values[:pairs], terminal_rewards[:pairs], attention_mask[:pairs], loss_mask[:pairs]
    wrong = values[pairs:], terminal_rewards[pairs:], attention_mask[pairs:], loss_mask[pairs:]
    loss = values.new_zeros(())
    terms = {}
    if config.use_lambda_return:
        gamma, lam = config.lambda_return.gamma, config.lambda_return.lam
        of_right, of_wrong = (compute_lambda_value_loss(*side, gamma=gamma, lam=lam) for side in (right, wrong))
        terms["value/lambda_loss"] = (of_right + of_wrong) / 2
        loss = loss + config.lambda_return.coef * terms["value/lambda_loss"]
    if config.use_mc_mse:
        terms["value/mc_loss"] = (compute_mc_value_loss(*right) + compute_mc_value_loss(*wrong)) / 2
        loss = loss + config.mc_mse_coef * terms["value/mc_loss"]
    if config.use_pairwise:
        terms["value/pairwise_loss"] = pairwise_ranking_loss(right[0], wrong[0], right[3], wrong[3])
        loss = loss + config.pairwise_coef * terms["value/pairwise_loss"]
    return loss, {name: term.detach() for name, term in terms.items()}


def _packed_value_loss(
    config: ValueLossConfig, values: Tensor, loss_mask: Tensor, terminal_rewards: Tensor, packing: Packing
) -> tuple[Tensor, dict[str, Tensor]]:
    """`value_loss` of [total] values."""
    pairs, split = len(terminal_rewards) // 2, packing.right_tokens
    right = values[:split], terminal_rewards[:pairs], packing.cu_seqlens[: pairs + 1], loss_mask[:split]
    wrong = values[split:], terminal_rewards[pairs:], packing.cu_seqlens[pairs:] - split, loss_mask[split:]
    loss = values.new_zeros(())
    terms = {}
    if config.use_lambda_return or config.use_mc_mse:
        name, coef = "value/mc_loss", config.mc_mse_coef
        if config.use_lambda_return:
            name, coef = "value/lambda_loss", config.lambda_return.coef
        gamma, lam = config.gamma_lam
        of_right, of_wrong = (lambda_value_loss_varlen(*side, gamma=gamma, lam=lam) for side in (right, wrong))
        terms[name] = (of_right + of_wrong) / 2
        loss = loss + coef * terms[name]
    if config.use_pairwise:
        margins = _sequence_means(right[0], right[2], right[3]) - _sequence_means(wrong[0], wrong[2], wrong[3])
        terms["value/pairwise_loss"] = -nn.functional.logsigmoid(margins).mean()
        loss = loss + config.pairwise_coef * terms["value/pairwise_loss"]
    return loss, {name: term.detach() for name, term in terms.items()}


def _sequence_means(values: Tensor, cu_seqlens: Tensor, mask: Tensor) -> Tensor:
    """Mean of V over the masked tokens of each sequence, [B]; each has at least its end token."""
    lengths = cu_seqlens.diff()
    kept = values.float().masked_fill(~mask, 0.0)
    total, count = (torch.segment_reduce(x, "sum", lengths=lengths, unsafe=True) for x in (kept, mask.float()))
    return total / count
