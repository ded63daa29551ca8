"""The training loss: what the configuration turns on."""

from __future__ import annotations

from torch import Tensor

from lambda_return_ext import compute_lambda_value_loss, compute_mc_value_loss, pairwise_ranking_loss
from lambda_return_ext.critic.config import ValueLossConfig


def value_loss(
    config: ValueLossConfig, values: Tensor, attention_mask: Tensor, loss_mask: Tensor, terminal_rewards: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of N right and N wrong solutions, and its terms before their coefficients.

    A regression term is (loss of right + loss of wrong) / 2, each side the mean over its own tokens, so that
    the longer side does not outweigh the other. Over ranks and micro-batches each side's mean is to be weighted
    by its share of that side's global token count.

    Args:
        config: which terms are on.
        values: [2 N, T], the right solutions first, then the wrong ones in the same order.
        attention_mask: [2 N, T].
        loss_mask: [2 N, T], the tokens that the loss sees.
        terminal_rewards: [2 N].

    Returns:
        The scalar to minimise, and `value/lambda_loss`, `value/mc_loss`, `value/pairwise_loss` where they are on.
    """
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
