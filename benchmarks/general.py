"""What the options of the general operators are timed on, by cpu.py and gpu.py alike.

Composed is what one would write without the option: compute_lambda_return, and torch's own operations on its result.
"""

from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from harness import GAMMA, LAM, Answers, Batch, forward_and_backward
from torch import Tensor

import lambda_return_ext as lr
from lambda_return_ext import reference

CLIP_RANGE = 0.2


class Case(NamedTuple):
    """One call of a public function, ready to be timed."""

    ours: Callable[[], Any]
    exact: Callable[[], Any]  # by the reference, in float64
    composed: Callable[[], Any] | None
    bytes_moved: int  # its inputs read once in each direction, its outputs written once


def answers(result: Any) -> Answers:
    """What a call gave: returns, advantages or both, or a loss without its statistics, or a gradient."""
    found = result if isinstance(result, tuple) else (result,)
    return found[:1] if found[0].dim() == 0 else found


def _bytes(*inputs: Any) -> int:
    return sum(x.nbytes for x in {id(x): x for x in inputs}.values() if isinstance(x, Tensor))


def _returns(function: str, values: Tensor, *arguments: Any, composed: Any = None, **options: Any) -> Case:
    ours, exact = (getattr(module, function) for module in (lr, reference))
    outputs = 2 if function == "returns_and_advantages" else 1
    return Case(
        partial(ours, values, *arguments, **options),
        lambda: exact(values.double(), *arguments, **options),
        composed,
        _bytes(values, *arguments, *options.values()) + outputs * values.nbytes,
    )


def _loss(
    name: str, function: str, values: Tensor, *arguments: Any, composed: Any = None, **options: Any
) -> dict[str, Case]:
    def call(module: ModuleType, x: Tensor) -> Any:
        return getattr(module, function)(x, *arguments, **options)

    @cache
    def exact() -> Answers:  # both at once: the reference takes seconds
        wide = values.double().requires_grad_()
        (loss,) = answers(call(reference, wide))
        return loss.detach(), torch.autograd.grad(loss, wide)[0]

    def step(loss: Callable[[Tensor], Any] | None) -> Callable[[], Tensor] | None:
        return loss and forward_and_backward(lambda x: answers(loss(x))[0], values.detach().requires_grad_())

    ours, read = partial(call, lr), _bytes(values, *arguments, *options.values())
    return {
        f"{name}, forward": Case(
            partial(ours, values), lambda: exact()[0], composed and partial(composed, values), read
        ),
        f"{name}, forward + backward": Case(step(ours), lambda: exact()[1], step(composed), 2 * read + values.nbytes),
    }


def masked_mean(losses: Tensor, batch: Batch) -> Tensor:
    """The mean over the tokens that count."""
    counted = batch.attention_mask & batch.loss_mask
    return torch.where(counted, losses, 0.0).sum() / counted.sum()


def composed_loss(
    outputs: Tensor,
    batch: Batch,
    loss: str = "mse",
    old_values: Tensor | None = None,
    reduction: str = "token_mean",
    detach_targets: bool = True,
) -> Tensor:
    """The loss by torch's own operations but for the returns, in float32 for 16-bit values."""
    x = outputs if outputs.dtype == torch.float64 else outputs.float()
    values = x.sigmoid() if loss == "bce_with_logits" else x
    values = values.detach() if detach_targets else values
    targets = lr.compute_lambda_return(values, batch.rewards, batch.loss_mask, GAMMA, LAM)
    name = {"bce_with_logits": "binary_cross_entropy_with_logits"}.get(loss, f"{loss}_loss")
    of = partial(getattr(F, name), target=targets, reduction="none")
    losses = of(x)
    if old_values is not None:
        old_values = old_values.to(x.dtype)
        losses = torch.maximum(losses, of(old_values + (x - old_values).clamp(-CLIP_RANGE, CLIP_RANGE)))
    if reduction == "token_mean":
        return masked_mean(losses, batch)
    counted = batch.attention_mask & batch.loss_mask
    return (torch.where(counted, losses, 0.0).sum(1) / counted.sum(1)).mean()


def cases(batch: Batch) -> dict[str, Case]:
    """Every case by name; the multiples of the plain loss are those of "mse". Its masks leave no row empty."""
    values, rewards, attention_mask, mask = batch
    scan = rewards, mask, GAMMA
    earlier = values.roll(1, 1)  # stands for what is known of each token: the same numbers in every dtype
    steps = earlier / 8
    lam = torch.linspace(0.9, 1.0, len(values), device=values.device)
    packed = values[mask], rewards, F.pad(mask.sum(1).cumsum(0), (1, 0)), None, GAMMA, LAM

    def plain(lam: float = LAM) -> Tensor:
        return lr.compute_lambda_return(values, *scan, lam)

    def advantages() -> Tensor:
        return torch.where(mask, plain() - values, 0.0)

    found = {
        "rewards": _returns("compute_lambda_return", values, *scan, LAM, rewards=steps),
        "lam of each row": _returns("compute_lambda_return", values, *scan, lam),
        "rewards and lam of each row": _returns("compute_lambda_return", values, *scan, lam, rewards=steps),
        "advantages": _returns("gae", values, *scan, LAM, composed=advantages),
        "returns and advantages": _returns(
            "returns_and_advantages", values, *scan, 1.0, LAM, composed=lambda: (plain(1.0), advantages())
        ),
        "packed returns": _returns("lambda_return_varlen", *packed),
    }
    full = "compute_lambda_value_loss", values, rewards, attention_mask, mask, GAMMA, LAM
    options: dict[str, dict[str, Any]] = {
        "mse": {},
        "huber": {"loss": "huber"},
        "bce_with_logits": {"loss": "bce_with_logits"},
        "clipped": {"old_values": earlier},
        "gradient through targets": {"detach_targets": False},
        "sequence_mean": {"reduction": "sequence_mean"},
    }
    for name, chosen in options.items():
        clip = {"clip_range": CLIP_RANGE} if "old_values" in chosen else {}
        found |= _loss(name, *full, **chosen, **clip, composed=partial(composed_loss, batch=batch, **chosen))
    found |= _loss("statistics", *full, return_statistics=True)
    return found | _loss("packed loss", "lambda_value_loss_varlen", *packed)
