"""The trainer's configuration: frozen, typed objects read from YAML plus `key=value` overrides.

Every key that exists is a field below, and docs/critic.md explains each. Anything else is an error that
names the key and the nearest valid one.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lambda_return_ext.critic.errors import UserError

UnitFloat = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
PositiveInt = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
ValuePosition = Literal["after", "before", "both"]


class Section(BaseModel):
    """A part of the configuration: immutable, no unknown keys, no silent casts."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataConfig(Section):
    """Where the rollouts or pairs come from and how they are split."""

    path: Text
    validation_path: Text | None = None
    columns: dict[str, Text] = {}
    sampling: Literal["pairs", "rollouts"] = "pairs"
    subset: Text | None = None
    split: Text = "train"
    chat_template: Text | None = None
    max_length: PositiveInt = 512
    overlong: Literal["drop", "truncate_prompt"] = "drop"
    validation_problems: PositiveInt | None = None
    train_problems: PositiveInt | None = None
    pairs_per_problem: PositiveInt | None = None
    length_bin: PositiveInt | None = None
    split_seed: int = 0
    packing: bool = False
    pad_to_multiple_of: PositiveInt = 1

    @model_validator(mode="after")
    def _keys_of_pairs(self) -> DataConfig:
        for key in ("pairs_per_problem", "length_bin"):
            if self.sampling == "rollouts" and getattr(self, key) is not None:
                raise ValueError(f"data.{key} must be null when data.sampling is rollouts: it chooses among pairs")
        return self


class HeadConfig(Section):
    """The value head on top of the backbone."""

    type: Literal["linear", "mlp", "sigmoid"] = "mlp"
    hidden_size: PositiveInt = 256
    bias: bool = True


class LoraConfig(Section):
    """Low-rank adapters in a frozen backbone; rank 0 is none."""

    rank: Count = 0
    alpha: PositiveFloat = 32.0
    dropout: UnitFloat = 0.0
    target_modules: Text | list[Text] = "all-linear"
    learning_rate: PositiveFloat | None = None
    weight_decay: Annotated[float, Field(ge=0.0)] | None = None


class ModelConfig(Section):
    """Backbone and head."""

    backbone: Text
    revision: Text | None = None
    trust_remote_code: bool = False
    from_scratch: bool = False
    config_overrides: dict[str, Any] = {}
    dtype: Literal["float32", "bfloat16"] = "float32"
    attn_implementation: Text | None = None
    layers: PositiveInt | None = None
    backbone_frozen: bool = True
    cache_features: bool = True
    gradient_checkpointing: bool = False
    value_position: ValuePosition = "after"
    lora: LoraConfig = LoraConfig()
    head: HeadConfig = HeadConfig()

    @model_validator(mode="after")
    def _cache_needs_a_frozen_backbone(self) -> ModelConfig:
        if self.cache_features and not self.backbone_frozen:
            raise ValueError(
                "model.cache_features must be false when model.backbone_frozen is false: "
                "the features of a backbone that trains change at every step"
            )
        if self.lora.rank and not self.backbone_frozen:
            raise ValueError(
                "model.backbone_frozen must be true when model.lora.rank is above 0: the adapters train in its place"
            )
        if self.lora.rank and self.cache_features:
            raise ValueError(
                "model.cache_features must be false when model.lora.rank is above 0: "
                "the features of a backbone whose adapters train change at every step"
            )
        if self.gradient_checkpointing and self.backbone_frozen and not self.lora.rank:
            raise ValueError(
                "model.gradient_checkpointing must be false when model.backbone_frozen is true: "
                "no gradient goes through a frozen backbone, so that it keeps no activations"
            )
        return self


