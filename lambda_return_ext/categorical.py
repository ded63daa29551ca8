"""Value learning as classification: a head of K logits a token, trained by cross-entropy against lambda-targets.

One operator, fused with the scan that makes the targets.

Source: Farebrother et al., Stop Regressing (2024), arXiv:2403.03950, sections 3.1 and 3.2.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from ._arguments import check_choice, check_floating, check_like, check_positive, check_tensor
from ._registrations import REDUCTIONS, call
from .functional import _check_scan, _Scan, check_normalizer

_ops = torch.ops.lambda_return

TARGETS = ("hl_gauss", "two_hot")  # in the order of csrc/kernels/categorical_value_loss.h


class Bins(NamedTuple):
    """K values that a head tells apart, evenly from ``low`` to ``high``.

    For ``hl_gauss`` they are the middles of K intervals; for ``two_hot`` the first is ``low`` and the last ``high``.
    """

    low: float = 0.0
    high: float = 1.0
    target: str = "hl_gauss"
    sigma: float = 0.75  # of hl_gauss: the Gaussian's standard deviation, in widths of an interval

    def check(self) -> None:
        """Raise ValueError or TypeError where these are no bins."""
        check_choice("bins.target", self.target, TARGETS)
        check_positive("bins.sigma", self.sigma)
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"bins.low must be below bins.high, both finite, got {self.low} and {self.high}")

    def centers(self, K: int, like: Tensor) -> Tensor:
        """Return the values of K bins, [K]."""
        if self.target == "two_hot":
            return torch.linspace(self.low, self.high, K, dtype=like.dtype, device=like.device)
        edges = self._edges(K, like)
        return (edges[1:] + edges[:-1]) / 2

    def _edges(self, K: int, like: Tensor) -> Tensor:
        return torch.linspace(self.low, self.high, K + 1, dtype=like.dtype, device=like.device)

    def probabilities(self, targets: Tensor, K: int) -> Tensor:
        """Return the distributions [..., K] that stand for targets [...], which are clamped to the bins."""
        x = targets.clamp(self.low, self.high)[..., None]
        if self.target == "two_hot":
            places = (x - self.low) * ((K - 1) / (self.high - self.low))
            return (1 - (places - torch.arange(K, dtype=x.dtype, device=x.device)).abs()).clamp(min=0)
        sigma = self.sigma * (self.high - self.low) / K
        cdf = torch.special.ndtr((self._edges(K, x) - x) / sigma)
        return cdf.diff(dim=-1) / (cdf[..., -1:] - cdf[..., :1])


def _check_logits(logits: Tensor, packed: bool) -> None:
    check_floating("logits", logits)
    if logits.dim() != (2 if packed else 3) or logits.shape[-1] < 2:
        shape = "[total, K]" if packed else "[B, T, K]"
        raise ValueError(f"logits must have shape {shape} with K >= 2, got {list(logits.shape)}")


def categorical_values(logits: Tensor, bins: Bins | None = None) -> Tensor:
    r"""The value that a distribution over bins says: :math:`V = \sum_k \mathrm{softmax}(x)_k c_k`.

    Args:
        logits: x, [..., K]; float32, bfloat16, float16 or float64.
        bins: what the K logits stand for; None: ``Bins()``.

    Returns:
        V, [...], float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: as said in the message.
    """
    bins = bins or Bins()
    bins.check()
    check_tensor("logits", logits)
    x = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    return (x.softmax(-1) * bins.centers(x.shape[-1], x)).sum(-1)  # a matrix product would be rounded by autocast


def compute_categorical_value_loss(
    logits: Tensor,
    terminal_rewards: Tensor,
    attention_mask: Tensor | None,
    loss_mask: Tensor | None,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    *,
    bins: Bins | None = None,
    rewards: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reduction: str = "token_mean",
    normalizer: Tensor | None = None,
    detach_targets: bool = True,
    return_statistics: bool = False,
) -> Any:
    r"""Cross-entropy of a head of K logits against the TD(lambda) targets of the values it says.

    .. math:: L = \frac{\sum m \left( -\sum_k q_k(G) \log \mathrm{softmax}(x)_k \right)}{\sum m}

    with G of :func:`~lambda_return_ext.compute_lambda_return` on :func:`categorical_values`, held constant. q is, for
    ``hl_gauss``, a Gaussian around G cut into intervals; for ``two_hot``, the two neighbours of G in proportion.

    Fused: forward reads the logits once, and of each token that counts again the few where q is not 0;
    backward reads them once and writes :math:`\mathrm{softmax}(x) - q`. What is kept for it besides the logits are two
    numbers a token. The logits of masked tokens are not read at all.

    Args:
        logits: x, [B, T, K], or [total, K] with ``cu_seqlens``; float32, bfloat16, float16 or float64. The K logits of
            a token are read in place where they stand next to one another; any other layout costs one copy.
        terminal_rewards: R, [B], any real dtype.
        attention_mask: [B, T] or [total], any real dtype, nonzero = valid; weights the loss only. None with
            ``cu_seqlens``: every token.
        loss_mask: likewise, nonzero = output token.
        gamma: discount per valid token, in [0, 1]; a float, or a 0-dim or [B] floating tensor.
        lam: lambda, likewise.
        bins: what the K logits stand for; None: ``Bins()``, from 0 to 1.
        rewards: r, [B, T] or [total], any real dtype.
        bootstrap_values: b, [B], any real dtype.
        cu_seqlens: [B + 1], int32 or int64: packed sequences.
        reduction: ``token_mean``, ``sequence_mean``, ``sum`` or ``none``.
        normalizer: 0-dim; takes the place of the number of tokens, or of sequences.
        detach_targets: False lets the gradient flow through G too, to any order, by unfused torch operations.
        return_statistics: also return the sums from which :func:`~lambda_return_ext.explained_variance` is computed.

    Returns:
        The loss, 0-dim (but for ``none``), float32 (float64 for float64 logits); 0 where no token counts. With
        ``return_statistics`` the loss and [6], as of :func:`~lambda_return_ext.compute_lambda_value_loss`.

    Raises:
        TypeError: a tensor argument is no tensor or has an unsupported dtype; a number is none.
        ValueError: a shape or device does not match; a number or an option is not as above.
    """
    bins = bins or Bins()
    bins.check()
    how = check_choice("reduction", reduction, REDUCTIONS)
    _check_logits(logits, cu_seqlens is not None)
    # The arguments are those of a scan over values that nobody has yet: only their shape and dtype are looked at.
    unseen = logits.detach()[..., 0]
    scan = _check_scan(unseen, terminal_rewards, loss_mask, gamma, lam, rewards, bootstrap_values, cu_seqlens)
    if attention_mask is not None or cu_seqlens is None:
        check_like("attention_mask", attention_mask, unseen)
    normalizer = check_normalizer(normalizer, reduction, unseen)
    if not detach_targets:
        return _unfused(logits, scan, attention_mask, bins, reduction, normalizer, return_statistics)
    scan = scan._replace(
        terminal_rewards=scan.terminal_rewards.detach(), rewards=None if rewards is None else rewards.detach()
    )
    result, _scale, statistics, _returns, _log_sums = call(
        _ops.categorical_value_loss.default,
        logits,
        scan.terminal_rewards,
        scan.mask,
        attention_mask,
        scan.rewards,
        scan.cu_seqlens,
        scan.gamma,
        scan.lam,
        normalizer,
        TARGETS.index(bins.target),
        float(bins.low),
        float(bins.high),
        float(bins.sigma),
        how,
    )
    return (result, statistics) if return_statistics else result


def _unfused(
    logits: Tensor,
    scan: _Scan,
    attention_mask: Tensor | None,
    bins: Bins,
    reduction: str,
    normalizer: Tensor | None,
    return_statistics: bool,
) -> Any:
    """Return the loss by torch's operations, with the gradient that flows through the targets."""
    x = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    counts = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    if scan.mask is not None:  # a NaN at a masked position would survive the derivative of the softmax
        counts = scan.mask != 0
        x = torch.where(counts[..., None], x, 0.0)
    if attention_mask is not None:
        counts = counts & (attention_mask != 0)
    values = categorical_values(x, bins)
    targets = call(_ops.td_lambda.default, values, *scan[1:], False)
    losses = -(bins.probabilities(targets, x.shape[-1]) * x.log_softmax(-1)).sum(-1)
    losses = torch.where(counts, losses, 0.0)
    result = reference.reduce_losses(losses, counts, reduction, normalizer, scan.cu_seqlens)
    return (result, reference.token_statistics(values, targets, counts)) if return_statistics else result
