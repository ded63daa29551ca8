"""Plain-torch oracle of the operators: slow, differentiable, and written from the definitions.

The scans, their losses and what is made of both have the signatures of their twins in
:mod:`lambda_return_ext.functional`; :func:`token_losses`, :func:`token_statistics` and :func:`reduce_losses` are the
parts of a loss. The loops follow the textbook recursion over *valid* positions rather than the carry of the kernels, so
that one checks the other. Give it float64 to get a reference value. Nothing at a masked position is used:
``torch.where`` keeps a NaN there out of the result and of its gradient.
"""

from typing import Any

import torch
from torch import Tensor, nn


def _tokens(values: Tensor, dims: int) -> Tensor:
    """Return values without a last 1 beyond ``dims``."""
    return values.squeeze(-1) if values.dim() > dims else values


def compute_lambda_return(
    values: Tensor,
    terminal_rewards: Tensor,
    loss_mask: Tensor,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    *,
    rewards: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
) -> Tensor:
    """Lambda-returns [B, T] by the double loop over rows and valid positions, differentiable in all but gamma, lam."""
    B = values.shape[0]
    gammas, lams = (
        x.expand(B).tolist() if isinstance(x, Tensor) else [x] * B for x in (gamma, lam)
    )  # one pair for each row
    valid = loss_mask != 0
    rows = []
    for b in range(B):
        value_weight, return_weight = gammas[b] * (1.0 - lams[b]), gammas[b] * lams[b]
        end = terminal_rewards[b].to(values.dtype)
        if bootstrap_values is not None and gammas[b] != 0:  # a term with weight 0 is left out: 0 * inf would be NaN
            end = end + gammas[b] * bootstrap_values[b].to(values.dtype)
        returns = list(torch.zeros_like(values[b]).unbind())
        following = None  # the next valid position
        for t in reversed(range(len(returns))):
            if not valid[b, t]:
                continue
            if following is None:
                returns[t] = end
            else:
                returns[t] = torch.zeros_like(values[b, t])
                if value_weight != 0:
                    returns[t] = returns[t] + value_weight * values[b, following]
                if return_weight != 0:
                    returns[t] = returns[t] + return_weight * returns[following]
            if rewards is not None:
                returns[t] = returns[t] + rewards[b, t].to(values.dtype)
            following = t
        rows.append(torch.stack(returns) if returns else values[b])
    return torch.stack(rows) if rows else torch.zeros_like(values)


