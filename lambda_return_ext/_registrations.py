"""Fake (shape) and autograd implementations of every operator, side by side.

The schemas are in csrc/library.cpp. The stable C++ interface of torch has no autograd, so it is registered here.
torch's own form of that is complete but slow: ``call`` is what eager code uses in its place.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling
from torch.library import Library, register_autograd, register_fake, register_vmap

_ops = torch.ops.lambda_return

# By names of their own, which are faster to look up: eager calls go by these several times.
_below_autograd = torch._C._AutoDispatchBelowAutograd
_any_requires_grad = torch._C._any_requires_grad
_in_transform = torch._C._are_functorch_transforms_active
_is_grad_enabled = torch.is_grad_enabled

# In the order of csrc/kernels/token_loss.h.
LOSS_KINDS = ("mse", "huber", "smooth_l1", "bce", "bce_with_logits")
REDUCTIONS = ("token_mean", "sequence_mean", "sum", "none")

# ---- calls -------------------------------------------------------------------------------------------------------

# The same formulas as plain autograd functions, by operator: for eager code, and for the transforms of torch.func,
# whose way of setting up the context costs an eager call half as much again. Of the former only apply() is kept.
_functions: dict[Any, Callable[..., Any]] = {}
_transformable: dict[Any, type[Function]] = {}
# And of the losses with nothing but the loss for an output.
_losses: dict[Any, Callable[..., Any]] = {}


class _Kernels(Library):
    """Registers torch's autograd kernels, and before each a way past it for calls that need no gradient.

    Its own way past enters the dispatcher anew with a set of keys and is half of a call on a few tokens.
    """

    def impl(self, op_name: str, fn: Callable[..., Any], dispatch_key: str = "", **options: Any) -> None:
        operator = getattr(_ops, op_name).default

        def kernel(keyset: Any, *args: Any) -> Any:
            if (
                type(args[0]) is not Tensor  # a fake tensor, say
                or _in_transform()
                or (_is_grad_enabled() and _any_requires_grad(*args))
            ):
                return fn(keyset, *args)
            with _below_autograd():
                return operator(*args)

        super().impl(op_name, kernel, dispatch_key, **options)


_kernels = _Kernels("lambda_return", "FRAGMENT")


def eager_apply(function: type[Function]) -> Callable[..., Any]:
    """Return what apply() of a function without setup_context comes to outside of transforms.

    Before that it asks for transforms, of which the caller has made sure that there are none, and for tensors that have
    outlived one, which the operators take as they are: a sixth of a forward and backward on a few tokens.
    """
    return super(Function, function).apply  # type: ignore[misc]


def _register_autograd(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None], constants: int = 0
) -> None:
    """Register the formulas; the last ``constants`` outputs have no gradient, and backward does without theirs."""
    register_autograd(f"lambda_return::{name}", backward, setup_context=setup_context, lib=_kernels)
    operator = getattr(_ops, name).default

    def forward(*inputs: Any) -> Any:
        with _below_autograd():
            return operator(*inputs)

    def setup(ctx: Any, inputs: tuple, output: Any) -> None:
        setup_context(ctx, inputs, output)
        if constants:
            ctx.mark_non_differentiable(*output[-constants:])
            ctx.set_materialize_grads(False)

    def forward_and_setup(ctx: Any, *inputs: Any) -> Any:
        output = forward(*inputs)
        setup(ctx, inputs, output)
        return output

    def loss_alone(ctx: Any, *inputs: Any) -> Tensor:
        with _below_autograd():  # forward() itself would be a call more, of 0.2 microseconds
            output = operator(*inputs)
        setup_context(ctx, inputs, output)
        return output[0]

    def backward_if_any(ctx: Any, *grads: Any) -> Any:
        """Gradients are not materialised: where only constants are used, there is none."""
        return backward(ctx, *grads) if grads[0] is not None else (None,) * len(ctx.needs_input_grad)

    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> Any:
        return _batched(operator, partial(call, operator), info, in_dims, *inputs)

    plain_backward = backward_if_any if constants else backward

    def function(**methods: Callable[..., Any]) -> type[Function]:
        return type(name, (Function,), {key: staticmethod(method) for key, method in methods.items()})

    _functions[operator] = eager_apply(function(forward=forward_and_setup, backward=plain_backward))
    if constants:
        _losses[operator] = eager_apply(function(forward=loss_alone, backward=backward))
    _transformable[operator] = function(forward=forward, setup_context=setup, backward=plain_backward, vmap=vmap)


def _needs_gradient(args: tuple) -> bool:
    for x in args:  # noqa: SIM110  (any() of a generator takes three times as long)
        if isinstance(x, Tensor) and x.requires_grad:
            return True
    return False


def call(operator: Any, *args: Any) -> Any:
    """Call an operator, past torch's Python autograd kernel where that changes nothing.

    Of a call on a few tokens that kernel is more than half. torch.compile and torch.export need it, as they look at
    operators as a whole; the transforms of torch.func need the plain autograd functions.
    """
    if is_compiling():
        return operator(*args)
    if _in_transform():
        transform = torch._C._functorch.peek_interpreter_stack()
        if transform.key() == torch._C._functorch.TransformType.Functionalize:
            return operator(*args)
        return _transformable[operator].apply(*args)
    if _is_grad_enabled() and _needs_gradient(args):
        return _functions[operator](*args)
    with _below_autograd():
        return operator(*args)


def call_loss(operator: Any, *args: Any) -> Tensor:
    """Call an operator for its first output alone, which leaves autograd less to do."""
    if is_compiling() or _in_transform():
        return call(operator, *args)[0]
    if _is_grad_enabled() and _needs_gradient(args):
        return _losses[operator](*args)
    with _below_autograd():
        return operator(*args)[0]


# ---- torch.vmap ----------------------------------------------------------------------------------------------------

# What each argument of an operator has for each of its B rows: tokens or one number ("row"), one number or one for all
# ("discount"), or nothing (None). Such operators treat rows alike, so a batch of calls is one call with more rows.
_ROWS: dict[Any, tuple[str | None, ...]] = {
    _ops.lambda_return.default: ("row", "row", "row", None, None),
    _ops.lambda_return_backward.default: ("row", "row", None, None),
    _ops.eos_mask.default: ("row",),
    _ops.td_lambda.default: ("row", "row", "row", "row", None, "discount", "discount", None),
    _ops.td_lambda_backward.default: ("row", "row", None, "discount", "discount", None),
    _ops.td_lambda_pair.default: ("row", "row", "row", "row", None, "discount", "discount", "discount"),
    _ops.td_lambda_map.default: ("row", "row", "row", None, "discount", "discount"),
}
# These add up over rows, and so are called once for each element of the batch.
_LOSSES = tuple(
    getattr(_ops, name + suffix).default
    for name in ("lambda_value_loss", "masked_mse", "td_lambda_loss", "categorical_value_loss")
    for suffix in ("", "_backward")
)


def _batched(operator: Any, run: Callable[..., Any], info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
    """Run an operator on a batch of arguments along in_dims: torch.vmap's rule for every operator.

    The dispatcher leaves out trailing arguments that are at their defaults.
    """
    N = info.batch_size
    batched = [x if dim is None else x.movedim(dim, 0) for x, dim in zip(args, in_dims, strict=True)]
    empty = N == 0
    if empty:  # one element of zeros says what an element's outputs look like; they are cut off again
        N = 1
        batched = [
            x if dim is None else torch.cat((x, x.new_zeros(1, *x.shape[1:])))
            for x, dim in zip(batched, in_dims, strict=True)
        ]
    kinds = _ROWS.get(operator)
    if kinds is None or any(isinstance(x, Tensor) and kind is None for x, kind in zip(args, kinds, strict=False)):
        results = [
            run(*(x if dim is None else x[i] for x, dim in zip(batched, in_dims, strict=True))) for i in range(N)
        ]
        single = isinstance(results[0], Tensor)
        outputs = [torch.stack(x) for x in zip(*([x] if single else x for x in results), strict=True)]
    else:
        B = batched[0].shape[0 if in_dims[0] is None else 1]

        def rows(x: Any, dim: int | None, kind: str | None) -> Any:
            if kind is None or x is None:
                return x
            x = x.expand(N, *x.shape) if dim is None else x
            if kind == "discount" and x.dim() == 1:
                x = x[:, None].expand(N, B)
            return x.reshape(N * B, *x.shape[2:])

        result = run(*map(rows, batched, in_dims, kinds))
        single = isinstance(result, Tensor)
        outputs = [x.reshape(N, x.shape[0] // N, *x.shape[1:]) for x in ([result] if single else result)]

    if empty:
        outputs = [x[:0] for x in outputs]
    return (outputs[0], 0) if single else (tuple(outputs), (0,) * len(outputs))


# The operators themselves are called below the transform, where the functions that ``call`` takes do not exist.
for _operator in (*_ROWS, *_LOSSES):
    register_vmap(_operator, partial(_batched, _operator, _operator))


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
    grad_values, grad_rewards = call(_ops.lambda_return_backward.default, grad_returns, mask, ctx.gamma, ctx.lam)
    return grad_values, grad_rewards.to(ctx.rewards_dtype), None, None, None


def _lambda_return_backward_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    _grad_returns, mask, ctx.gamma, ctx.lam = inputs
    ctx.save_for_backward(mask)


def _lambda_return_backward_backward(
    ctx: Any, grad_grad_values: Tensor, grad_grad_rewards: Tensor
) -> tuple[Tensor | None, ...]:
    (mask,) = ctx.saved_tensors
    grad_grad_returns = call(_ops.lambda_return.default, grad_grad_values, grad_grad_rewards, mask, ctx.gamma, ctx.lam)
    return grad_grad_returns, None, None, None


_register_autograd("lambda_return", _lambda_return_backward, _lambda_return_setup)
_register_autograd("lambda_return_backward", _lambda_return_backward_backward, _lambda_return_backward_setup)

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


def _lambda_value_loss_backward(ctx: Any, grad_loss: Tensor, *_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    operator = _ops.lambda_value_loss_backward.default
    grad_values = call(operator, grad_loss, *ctx.saved_tensors, ctx.gamma, ctx.lam)
    return grad_values, None, None, None, None, None


_register_autograd("lambda_value_loss", _lambda_value_loss_backward, _lambda_value_loss_setup, constants=1)

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


def _masked_mse_backward(ctx: Any, grad_loss: Tensor, *_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    num_tokens, values, targets, mask = ctx.saved_tensors
    operator = _ops.masked_mse_backward.default
    grad_values = call(operator, grad_loss, num_tokens, values, targets, mask)
    if not ctx.needs_input_grad[1]:
        grad_targets = None
    elif targets.dtype == values.dtype:
        grad_targets = -grad_values
    else:  # float32 targets of half values: the same error with the sides exchanged, not rounded to half
        grad_targets = call(operator, grad_loss, num_tokens, targets, values.to(targets.dtype), mask)
    return grad_values, grad_targets, None


_register_autograd("masked_mse", _masked_mse_backward, _masked_mse_setup, constants=1)

# ---- td_lambda: the general return; gamma and lam have no gradient -------------------------------------------------


def _check_optional_devices(first: Tensor, *others: Tensor | None) -> None:
    _check_devices(first, *(other for other in others if other is not None))


def _fake_rows(tokens: Tensor, cu_seqlens: Tensor | None) -> Any:
    """Return the number of sequences."""
    return tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


@register_fake("lambda_return::td_lambda")
def _(
    values: Tensor,
    terminal_rewards: Tensor,
    mask: Tensor | None,
    rewards: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: Tensor,
    lam: Tensor,
    advantages: bool = False,
) -> Tensor:
    _check_optional_devices(values, terminal_rewards, mask, rewards, cu_seqlens, gamma, lam)
    return values.new_empty(values.shape)


@register_fake("lambda_return::td_lambda_backward")
def _(
    grad_returns: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: Tensor,
    lam: Tensor,
    with_rewards: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_optional_devices(grad_returns, mask, cu_seqlens, gamma, lam)
    dtype = _accumulate_dtype(grad_returns)
    return (
        grad_returns.new_empty(grad_returns.shape),
        grad_returns.new_empty(_fake_rows(grad_returns, cu_seqlens), dtype=dtype),
        grad_returns.new_empty(grad_returns.shape if with_rewards else (0,), dtype=dtype),
    )


@register_fake("lambda_return::td_lambda_pair")
def _(
    values: Tensor,
    terminal_rewards: Tensor,
    mask: Tensor | None,
    rewards: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: Tensor,
    lam_returns: Tensor,
    lam_advantages: Tensor,
) -> tuple[Tensor, Tensor]:
    _check_optional_devices(values, terminal_rewards, mask, rewards, cu_seqlens, gamma, lam_returns, lam_advantages)
    return values.new_empty(values.shape), values.new_empty(values.shape)


@register_fake("lambda_return::td_lambda_map")
def _(
    values: Tensor,
    mask: Tensor | None,
    rewards: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: Tensor,
    lam: Tensor,
) -> Tensor:
    _check_optional_devices(values, mask, rewards, cu_seqlens, gamma, lam)
    return values.new_empty((_fake_rows(values, cu_seqlens), 2), dtype=_accumulate_dtype(values))


def _td_lambda_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _values, terminal_rewards, mask, rewards, cu_seqlens, gamma, lam, ctx.advantages = inputs
    ctx.rewards_dtypes = terminal_rewards.dtype, None if rewards is None else rewards.dtype
    ctx.save_for_backward(mask, cu_seqlens, gamma, lam)


def _td_lambda_backward(ctx: Any, grad_returns: Tensor) -> tuple[Tensor | None, ...]:
    mask, cu_seqlens, gamma, lam = ctx.saved_tensors
    terminal_dtype, rewards_dtype = ctx.rewards_dtypes
    with_rewards = rewards_dtype is not None and ctx.needs_input_grad[3]
    grad_values, grad_terminal, grad_rewards = call(
        _ops.td_lambda_backward.default, grad_returns, mask, cu_seqlens, gamma, lam, with_rewards
    )
    if ctx.advantages:  # G - V
        grad_values = grad_values - (grad_returns if mask is None else torch.where(mask != 0, grad_returns, 0.0))
    grad_rewards = grad_rewards.to(rewards_dtype) if with_rewards else None
    return grad_values, grad_terminal.to(terminal_dtype), None, grad_rewards, None, None, None, None


def _td_lambda_backward_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    _grad_returns, mask, cu_seqlens, gamma, lam, ctx.with_rewards = inputs
    ctx.save_for_backward(mask, cu_seqlens, gamma, lam)


def _td_lambda_backward_backward(
    ctx: Any, grad_grad_values: Tensor, grad_grad_terminal: Tensor, grad_grad_rewards: Tensor
) -> tuple[Tensor | None, ...]:
    mask, cu_seqlens, gamma, lam = ctx.saved_tensors
    rewards = grad_grad_rewards if ctx.with_rewards else None
    grad_grad_returns = call(
        _ops.td_lambda.default, grad_grad_values, grad_grad_terminal, mask, rewards, cu_seqlens, gamma, lam, False
    )
    return grad_grad_returns, None, None, None, None, None


_register_autograd("td_lambda", _td_lambda_backward, _td_lambda_setup)
_register_autograd("td_lambda_backward", _td_lambda_backward_backward, _td_lambda_backward_setup)

# ---- td_lambda_loss: the targets are constants, gradients reach values only --------------------------------------


@register_fake("lambda_return::td_lambda_loss")
def _(
    values: Tensor,
    terminal_rewards: Tensor,
    mask: Tensor | None,
    attention_mask: Tensor | None,
    rewards: Tensor | None,
    old_values: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: Tensor,
    lam: Tensor,
    normalizer: Tensor | None,
    kind: int = 0,
    delta: float = 1.0,
    clip_range: float = 0.0,
    reduction: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_optional_devices(
        values, terminal_rewards, mask, attention_mask, rewards, old_values, cu_seqlens, gamma, lam, normalizer
    )
    dtype = _accumulate_dtype(values)
    shape = values.shape if reduction == REDUCTIONS.index("none") else ()
    return (
        values.new_empty(shape, dtype=dtype),
        values.new_empty(_fake_rows(values, cu_seqlens), dtype=dtype),
        values.new_empty(6, dtype=torch.float64),
    )


@register_fake("lambda_return::td_lambda_loss_backward")
def _(
    grad_loss: Tensor,
    scale: Tensor,
    values: Tensor,
    terminal_rewards: Tensor,
    mask: Tensor | None,
    attention_mask: Tensor | None,
    rewards: Tensor | None,
    old_values: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: Tensor,
    lam: Tensor,
    kind: int = 0,
    delta: float = 1.0,
    clip_range: float = 0.0,
    reduction: int = 0,
) -> Tensor:
    _check_optional_devices(
        values, grad_loss, scale, terminal_rewards, mask, attention_mask, rewards, old_values, cu_seqlens, gamma, lam
    )
    return values.new_empty(values.shape)


def _td_lambda_loss_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, _normalizer, kind, delta, clip_range, reduction = inputs
    ctx.options = kind, delta, clip_range, reduction
    _loss, scale, _statistics = output
    ctx.save_for_backward(scale, *tensors)


def _td_lambda_loss_backward(ctx: Any, grad_loss: Tensor, *_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    operator = _ops.td_lambda_loss_backward.default
    grad_values = call(operator, grad_loss, *ctx.saved_tensors, *ctx.options)
    return grad_values, *[None] * 13


_register_autograd("td_lambda_loss", _td_lambda_loss_backward, _td_lambda_loss_setup, constants=2)

# ---- categorical_value_loss: likewise, gradients reach logits only -------------------------------------------------


@register_fake("lambda_return::categorical_value_loss")
def _(
    logits: Tensor,
    terminal_rewards: Tensor,
    mask: Tensor | None,
    attention_mask: Tensor | None,
    rewards: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: Tensor,
    lam: Tensor,
    normalizer: Tensor | None,
    kind: int = 0,
    low: float = 0.0,
    high: float = 1.0,
    sigma: float = 0.75,
    reduction: int = 0,
) -> tuple[Tensor, ...]:
    _check_optional_devices(logits, terminal_rewards, mask, attention_mask, rewards, cu_seqlens, gamma, lam, normalizer)
    dtype, tokens = _accumulate_dtype(logits), logits.shape[:-1]
    return (
        logits.new_empty(tokens if reduction == REDUCTIONS.index("none") else (), dtype=dtype),
        logits.new_empty(_fake_rows(logits, cu_seqlens), dtype=dtype),
        logits.new_empty(6, dtype=torch.float64),
        logits.new_empty(tokens, dtype=dtype),
        logits.new_empty(tokens, dtype=dtype),
    )


@register_fake("lambda_return::categorical_value_loss_backward")
def _(
    grad_loss: Tensor,
    scale: Tensor,
    logits: Tensor,
    returns: Tensor,
    log_sums: Tensor,
    cu_seqlens: Tensor | None,
    kind: int = 0,
    low: float = 0.0,
    high: float = 1.0,
    sigma: float = 0.75,
    reduction: int = 0,
) -> Tensor:
    _check_optional_devices(logits, grad_loss, scale, returns, log_sums, cu_seqlens)
    return logits.new_empty(logits.shape)


def _categorical_value_loss_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    logits, cu_seqlens = inputs[0], inputs[5]
    ctx.options = inputs[9:]
    _loss, scale, _statistics, returns, log_sums = output
    ctx.save_for_backward(scale, logits, returns, log_sums, cu_seqlens)


def _categorical_value_loss_backward(ctx: Any, grad_loss: Tensor, *_grads: Tensor | None) -> tuple[Tensor | None, ...]:
    operator = _ops.categorical_value_loss_backward.default
    return call(operator, grad_loss, *ctx.saved_tensors, *ctx.options), *[None] * 13


_register_autograd(
    "categorical_value_loss", _categorical_value_loss_backward, _categorical_value_loss_setup, constants=4
)

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

    _register_autograd(name, backward, setup_context)


_unsupported("lambda_value_loss_backward", "the fused loss has no second derivative; write it with lambda_return")
_unsupported("masked_mse_backward", "the fused loss has no second derivative; write it in torch operations")
_unsupported("eos_mask", "a mask has no gradient")
_unsupported("td_lambda_pair", "its outputs are targets and have no gradient; use td_lambda for each")
_unsupported("td_lambda_map", "the map of a chunk has no gradient; see lambda_return_ext.distributed")
_unsupported("td_lambda_loss_backward", "the fused loss has no second derivative; give it detach_targets=False")
_unsupported(
    "categorical_value_loss_backward", "the fused loss has no second derivative; write it with categorical_values"
)
