"""The public functions: arguments checked, then one operator each.

Shapes: B sequences of at most T tokens. Values are float64, float32, bfloat16 or float16 in any layout; rows that are
contiguous in T are read in place, any other layout costs one contiguous copy. Masks are bool, any integer or any
floating dtype, nonzero = valid; bool, uint8 and int8 are read in place, any other dtype becomes one bool copy. What
stands at a masked position is never used: NaN or Inf there reaches no output and no gradient.

Every function raises TypeError for an argument of the wrong type or dtype and ValueError for one of the wrong shape,
device or range, before anything is computed.
"""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.compiler import is_compiling

from . import reference
from ._arguments import (
    VALUE_DTYPES,
    check_choice,
    check_cu_seqlens,
    check_discount,
    check_floating,
    check_like,
    check_packed_values,
    check_positive,
    check_rewards,
    check_tensor,
    check_unit_interval,
    check_value_logits,
    check_values,
)
from ._registrations import LOSS_KINDS, REDUCTIONS, call, call_loss

_ops = torch.ops.lambda_return


# ---- calls of operators that check their own arguments -----------------------------------------------------------


def _explained(run: Callable[..., Tensor], explain: Callable[..., None], operator: Any, *args: Any) -> Tensor:
    """Return run(operator, *args); where the operator refuses, explain(*args) raises an error that names the argument.

    Explaining first would be a quarter of a call on a few tokens, and is left to where no kernel looks at arguments.
    """
    if type(args[0]) is not Tensor or args[0].is_meta or is_compiling():
        explain(*args)
        return run(operator, *args)
    try:
        return run(operator, *args)
    except (RuntimeError, TypeError) as error:
        refusal = error
    explain(*args)
    raise refusal


def _as_numbers(gamma: float | Tensor, lam: float | Tensor) -> tuple[float, float] | None:
    """Return both as floats in [0, 1], or None where one is a tensor."""
    # Usually floats, of which torch's isinstance() is slow to say that they are no tensors.
    if type(gamma) is type(lam) is float:
        if 0.0 <= gamma <= 1.0 and 0.0 <= lam <= 1.0:
            return gamma, lam
    elif isinstance(gamma, Tensor) or isinstance(lam, Tensor):
        return None
    return check_unit_interval("gamma", gamma), check_unit_interval("lam", lam)


def _squeezed(x: Tensor) -> Tensor:
    """Return [B, T] where x is [B, T, 1], else x."""
    return x.squeeze(-1) if isinstance(x, Tensor) and x.dim() == 3 and x.shape[-1] == 1 else x


def _explain_return(values: Tensor, terminal_rewards: Tensor, loss_mask: Tensor, _gamma: float, _lam: float) -> None:
    check_values("values", values)
    check_rewards("terminal_rewards", terminal_rewards, values)
    check_like("loss_mask", loss_mask, values)


def _explain_loss(
    values: Tensor, rewards: Tensor, attention_mask: Tensor, loss_mask: Tensor, gamma: float, lam: float
) -> None:
    _explain_mc_loss(values, rewards, attention_mask, loss_mask, gamma, lam, "terminal_rewards")


def _explain_mc_loss(
    values: Tensor,
    rewards: Tensor,
    attention_mask: Tensor,
    loss_mask: Tensor,
    _gamma: float,
    _lam: float,
    rewards_name: str = "rewards",
) -> None:
    check_value_logits("value_logits", values)
    check_rewards(rewards_name, rewards, values)
    check_like("attention_mask", attention_mask, values)
    check_like("loss_mask", loss_mask, values)


def _explain_mse(values: Tensor, targets: Tensor, mask: Tensor) -> None:
    check_value_logits("values", values)
    check_like("targets", targets, values)
    half = values.dtype in (torch.bfloat16, torch.float16)
    if targets.dtype != values.dtype and not (half and targets.dtype == torch.float32):
        wanted = f"{values.dtype} or torch.float32" if half else str(values.dtype)
        raise TypeError(f"targets must be {wanted} for values of {values.dtype}, got {targets.dtype}")
    check_like("mask", mask, values)


# ---- returns and losses ------------------------------------------------------------------------------------------


class _Scan(NamedTuple):
    """The arguments that the general operators share, in their order."""

    values: Tensor
    terminal_rewards: Tensor
    mask: Tensor | None
    rewards: Tensor | None
    cu_seqlens: Tensor | None
    gamma: Tensor
    lam: Tensor

    @property
    def rows(self) -> int:
        return self.terminal_rewards.shape[0]


