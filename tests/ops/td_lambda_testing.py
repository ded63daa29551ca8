"""Inputs of the general operators' tests: everything at once, padded or packed."""

from typing import Any, NamedTuple

import pytest
import torch
from ops_testing import make_mask, rng
from torch import Tensor

from lambda_return_ext import reference

# Lengths around the blocks (1024 tokens) and stretches (16,384) of the CPU, empty sequences among them.
LENGTHS = ((3, 0, 1, 17, 64), (1023, 1024, 1025, 0), (16384, 5, 17000))


def lengths_with(lengths: tuple[tuple[int, ...], ...], dtypes: tuple[torch.dtype, ...]) -> list[Any]:
    """Parameters: all of them together, where the longest, over which the reference takes long, are float32's alone."""
    exhaustive = pytest.mark.exhaustive
    return [
        pytest.param(each, dtype, marks=exhaustive if each == LENGTHS[-1] and dtype != torch.float32 else ())
        for each in lengths
        for dtype in dtypes
    ]


class Case(NamedTuple):
    """Padded [B, T] without cu_seqlens, packed [total] with it."""

    values: Tensor
    terminal_rewards: Tensor  # [B]
    loss_mask: Tensor
    gamma: Tensor  # [B]
    lam: Tensor  # [B]
    rewards: Tensor
    bootstrap_values: Tensor  # [B]
    cu_seqlens: Tensor | None

    @property
    def options(self) -> dict[str, Any]:
        return {"rewards": self.rewards, "bootstrap_values": self.bootstrap_values}

    def returns(self, function: Any = None, **changes: Any) -> Tensor:
        """The returns by a function of the package or, by default, of the reference in float64."""
        case = self._replace(**changes)
        if function is None:
            function = reference.compute_lambda_return if case.cu_seqlens is None else reference.lambda_return_varlen
            case = case._replace(values=case.values.double(), rewards=case.rewards.double())
        layout = () if case.cu_seqlens is None else (case.cu_seqlens,)
        return function(
            case.values, case.terminal_rewards, *layout, case.loss_mask, case.gamma, case.lam, **case.options
        )


def _case(shape: tuple[int, ...], B: int, mask: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype) -> Case:
    generator = rng(B)

    def random(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    values, rewards = random(*shape), 0.2 * random(*shape) - 0.1
    # Each row has a discount of its own, the corners among them.
    gamma, lam = 0.9 + 0.1 * random(B), random(B)
    gamma[: B // 2], lam[:1], lam[1:2] = 1.0, 1.0, 0.0
    return Case(values.to(dtype), random(B), mask, gamma, lam, rewards.float(), random(B), cu_seqlens)


def padded(kind: str = "gaps", B: int = 5, T: int = 23, dtype: torch.dtype = torch.float64) -> Case:
    return _case((B, T), B, make_mask(kind, B, T), None, dtype)


def packed(lengths: tuple[int, ...] = LENGTHS[0], dtype: torch.dtype = torch.float64) -> Case:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    total = int(cu_seqlens[-1])
    return _case((total,), len(lengths), make_mask("gaps", 1, total)[0], cu_seqlens, dtype)
