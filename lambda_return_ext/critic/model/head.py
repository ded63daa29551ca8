"""The value head."""

from __future__ import annotations

from torch import nn

from lambda_return_ext import init_value_head_bias
from lambda_return_ext.critic.config import HeadConfig


def build_value_head(config: HeadConfig, hidden_size: int, bias_init: float | None) -> nn.Module:
    """A head from [..., H] to [..., 1] that says `bias_init` everywhere until it has learned something."""
    last = nn.Linear(config.hidden_size if config.type == "mlp" else hidden_size, 1, bias=config.bias)
    head: nn.Module = last
    if config.type == "mlp":
        head = nn.Sequential(nn.Linear(hidden_size, config.hidden_size), nn.GELU(), last)
    elif config.type == "sigmoid":
        head = nn.Sequential(last, nn.Sigmoid())
    if bias_init is not None:
        nn.init.zeros_(last.weight)
        init_value_head_bias(head, bias_init)
    return head
