"""Value learning as classification: a head of K logits a token, trained by cross-entropy against lambda-targets.

The targets come from the operators; the classification is torch's own softmax, which torch.compile fuses.

Source: Farebrother et al., Stop Regressing (2024), arXiv:2403.03950, sections 3.1 and 3.2.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from ._arguments import VALUE_DTYPES, check_choice, check_like, check_positive, check_tensor
from ._registrations import REDUCTIONS
from .functional import compute_lambda_return, lambda_return_varlen

TARGETS = ("hl_gauss", "two_hot")


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
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
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


def _check_logits(logits: Tensor, packed: bool) -> Tensor:
    check_tensor("logits", logits)
    if logits.dtype not in VALUE_DTYPES:
        raise TypeError(f"logits must be float32, bfloat16, float16 or float64, got {logits.dtype}")
    if logits.dim() != (2 if packed else 3) or logits.shape[-1] < 2:
        shape = "[total, K]" if packed else "[B, T, K]"
        raise ValueError(f"logits must have shape {shape} with K >= 2, got {list(logits.shape)}")
    return logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)


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
    return x.softmax(-1) @ bins.centers(x.shape[-1], x)


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
) -> Tensor:
    r"""Cross-entropy of a head of K logits against the TD(lambda) targets of the values it says.

    .. math:: L = \frac{\sum m \left( -\sum_k q_k(G) \log \mathrm{softmax}(x)_k \right)}{\sum m}

    with G of :func:`~lambda_return_ext.compute_lambda_return` on :func:`categorical_values`, held constant. q is, for
    ``hl_gauss``, a Gaussian around G cut into intervals; for ``two_hot``, the two neighbours of G in proportion.

    Args:
        logits: x, [B, T, K], or [total, K] with ``cu_seqlens``; float32, bfloat16, float16 or float64.
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

    Returns:
        The loss, 0-dim (but for ``none``), float32 (float64 for float64 logits); 0 where no token counts.

    Raises:
        TypeError: a tensor argument is no tensor or has an unsupported dtype; a number is none.
        ValueError: a shape or device does not match; a number or an option is not as above.
    """
    bins = bins or Bins()
    check_choice("reduction", reduction, REDUCTIONS)
    x = _check_logits(logits, cu_seqlens is not None)
    values = categorical_values(x.detach(), bins)
    options: dict[str, Any] = {"rewards": rewards, "bootstrap_values": bootstrap_values}
    mask: Any = loss_mask  # checked by the functions that take it
    with torch.no_grad():
        if cu_seqlens is None:
            targets = compute_lambda_return(values, terminal_rewards, mask, gamma, lam, **options)
        else:
            targets = lambda_return_varlen(values, terminal_rewards, cu_seqlens, mask, gamma, lam, **options)
    counts = torch.ones_like(values, dtype=torch.bool)
    for name, weights in (("loss_mask", loss_mask), ("attention_mask", attention_mask)):
        if weights is not None or cu_seqlens is None:
            check_like(name, weights, values)
            counts = counts & (weights != 0)
    # What does not count is replaced first, so that a NaN there reaches no gradient.
    logs = torch.where(counts[..., None], x, 0.0).log_softmax(-1)
    q = bins.probabilities(torch.where(counts, targets, bins.low), x.shape[-1])
    losses = torch.where(counts, -(q * logs).sum(-1), 0.0)
    return reference.reduce_losses(losses, counts, reduction, normalizer, cu_seqlens)
