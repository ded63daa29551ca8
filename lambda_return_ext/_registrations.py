"""Fake (shape) and autograd implementations of every operator, side by side.

The schemas are in csrc/library.cpp. The stable C++ interface of torch has no autograd, so it is registered here.
torch's own form of that is complete but slow: ``call`` is what eager code uses in its place.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.library import register_autograd, register_fake

_ops = torch.ops.lambda_return

# ---- calls -------------------------------------------------------------------------------------------------------

# The same formulas as plain autograd functions, by operator; their forward returns the operator's first output.
_functions: dict[Any, type[Function]] = {}


def _register_autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    register_autograd(f"lambda_return::{name}", backward, setup_context=setup_context)
    operator = getattr(_ops, name).default

    def forward(ctx: Any, *inputs: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            output = operator(*inputs)
        setup_context(ctx, inputs, output)
        return output[0] if isinstance(output, tuple) else output

    _functions[operator] = type(
        name, (Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    )


def _call_in_backward(operator: Any, *args: Any) -> Any:
    """Call an operator with all its outputs: differentiably where the backward itself is recorded."""
    if torch.is_grad_enabled():
        return operator(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def call(operator: Any, *args: Any) -> Any:
    """Call an operator and return its first output, past torch's Python autograd kernel where that changes nothing.

    Of a call on a few tokens that kernel is more than half. It is needed where torch looks at operators as a whole:
    under torch.compile and torch.export, and under the transforms of torch.func.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        output = operator(*args)
    elif torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
        return _functions[operator].apply(*args)
    else:
        with torch._C._AutoDispatchBelowAutograd():
            output = operator(*args)
    return output[0] if isinstance(output, tuple) else output


# ---- fake implementations ------------------------------------------------------------------------------------------


