"""The public functions: arguments checked, then one operator each.

Shapes: B sequences of at most T tokens. Values are float64, float32, bfloat16 or float16 in any layout; rows that are
contiguous in T are read in place, any other layout costs one contiguous copy. Masks are bool, any integer or any
floating dtype, nonzero = valid; bool, uint8 and int8 are read in place, any other dtype becomes one bool copy. What
stands at a masked position is never used: NaN or Inf there reaches no output and no gradient.

Every function raises TypeError for an argument of the wrong type or dtype and ValueError for one of the wrong shape,
device or range, before anything is computed.
"""

import math
from numbers import Real

import torch
from torch import Tensor, nn

from ._registrations import call

_ops = torch.ops.lambda_return

_VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# ---- arguments ---------------------------------------------------------------------------------------------------


def _check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")


def _check_values(name: str, values: Tensor) -> Tensor:
    _check_tensor(name, values)
    if values.dtype not in _VALUE_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {values.dtype}")
    if values.dim() != 2:
        raise ValueError(f"{name} must have shape [B, T], got {list(values.shape)}")
    return values


def _check_value_logits(name: str, value_logits: Tensor) -> Tensor:
    """Check [B, T] or [B, T, 1] and return [B, T]."""
    _check_tensor(name, value_logits)
    if value_logits.dim() == 3 and value_logits.shape[-1] == 1:
        value_logits = value_logits.squeeze(-1)
    if value_logits.dim() != 2:
        raise ValueError(f"{name} must have shape [B, T] or [B, T, 1], got {list(value_logits.shape)}")
    return _check_values(name, value_logits)


def _check_like(name: str, x: Tensor, values: Tensor) -> None:
    _check_tensor(name, x)
    if x.is_complex():
        raise TypeError(f"{name} must have a real dtype, got {x.dtype}")
    if x.shape != values.shape:
        raise ValueError(f"{name} must have the shape of the values, {list(values.shape)}, got {list(x.shape)}")
    if x.device != values.device:
        raise ValueError(f"{name} must be on the device of the values, {values.device}, got {x.device}")


def _check_rewards(name: str, rewards: Tensor, values: Tensor) -> None:
    _check_tensor(name, rewards)
    if rewards.is_complex():
        raise TypeError(f"{name} must have a real dtype, got {rewards.dtype}")
    if rewards.dim() != 1 or rewards.shape[0] != values.shape[0]:
        raise ValueError(f"{name} must have shape [B] = [{values.shape[0]}], got {list(rewards.shape)}")
    if rewards.device != values.device:
        raise ValueError(f"{name} must be on the device of the values, {values.device}, got {rewards.device}")


def check_unit_interval(name: str, x: float) -> float:
    """Return ``x`` as a float if it is a real number in [0, 1]; raise TypeError or ValueError otherwise."""
    if type(x) is not float:
        if isinstance(x, bool) or not isinstance(x, Real):
            raise TypeError(f"{name} must be a float, got {type(x).__name__}")
        x = float(x)
    if not 0.0 <= x <= 1.0:  # also refuses NaN
        raise ValueError(f"{name} must be in [0, 1], got {x}")
    return x


# ---- returns and losses ------------------------------------------------------------------------------------------


