"""A value model as transformers saves one."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

HEAD_SETTINGS = "value_head.json"
HEAD_TENSORS = "value_head.safetensors"


def token_classifier(backbone: Any, head: nn.Module) -> Any | None:
    """A transformers token classification model of these parts, or None where transformers has none."""
    from transformers import AutoModelForTokenClassification

    config = copy.deepcopy(backbone.config)
    config.num_labels = 1
    config.problem_type = "regression"  # else vLLM puts a sigmoid on a model with one label
    config.classifier_dropout = 0.0
    try:
        whole = AutoModelForTokenClassification.from_config(config, dtype=backbone.dtype)
    except ValueError:
        return None
    if not isinstance(getattr(whole, whole.base_model_prefix), type(backbone)) or classifier(whole) is None:
        return None
    setattr(whole, whole.base_model_prefix, backbone)
    # In float32 beside a bfloat16 backbone too, or margins smaller than its rounding would be lost.
    linear = classifier(whole).float()
    linear.load_state_dict(head.state_dict(), strict=False)
    if "bias" not in head.state_dict():  # transformers' layer has one
        nn.init.zeros_(linear.bias)
    return whole


def classifier(whole: Any) -> Any:
    """The linear layer on top of a token classification model."""
    return next((module for module in whole.children() if isinstance(module, nn.Linear)), None)