def _accumulate_dtype(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _check_devices(first: Tensor, *others: Tensor) -> None:
    """Refuse mixed devices: a meta tensor among others would otherwise get an output that nobody writes."""
    for other in others:
        if other.device != first.device:
            raise RuntimeError(f"Expected all tensors to be on the same device, got {first.device} and {other.device}")


def _fake_loss(values: Tensor) -> tuple[Tensor, Tensor]:
    return values.new_empty((), dtype=_accumulate_dtype(values)), values.new_empty((), dtype=torch.int64)


# ---- lambda_return: linear in (values, terminal_rewards), so its adjoint's adjoint is itself ---------------------


@register_fake("lambda_return::lambda_return")
def _(values: Tensor, terminal_rewards: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> Tensor:
    _check_devices(values, terminal_rewards, mask)
    return values.new_empty(values.shape)


@register_fake("lambda_return::lambda_return_backward")
def _(grad_returns: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    _check_devices(grad_returns, mask)
    grad_rewards = grad_returns.new_empty(grad_returns.shape[0], dtype=_accumulate_dtype(grad_returns))
    return grad_returns.new_empty(grad_returns.shape), grad_rewards


def _lambda_return_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _values, terminal_rewards, mask, ctx.gamma, ctx.lam = inputs
    ctx.rewards_dtype = terminal_rewards.dtype
    ctx.save_for_backward(mask)


def _lambda_return_backward(ctx: Any, grad_returns: Tensor) -> tuple[Tensor | None, ...]:
    (mask,) = ctx.saved_tensors
    grad_values, grad_rewards = _call_in_backward(
        _ops.lambda_return_backward.default, grad_returns, mask, ctx.gamma, ctx.lam
    )
    return grad_values, grad_rewards.to(ctx.rewards_dtype), None, None, None


def _lambda_return_backward_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    _grad_returns, mask, ctx.gamma, ctx.lam = inputs
    ctx.save_for_backward(mask)


def _lambda_return_backward_backward(
    ctx: Any, grad_grad_values: Tensor, grad_grad_rewards: Tensor
) -> tuple[Tensor | None, ...]:
    (mask,) = ctx.saved_tensors
    return _ops.lambda_return.default(grad_grad_values, grad_grad_rewards, mask, ctx.gamma, ctx.lam), None, None, None


_register_autograd("lambda_return", _lambda_return_backward, _lambda_return_setup)
register_autograd(
    "lambda_return::lambda_return_backward",
    _lambda_return_backward_backward,
    setup_context=_lambda_return_backward_setup,
)

# ---- lambda_value_loss: the targets are constants, gradients reach values only -----------------------------------


@register_fake("lambda_return::lambda_value_loss")
def _(
    values: Tensor,
    terminal_rewards: Tensor,
    attention_mask: Tensor,
    loss_mask: Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Tensor, Tensor]:
    _check_devices(values, terminal_rewards, attention_mask, loss_mask)
    return _fake_loss(values)


@register_fake("lambda_return::lambda_value_loss_backward")
def _(
    grad_loss: Tensor,
    num_tokens: Tensor,
    values: Tensor,
    terminal_rewards: Tensor,
    attention_mask: Tensor,
    loss_mask: Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> Tensor:
    _check_devices(values, grad_loss, num_tokens, terminal_rewards, attention_mask, loss_mask)
    return values.new_empty(values.shape)


def _lambda_value_loss_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.gamma, ctx.lam = inputs
    _loss, num_tokens = output
    ctx.save_for_backward(num_tokens, *tensors)


def _lambda_value_loss_backward(
    ctx: Any, grad_loss: Tensor, _grad_num_tokens: None = None
) -> tuple[Tensor | None, ...]:
    operator = _ops.lambda_value_loss_backward.default
    grad_values = _call_in_backward(operator, grad_loss, *ctx.saved_tensors, ctx.gamma, ctx.lam)
    return grad_values, None, None, None, None, None


_register_autograd("lambda_value_loss", _lambda_value_loss_backward, _lambda_value_loss_setup)

# ---- masked_mse: d loss / d targets is minus d loss / d values ---------------------------------------------------


@register_fake("lambda_return::masked_mse")
def _(values: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    _check_devices(values, targets, mask)
    return _fake_loss(values)


@register_fake("lambda_return::masked_mse_backward")
def _(grad_loss: Tensor, num_tokens: Tensor, values: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    _check_devices(values, grad_loss, num_tokens, targets, mask)
    return values.new_empty(values.shape)


def _masked_mse_setup(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    _loss, num_tokens = output
    ctx.save_for_backward(num_tokens, *inputs)


def _masked_mse_backward(ctx: Any, grad_loss: Tensor, _grad_num_tokens: None = None) -> tuple[Tensor | None, ...]:
    num_tokens, values, targets, mask = ctx.saved_tensors
    operator = _ops.masked_mse_backward.default
    grad_values = _call_in_backward(operator, grad_loss, num_tokens, values, targets, mask)
    if not ctx.needs_input_grad[1]:
        grad_targets = None
    elif targets.dtype == values.dtype:
        grad_targets = -grad_values
    else:  # float32 targets of half values: the same error with the sides exchanged, not rounded to half
        grad_targets = _call_in_backward(operator, grad_loss, num_tokens, targets, values.to(targets.dtype), mask)
    return grad_values, grad_targets, None


_register_autograd("masked_mse", _masked_mse_backward, _masked_mse_setup)

# ---- eos_mask: not differentiable ---------------------------------------------------------------------------------


@register_fake("lambda_return::eos_mask")
def _(mask: Tensor) -> Tensor:
    return mask.new_empty(mask.shape)


# ---- gradients that do not exist ----------------------------------------------------------------------------------


def _unsupported(name: str, what: str) -> None:
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        """Nothing is saved: the backward always raises."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"lambda_return::{name}: {what}")

    register_autograd(f"lambda_return::{name}", backward, setup_context=setup_context)


_unsupported("lambda_value_loss_backward", "the fused loss has no second derivative; write it with lambda_return")
_unsupported("masked_mse_backward", "the fused loss has no second derivative; write it in torch operations")
_unsupported("eos_mask", "a mask has no gradient")