class LambdaReturnConfig(Section):
    """The TD(lambda) target, its warm-up and the first prediction."""

    gamma: UnitFloat = 1.0
    lam: UnitFloat = 0.95
    lam_schedule: Literal["constant", "linear", "cosine"] = "constant"
    lam_start: UnitFloat = 1.0
    lam_hold_steps: Count = 0
    lam_decay_steps: PositiveInt | None = None
    coef: PositiveFloat = 1.0
    warmup_steps: Count = 0
    bias_init: float | Literal["mean"] | None = 0.5

    @field_validator("bias_init", mode="before")
    @classmethod
    def _number_or_mean(cls, value: Any) -> Any:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is None or value == "mean" or (is_number and math.isfinite(value)):
            return value
        raise ValueError(
            f"training.value_loss.lambda_return.bias_init must be a finite number, 'mean' or null, got {value!r}"
        )


class ValueLossConfig(Section):
    """Which terms the loss has; Monte-Carlo and lambda-return exclude each other."""

    use_pairwise: bool = False
    pairwise_coef: PositiveFloat = 1.0
    use_mc_mse: bool = False
    mc_mse_coef: PositiveFloat = 1.0
    use_lambda_return: bool = False
    lambda_return: LambdaReturnConfig = LambdaReturnConfig()
    error: Literal["mse", "huber"] = "mse"
    huber_delta: PositiveFloat = 1.0
    reduction: Literal["token", "sequence"] = "token"
    balance: bool | None = None
    output_window: PositiveInt | None = None

    @model_validator(mode="after")
    def _one_regression_target(self) -> ValueLossConfig:
        prefix = "training.value_loss"
        if self.use_mc_mse and self.use_lambda_return:
            raise ValueError(
                f"{prefix}.use_mc_mse and {prefix}.use_lambda_return must not both be true: "
                "they are two targets for the same value"
            )
        return self

    @property
    def is_off(self) -> bool:
        """True when no term is on, so that there is nothing to train."""
        return not (self.use_pairwise or self.use_mc_mse or self.use_lambda_return)

    @property
    def gamma_lam(self) -> tuple[float, float]:
        """What the target uses; Monte-Carlo is both at 1."""
        return (self.lambda_return.gamma, self.lambda_return.lam) if self.use_lambda_return else (1.0, 1.0)

    @property
    def warmup_steps(self) -> int:
        """Steps on the last token alone; the warm-up belongs to the lambda-return loss."""
        return self.lambda_return.warmup_steps if self.use_lambda_return else 0


class EarlyStoppingConfig(Section):
    """End a run that has stopped rising on validation, by the measure of `evaluation.best`."""

    patience: PositiveInt | None = None
    min_delta: Annotated[float, Field(ge=0.0)] = 0.0


class TrainingConfig(Section):
    """The optimisation."""

    epochs: PositiveInt = 8
    max_steps: PositiveInt | None = None
    batch_size: PositiveInt = 16
    micro_batch_size: PositiveInt | None = None
    strategy: Literal["ddp", "fsdp"] = "ddp"
    precision: Literal["float32", "bfloat16"] = "float32"
    learning_rate: PositiveFloat = 1e-3
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    lr_warmup_steps: Count = 0
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    max_grad_norm: PositiveFloat | None = 1.0
    save_every: PositiveInt = 50
    save_total_limit: PositiveInt | None = 1
    nonfinite: Literal["stop", "skip"] = "stop"
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    compile: bool = False
    value_loss: ValueLossConfig = ValueLossConfig()


class EvaluationConfig(Section):
    """When and on what the critic is measured."""

    every: PositiveInt = 50
    batch_size: PositiveInt = 32
    best: Literal["pairwise_accuracy", "explained_variance"] | None = None
    train_pairs: PositiveInt = 200
    baselines: bool = True


class TrackingConfig(Section):
    """Where metrics go besides `metrics.jsonl`."""

    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = ["tensorboard"]
    project: Text = "lambda-critic"
    name: Text | None = None