def _check_scan(
    values: Tensor,
    terminal_rewards: Tensor,
    loss_mask: Tensor | None,
    gamma: float | Tensor,
    lam: float | Tensor,
    rewards: Tensor | None,
    bootstrap_values: Tensor | None,
    cu_seqlens: Tensor | None,
    lam_name: str = "lam",
    mask_name: str = "loss_mask",
) -> _Scan:
    rows = values.shape[0] if cu_seqlens is None else check_cu_seqlens(cu_seqlens, values)
    check_rewards("terminal_rewards", terminal_rewards, values, rows)
    if loss_mask is not None or cu_seqlens is None:
        check_like(mask_name, loss_mask, values)
    if rewards is not None:
        check_like("rewards", rewards, values)
    gamma, lam = check_discount("gamma", gamma, values, rows), check_discount(lam_name, lam, values, rows)
    if bootstrap_values is not None:
        check_rewards("bootstrap_values", bootstrap_values, values, rows)
        dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
        discount = gamma.to(dtype)
        # A term with weight 0 is left out: 0 * inf would be NaN.
        bootstrap = torch.where(discount == 0, 0.0, discount * bootstrap_values.to(dtype))
        terminal_rewards = terminal_rewards.to(dtype) + bootstrap
    return _Scan(values, terminal_rewards, loss_mask, rewards, cu_seqlens, gamma, lam)


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
    r"""TD(lambda) targets of masked sequences with one terminal reward each.

    For one sequence with valid positions :math:`p_1 < \dots < p_n` (``loss_mask`` nonzero) and terminal reward R

    .. math::
        G_{p_n} = R, \qquad
        G_{p_i} = \gamma \left( (1 - \lambda) V_{p_{i+1}} + \lambda G_{p_{i+1}} \right),

    and G = 0 at masked positions. Gaps in the mask cost no discount. ``lam=1`` gives the Monte-Carlo target
    (with ``gamma=1``, R everywhere) and never reads ``values``; ``lam=0`` uses only the next value. With rewards r at
    every step and a bootstrap value b, which stands for the value after the end of a truncated sequence,

    .. math::
        G_{p_n} = r_{p_n} + R + \gamma b, \qquad
        G_{p_i} = r_{p_i} + \gamma \left( (1 - \lambda) V_{p_{i+1}} + \lambda G_{p_{i+1}} \right).

    Differentiable, to any order, in everything but gamma and lam; detach the result to use it as a target.

    Args:
        values: V, [B, T]; float32, bfloat16, float16 or float64. Accumulated in float32 (float64 for float64).
        terminal_rewards: R, [B], any real dtype.
        loss_mask: [B, T], any real dtype, nonzero = valid.
        gamma: discount per valid token, in [0, 1]; a float, or a 0-dim or [B] floating tensor on the device of the
            values, so that a schedule changes neither a compiled nor a captured graph. A tensor's range is checked on
            the CPU only.
        lam: lambda, likewise.
        rewards: r, [B, T], any real dtype, read in the accumulation dtype; say, a KL penalty for each token.
        bootstrap_values: b, [B], any real dtype; 0 for a sequence that is not truncated.

    Returns:
        G, [B, T], contiguous, in the dtype of ``values``.

    Raises:
        TypeError: a tensor argument is no tensor or has an unsupported dtype; gamma or lam is no real number.
        ValueError: a shape or device does not match; gamma or lam is outside [0, 1].

    Source: Sutton and Barto, Reinforcement Learning (2nd ed.), section 12.1, the recursive form of the lambda-return.
    """
    if rewards is bootstrap_values is None and (numbers := _as_numbers(gamma, lam)):
        tensors = values, terminal_rewards, loss_mask
        return _explained(call, _explain_return, _ops.lambda_return.default, *tensors, *numbers)
    values = check_values("values", values)
    scan = _check_scan(values, terminal_rewards, loss_mask, gamma, lam, rewards, bootstrap_values, None)
    return call(_ops.td_lambda.default, *scan, False)


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
    """TD(lambda) targets of packed sequences: :func:`compute_lambda_return` without padding.

    Sequence b is the tokens ``cu_seqlens[b]`` to ``cu_seqlens[b + 1] - 1``; it may be empty. Same bits from run to run.
    Tiles begin elsewhere than in padded rows, so that float64 targets agree to 4 ulp of the largest of 1 and abs(G).

    Args:
        values: V, [total] or [total, 1]; float32, bfloat16, float16 or float64.
        terminal_rewards: R, [B], any real dtype.
        cu_seqlens: [B + 1], int32 or int64, from 0 to total without falling. Checked on the CPU; on a device, which is
            not waited for, no content can lead out of bounds.
        loss_mask: [total], any real dtype, nonzero = valid; None: every token is.
        gamma: discount per valid token, in [0, 1]; a float, or a 0-dim or [B] floating tensor.
        lam: lambda, likewise.
        rewards: r, [total], any real dtype.
        bootstrap_values: b, [B], any real dtype.

    Returns:
        G, [total], in the dtype of ``values``. Differentiable as that of :func:`compute_lambda_return`.

    Raises:
        TypeError: a tensor argument is no tensor or has an unsupported dtype; gamma or lam is no real number.
        ValueError: a shape or device does not match; ``cu_seqlens``, gamma or lam is not as above.
    """
    values = check_packed_values("values", values)
    scan = _check_scan(values, terminal_rewards, loss_mask, gamma, lam, rewards, bootstrap_values, cu_seqlens)
    return call(_ops.td_lambda.default, *scan, False)


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
    r"""Generalised advantage estimates of masked sequences: :math:`A = G - V` at valid tokens, 0 elsewhere.

    G is the return of :func:`compute_lambda_return`; this is the sum of discounted TD errors of Schulman et al., with
    no value after the end but ``bootstrap_values``.

    Args:
        values: V, [B, T] or [B, T, 1], or [total] or [total, 1] with ``cu_seqlens``.
        terminal_rewards: R, [B], any real dtype.
        loss_mask: the shape of the values, any real dtype, nonzero = valid; with ``cu_seqlens`` None: every token is.
        gamma: discount per valid token, in [0, 1]; a float, or a 0-dim or [B] floating tensor.
        lam: lambda, likewise.
        rewards: r, the shape of the values, any real dtype.
        bootstrap_values: b, [B], any real dtype.
        cu_seqlens: [B + 1], int32 or int64: packed sequences, see :func:`lambda_return_varlen`.
        whiten: give the advantages mean 0 and variance 1, see :func:`masked_whiten`.
        group: the ranks over which to whiten, a torch.distributed process group; None: this process alone.

    Returns:
        A, the shape of the values without a last 1, in their dtype. Differentiable unless whitened; detach it for a
        policy loss.

    Raises:
        TypeError: a tensor argument is no tensor or has an unsupported dtype; gamma or lam is no real number.
        ValueError: a shape or device does not match; ``cu_seqlens``, gamma or lam is out of range.

    Source: Schulman et al. (2016), arXiv:1506.02438, equation 16.
    """
    values = (check_value_logits if cu_seqlens is None else check_packed_values)("values", values)
    scan = _check_scan(values, terminal_rewards, loss_mask, gamma, lam, rewards, bootstrap_values, cu_seqlens)
    advantages = call(_ops.td_lambda.default, *scan, True)
    return masked_whiten(advantages, loss_mask, group=group) if whiten else advantages


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
    r"""Targets for the critic and advantages for the policy, each with a lambda of its own, in one operator.

    Args:
        values: V, [B, T] or [B, T, 1], or [total] or [total, 1] with ``cu_seqlens``.
        terminal_rewards: R, [B], any real dtype.
        loss_mask: the shape of the values, any real dtype, nonzero = valid; with ``cu_seqlens`` None: every token is.
        gamma: discount per valid token, in [0, 1]; a float, or a 0-dim or [B] floating tensor.
        lam_returns: lambda of the returns, likewise.
        lam_advantages: lambda of the advantages, likewise.
        rewards: r, the shape of the values, any real dtype.
        bootstrap_values: b, [B], any real dtype.
        cu_seqlens: [B + 1], int32 or int64: packed sequences, see :func:`lambda_return_varlen`.
        whiten: give the advantages mean 0 and variance 1, see :func:`masked_whiten`.
        group: the ranks over which to whiten, a torch.distributed process group; None: this process alone.

    Returns:
        The returns of :func:`compute_lambda_return` and the advantages of :func:`gae`, both without gradient, in the
        dtype of the values.

    Raises:
        TypeError: a tensor argument is no tensor or has an unsupported dtype; gamma or lam is no real number.
        ValueError: a shape or device does not match; ``cu_seqlens``, gamma or lam is out of range.

    Source: Yuan et al., VC-PPO (2025), arXiv:2503.01491, and Yue et al., VAPO (2025), arXiv:2504.05118: decoupled GAE.
    """
    values = (check_value_logits if cu_seqlens is None else check_packed_values)("values", values)
    scan = _check_scan(
        values, terminal_rewards, loss_mask, gamma, lam_returns, rewards, bootstrap_values, cu_seqlens, "lam_returns"
    )
    second_lam = check_discount("lam_advantages", lam_advantages, values, scan.rows)
    constants = (x if x is None else x.detach() for x in scan)
    returns, advantages = call(_ops.td_lambda_pair.default, *constants, second_lam)
    return returns, masked_whiten(advantages, loss_mask, group=group) if whiten else advantages


