"""The arguments of the public functions: what each must be, and an error that says what it is instead."""

from numbers import Real
from typing import Any

import torch
from torch import Tensor

VALUE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(name: str, x: object) -> None:
    """Check that ``x`` is a tensor, and that of this rank alone."""
    if type(x) is Tensor:
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if hasattr(x, "device_mesh"):
        raise TypeError(
            f"{name} must be a plain tensor, got a DTensor: lambda_return_ext.distributed takes sequences that are "
            f"sharded on T; where every rank holds whole sequences, give it {name}.to_local()"
        )


def check_floating(name: str, x: Tensor) -> None:
    check_tensor(name, x)
    if x.dtype not in VALUE_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")


def check_values(name: str, values: Tensor) -> Tensor:
    check_floating(name, values)
    if values.dim() != 2:
        raise ValueError(f"{name} must have shape [B, T], got {list(values.shape)}")
    return values


def check_value_logits(name: str, value_logits: Tensor) -> Tensor:
    """Check [B, T] or [B, T, 1] and return [B, T]."""
    check_tensor(name, value_logits)
    if value_logits.dim() == 3 and value_logits.shape[-1] == 1:
        value_logits = value_logits.squeeze(-1)
    if value_logits.dim() != 2:
        raise ValueError(f"{name} must have shape [B, T] or [B, T, 1], got {list(value_logits.shape)}")
    return check_values(name, value_logits)


def check_like(name: str, x: Any, values: Tensor, of: str = "the values") -> None:
    """Check the shape and device of x; errors call the other tensor ``of``."""
    check_tensor(name, x)
    if x.is_complex():
        raise TypeError(f"{name} must have a real dtype, got {x.dtype}")
    if x.shape != values.shape:
        raise ValueError(f"{name} must have the shape of {of}, {list(values.shape)}, got {list(x.shape)}")
    if x.device != values.device:
        raise ValueError(f"{name} must be on the device of {of}, {values.device}, got {x.device}")


def check_rewards(name: str, rewards: Tensor, values: Tensor, rows: int | None = None) -> None:
    """Check [B], with B = ``rows`` or the rows of ``values``."""
    rows = values.shape[0] if rows is None else rows
    check_tensor(name, rewards)
    if rewards.is_complex():
        raise TypeError(f"{name} must have a real dtype, got {rewards.dtype}")
    if rewards.dim() != 1 or rewards.shape[0] != rows:
        raise ValueError(f"{name} must have shape [B] = [{rows}], got {list(rewards.shape)}")
    if rewards.device != values.device:
        raise ValueError(f"{name} must be on the device of the values, {values.device}, got {rewards.device}")


def check_unit_interval(name: str, x: Any) -> float:
    """Return ``x`` as a float if it is a real number in [0, 1]; raise TypeError or ValueError otherwise."""
    if type(x) is not float:
        if isinstance(x, bool) or not isinstance(x, Real):
            raise TypeError(f"{name} must be a float, got {type(x).__name__}")
        x = float(x)
    if not 0.0 <= x <= 1.0:  # also refuses NaN
        raise ValueError(f"{name} must be in [0, 1], got {x}")
    return x


def _can_look_at(x: Tensor) -> bool:
    """Whether what x holds can be checked: without waiting for a device, and where it holds anything yet."""
    tracing = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return x.device.type == "cpu" and not tracing and type(x) is Tensor


def check_packed_values(name: str, values: Tensor) -> Tensor:
    """Check [total] or [total, 1] and return [total]."""
    check_floating(name, values)
    if values.dim() == 2 and values.shape[-1] == 1:
        values = values.squeeze(-1)
    if values.dim() != 1:
        raise ValueError(f"{name} must have shape [total] or [total, 1], got {list(values.shape)}")
    return values


def check_cu_seqlens(cu_seqlens: Tensor, values: Tensor) -> int:
    """Check [B + 1] and return B. What it holds is looked at on the CPU only: a device is not waited for."""
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape [B + 1], got {list(cu_seqlens.shape)}")
    if cu_seqlens.device != values.device:
        raise ValueError(f"cu_seqlens must be on the device of the values, {values.device}, got {cu_seqlens.device}")
    if _can_look_at(cu_seqlens):
        first, last = cu_seqlens[0].item(), cu_seqlens[-1].item()
        if first != 0:
            raise ValueError(f"cu_seqlens must begin with 0, got {first}")
        steps = cu_seqlens.diff()
        if steps.numel() and steps.min().item() < 0:
            b = int((steps < 0).nonzero()[0])
            raise ValueError(
                f"cu_seqlens must not fall, got {cu_seqlens[b].item()} and then {cu_seqlens[b + 1].item()}"
            )
        if last != values.shape[0]:
            raise ValueError(f"cu_seqlens must end with the number of values, {values.shape[0]}, got {last}")
    return cu_seqlens.shape[0] - 1


def check_discount(name: str, x: float | Tensor, values: Tensor, rows: int) -> Tensor:
    """Return a discount as the general operators take it: float64, 0-dim or [B], on the device of the values.

    A tensor's range is looked at on the CPU only: a device is not waited for.
    """
    if not isinstance(x, Tensor):
        return torch.full((), check_unit_interval(name, x), dtype=torch.float64, device=values.device)
    check_tensor(name, x)
    if x.dtype not in VALUE_DTYPES:
        raise TypeError(f"{name} must be a float or a float32, bfloat16, float16 or float64 tensor, got {x.dtype}")
    if x.dim() > 1 or (x.dim() == 1 and x.shape[0] != rows):
        raise ValueError(f"{name} must be a float, 0-dim or of shape [B] = [{rows}], got {list(x.shape)}")
    if x.device != values.device:
        raise ValueError(f"{name} must be on the device of the values, {values.device}, got {x.device}")
    if x.requires_grad:
        raise ValueError(f"{name} must not require a gradient: returns are not differentiable in it; detach it")
    if _can_look_at(x):
        least, most = (end.item() for end in x.aminmax()) if x.numel() else (0, 1)
        if not (least >= 0 and most <= 1):  # NaN is both, where there is one
            outside = ~((x >= 0) & (x <= 1))
            raise ValueError(f"{name} must be in [0, 1], got {x[outside].flatten()[0].item()}")
    return x.to(torch.float64)


def check_choice(name: str, x: str, choices: tuple[str, ...]) -> int:
    """Return the place of ``x`` among ``choices``."""
    if x not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {x!r}")
    return choices.index(x)


def check_positive(name: str, x: float) -> float:
    """Return ``x`` as a float if it is a finite number above 0."""
    if isinstance(x, bool) or not isinstance(x, Real):
        raise TypeError(f"{name} must be a float, got {type(x).__name__}")
    if not 0.0 < float(x) < float("inf"):
        raise ValueError(f"{name} must be finite and above 0, got {x}")
    return float(x)