def lambda_return_varlen(
    values: Tensor,
    terminal_rewards: Tensor,
    cu_seqlens: Tensor,
    loss_mask: Tensor | None = None,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    *,
    rewards: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
) -> Tensor:
    """Lambda-returns [total] of packed sequences: each alone, as a padded batch of one."""
    values = _tokens(values, 1)
    mask = torch.ones_like(values, dtype=torch.bool) if loss_mask is None else loss_mask
    parts = [values[:0]]
    for b, (begin, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        parts.append(
            compute_lambda_return(
                values[None, begin:end],
                terminal_rewards[b : b + 1],
                mask[None, begin:end],
                gamma[b] if isinstance(gamma, Tensor) and gamma.dim() else gamma,
                lam[b] if isinstance(lam, Tensor) and lam.dim() else lam,
                rewards=None if rewards is None else rewards[None, begin:end],
                bootstrap_values=None if bootstrap_values is None else bootstrap_values[b : b + 1],
            )[0]
        )
    return torch.cat(parts)


def gae(
    values: Tensor,
    terminal_rewards: Tensor,
    loss_mask: Tensor | None,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    *,
    rewards: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    whiten: bool = False,
    group: Any = None,
) -> Tensor:
    """Advantages: the lambda-returns less the values where valid, 0 elsewhere."""
    values = _tokens(values, 2 if cu_seqlens is None else 1)
    valid = torch.ones_like(values, dtype=torch.bool) if loss_mask is None else loss_mask != 0
    returns = _returns(values, terminal_rewards, loss_mask, gamma, lam, rewards, bootstrap_values, cu_seqlens)
    advantages = torch.where(valid, returns - values, 0.0)
    return masked_whiten(advantages, valid, group=group) if whiten else advantages


def _returns(
    values: Tensor,
    terminal_rewards: Tensor,
    loss_mask: Tensor | None,
    gamma: float | Tensor,
    lam: float | Tensor,
    rewards: Tensor | None,
    bootstrap_values: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Lambda-returns, padded without ``cu_seqlens``, packed with it."""
    options = {"rewards": rewards, "bootstrap_values": bootstrap_values}
    if cu_seqlens is not None:
        return lambda_return_varlen(values, terminal_rewards, cu_seqlens, loss_mask, gamma, lam, **options)
    assert loss_mask is not None  # only packed rows have no padding
    return compute_lambda_return(values, terminal_rewards, loss_mask, gamma, lam, **options)


@torch.no_grad()
def returns_and_advantages(
    values: Tensor,
    terminal_rewards: Tensor,
    loss_mask: Tensor | None,
    gamma: float | Tensor = 1.0,
    lam_returns: float | Tensor = 1.0,
    lam_advantages: float | Tensor = 0.95,
    *,
    rewards: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    whiten: bool = False,
    group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Lambda-returns and advantages, each with a lambda of its own, without gradient."""
    values = _tokens(values, 2 if cu_seqlens is None else 1)
    options: dict[str, Any] = {
        "rewards": rewards,
        "bootstrap_values": bootstrap_values,
        "cu_seqlens": cu_seqlens,
    }
    scan = values, terminal_rewards, loss_mask, gamma
    return _returns(*scan, lam_returns, **options), gae(*scan, lam_advantages, **options, whiten=whiten, group=group)


def masked_whiten(x: Tensor, mask: Tensor | None, *, group: Any = None, eps: float = 1e-8) -> Tensor:
    """Valid numbers with mean 0 and variance 1, in one process: ``group`` must be None."""
    if group is not None:
        raise ValueError(f"group must be None in the reference, got {group}")
    valid = torch.ones_like(x, dtype=torch.bool) if mask is None else mask != 0
    kept = x.detach()[valid].double()
    whitened = torch.zeros_like(x, requires_grad=False)
    if len(kept):
        variance = kept.var() if len(kept) > 1 else torch.zeros_like(kept[0])
        whitened[valid] = ((kept - kept.mean()) / (variance + eps).sqrt()).to(x.dtype)
    return whitened


def token_losses(
    outputs: Tensor,
    targets: Tensor,
    counts: Tensor,
    loss: str = "mse",
    delta: float = 1.0,
    old_values: Tensor | None = None,
    clip_range: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Losses of the head's outputs, in any shape and 0 where ``counts`` is False, and which of them are clipped.

    ``loss`` is that of :func:`lambda_return_ext.compute_lambda_value_loss`.
    """
    # What does not count is replaced before the formulas, so that a NaN there reaches no gradient.
    outputs, targets = torch.where(counts, outputs, 0.5), torch.where(counts, targets, 0.5)

    def of(x: Tensor) -> Tensor:
        if loss == "mse":
            return (x - targets) ** 2
        if loss == "huber":
            return nn.functional.huber_loss(x, targets, reduction="none", delta=delta)
        if loss == "smooth_l1":
            return nn.functional.smooth_l1_loss(x, targets, reduction="none", beta=delta)
        if loss == "bce":
            # torch's function raises for what is no probability (on a device, for good) and under autocast.
            inside = (x >= 0) & (x <= 1)
            with torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False):
                entropy = nn.functional.binary_cross_entropy(torch.where(inside, x, 0.5), targets, reduction="none")
            return torch.where(inside, entropy, torch.nan)
        return nn.functional.softplus(x) - x * targets

    losses, clipped = of(outputs), torch.zeros_like(counts)
    if old_values is not None:
        old_values = torch.where(counts, old_values.to(outputs.dtype), 0.5)
        change = outputs - old_values
        held = of(old_values + change.clamp(-clip_range, clip_range))
        # What is within the range is not clipped, however old + change rounds.
        clipped = ((change > clip_range) | (change < -clip_range)) & (held > losses)
        losses = torch.where(clipped, held, losses)  # not maximum, which halves the gradient where both are equal
    return torch.where(counts, losses, 0.0), clipped


@torch.no_grad()
def token_statistics(values: Tensor, targets: Tensor, counts: Tensor, clipped: Tensor | None = None) -> Tensor:
    """Statistics [6] of :func:`lambda_return_ext.compute_lambda_value_loss`, of values in any shape."""
    targets, errors = (torch.where(counts, x, 0.0).to(torch.float64) for x in (targets, targets - values))
    clipped = torch.zeros_like(counts) if clipped is None else clipped & counts
    kept = (counts, targets, targets**2, errors, errors**2, clipped)
    return torch.stack([x.sum().to(torch.float64) for x in kept])


def reduce_losses(
    losses: Tensor,
    counts: Tensor,
    reduction: str = "token_mean",
    normalizer: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Reduce the losses of tokens, [B, T] or [total] with ``cu_seqlens``, as the fused loss does."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if reduction == "token_mean":
        total, denominator = losses.sum(), counts.sum()
    else:
        if cu_seqlens is None:
            tokens = counts.sum(1)
            divisors = tokens[:, None]
        else:  # no index_add, which adds in any order on a device
            before = nn.functional.pad(counts.cumsum(0), (1, 0))
            tokens = before[cu_seqlens].diff()
            positions = torch.arange(losses.shape[0], device=losses.device)
            divisors = tokens[torch.bucketize(positions, cu_seqlens[1:], right=True)]
        total, denominator = (losses / divisors.clamp(min=1)).sum(), (tokens > 0).sum()
    if normalizer is not None:
        denominator = normalizer
    return torch.where(denominator == 0, 0.0, total / torch.where(denominator == 0, 1, denominator))


def masked_mse(values: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over the positions where ``mask`` is nonzero; 0 where there are none."""
    mask = mask != 0
    error = torch.where(mask, values - targets, torch.zeros_like(values))
    return (error**2).sum() / mask.sum().clamp(min=1)


def lambda_value_loss_varlen(
    value_logits: Tensor,
    terminal_rewards: Tensor,
    cu_seqlens: Tensor,
    loss_mask: Tensor | None = None,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    *,
    rewards: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    output_mask: Tensor | None = None,
    loss: str = "mse",
    delta: float = 1.0,
    old_values: Tensor | None = None,
    clip_range: float | None = None,
    reduction: str = "token_mean",
    normalizer: Tensor | None = None,
    detach_targets: bool = True,
    return_statistics: bool = False,
) -> Any:
    """Masked loss of packed values against their own lambda-returns, and with ``return_statistics`` its sums."""
    outputs = _tokens(value_logits, 1)
    counts = torch.ones_like(outputs, dtype=torch.bool) if loss_mask is None else loss_mask != 0
    valid = counts if output_mask is None else output_mask != 0
    counts = counts & valid
    outputs = torch.where(valid, outputs, 0.0)  # a NaN at a masked position would survive the derivative of a sigmoid
    values = outputs.sigmoid() if loss == "bce_with_logits" else outputs
    with torch.set_grad_enabled(torch.is_grad_enabled() and not detach_targets):
        targets = lambda_return_varlen(
            values,
            terminal_rewards,
            cu_seqlens,
            valid,
            gamma,
            lam,
            rewards=rewards,
            bootstrap_values=bootstrap_values,
        )
    old_values = None if old_values is None else _tokens(old_values.detach(), 1)
    losses, clipped = token_losses(outputs, targets, counts, loss, delta, old_values, clip_range or 0.0)
    result = reduce_losses(losses, counts, reduction, normalizer, cu_seqlens)
    return (result, token_statistics(values, targets, counts, clipped)) if return_statistics else result


def compute_lambda_value_loss(
    value_logits: Tensor,
    terminal_rewards: Tensor,
    attention_mask: Tensor,
    loss_mask: Tensor,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    *,
    rewards: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    output_mask: Tensor | None = None,
    loss: str = "mse",
    delta: float = 1.0,
    old_values: Tensor | None = None,
    clip_range: float | None = None,
    reduction: str = "token_mean",
    normalizer: Tensor | None = None,
    detach_targets: bool = True,
    return_statistics: bool = False,
) -> Any:
    """Masked loss of values against their own lambda-returns: that of the rows in a pack, one after the other."""
    values = _tokens(value_logits, 2)
    B, T = values.shape

    def packed(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.reshape(B * T)

    result, statistics = lambda_value_loss_varlen(
        values.reshape(B * T),
        terminal_rewards,
        T * torch.arange(B + 1, device=values.device),
        packed((attention_mask != 0) & (loss_mask != 0)),
        gamma,
        lam,
        rewards=packed(rewards),
        bootstrap_values=bootstrap_values,
        output_mask=packed(loss_mask if output_mask is None else output_mask),
        loss=loss,
        delta=delta,
        old_values=packed(old_values),
        clip_range=clip_range,
        reduction=reduction,
        normalizer=normalizer,
        detach_targets=detach_targets,
        return_statistics=True,
    )
    result = result.view(B, T) if reduction == "none" else result
    return (result, statistics) if return_statistics else result


def explained_variance(statistics: Tensor) -> Tensor:
    """Share of the variance of G that V explains, [...], from sums [..., 6]; NaN where only rounding varies."""
    results = []
    for sums in statistics.reshape(-1, 6).tolist():
        _one, returns, squared_returns, errors, squared_errors = (x / max(sums[0], 1.0) for x in sums[:5])
        variance, left = squared_returns - returns**2, squared_errors - errors**2
        varies = variance > 4096 * torch.finfo(statistics.dtype).eps * squared_returns
        results.append(1.0 - left / variance if varies else float("nan"))
    return torch.tensor(results, dtype=torch.float64, device=statistics.device).view(statistics.shape[:-1])


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