def masked_whiten(x: Tensor, mask: Tensor | None, *, group: Any = None, eps: float = 1e-8) -> Tensor:
    r""":math:`(x - \mu) / \sqrt{\sigma^2 + \epsilon}` at valid tokens, 0 elsewhere.

    Mean and variance (with n - 1) run over the valid tokens of all ranks of ``group``, by one all-reduce of three
    numbers in float64; nothing is waited for. Fewer than two valid tokens: the variance is 0.

    Args:
        x: any shape; float32, bfloat16, float16 or float64.
        mask: the shape of ``x``, any real dtype, nonzero = valid; None: everything is.
        group: a torch.distributed process group; None: this process alone.
        eps: added to the variance.

    Returns:
        The shape and dtype of ``x``, without gradient.

    Raises:
        TypeError: an argument is no tensor or has an unsupported dtype.
        ValueError: the shape or device of ``mask`` does not match.
    """
    check_floating("x", x)
    if mask is not None:
        check_like("mask", mask, x, of="x")
    valid = torch.ones_like(x, dtype=torch.bool) if mask is None else mask != 0
    kept = torch.where(valid, x.detach(), 0.0).to(torch.float64)
    sums = torch.stack([valid.sum(dtype=torch.float64), kept.sum(), (kept * kept).sum()])
    if group is not None:
        torch.distributed.all_reduce(sums, group=group)
    count, total, squares = sums.unbind()
    mean = total / count.clamp(min=1)
    variance = ((squares - total * mean) / (count - 1).clamp(min=1)).clamp(min=0)
    return torch.where(valid, (kept - mean) * (variance + eps).rsqrt(), 0.0).to(x.dtype)


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
    r"""Masked loss of values against their own TD(lambda) targets, in one fused pass; by default the squared error.

    With :math:`m` = ``attention_mask`` * ``loss_mask`` (nonzero = 1) and G of :func:`compute_lambda_return` over
    ``loss_mask`` alone,

    .. math::
        L = \frac{\sum m (V - G)^2}{\sum m}, \qquad
        \frac{\partial L}{\partial V} = \frac{2 m (V - G)}{\sum m},

    and 0 with zero gradient where no token counts. The targets are constants: no gradient flows through G, nor to
    ``terminal_rewards``. G is never stored: forward and backward each read the values and masks once.

    ``loss`` chooses what stands in place of the square, with :math:`e = V - G`:

    * ``mse``: :math:`e^2`, without a factor of one half;
    * ``huber``: :math:`e^2 / 2` where :math:`|e| \le \delta`, else :math:`\delta (|e| - \delta / 2)`;
    * ``smooth_l1``: ``huber`` divided by :math:`\delta`;
    * ``bce``: :math:`-G \log V - (1 - G) \log(1 - V)` of a head that ends in a sigmoid, logarithms no less than -100;
    * ``bce_with_logits``: the same with :math:`V = \sigma(x)` of a head that gives the logit x.

    With ``old_values`` the first three are clipped as PPO's value loss: the larger of the losses of V and of
    :math:`V_{old} + \mathrm{clamp}(V - V_{old}, -c, c)`, c = ``clip_range``. Where both are
    equal the gradient is that of V's.

    ``reduction``: ``token_mean`` as above; ``sequence_mean``, the mean over sequences of the mean over their tokens
    (sequences without a token count nowhere), so that long ones weigh no more; ``sum``; or ``none``, [B, T] with 0
    where m is 0. ``normalizer`` takes the place of the number of tokens, or of sequences: give it the count over all
    ranks and micro-batches.

    Args:
        value_logits: V or x, [B, T] or [B, T, 1]; float32, bfloat16, float16 or float64.
        terminal_rewards: R, [B], any real dtype.
        attention_mask: [B, T], any real dtype, nonzero = valid; weights the error only.
        loss_mask: [B, T], any real dtype, nonzero = output token. One byte mask given as both is read once.
        gamma: discount per valid token, in [0, 1]; a float, or a 0-dim or [B] floating tensor on the device of the
            values.
        lam: lambda, likewise.
        rewards: r, [B, T], any real dtype; see :func:`compute_lambda_return`.
        bootstrap_values: b, [B], any real dtype; likewise.
        output_mask: [B, T], any real dtype: all output tokens, where ``loss_mask`` is only a window of them. The return
            then runs over these, from the true end of the sequence where the terminal reward arrives.
        loss: ``mse``, ``huber``, ``smooth_l1``, ``bce`` or ``bce_with_logits``.
        delta: of ``huber`` and ``smooth_l1``, above 0.
        old_values: the shape and dtype of ``value_logits``; needs ``clip_range``.
        clip_range: c, above 0.
        reduction: ``token_mean``, ``sequence_mean``, ``sum`` or ``none``.
        normalizer: 0-dim, on the device of the values, for the two means; 0 gives a loss of 0.
        detach_targets: False lets the gradient flow through G too, to any order; fused for the first three losses
            without clipping in eager code, unless a gradient of the gradient is wanted.
        return_statistics: also return the sums from which :func:`explained_variance` is computed.

    Returns:
        The loss, 0-dim (but for ``none``), float32 (float64 for float64 values). With ``return_statistics`` the loss
        and [6], float64: the number of tokens that count, and over these the sums of G, :math:`G^2`, G - V and
        :math:`(G - V)^2` and the number of those that were clipped. Add them up over ranks and steps.

    Raises:
        TypeError: a tensor argument is no tensor or has an unsupported dtype; a number is none.
        ValueError: a shape or device does not match; gamma, lam, delta or clip_range is out of range; an option is
            unknown or does not go with the others.
    """
    if (
        loss == "mse"
        and reduction == "token_mean"
        and detach_targets
        and not return_statistics
        and rewards is bootstrap_values is output_mask is old_values is clip_range is normalizer is None
        and (numbers := _as_numbers(gamma, lam))
    ):
        tensors = _squeezed(value_logits), terminal_rewards, attention_mask, loss_mask
        return _explained(call_loss, _explain_loss, _ops.lambda_value_loss.default, *tensors, *numbers)
    values = check_value_logits("value_logits", value_logits)
    check_like("attention_mask", attention_mask, values)
    check_like("loss_mask", loss_mask, values)
    mask_name, mask = "loss_mask", loss_mask
    if output_mask is not None:
        check_like("output_mask", output_mask, values)
        attention_mask = (attention_mask != 0) & (loss_mask != 0)
        mask_name, mask = "output_mask", output_mask
    scan = _check_scan(values, terminal_rewards, mask, gamma, lam, rewards, bootstrap_values, None, mask_name=mask_name)
    if old_values is not None:
        old_values = check_value_logits("old_values", old_values)
    return _value_loss(
        scan,
        attention_mask,
        _check_loss(values, loss, delta, old_values, clip_range, reduction, normalizer),
        detach_targets,
        return_statistics,
    )


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
    """Masked loss of packed values against their own TD(lambda) targets, in one fused pass.

    :func:`compute_lambda_value_loss` without padding: the same formulas, options and errors, with [total] in place of
    [B, T] and ``cu_seqlens`` as in :func:`lambda_return_varlen`. There is no attention mask, as there is no padding;
    without ``loss_mask`` every token counts.

    Args:
        value_logits: V or x, [total] or [total, 1]; float32, bfloat16, float16 or float64.
        terminal_rewards: R, [B], any real dtype.
        cu_seqlens: [B + 1], int32 or int64, from 0 to total without falling.
        loss_mask: [total], any real dtype, nonzero = output token; None: every token is.
        gamma: discount per valid token, in [0, 1]; a float, or a 0-dim or [B] floating tensor.
        lam: lambda, likewise.
        rewards: r, [total], any real dtype.
        bootstrap_values: b, [B], any real dtype.
        output_mask: [total], any real dtype: all output tokens, where ``loss_mask`` is only a window of them.
        loss: see :func:`compute_lambda_value_loss`, and so the rest.
        delta: of ``huber`` and ``smooth_l1``, above 0.
        old_values: the shape and dtype of ``value_logits``.
        clip_range: above 0.
        reduction: ``token_mean``, ``sequence_mean``, ``sum`` or ``none``.
        normalizer: 0-dim, on the device of the values.
        detach_targets: False lets the gradient flow through G too.
        return_statistics: also return the sums.

    Returns:
        The loss, or the loss and the statistics.

    Raises:
        TypeError: a tensor argument is no tensor or has an unsupported dtype; a number is none.
        ValueError: a shape or device does not match; a number is out of range; an option is unknown or does not go with
            the others.
    """
    values = check_packed_values("value_logits", value_logits)
    attention_mask, mask, mask_name = None, loss_mask, "loss_mask"
    if output_mask is not None:
        if loss_mask is not None:
            check_like("loss_mask", loss_mask, values)
        attention_mask, mask, mask_name = loss_mask, output_mask, "output_mask"
    scan = _check_scan(
        values, terminal_rewards, mask, gamma, lam, rewards, bootstrap_values, cu_seqlens, mask_name=mask_name
    )
    if old_values is not None:
        old_values = check_packed_values("old_values", old_values)
    return _value_loss(
        scan,
        attention_mask,
        _check_loss(values, loss, delta, old_values, clip_range, reduction, normalizer),
        detach_targets,
        return_statistics,
    )


