"""A checked configuration with its data and model, as training and everything that looks at a run need it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lambda_return_ext.critic import checkpoint
from lambda_return_ext.critic.config import Config, TrainingConfig
from lambda_return_ext.critic.data.batches import Collator
from lambda_return_ext.critic.data.pairs import TokenPair
from lambda_return_ext.critic.data.split import PairData, read_examples, select_pairs
from lambda_return_ext.critic.display import Display
from lambda_return_ext.critic.errors import UserError
from lambda_return_ext.critic.model.backbone import Backbone
from lambda_return_ext.critic.model.features import compute_features, group_by_prompt
from lambda_return_ext.critic.model.value_model import ValueModel, build_model
from lambda_return_ext.critic.ranks import Ranks, choose_device, exchange_features


@dataclass(frozen=True)
class Task:
    """A checked configuration with its data and model, before any heavy work."""

    config: Config
    ranks: Ranks
    backbone: Backbone
    data: PairData
    sha256: str
    pad_id: int
    model: ValueModel
    steps: int

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.ranks.device

    @property
    def train_subset(self) -> list[TokenPair]:
        """The training pairs that are evaluated beside validation: the same ones all along."""
        pairs, wanted = self.data.train, self.config.evaluation.train_pairs
        return pairs[:: math.ceil(len(pairs) / wanted)]

    def summary(self) -> dict[str, Any]:
        """The data of this run, as saved with it; another summary means other data."""
        return {"path": self.config.data.path, "sha256": self.sha256, **self.data.report()}


def prepare(config: Config, ranks: Ranks | None = None) -> Task:
    """Load and check all that a run needs, without writing anything.

    Args:
        config: the run.
        ranks: this process among all; None when it is alone.

    Raises:
        UserError: the data, the backbone or the plan of the run is wrong.
    """
    if config.training.value_loss.is_off:
        raise UserError(
            "training.value_loss must have at least one of use_lambda_return, use_mc_mse and use_pairwise on, "
            "got none: there is nothing to train"
        )
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    to_be_sharded = ranks is not None and config.training.strategy == "fsdp"
    ranks = ranks or Ranks(0, 1, choose_device(config.device))
    if config.training.compile and ranks.size > 1:
        raise UserError(f"training.compile must be false under torchrun, got true with {ranks.size} processes")
    backbone = Backbone(config.model)
    examples, sha256 = read_examples(config.data)
    tokenizer = backbone.tokenizer()
    data = select_pairs(examples, tokenizer, config.data)
    steps = total_steps(config.training, len(data.train))
    warmup_steps = config.training.value_loss.warmup_steps
    if warmup_steps >= steps:
        raise UserError(
            f"training.value_loss.lambda_return.warmup_steps must be less than the {steps} steps of the run, "
            f"got {warmup_steps}: it would never leave the warm-up"
        )
    if config.training.lr_warmup_steps >= steps:
        raise UserError(
            f"training.lr_warmup_steps must be less than the {steps} steps of the run, "
            f"got {config.training.lr_warmup_steps}"
        )
    torch.manual_seed(config.seed)
    model = build_model(backbone, config.data.max_length, config.training.value_loss.lambda_return.bias_init)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    check_fit(model, config, data, pad_id)
    if not to_be_sharded:  # else each rank puts only its shard on its device
        model.to(ranks.device)
        model.autocast_dtype = torch.bfloat16 if config.training.precision == "bfloat16" else None
    return Task(config, ranks, backbone, data, sha256, pad_id, model, steps)


def check_fit(model: ValueModel, config: Config, data: PairData, pad_id: int) -> None:
    """Refuse a backbone without a row in its embedding for a token of the data, or for a position of a padded batch.

    Raises:
        UserError: it lacks one.
    """
    backbone, multiple = model.backbone.config, config.data.pad_to_multiple_of
    solutions = (side for pair in data.train + data.validation for side in (pair.right, pair.wrong))
    largest = max(pad_id, *(max(solution.prompt_ids + solution.output_ids) for solution in solutions))
    rows, positions = (getattr(backbone, key, None) for key in ("vocab_size", "max_position_embeddings"))
    if rows is not None and largest >= rows:
        raise UserError(
            f"model.backbone must know each token of its tokenizer, got vocab_size = {rows} and id {largest}"
        )
    padded = math.ceil(config.data.max_length / multiple) * multiple
    if positions is not None and padded > positions:
        raise UserError(
            f"data.pad_to_multiple_of must keep data.max_length = {config.data.max_length} within the {positions} "
            f"positions of {config.model.backbone}, got {multiple}: batches may be {padded} tokens wide"
        )


def total_steps(config: TrainingConfig, pairs: int) -> int:
    """Steps of a run: all epochs, but at most `max_steps`."""
    steps = config.epochs * math.ceil(pairs / config.batch_size)
    return min(steps, config.max_steps or steps)


def build_collator(task: Task, pairs: list[TokenPair], display: Display) -> Collator:
    """The collator of a run; where features are cached, computes those of `pairs` once."""
    features = None
    if task.config.model.cache_features:
        groups = group_by_prompt(pairs)
        own = task.ranks.share(groups)
        with display.phase("features", "tokens", sum(group.tokens for group in own)) as advance, task.model.autocast():
            features = compute_features(task.model.backbone, own, advance)
        features = exchange_features(features, groups, task.ranks)
    return Collator(task.pad_id, features, task.config.data.pad_to_multiple_of, task.config.data.packing)


def load_run(run: str) -> tuple[Task, dict[str, Any]]:
    """A run with its data and the model of its best checkpoint, and that checkpoint's step and metrics.

    Raises:
        UserError: the folder holds no run, or one without a validation, or its data has changed since.
    """
    run_dir = Path(run)
    task = prepare(checkpoint.saved_config(run_dir))
    checkpoint.check_same_data(run_dir, task.summary())
    tensors, state = checkpoint.load_best(run_dir)
    checkpoint.load_model(task.model, tensors)
    return task, state
