"""Plain-torch oracle of the operators: slow, differentiable, and written from the definitions.

Every function has the signature of its twin in :mod:`lambda_return_ext.functional`. The loops follow the textbook
recursion over *valid* positions rather than the carry of the kernels, so that one checks the other. Give it float64
to get a reference value. Nothing at a masked position is used: ``torch.where`` keeps a NaN there out of the result
and of its gradient.
"""

import torch
from torch import Tensor


def compute_lambda_return(
    values: Tensor, terminal_rewards: Tensor, loss_mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> Tensor:
    """Lambda-returns [B, T] by the double loop over rows and valid positions, differentiable in both inputs."""
    value_weight, return_weight = gamma * (1.0 - lam), gamma * lam
    rows = []
    for row_values, reward, row_mask in zip(values, terminal_rewards, loss_mask != 0, strict=True):
        returns = list(torch.zeros_like(row_values).unbind())
        following = None  # the next valid position
        for t in reversed(range(len(returns))):
            if not row_mask[t]:
                continue
            if following is None:
                returns[t] = reward.to(values.dtype)
            else:
                # A term with weight 0 is left out: 0 * inf would be NaN.
                returns[t] = torch.zeros_like(row_values[t])
                if value_weight != 0:
                    returns[t] = returns[t] + value_weight * row_values[following]
                if return_weight != 0:
                    returns[t] = returns[t] + return_weight * returns[following]
            following = t
        rows.append(torch.stack(returns) if returns else row_values)
    return torch.stack(rows) if rows else torch.zeros_like(values)


def masked_mse(values: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over the positions where ``mask`` is nonzero; 0 where there are none."""
    mask = mask != 0
    error = torch.where(mask, values - targets, torch.zeros_like(values))
    return (error**2).sum() / mask.sum().clamp(min=1)


def compute_lambda_value_loss(
    value_logits: Tensor,
    terminal_rewards: Tensor,
    attention_mask: Tensor,
    loss_mask: Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> Tensor:
    """Masked squared error of values against their own lambda-returns, which are held constant."""
    values = value_logits.squeeze(-1) if value_logits.dim() == 3 else value_logits
    targets = compute_lambda_return(values.detach(), terminal_rewards.detach(), loss_mask, gamma, lam)
    return masked_mse(values, targets, (attention_mask != 0) & (loss_mask != 0))


def compute_mc_value_loss(value_logits: Tensor, rewards: Tensor, attention_mask: Tensor, loss_mask: Tensor) -> Tensor:
    """Masked squared error of values against the terminal reward of their sequence."""
    values = value_logits.squeeze(-1) if value_logits.dim() == 3 else value_logits
    targets = rewards.detach().to(values.dtype).unsqueeze(1).expand_as(values)
    return masked_mse(values, targets, (attention_mask != 0) & (loss_mask != 0))


def create_eos_only_mask(loss_mask: Tensor) -> Tensor:
    """Float32 mask [B, T] with 1 at the last valid position of each row."""
    eos = torch.zeros(loss_mask.shape, dtype=torch.float32, device=loss_mask.device)
    for b, row in enumerate(loss_mask != 0):
        valid = row.nonzero()
        if len(valid):
            eos[b, valid[-1]] = 1.0
    return eos