def check_normalizer(normalizer: Tensor | None, reduction: str, values: Tensor) -> Tensor | None:
    """Return what takes the place of a mean's own count, without gradient."""
    if normalizer is None:
        return None
    check_tensor("normalizer", normalizer)
    if not reduction.endswith("_mean"):
        raise ValueError(f"normalizer must be None with reduction {reduction!r}: there is no mean to normalise")
    if normalizer.dim() != 0 or normalizer.is_complex():
        raise ValueError(f"normalizer must be real and 0-dim, got {normalizer.dtype} {list(normalizer.shape)}")
    if normalizer.device != values.device:
        raise ValueError(f"normalizer must be on the device of the values, {values.device}, got {normalizer.device}")
    return normalizer.detach()


class _Loss(NamedTuple):
    kind: int
    delta: float
    old_values: Tensor | None
    clip_range: float
    reduction: int
    normalizer: Tensor | None


def _check_loss(
    values: Tensor,
    loss: str,
    delta: float,
    old_values: Tensor | None,
    clip_range: float | None,
    reduction: str,
    normalizer: Tensor | None,
) -> _Loss:
    kind = check_choice("loss", loss, LOSS_KINDS)
    how = check_choice("reduction", reduction, REDUCTIONS)
    if (old_values is None) != (clip_range is None):
        given, missing = ("clip_range", "old_values") if old_values is None else ("old_values", "clip_range")
        raise ValueError(f"{missing} must be given with {given}, got None")
    if old_values is not None:
        if loss.startswith("bce"):
            raise ValueError(f"old_values must be None with loss {loss!r}: only mse, huber and smooth_l1 are clipped")
        check_like("old_values", old_values, values)
        if old_values.dtype != values.dtype:
            raise TypeError(f"old_values must have the dtype of the values, {values.dtype}, got {old_values.dtype}")
        old_values = old_values.detach()
    normalizer = check_normalizer(normalizer, reduction, values)
    clip = 0.0 if clip_range is None else check_positive("clip_range", clip_range)
    return _Loss(kind, check_positive("delta", delta), old_values, clip, how, normalizer)