class Config(Section):
    """Everything a run depends on; saved with it as `config.yaml`."""

    run_dir: Text
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0  # torch takes one bit more, and each rank adds its number
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: PositiveInt | None = None
    data: DataConfig
    model: ModelConfig
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        if self.training.strategy == "fsdp":
            for key, is_on, why in (
                ("model.cache_features", self.model.cache_features, "features are computed by a whole backbone"),
                ("training.compile", self.training.compile, "a sharded model is not one graph"),
            ):
                if is_on:
                    raise ValueError(f"{key} must be false when training.strategy is fsdp: {why}")
        if self.data.sampling == "rollouts" and self.training.value_loss.use_pairwise:
            raise ValueError(
                "training.value_loss.use_pairwise must be false when data.sampling is rollouts: "
                "a batch of single answers has no pairs to rank"
            )
        bias = self.training.value_loss.lambda_return.bias_init
        if not self.model.head.bias and bias is not None:
            raise ValueError(
                "training.value_loss.lambda_return.bias_init must be null when model.head.bias is false: a head "
                f"without a bias cannot start at a number, got {bias!r}"
            )
        if self.model.head.type == "sigmoid" and isinstance(bias, float) and not 0.0 < bias < 1.0:
            raise ValueError(
                "training.value_loss.lambda_return.bias_init must be between 0 and 1 when model.head.type is sigmoid, "
                f"got {bias}"
            )
        return self

    @property
    def best(self) -> str:
        """The measure on validation that the best checkpoint and early stopping follow."""
        default = "pairwise_accuracy" if self.data.sampling == "pairs" else "explained_variance"
        return self.evaluation.best or default

    @property
    def balanced(self) -> bool:
        """Whether the loss is the mean of those of two halves of the rollouts."""
        balance = self.training.value_loss.balance
        return self.data.sampling == "pairs" if balance is None else balance

    def to_yaml(self) -> str:
        """The resolved configuration, every key written out."""
        return OmegaConf.to_yaml(OmegaConf.create(self.model_dump()))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides and check the whole.

    Args:
        path: the YAML file.
        overrides: dotted `key=value` strings; values are YAML, later ones win.

    Raises:
        UserError: the file is missing or no YAML mapping, an override has no `=`, or a key is unknown,
            of the wrong type or out of range. All faults are named at once.
    """
    for override in overrides:
        if "=" not in override:
            raise UserError(f"an override must look like key=value, got {override!r}")
        try:
            OmegaConf.from_dotlist([override])
        except yaml.YAMLError as error:
            raise UserError(f"the value of an override must be valid YAML, got {override!r}") from error
    try:
        loaded = OmegaConf.load(path)
        if not isinstance(loaded, DictConfig):
            raise UserError(f"{path} must be a YAML mapping of config keys, got a {type(loaded).__name__}")
        merged = OmegaConf.merge(loaded, OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(merged, resolve=True)
    except OSError as error:
        raise UserError(f"the config must be a readable YAML file, got {str(path)!r}: {error.strerror}") from error
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{path} and its overrides must be valid YAML: {error}") from error
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(_explain(fault) for fault in error.errors())) from error


def _explain(fault: Any) -> str:
    """One pydantic fault as one sentence: the key, what it must be, what it got."""
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"unknown config key {key!r}; the nearest valid key is {_nearest_key(key)!r}"
    if fault["type"] == "missing":
        return f"config key {key!r} must be given"
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    wanted = fault["msg"].replace("Input should be", "must be")
    if fault["type"] == "model_type":
        wanted = "must be a section with keys of its own"
    return f"{key or 'the config'} {wanted}, got {fault['input']!r}"


def _nearest_key(key: str) -> str:
    """The valid key most like `key`; a right name in the wrong section, and initials of one in this, count as near."""
    section, _, name = key.rpartition(".")

    def likeness(candidate: str) -> float:
        its_section, _, its_name = candidate.rpartition(".")
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        is_short_for = name == "".join(word[0] for word in its_name.split("_"))
        alike = 1.0 if is_short_for else difflib.SequenceMatcher(None, name, its_name).ratio()
        return whole + 3 * alike + (section == its_section)

    return max(_keys(Config), key=likeness)


def _keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    """All dotted keys, sections included."""
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _keys(field.annotation, f"{prefix}{name}.")