def compute_lambda_return(
    values: Tensor, terminal_rewards: Tensor, loss_mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> Tensor:
    r"""TD(lambda) targets of masked sequences with one terminal reward each.

    For one sequence with valid positions :math:`p_1 < \dots < p_n` (``loss_mask`` nonzero) and terminal reward R

    .. math::
        G_{p_n} = R, \qquad
        G_{p_i} = \gamma \left( (1 - \lambda) V_{p_{i+1}} + \lambda G_{p_{i+1}} \right),

    and G = 0 at masked positions. Gaps in the mask cost no discount. ``lam=1`` gives the Monte-Carlo target
    (with ``gamma=1``, R everywhere) and never reads ``values``; ``lam=0`` uses only the next value.

    Differentiable, to any order, in ``values`` and ``terminal_rewards``; detach the result to use it as a target.

    Args:
        values: V, [B, T]; float32, bfloat16, float16 or float64. Accumulated in float32 (float64 for float64).
        terminal_rewards: R, [B], any real dtype.
        loss_mask: [B, T], any real dtype, nonzero = valid.
        gamma: discount per valid token, in [0, 1].
        lam: lambda, in [0, 1].

    Returns:
        G, [B, T], contiguous, in the dtype of ``values``.

    Raises:
        TypeError: a tensor argument is no tensor or has an unsupported dtype; gamma or lam is no real number.
        ValueError: a shape or device does not match; gamma or lam is outside [0, 1].

    Source: Sutton and Barto, Reinforcement Learning (2nd ed.), section 12.1, the recursive form of the lambda-return.
    """
    values = _check_values("values", values)
    _check_rewards("terminal_rewards", terminal_rewards, values)
    _check_like("loss_mask", loss_mask, values)
    gamma, lam = check_unit_interval("gamma", gamma), check_unit_interval("lam", lam)
    return call(_ops.lambda_return.default, values, terminal_rewards, loss_mask, gamma, lam)


def compute_lambda_value_loss(
    value_logits: Tensor,
    terminal_rewards: Tensor,
    attention_mask: Tensor,
    loss_mask: Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> Tensor:
    r"""Masked mean squared error of values against their own TD(lambda) targets, in one fused pass.

    With :math:`m` = ``attention_mask`` * ``loss_mask`` (nonzero = 1) and G of :func:`compute_lambda_return` over
    ``loss_mask`` alone,

    .. math::
        L = \frac{\sum m (V - G)^2}{\sum m}, \qquad
        \frac{\partial L}{\partial V} = \frac{2 m (V - G)}{\sum m},

    and 0 with zero gradient where no token counts. The targets are constants: no gradient flows through G, nor to
    ``terminal_rewards``. G is never stored: forward and backward each read the values and masks once.

    Args:
        value_logits: V, [B, T] or [B, T, 1]; float32, bfloat16, float16 or float64.
        terminal_rewards: R, [B], any real dtype.
        attention_mask: [B, T], any real dtype, nonzero = valid; weights the error only.
        loss_mask: [B, T], any real dtype, nonzero = output token. One byte mask given as both is read once.
        gamma: discount per valid token, in [0, 1].
        lam: lambda, in [0, 1].

    Returns:
        The loss, 0-dim, float32 (float64 for float64 values).

    Raises:
        TypeError: a tensor argument is no tensor or has an unsupported dtype; gamma or lam is no real number.
        ValueError: a shape or device does not match; gamma or lam is outside [0, 1].
    """
    values = _check_value_logits("value_logits", value_logits)
    _check_rewards("terminal_rewards", terminal_rewards, values)
    _check_like("attention_mask", attention_mask, values)
    _check_like("loss_mask", loss_mask, values)
    gamma, lam = check_unit_interval("gamma", gamma), check_unit_interval("lam", lam)
    return call(_ops.lambda_value_loss.default, values, terminal_rewards, attention_mask, loss_mask, gamma, lam)


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
    values = _check_value_logits("value_logits", value_logits)
    _check_rewards("rewards", rewards, values)
    _check_like("attention_mask", attention_mask, values)
    _check_like("loss_mask", loss_mask, values)
    return call(_ops.lambda_value_loss.default, values, rewards, attention_mask, loss_mask, 1.0, 1.0)


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
    values = _check_value_logits("values", values)
    _check_tensor("targets", targets)
    if targets.dim() == 3 and targets.shape[-1] == 1:
        targets = targets.squeeze(-1)
    _check_like("targets", targets, values)
    half = values.dtype in (torch.bfloat16, torch.float16)
    if targets.dtype != values.dtype and not (half and targets.dtype == torch.float32):
        wanted = f"{values.dtype} or torch.float32" if half else str(values.dtype)
        raise TypeError(f"targets must be {wanted} for values of {values.dtype}, got {targets.dtype}")
    _check_like("mask", mask, values)
    return call(_ops.masked_mse.default, values, targets, mask)


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
    _check_tensor("loss_mask", loss_mask)
    if loss_mask.is_complex():
        raise TypeError(f"loss_mask must have a real dtype, got {loss_mask.dtype}")
    if loss_mask.is_floating_point() and loss_mask.dtype not in _VALUE_DTYPES:
        raise TypeError(f"loss_mask must be float32, bfloat16, float16 or float64 if floating, got {loss_mask.dtype}")
    if loss_mask.dim() != 2:
        raise ValueError(f"loss_mask must have shape [B, T], got {list(loss_mask.shape)}")
    return call(_ops.eos_mask.default, loss_mask.detach()).to(torch.float32)


# ---- right and wrong solutions in pairs --------------------------------------------------------------------------


def _mean_value(name: str, values: Tensor, mask_name: str, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean value over the masked tokens of each row, [B] (0 where there are none), and their number, [B]."""
    values = _check_value_logits(name, values)
    _check_like(mask_name, mask, values)
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
    values = _check_value_logits("values", values)
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
