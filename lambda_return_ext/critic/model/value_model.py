"""The value model: a transformer backbone, its features, and a value head."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lambda_return_ext.critic.config import HeadConfig, LoraConfig
from lambda_return_ext.critic.errors import UserError
from lambda_return_ext.critic.model.adapters import add_lora, merge_lora
from lambda_return_ext.critic.model.backbone import Backbone, check_backbone, forget_gguf
from lambda_return_ext.critic.model.export import HEAD_SETTINGS, HEAD_TENSORS, classifier, token_classifier
from lambda_return_ext.critic.model.head import build_value_head


class ValueModel(nn.Module):
    """A value for every token: `value_head(backbone(tokens))`, in float32.

    Args:
        backbone: a transformers base model, or any module with its call signature and `config.hidden_size`.
        head: kind and size of the value head.
        bias_init: the first prediction at every token; None leaves the head as torch initialises it.
        backbone_frozen: the backbone gets no gradient and stays in evaluation mode.
        lora: adapters that train inside a frozen backbone.
    """

    def __init__(
        self,
        backbone: Any,
        head: HeadConfig,
        bias_init: float | None,
        backbone_frozen: bool,
        lora: LoraConfig | None = None,
    ):
        super().__init__()
        self.backbone = backbone
        self.head_config = head
        self.value_head = build_value_head(head, backbone.config.hidden_size, bias_init)
        self.has_lora = lora is not None and lora.rank > 0
        self.backbone_frozen = backbone_frozen and not self.has_lora
        self.autocast_dtype: torch.dtype | None = None
        self.backbone_has_files = True
        backbone.requires_grad_(not backbone_frozen)
        if lora is not None and self.has_lora:
            add_lora(backbone, lora)

    def forward(self, inputs: Tensor, attention_mask: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Values [B, T], or [total] of packed sequences.

        Args:
            inputs: token ids [B, T] or [total], or features that the backbone gave before, with H behind.
            attention_mask: bool, the shape of the ids, false at padding.
            cu_seqlens: [B + 1], where packed sequences begin and the last one ends.
        """
        if inputs.is_floating_point():
            features = inputs
        else:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.backbone_frozen), self.autocast():
                if cu_seqlens is None:
                    output = self.backbone(input_ids=inputs, attention_mask=attention_mask, use_cache=False)
                    features = output.last_hidden_state
                else:
                    features = self._packed_features(inputs, cu_seqlens)
        return self.value_head(features.float()).squeeze(-1)

    def _packed_features(self, ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """[total, H]: transformers keeps sequences apart where position_ids begin anew and there is no mask."""
        starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=len(ids))
        positions = torch.arange(len(ids), device=ids.device) - starts
        output = self.backbone(input_ids=ids[None], position_ids=positions[None], use_cache=False)
        return output.last_hidden_state[0]

    def autocast(self) -> AbstractContextManager[None]:
        """Compute the backbone in `autocast_dtype`, where that is set; the head is always in float32."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(next(self.parameters()).device.type, dtype=self.autocast_dtype)

    def backbone_layers(self) -> list[nn.Module]:
        """The transformer layers of the backbone: of layers within layers, which some families name, the outermost."""
        names = getattr(self.backbone, "_no_split_modules", None) or ()

        def outermost(module: nn.Module) -> Iterator[nn.Module]:
            for child in module.children():
                if type(child).__name__ in names:
                    yield child
                else:
                    yield from outermost(child)

        return [*dict.fromkeys(outermost(self.backbone))]  # some families use a layer several times

    def train(self, mode: bool = True) -> ValueModel:
        """Switch between training and evaluation; a frozen backbone stays in evaluation."""
        super().train(mode)
        if self.backbone_frozen:
            self.backbone.eval()
        return self

    def checkpoint_gradients(self) -> None:
        """Keep the activations of whole layers only, and compute those within a layer again in the backward pass."""
        # transformers 5.24 renamed the method, and the old name warns there.
        name = "activation_checkpointing_enable"
        enable = getattr(self.backbone, name, None) or self.backbone.gradient_checkpointing_enable
        enable({"use_reentrant": False})

    def saved_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds: all tensors, without those of a frozen backbone that has files of its own."""
        tensors = self.state_dict()
        if self.backbone_has_files and (self.backbone_frozen or self.has_lora):
            trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
            return {name: tensor for name, tensor in tensors.items() if name in trained}
        return tensors

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the whole model, for `from_pretrained` and for transformers; LoRA adapters become part of the weights.

        With a linear head it is a transformers token classification model with one label, where there is one for this
        backbone; else the backbone as transformers saves it, and the head beside it.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.has_lora:
            merge_lora(self.backbone)
            self.has_lora = False
        forget_gguf(self.backbone)
        whole = token_classifier(self.backbone, self.value_head) if self.head_config.type == "linear" else None
        if whole is not None:
            whole.save_pretrained(folder)
            return
        self.backbone.save_pretrained(folder)
        save_file(self.value_head.state_dict(), folder / HEAD_TENSORS)
        (folder / HEAD_SETTINGS).write_text(self.head_config.model_dump_json() + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> ValueModel:
        """Load what `save_pretrained` wrote, or any token classification model of transformers with one label.

        Args:
            folder: the saved model.
            dtype: of the backbone; the head is in float32.

        Raises:
            UserError: there is no such model in the folder.
        """
        from transformers import AutoModel, AutoModelForTokenClassification

        folder = Path(folder)
        try:
            if (folder / HEAD_SETTINGS).is_file():
                head_config = HeadConfig.model_validate_json((folder / HEAD_SETTINGS).read_text(encoding="utf-8"))
                model = cls(AutoModel.from_pretrained(folder, dtype=dtype), head_config, None, backbone_frozen=True)
                model.value_head.load_state_dict(load_file(folder / HEAD_TENSORS))
                return model.eval()
            whole, report = AutoModelForTokenClassification.from_pretrained(
                folder, dtype=dtype, output_loading_info=True
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{folder} must be a folder that ValueModel.save_pretrained wrote: {error}") from error
        if missing := report["missing_keys"]:  # transformers makes them up
            raise UserError(f"{folder} must hold every weight of a value model, got none for {min(missing)}")
        if whole.config.num_labels != 1:
            raise UserError(f"{folder} must hold a model with one label, got {whole.config.num_labels}")
        model = cls(whole.base_model, HeadConfig(type="linear"), None, backbone_frozen=True)
        model.value_head.load_state_dict(classifier(whole).state_dict())
        return model.eval()


@torch.no_grad()
def check_packing(model: ValueModel) -> None:
    """Try whether the backbone keeps packed sequences apart: not every kind does. All ranks must call it.

    Raises:
        UserError: the features of a sequence depend on what is packed before it.
    """
    device, length = next(model.parameters()).device, 8
    seen: list[Tensor] = []
    handle = model.value_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ids = torch.arange(length, device=device).repeat(2)
    bounds = torch.tensor([0, length, 2 * length], dtype=torch.int32, device=device)
    training = model.training
    model.eval()(ids, torch.ones_like(ids).bool(), bounds)
    model.train(training)
    handle.remove()
    first, second = seen[0].chunk(2)
    # Rounding in 16 bits is a percent or two; what goes before changes about as much as the features are large.
    if (first - second).norm() > 0.1 * first.norm():
        raise UserError("data.packing must be false for this backbone: it does not keep packed sequences apart")


def build_model(backbone: Backbone, max_length: int, bias_init: float | None) -> ValueModel:
    """The value model that the configuration of a backbone describes.

    Raises:
        UserError: it cannot be loaded, or not as it is asked for, or is no causal language model.
    """
    settings = backbone.settings
    base_model = backbone.base_model(settings.layers, max_length)
    check_backbone(base_model, backbone.name)
    model = ValueModel(base_model, settings.head, bias_init, settings.backbone_frozen, settings.lora)
    model.backbone_has_files = not settings.from_scratch
    if settings.gradient_checkpointing:
        model.checkpoint_gradients()
    return model
