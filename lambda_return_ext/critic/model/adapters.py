"""Low-rank adapters inside a frozen backbone."""

from __future__ import annotations

import re

from torch import nn

from lambda_return_ext.critic.config import LoraConfig
from lambda_return_ext.critic.errors import UserError, require


def add_lora(backbone: nn.Module, config: LoraConfig) -> None:
    """Put adapters into the linear layers of a frozen backbone; they alone train, in float32.

    Raises:
        UserError: peft is missing, or finds no such modules.
    """
    peft = require("peft", "model.lora", "peft")
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=config.target_modules
    )
    try:
        peft.inject_adapter_in_model(settings, backbone)
    except (ValueError, re.error) as error:
        raise UserError(f"model.lora.target_modules = {config.target_modules!r} does not fit: {error}") from error
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def merge_lora(backbone: nn.Module) -> None:
    """Add the adapters to the weights they belong to, and put the plain layers back."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {name: module for name, module in backbone.named_modules() if isinstance(module, BaseTunerLayer)}
    for name, module in layers.items():
        module.merge()
        if name.rpartition(".")[0] not in layers:  # the experts of a mixture have one wrapper for each parameter
            backbone.set_submodule(name, module.get_base_layer())
