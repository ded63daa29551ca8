"""Inputs, layouts and accuracy rules shared by the operator tests."""

from typing import NamedTuple

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

VALUE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF_DTYPES = (torch.bfloat16, torch.float16)
ROUNDED_DTYPES = (torch.float32, *HALF_DTYPES)  # those that a float64 reference can judge
SIGNED_DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64)
UNSIGNED_DTYPES = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
MASK_DTYPES = (torch.bool, *SIGNED_DTYPES, *UNSIGNED_DTYPES, *VALUE_DTYPES)
# Each value dtype once, each way that a mask is read once: torch.library.opcheck takes long.
OPCHECK_DTYPES = (
    (torch.float64, torch.bool),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.int64),
    (torch.float16, torch.uint8),
)
# (gamma, lam): the corners, where terms vanish, and the usual settings.
DISCOUNTS = ((1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 1.0), (1.0, 0.0), (0.0, 0.95))

# The same examples on every machine and nothing written to disk.
PROPERTY = settings(deadline=None, derandomize=True, database=None, max_examples=60)


# ---- masks -------------------------------------------------------------------------------------------------------


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _prompt(rows: Tensor, positions: Tensor, T: int) -> Tensor:
    return positions >= (rows % 3 + 1) * T // 5


def _padding(rows: Tensor, positions: Tensor, T: int) -> Tensor:
    return positions < T - (rows % 3 + 1) * T // 5


def _gaps(rows: Tensor, positions: Tensor, T: int) -> Tensor:
    return torch.rand(len(rows), T, generator=rng(T)) < 0.6