def _value_loss(
    scan: _Scan, attention_mask: Tensor | None, loss: _Loss, detach_targets: bool, return_statistics: bool
) -> Any:
    if detach_targets:
        rewards = None if scan.rewards is None else scan.rewards.detach()
        scan = scan._replace(terminal_rewards=scan.terminal_rewards.detach(), rewards=rewards)
        result, _scale, statistics = call(_ops.td_lambda_loss.default, *_operands(scan, attention_mask, loss))
        return (result, statistics) if return_statistics else result

    # A gradient of two parts is rounded to a half type as their sum.
    scan = scan._replace(values=scan.values.to(torch.float64 if scan.values.dtype == torch.float64 else torch.float32))
    of_error_alone = loss.old_values is None and not LOSS_KINDS[loss.kind].startswith("bce")
    if of_error_alone and not (is_compiling() or torch._C._are_functorch_transforms_active()):
        result, statistics = _LossThroughTargets.apply(*_operands(scan, attention_mask, loss))
        return (result, statistics) if return_statistics else result
    return _unfused_value_loss(scan, attention_mask, loss, return_statistics)


def _operands(scan: _Scan, attention_mask: Tensor | None, loss: _Loss) -> tuple:
    """Return the arguments of td_lambda_loss."""
    return (
        scan.values,
        scan.terminal_rewards,
        scan.mask,
        attention_mask,
        scan.rewards,
        loss.old_values,
        scan.cu_seqlens,
        scan.gamma,
        scan.lam,
        loss.normalizer,
        loss.kind,
        loss.delta,
        loss.clip_range,
        loss.reduction,
    )


