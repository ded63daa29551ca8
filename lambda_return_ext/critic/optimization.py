"""Which parameter learns how fast, at each step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from lambda_return_ext.critic.config import LoraConfig, TrainingConfig


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
    if config.lr_schedule == "constant":
        return lambda step: 1.0
    return lambda step: 0.5 * (1.0 + math.cos(math.pi * (step - 1) / steps))