def _first_valid(rows: Tensor, positions: Tensor, T: int) -> Tensor:
    return (positions == 0) | ((positions > T // 2) & (positions < T - 1))


_MASKS = {
    "dense": lambda rows, positions, T: torch.ones(len(rows), T, dtype=torch.bool),
    "prompt": _prompt,
    "padding": _padding,
    "gaps": _gaps,
    "conversation": lambda *args: _prompt(*args) & _padding(*args) & _gaps(*args),
    "empty_rows": lambda *args: _gaps(*args) & (args[0] % 2 == 1),
    "single_token": lambda rows, positions, T: positions == (7 * rows + 3) % max(T, 1),
    "first_valid": _first_valid,
    "nothing": lambda rows, positions, T: torch.zeros(len(rows), T, dtype=torch.bool),
}
MASK_KINDS = tuple(_MASKS)


def make_mask(kind: str, B: int, T: int) -> Tensor:
    """Return a bool mask [B, T]; the rows of one kind differ."""
    return _MASKS[kind](torch.arange(B)[:, None], torch.arange(T), T).expand(B, T).contiguous()


def mask_as(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return mask [B, T] in dtype, its valid positions in turn every kind of nonzero and its others every zero."""
    if dtype == torch.bool:
        return mask.clone()
    if dtype.is_floating_point:
        limits = torch.finfo(dtype)
        nonzeros = [1.0, 0.25, -1.0, float("nan"), float("inf"), limits.smallest_normal * limits.eps, limits.min]
        zeros = [0.0, -0.0]
    else:
        limits = torch.iinfo(dtype)
        # Powers of two whose low bytes are 0 would pass for masked if only one byte were read.
        nonzeros = [1, 2, limits.max, *(1 << bits for bits in (8, 16, 32) if 1 << bits <= limits.max)]
        nonzeros += [-1, limits.min] if limits.min < 0 else []
        zeros = [0]
    flat = [
        nonzeros[i % len(nonzeros)] if valid else zeros[i % len(zeros)]
        for i, valid in enumerate(mask.view(-1).tolist())
    ]
    return torch.tensor(flat, dtype=dtype).view(mask.shape)


# ---- batches -----------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """The arguments of compute_lambda_value_loss in their order."""

    values: Tensor  # [B, T]
    rewards: Tensor  # [B]
    attention_mask: Tensor  # [B, T], cuts off some tokens of loss_mask too
    loss_mask: Tensor  # [B, T]

    @property
    def counted(self) -> Tensor:
        """The tokens whose error counts, [B, T]."""
        return (self.attention_mask != 0) & (self.loss_mask != 0)


def make_batch(kind: str = "gaps", B: int = 4, T: int = 13, dtype: torch.dtype = torch.float64, seed: int = 0) -> Batch:
    generator = rng(seed)
    values = torch.randn(B, T, generator=generator, dtype=torch.float64).to(dtype)
    # Eighths, so that no dtype rounds a reward.
    rewards = torch.randint(-8, 9, (B,), generator=generator).to(dtype) / 8
    attention_mask = torch.rand(B, T, generator=generator) < 0.8
    return Batch(values, rewards, attention_mask, make_mask(kind, B, T))


def make_grad(batch: Batch, seed: int = 1) -> Tensor:
    """Return an incoming gradient [B, T] in the dtype of the values."""
    return torch.randn(batch.values.shape, generator=rng(seed), dtype=torch.float64).to(batch.values.dtype)


def leaf(x: Tensor) -> Tensor:
    """Return a copy of x that requires a gradient."""
    return x.detach().clone().requires_grad_()


def poisoned(x: Tensor, keep: Tensor) -> Tensor:
    """Return a copy of x [B, T] with NaN, Inf and -Inf wherever keep [B, T] is False."""
    bad = torch.tensor([float("nan"), float("inf"), float("-inf")], dtype=x.dtype)
    return torch.where(keep, x.detach(), bad[torch.arange(x.numel()) % 3].view(x.shape))


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Draw batches of every shape, empty ones included, of every dtype, with any bits as masks."""
    B, T = draw(st.integers(0, 4)), draw(st.integers(0, 18))
    dtype, mask_dtype = draw(st.sampled_from(VALUE_DTYPES)), draw(st.sampled_from(MASK_DTYPES))
    bits = st.lists(st.booleans(), min_size=B * T, max_size=B * T)
    attention_mask, loss_mask = (torch.tensor(draw(bits), dtype=torch.bool).view(B, T) for _ in range(2))
    batch = make_batch("nothing", B, T, dtype, seed=draw(st.integers(0, 1000)))
    return batch._replace(attention_mask=attention_mask, loss_mask=mask_as(loss_mask, mask_dtype))


unit_floats = st.sampled_from([0.0, 1.0]) | st.floats(0.0, 1.0)


# ---- layouts -----------------------------------------------------------------------------------------------------


def _inside(x: Tensor, shape: tuple[int, ...], index: tuple) -> Tensor:
    """Return x as the view ``index`` into a tensor of ``shape`` that holds NaN (or ones) everywhere else."""
    around = torch.full(shape, float("nan") if x.is_floating_point() else 1, dtype=x.dtype)
    around[index] = x.detach()
    return around[index]


# Views with the elements of x [B, T] in another layout.
LAYOUTS = {
    "transposed": lambda x: x.detach().t().contiguous().t(),
    "head_output": lambda x: _inside(x, (*x.shape, 3), (slice(None), slice(None), 1)),
    "every_other": lambda x: _inside(x, (x.shape[0] + 2, 2 * x.shape[1] + 3), (slice(1, -1), slice(1, -2, 2))),
    "window": lambda x: _inside(x, (x.shape[0], x.shape[1] + 5), (slice(None), slice(3, -2))),
    "every_other_row": lambda x: _inside(x, (2 * x.shape[0], x.shape[1]), (slice(1, None, 2),)),
}


def strided(x: Tensor) -> Tensor:
    """Return x [B] as a view with stride 3."""
    return _inside(x, (x.shape[0], 3), (slice(None), 1))


# ---- plain torch and accuracy ------------------------------------------------------------------------------------


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def plain_lambda_return(
    values: Tensor, rewards: Tensor, mask: Tensor, gamma: float, lam: float, dtype: torch.dtype | None = None
) -> Tensor:
    """Lambda-returns of finite values as one writes them in plain torch: column by column, halves in float32."""
    acc = accumulate_dtype(values.dtype)
    valid = mask != 0
    weighted = gamma * (1.0 - lam) * torch.where(valid, values, 0.0).to(acc)
    carries = [rewards.to(acc)]
    for column, valid_column in zip(weighted.unbind(1)[:0:-1], valid.unbind(1)[:0:-1], strict=True):
        carries.append(torch.where(valid_column, column + gamma * lam * carries[-1], carries[-1]))
    return torch.where(valid, torch.stack(carries[::-1], dim=1), 0.0).to(dtype or values.dtype)


def plain_masked_mse(values: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Masked mean squared error as one writes it in plain torch, halves in float32."""
    acc = accumulate_dtype(values.dtype)
    valid = mask != 0
    error = torch.where(valid, values.to(acc) - targets.to(acc), 0.0)
    return (error**2).sum() / valid.sum().clamp(min=1)


def plain_value_loss(batch: Batch, gamma: float, lam: float) -> Tensor:
    acc = accumulate_dtype(batch.values.dtype)
    targets = plain_lambda_return(batch.values.detach(), batch.rewards, batch.loss_mask, gamma, lam, dtype=acc)
    return plain_masked_mse(batch.values, targets, batch.counted)


def rounding_unit(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return at least the distance between neighbours of dtype around x."""
    limits = torch.finfo(dtype)
    return limits.eps * x.double().abs().clamp(min=limits.smallest_normal)


def assert_as_accurate_as_torch(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """At most twice the error of plain torch in the same dtype, and one rounding unit, against float64."""
    assert ours.dtype == plain.dtype
    assert exact.dtype == torch.float64
    error = (ours.double() - exact).abs() - rounding_unit(exact, ours.dtype)
    allowed = 2 * (plain.double() - exact).abs().max()
    assert error.max() <= allowed, f"error beyond one unit {error.max():.3e}, allowed {allowed:.3e}"


def assert_rounded(ours: Tensor, exact: Tensor) -> None:
    """Equal to exact (float64) rounded to the dtype of ours, to one unit in the last place."""
    rounded = exact.to(ours.dtype).double()
    assert ((ours.double() - rounded).abs() <= rounding_unit(exact, ours.dtype)).all()