class _LossThroughTargets(Function):
    """A loss of V - G alone, whose gradient through G is that through V with the sign changed.

    Takes the arguments of td_lambda_loss and returns the loss and the statistics. Gradients of gradients are those of
    the same loss in torch's operations.
    """

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> tuple[Tensor, Tensor]:
        result, scale, statistics = call(_ops.td_lambda_loss.default, *operands)
        ctx.save_for_backward(scale, *operands[:10])
        ctx.options = operands[10:]
        ctx.mark_non_differentiable(statistics)
        return result, statistics

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _grad_statistics: Tensor) -> tuple[Tensor | None, ...]:
        scale, *tensors = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if torch.is_grad_enabled():
            wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
            for i in wanted:  # one tensor may be given twice, and gets each use's gradient
                tensors[i] = tensors[i].view_as(tensors[i])
            values, terminal_rewards, mask, attention_mask, rewards, _old, cu_seqlens, gamma, lam, normalizer = tensors
            kind, delta, _clip_range, reduction = ctx.options
            scan = _Scan(values, terminal_rewards, mask, rewards, cu_seqlens, gamma, lam)
            loss = _Loss(kind, delta, None, 0.0, reduction, normalizer)
            result = _unfused_value_loss(scan, attention_mask, loss, return_statistics=False)
            found = torch.autograd.grad(result, [tensors[i] for i in wanted], grad_loss, create_graph=True)
            for i, grad in zip(wanted, found, strict=True):
                grads[i] = grad
            return tuple(grads)

        _values, terminal_rewards, mask, _attention_mask, rewards, _old, cu_seqlens, gamma, lam, _normalizer = tensors
        through_values = call(_ops.td_lambda_loss_backward.default, grad_loss, scale, *tensors[:-1], *ctx.options)
        with_rewards = ctx.needs_input_grad[4]
        through_targets, grad_terminal, grad_rewards = call(
            _ops.td_lambda_backward.default, through_values, mask, cu_seqlens, gamma, lam, with_rewards
        )
        grads[0] = through_values.sub_(through_targets)
        grads[1] = grad_terminal.neg_().to(terminal_rewards.dtype)
        if with_rewards:
            grads[4] = grad_rewards.neg_().to(rewards.dtype)
        return tuple(grads)


def _unfused_value_loss(scan: _Scan, attention_mask: Tensor | None, loss: _Loss, return_statistics: bool) -> Any:
    """The loss in torch's operations but for the return: differentiable to any order, through the targets too."""
    outputs = scan.values
    if scan.mask is not None:  # a NaN at a masked position would survive the derivative of a sigmoid
        outputs = torch.where(scan.mask != 0, outputs, 0.0)
    values = outputs.sigmoid() if LOSS_KINDS[loss.kind] == "bce_with_logits" else outputs
    targets = call(_ops.td_lambda.default, values, *scan[1:], False)
    counts = torch.ones_like(values, dtype=torch.bool)
    for mask in (scan.mask, attention_mask):
        counts = counts if mask is None else counts & (mask != 0)
    losses, clipped = reference.token_losses(
        outputs, targets, counts, LOSS_KINDS[loss.kind], loss.delta, loss.old_values, loss.clip_range
    )
    result = reference.reduce_losses(losses, counts, REDUCTIONS[loss.reduction], loss.normalizer, scan.cu_seqlens)
    return (result, reference.token_statistics(values, targets, counts, clipped)) if return_statistics else result


def explained_variance(statistics: Tensor) -> Tensor:
    r""":math:`1 - \mathrm{Var}(G - V) / \mathrm{Var}(G)` over tokens, from the statistics of the fused loss.

    Exact over any number of ranks and steps: add the statistics up first, with one all-reduce over ranks. 1 is a
    perfect critic, 0 one that is no better than a constant. NaN where the targets do not vary by more than the sums
    are rounded: by about a millionth of their root mean square, in float64. Nothing is waited for.

    Args:
        statistics: [6], float64, from ``return_statistics``; or [..., 6].

    Returns:
        [...], float64.

    Raises:
        TypeError: ``statistics`` is no tensor or not floating.
        ValueError: its last dimension is not 6.
    """
    check_tensor("statistics", statistics)
    if not statistics.is_floating_point():
        raise TypeError(f"statistics must be floating, got {statistics.dtype}")
    if statistics.dim() < 1 or statistics.shape[-1] != 6:
        raise ValueError(f"statistics must have shape [..., 6], got {list(statistics.shape)}")
    count, returns, squared_returns, errors, squared_errors, _clipped = statistics.to(torch.float64).unbind(-1)
    count = count.clamp(min=1)
    mean_square = squared_returns / count
    variance = mean_square - (returns / count) ** 2
    left = squared_errors / count - (errors / count) ** 2
    # Sums of one number over and over are rounded to one side: up to 135 eps of the mean square over 2 million tokens.
    rounding = 4096 * torch.finfo(statistics.dtype).eps * mean_square
    return torch.where(variance > rounding, 1 - left / variance, torch.nan)


def compute_mc_value_loss(value_logits: Tensor, rewards: Tensor, attention_mask: Tensor, loss_mask: Tensor) -> Tensor:
    r"""Masked mean squared error of values against the terminal reward of their sequence (Monte-Carlo).

    :func:`compute_lambda_value_loss` with gamma = lam = 1: the target of every output token is R.

    Args:
        value_logits: V, [B, T] or [B, T, 1]; float32, bfloat16, float16 or float64.
        rewards: R, [B], any real dtype.
        attention_mask: [B, T], any real dtype, nonzero = valid.
        loss_mask: [B, T], any real dtype, nonzero = output token.

    Returns:
        The loss, 0-dim, float32 (float64 for float64 values); 0 where no token counts.

    Raises:
        TypeError: an argument is no tensor or has an unsupported dtype.
        ValueError: a shape or device does not match.
    """
    tensors = _squeezed(value_logits), rewards, attention_mask, loss_mask
    return _explained(call_loss, _explain_mc_loss, _ops.lambda_value_loss.default, *tensors, 1.0, 1.0)


