"""A checked configuration with its data and model, as training and everything that looks at a run need it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from lambda_return_ext.critic import checkpoint
from lambda_return_ext.critic.config import Config, TrainingConfig
from lambda_return_ext.critic.data.batches import Collator
from lambda_return_ext.critic.data.pairs import all_pairs
from lambda_return_ext.critic.data.rollouts import Rollout, Solution, solutions_of
from lambda_return_ext.critic.data.split import Item, RunData, read_rows, select_data
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
    data: RunData
    digests: Mapping[str, str]
    pad_id: int
    model: ValueModel
    steps: int

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.ranks.device

    @property
    def train_subset(self) -> Sequence[Item]:
        """The training items that are evaluated beside validation: the same ones all along."""
        items, wanted = self.data.train, self.config.evaluation.train_pairs
        return items[:: math.ceil(len(items) / wanted)]

    def summary(self) -> dict[str, Any]:
        """The data of this run, as saved with it; another summary means other data."""
        return {"path": self.config.data.path, **self.digests, **self.data.report()}

    def collator(self, features: Mapping[Solution, Tensor] | None = None) -> Collator:
        """What makes batches of this run.

        Args:
            features: [1 + T, H] from the prompt's last token on of each solution; None for batches of token ids.
        """
        config = self.config
        position = config.model.value_position
        if features is not None and position == "after":  # no value at the prompt
            features = {solution: rows[1:] for solution, rows in features.items()}
        return Collator(
            self.pad_id,
            features,
            config.data.pad_to_multiple_of,
            config.data.packing,
            position,
            None if config.data.sampling == "pairs" else midpoint(self.data.train),
            any(rollout.step_rewards is not None for rollout in self.data.rollouts),
        )


def midpoint(items: Sequence[Item]) -> float:
    """The middle of the range of the rewards of some items: where the upper half begins."""
    totals = [rollout.total for item in items for rollout in item.rollouts]
    return (min(totals) + max(totals)) / 2


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
    rows = read_rows(config.data)
    tokenizer = backbone.tokenizer()
    data = select_data(rows, tokenizer, config.data)
    check_measure(config, data)
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
    model = build_model(backbone, config.data.max_length, first_prediction(config, data))
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    check_fit(model, config, data, pad_id)
    if not to_be_sharded:  # else each rank puts only its shard on its device
        model.to(ranks.device)
        model.autocast_dtype = torch.bfloat16 if config.training.precision == "bfloat16" else None
    return Task(config, ranks, backbone, data, rows.digests, pad_id, model, steps)


def check_measure(config: Config, data: RunData) -> None:
    """Refuse a measure for the best checkpoint that the validation data cannot give.

    Raises:
        UserError: accuracies need two answers of one problem with different rewards.
    """
    rollouts = [item for item in data.validation if isinstance(item, Rollout)]
    if config.best == "pairwise_accuracy" and rollouts and not all_pairs(rollouts):
        raise UserError(
            "evaluation.best must be explained_variance where no validation problem has two answers with different "
            "rewards, got pairwise_accuracy"
        )


def first_prediction(config: Config, data: RunData) -> float | None:
    """What the critic says at every token before it has learned: a number, or the mean reward of the training rollouts.

    Raises:
        UserError: a sigmoid cannot say that mean.
    """
    bias = config.training.value_loss.lambda_return.bias_init
    if bias != "mean":
        return bias
    mean = fmean(rollout.total for item in data.train for rollout in item.rollouts)
    if config.model.head.type == "sigmoid" and not 0.0 < mean < 1.0:
        raise UserError(
            "training.value_loss.lambda_return.bias_init must be a number when model.head.type is sigmoid and the mean "
            f"reward of the training data is not between 0 and 1, got 'mean' for a mean of {mean:g}"
        )
    return mean


def check_fit(model: ValueModel, config: Config, data: RunData, pad_id: int) -> None:
    """Refuse a backbone without a row in its embedding for a token of the data, or for a position of a padded batch.

    Raises:
        UserError: it lacks one.
    """
    backbone, multiple = model.backbone.config, config.data.pad_to_multiple_of
    solutions = [rollout.solution for rollout in data.rollouts]
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


def total_steps(config: TrainingConfig, items: int) -> int:
    """Steps of a run: all epochs, but at most `max_steps`."""
    steps = config.epochs * math.ceil(items / config.batch_size)
    return min(steps, config.max_steps or steps)


def build_collator(task: Task, items: Sequence[Item], display: Display) -> Collator:
    """The collator of a run; where features are cached, computes those of `items` once."""
    if not task.config.model.cache_features:
        return task.collator()
    groups = group_by_prompt(solutions_of(items))
    own = task.ranks.share(groups)
    with display.phase("features", "tokens", sum(group.tokens for group in own)) as advance, task.model.autocast():
        features = compute_features(task.model.backbone, own, advance)
    return task.collator(exchange_features(features, groups, task.ranks))


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
