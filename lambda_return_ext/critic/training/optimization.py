"""Which parameter learns how fast, at each step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from lambda_return_ext.critic.config import LoraConfig, TrainingConfig, ValueLossConfig


def parameter_groups(model: nn.Module, config: TrainingConfig, lora: LoraConfig) -> list[dict[str, Any]]:
    """Groups for AdamW: weight decay for matrices, none for biases and norms, and adapters on their own.

    Each group has its learning rate before the schedule as `base_lr`.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapters = [parameter for name, parameter in trained.items() if "lora_" in name]
    others = [parameter for name, parameter in trained.items() if "lora_" not in name]
    rate, decay = lora.learning_rate or config.learning_rate, lora.weight_decay
    groups = [
        ([parameter for parameter in others if parameter.dim() > 1], config.learning_rate, config.weight_decay),
        ([parameter for parameter in others if parameter.dim() <= 1], config.learning_rate, 0.0),
        (adapters, rate, config.weight_decay if decay is None else decay),
    ]
    return [
        {"params": parameters, "lr": lr, "base_lr": lr, "weight_decay": weight_decay}
        for parameters, lr, weight_decay in groups
        if parameters
    ]


def lr_schedule(config: TrainingConfig, steps: int) -> Callable[[int], float]:
    """The share of the learning rate at step 1, 2, ...

    It depends on the step alone, so that a checkpoint need not hold it.
    """
    warmup = config.lr_warmup_steps

    def factor(step: int) -> float:
        if step <= warmup:
            return step / warmup
        if config.lr_schedule == "constant":
            return 1.0
        return 0.5 * (1.0 + math.cos(math.pi * (step - 1 - warmup) / (steps - warmup)))

    return factor


def lam_schedule(config: ValueLossConfig, steps: int) -> Callable[[int], float]:
    """Lambda at step 1, 2, ...: held at `lam_start`, then falling to `lam`, where it stays; 1 for Monte-Carlo."""
    settings, last = config.lambda_return, config.gamma_lam[1]
    if not config.use_lambda_return or settings.lam_schedule == "constant":
        return lambda step: last
    length = settings.lam_decay_steps or max(steps - settings.lam_hold_steps, 1)

    def lam(step: int) -> float:
        done = min(max((step - settings.lam_hold_steps) / length, 0.0), 1.0)
        if settings.lam_schedule == "cosine":
            done = 0.5 * (1.0 - math.cos(math.pi * done))
        return settings.lam_start + (last - settings.lam_start) * done if done < 1.0 else last

    return lam