def masked_mse(values: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    r"""Masked mean squared error against targets computed elsewhere, fused: :math:`\sum m (V - G)^2 / \sum m`.

    Args:
        values: V, [B, T] or [B, T, 1]; float32, bfloat16, float16 or float64.
        targets: G, the shape of ``values``, in their dtype or in float32 for the half types. Differentiable too.
        mask: [B, T], any real dtype, nonzero = valid.

    Returns:
        The loss, 0-dim, float32 (float64 for float64 values); 0 where no token counts.

    Raises:
        TypeError: an argument is no tensor or has an unsupported dtype.
        ValueError: a shape or device does not match.
    """
    tensors = _squeezed(values), _squeezed(targets), mask
    return _explained(call_loss, _explain_mse, _ops.masked_mse.default, *tensors)


def create_eos_only_mask(loss_mask: Tensor) -> Tensor:
    """Mask of the last output token of each sequence, for the warm-up that trains on the outcome alone.

    Args:
        loss_mask: [B, T], bool, any integer, float16, bfloat16, float32 or float64; nonzero = output token.

    Returns:
        [B, T], float32: 1 at the last nonzero position of each row, 0 elsewhere; rows without one stay 0.

    Raises:
        TypeError: ``loss_mask`` is no tensor or has an unsupported dtype.
        ValueError: ``loss_mask`` is not two-dimensional.
    """
    check_tensor("loss_mask", loss_mask)
    if loss_mask.is_complex():
        raise TypeError(f"loss_mask must have a real dtype, got {loss_mask.dtype}")
    if loss_mask.is_floating_point() and loss_mask.dtype not in VALUE_DTYPES:
        raise TypeError(f"loss_mask must be float32, bfloat16, float16 or float64 if floating, got {loss_mask.dtype}")
    if loss_mask.dim() != 2:
        raise ValueError(f"loss_mask must have shape [B, T], got {list(loss_mask.shape)}")
    return call(_ops.eos_mask.default, loss_mask.detach()).to(torch.float32)


# ---- right and wrong solutions in pairs --------------------------------------------------------------------------


def _mean_value(name: str, values: Tensor, mask_name: str, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean value over the masked tokens of each row, [B] (0 where there are none), and their number, [B]."""
    values = check_value_logits(name, values)
    check_like(mask_name, mask, values)
    valid = mask != 0
    values = values if values.dtype == torch.float64 else values.float()
    count = valid.sum(dim=1)
    return torch.where(valid, values, 0.0).sum(dim=1) / count.clamp(min=1), count


def _pair_means(
    v_pos: Tensor, v_neg: Tensor, loss_mask_pos: Tensor, loss_mask_neg: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean values of the right and wrong side of each pair, [B], and which pairs have tokens on both sides, [B]."""
    mean_pos, count_pos = _mean_value("v_pos", v_pos, "loss_mask_pos", loss_mask_pos)
    mean_neg, count_neg = _mean_value("v_neg", v_neg, "loss_mask_neg", loss_mask_neg)
    if mean_pos.shape != mean_neg.shape:
        raise ValueError(f"v_neg must have as many rows as v_pos, {mean_pos.shape[0]}, got {mean_neg.shape[0]}")
    if mean_pos.device != mean_neg.device:
        raise ValueError(f"v_neg must be on the device of v_pos, {mean_pos.device}, got {mean_neg.device}")
    return mean_pos, mean_neg, (count_pos > 0) & (count_neg > 0)


def pairwise_ranking_loss(v_pos: Tensor, v_neg: Tensor, loss_mask_pos: Tensor, loss_mask_neg: Tensor) -> Tensor:
    r"""Bradley-Terry ranking loss of right against wrong solutions.

    The mean over pairs of :math:`-\log \sigma(\bar V_{pos} - \bar V_{neg})`, with :math:`\bar V` the mean value over
    the output tokens. A pair in which either side has no output token counts nowhere; no pairs at all give 0.

    Args:
        v_pos: values of the right solutions, [B, T] or [B, T, 1]; float32, bfloat16, float16 or float64.
        v_neg: values of the wrong solutions, [B, T'] or [B, T', 1].
        loss_mask_pos: [B, T], any real dtype, nonzero = output token.
        loss_mask_neg: [B, T'], likewise.

    Returns:
        The loss, 0-dim, float32 (float64 for float64 values).

    Raises:
        TypeError: an argument is no tensor or has an unsupported dtype.
        ValueError: a shape or device does not match.

    Source: Bradley and Terry (1952); as a reward-model loss, Ouyang et al. (2022), arXiv:2203.02155, equation 1.
    """
    mean_pos, mean_neg, counts = _pair_means(v_pos, v_neg, loss_mask_pos, loss_mask_neg)
    losses = -nn.functional.logsigmoid(mean_pos - mean_neg)
    return torch.where(counts, losses, 0.0).sum() / counts.sum().clamp(min=1)


@torch.no_grad()
def compute_pairwise_accuracy(
    v_pos: Tensor, v_neg: Tensor, loss_mask_pos: Tensor, loss_mask_neg: Tensor
) -> dict[str, float | int]:
    """How often the mean value of the right solution is above that of the wrong one.

    A tie counts as wrong. A pair in which either side has no output token counts nowhere. Waits for the device.

    Args:
        v_pos: values of the right solutions, [B, T] or [B, T, 1]; float32, bfloat16, float16 or float64.
        v_neg: values of the wrong solutions, [B, T'] or [B, T', 1].
        loss_mask_pos: [B, T], any real dtype, nonzero = output token.
        loss_mask_neg: [B, T'], likewise.

    Returns:
        ``pairwise_accuracy``, ``mean_pos``, ``mean_neg``, ``margin`` (mean_pos - mean_neg), ``correct_pairs`` and
        ``total_pairs``; all 0 where there is no pair.

    Raises:
        TypeError: an argument is no tensor or has an unsupported dtype.
        ValueError: a shape or device does not match.
    """
    mean_pos, mean_neg, counts = _pair_means(v_pos, v_neg, loss_mask_pos, loss_mask_neg)
    sums = torch.stack(
        [
            counts.sum(dtype=torch.float64),
            (counts & (mean_pos > mean_neg)).sum(dtype=torch.float64),
            torch.where(counts, mean_pos, 0.0).sum(dtype=torch.float64),
            torch.where(counts, mean_neg, 0.0).sum(dtype=torch.float64),
        ]
    )
    total, correct, sum_pos, sum_neg = sums.tolist()
    pairs = max(total, 1.0)
    return {
        "pairwise_accuracy": correct / pairs,
        "mean_pos": sum_pos / pairs,
        "mean_neg": sum_neg / pairs,
        "margin": (sum_pos - sum_neg) / pairs,
        "correct_pairs": int(correct),
        "total_pairs": int(total),
    }


@torch.no_grad()
def compute_token_variance(values: Tensor, mask: Tensor) -> float:
    """Mean over sequences of the population variance of the values over the masked tokens.

    0 for a critic that says the same at every token. Sequences without a masked token count nowhere; none at all
    give 0. Waits for the device.

    Args:
        values: [B, T] or [B, T, 1]; float32, bfloat16, float16 or float64.
        mask: [B, T], any real dtype, nonzero = output token.

    Raises:
        TypeError: an argument is no tensor or has an unsupported dtype.
        ValueError: a shape or device does not match.
    """
    values = check_value_logits("values", values)
    mean, count = _mean_value("values", values, "mask", mask)
    deviation = torch.where(mask != 0, values.to(mean.dtype) - mean[:, None], 0.0)
    variance = (deviation**2).sum(dim=1) / count.clamp(min=1)
    return (variance.sum(dtype=torch.float64) / (count > 0).sum().clamp(min=1)).item()


# ---- value heads -------------------------------------------------------------------------------------------------

_HEAD_NAMES = ("value_head", "linear", "mlp", "score")


def _output_layer(module: nn.Module) -> tuple[nn.Linear, bool] | None:
    """Return the last Linear of a value head and whether a sigmoid follows it, or None."""
    if isinstance(module, nn.Linear):
        return module, False
    if isinstance(module, nn.Sequential):
        layers = list(module)
        sigmoid = bool(layers) and isinstance(layers[-1], nn.Sigmoid)
        found = _output_layer(layers[-2 if sigmoid else -1]) if len(layers) > sigmoid else None
        return (found[0], sigmoid or found[1]) if found else None
    for name in _HEAD_NAMES:
        child = getattr(module, name, None)
        if isinstance(child, nn.Module):
            return _output_layer(child)
    return None


def init_value_head_bias(module: nn.Module, bias: float) -> None:
    """Set the bias of a value head so that its first prediction is ``bias`` where its last weights are zero.

    The head is a Linear, a Sequential whose last layer is a head, or a module that holds one as ``value_head``,
    ``linear``, ``mlp`` or ``score``, nested to any depth. Where the head ends in a Sigmoid the bias becomes
    logit(bias). Weights are left alone.

    Args:
        module: the head, or a model that holds it.
        bias: the first prediction, a finite number; strictly between 0 and 1 for a head that ends in a sigmoid.

    Raises:
        TypeError: no head is found in ``module``, or ``bias`` is no real number.
        ValueError: the head's last Linear has no bias, or ``bias`` is not a possible prediction.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    if isinstance(bias, bool) or not isinstance(bias, Real):
        raise TypeError(f"bias must be a float, got {type(bias).__name__}")
    bias = float(bias)
    if not math.isfinite(bias):
        raise ValueError(f"bias must be finite, got {bias}")
    found = _output_layer(module)
    if found is None:
        children = ", ".join(f"{name}: {type(child).__name__}" for name, child in module.named_children()) or "nothing"
        raise TypeError(
            "module must be a Linear, a Sequential that ends in one, or hold one as "
            f"{', '.join(_HEAD_NAMES)}; got {type(module).__name__} with {children}"
        )
    layer, sigmoid = found
    if layer.bias is None:
        raise ValueError("module must have a bias in its last Linear, got one with bias=False")
    if sigmoid:
        if not 0.0 < bias < 1.0:
            raise ValueError(f"bias must be strictly between 0 and 1 for a head that ends in a sigmoid, got {bias}")
        bias = math.log(bias / (1.0 - bias))
    with torch.no_grad():
        layer.bias.fill_(bias)
