"""A model measured on all of a run's problems, and the baselines beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lambda_return_ext.critic.data.batches import Collator
from lambda_return_ext.critic.display import Display
from lambda_return_ext.critic.evaluation.baselines import length_baseline, likelihood_baseline
from lambda_return_ext.critic.evaluation.metrics import evaluate_pairs
from lambda_return_ext.critic.model.features import group_by_prompt
from lambda_return_ext.critic.task import Task


def measure(task: Task, collate: Collator, between_batches: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Validation, a fixed part of the training pairs, and the gap between the two: how much is memorised."""
    config = task.config
    parts = {"validation": task.data.validation, "train_subset": task.train_subset}
    measured = {
        f"{part}/{name}": value
        for part, pairs in parts.items()
        for name, value in evaluate_pairs(
            task.model,
            config.training.value_loss,
            pairs,
            collate,
            config.evaluation.batch_size,
            task.ranks,
            between_batches,
        ).items()
    }
    gap = measured["train_subset/pairwise_accuracy"] - measured["validation/pairwise_accuracy"]
    return {**measured, "validation/gap": gap}


def describe(measured: dict[str, Any]) -> str:
    """One line about a validation."""
    return (
        f"validation pairwise accuracy {measured['validation/pairwise_accuracy']:.4f}, "
        f"train {measured['train_subset/pairwise_accuracy']:.4f}, gap {measured['validation/gap']:+.4f}, "
        f"last token {measured['validation/last_token_accuracy']:.4f}, margin {measured['validation/margin']:+.2g}"
    )


def results_of(task: Task, run_dir: Path, checkpoints: dict[str, Any]) -> dict[str, Any]:
    """The measured checkpoints as results, yet without baselines."""
    summary = task.summary()
    title = (
        f"{run_dir}: {summary['validation']['pairs']} pairs of {summary['validation']['problems']} problems "
        f"never trained on, seed {task.config.seed}"
    )
    return {"title": title, "checkpoints": checkpoints, "baselines": {}, "data": summary}


def measure_baselines(task: Task, display: Display) -> dict[str, float]:
    """The pairwise accuracy of each baseline that the configuration asks for, by its title."""
    if not task.config.evaluation.baselines:
        return {}
    baselines = dict([length_baseline(task.data.train, task.data.validation)])
    if not task.config.model.from_scratch:
        groups = group_by_prompt(task.data.validation)
        language_model = task.backbone.language_model().eval().to(task.device)
        with display.phase("likelihood baseline", "tokens", sum(group.tokens for group in groups)) as advance:
            baselines["likelihood"] = likelihood_baseline(language_model, task.data.validation, groups, advance)
    return baselines
