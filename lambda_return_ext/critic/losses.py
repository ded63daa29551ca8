"""The training loss: what the configuration turns on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lambda_return_ext import compute_lambda_value_loss, lambda_value_loss_varlen
from lambda_return_ext.critic.config import ValueLossConfig
from lambda_return_ext.critic.data.batches import Packing


def count_terms(config: ValueLossConfig, loss_mask: Tensor, packing: Packing | None = None) -> Tensor:
    """Over how much the means of the loss are taken: tokens of right solutions, of wrong ones, and pairs.

    Where the loss is a mean over sequences, solutions that have a token stand in place of tokens.

    Add the counts of all ranks and micro-batches of a step up, and give the sum to `value_loss`.

    Args:
        config: how the loss is reduced.
        loss_mask: bool [2 N, T] or packed [total], the tokens that the loss sees.
        packing: where packed solutions lie; None where they are padded.

    Returns:
        [3], int64.
    """
    right, wrong = sum_rows(loss_mask, packing).chunk(2)
    if config.reduction == "sequence":
        return torch.stack([(right > 0).sum(), (wrong > 0).sum(), ((right > 0) & (wrong > 0)).sum()])
    return torch.stack([right.sum(), wrong.sum(), ((right > 0) & (wrong > 0)).sum()])


def value_loss(
    config: ValueLossConfig,
    values: Tensor,
    attention_mask: Tensor,
    loss_mask: Tensor,
    terminal_rewards: Tensor,
    packing: Packing | None = None,
    counts: Tensor | None = None,
    lam: Tensor | None = None,
    output_mask: Tensor | None = None,
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
        lam: 0-dim, lambda at this step; None takes that of the configuration.
        output_mask: bool, the shape of the values, all output tokens, where the loss sees only a window of them; the
            return then runs from the true end.

    Returns:
        The scalar to minimise, and `value/lambda_loss`, `value/mc_loss`, `value/pairwise_loss` where they are on.
    """
    if lam is None or not config.use_lambda_return:
        lam = torch.tensor(config.gamma_lam[1], dtype=torch.float64, device=values.device)
    counts = count_terms(config, loss_mask, packing) if counts is None else counts
    loss = values.new_zeros(())
    terms = {}
    if config.use_lambda_return or config.use_mc_mse:
        name, coef = ("lambda", config.lambda_return.coef) if config.use_lambda_return else ("mc", config.mc_mse_coef)
        of_right, of_wrong = _side_losses(
            config, values, attention_mask, loss_mask, output_mask, terminal_rewards, packing, counts, lam
        )
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
    output_mask: Tensor | None,
    terminal_rewards: Tensor,
    packing: Packing | None,
    counts: Tensor,
    lam: Tensor,
) -> list[Tensor]:
    """The regression loss of right and of wrong solutions."""
    split = len(values) // 2 if packing is None else packing.right_tokens
    pairs = len(terminal_rewards) // 2
    losses = []
    for side, rewards, normalizer in (
        (slice(None, split), terminal_rewards[:pairs], counts[0]),
        (slice(split, None), terminal_rewards[pairs:], counts[1]),
    ):
        how: dict[str, Any] = {
            "gamma": config.gamma_lam[0],
            "lam": lam,
            "output_mask": None if output_mask is None else output_mask[side],
            "loss": config.error,
            "delta": config.huber_delta,
            "reduction": f"{config.reduction}_mean",
            "normalizer": normalizer,
        }
        if packing is None:
            masks = attention_mask[side], loss_mask[side]
            losses.append(compute_lambda_value_loss(values[side], rewards, *masks, **how))
        else:
            bounds = packing.cu_seqlens[: pairs + 1] if side.start is None else packing.cu_seqlens[pairs:] - split
            losses.append(lambda_value_loss_varlen(values[side], rewards, bounds, loss_mask[side], **how))
    return losses


def _pairwise_loss(values: Tensor, loss_mask: Tensor, packing: Packing | None, pairs: Tensor) -> Tensor:
    """-log sigmoid(mean of right - mean of wrong), summed over pairs of which both sides have a token."""
    counts = sum_rows(loss_mask, packing)
    means = sum_rows(values.float().masked_fill(~loss_mask, 0.0), packing) / counts.clamp(min=1)
    right, wrong = means.chunk(2)
    valid = (counts > 0).chunk(2)
    losses = -nn.functional.logsigmoid(right - wrong)
    return losses.masked_fill(~(valid[0] & valid[1]), 0.0).sum() / pairs.clamp(min=1)


def sum_rows(x: Tensor, packing: Packing | None) -> Tensor:
    """The sum over each solution, [2 N]; of a mask, in int64."""
    if packing is None:
        return x.sum(1)
    exact = x.long() if x.dtype == torch.bool else x
    lengths = packing.cu_seqlens.diff()
    if exact.is_floating_point():
        return torch.segment_reduce(exact, "sum", lengths=lengths, unsafe=True)
    before = nn.functional.pad(exact.cumsum(0), (1, 0))
    return before[packing.cu_seqlens.long()].diff()


def window_mask(loss_mask: Tensor, packing: Packing | None, where: Tensor, size: int) -> Tensor:
    """A window of each solution's output tokens; all of them where there are no more than `size`.

    Args:
        loss_mask: bool [2 N, T] or packed [total], all output tokens.
        packing: where packed solutions lie; None where they are padded.
        where: [2 N], in [0, 1): where between its first and its last place the window lies.
        size: number of output tokens in a window.

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
