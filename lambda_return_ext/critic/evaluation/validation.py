"""A model measured on all of a run's problems, and the baselines beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lambda_return_ext.critic.data.batches import Collator
from lambda_return_ext.critic.data.pairs import TokenPair, all_pairs
from lambda_return_ext.critic.data.rollouts import Rollout, solutions_of
from lambda_return_ext.critic.data.split import Item
from lambda_return_ext.critic.display import Display
from lambda_return_ext.critic.evaluation.baselines import length_baseline, likelihood_baseline
from lambda_return_ext.critic.evaluation.metrics import evaluate_items
from lambda_return_ext.critic.model.features import group_by_prompt
from lambda_return_ext.critic.task import Task

MEASURES = ("pairwise_accuracy", "explained_variance")  # that `evaluation.best` may name


def measure(task: Task, collate: Collator, between_batches: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Validation, a fixed part of the training pairs, and the gap between the two: how much is memorised."""
    parts = {"validation": task.data.validation, "train_subset": task.train_subset}
    measured = {
        f"{part}/{name}": value
        for part, items in parts.items()
        for name, value in evaluate_items(task.model, task.config, items, collate, task.ranks, between_batches).items()
    }
    best = task.config.best
    gap = measured.get(f"train_subset/{best}", measured[f"validation/{best}"]) - measured[f"validation/{best}"]
    return {**measured, "validation/gap": gap}


def describe(measured: Mapping[str, Any], best: str) -> str:
    """One line about a validation, the measure first that the best checkpoint follows."""
    other = next(name for name in MEASURES if name != best)
    told = [
        f"validation {best.replace('_', ' ')} {measured[f'validation/{best}']:.4f}",
        f"train {measured.get(f'train_subset/{best}', math.nan):.4f}",
        f"gap {measured['validation/gap']:+.4f}",
    ]
    for title, key, style in (
        (other.replace("_", " "), other, ".4f"),
        ("last token", "last_token_accuracy", ".4f"),
        ("margin", "margin", "+.2g"),
    ):
        if f"validation/{key}" in measured:
            told.append(f"{title} {measured[f'validation/{key}']:{style}}")
    return ", ".join(told)


def results_of(task: Task, run_dir: Path, checkpoints: dict[str, Any]) -> dict[str, Any]:
    """The measured checkpoints as results, yet without baselines."""
    summary = task.summary()
    kind = "pairs" if "pairs" in summary["validation"] else "rollouts"
    title = (
        f"{run_dir}: {summary['validation'][kind]} {kind} of {summary['validation']['problems']} problems "
        f"never trained on, seed {task.config.seed}"
    )
    return {"title": title, "checkpoints": checkpoints, "baselines": {}, "data": summary}


def measure_baselines(task: Task, display: Display) -> dict[str, float]:
    """The pairwise accuracy of each baseline that the configuration asks for, by its title."""
    if not task.config.evaluation.baselines:
        return {}
    train, validation = pairs_of(task.data.train), pairs_of(task.data.validation)
    if not validation:
        return {}
    baselines = dict([length_baseline(train, validation)])
    if not task.config.model.from_scratch:
        groups = group_by_prompt(solutions_of(validation))
        language_model = task.backbone.language_model().eval().to(task.device)
        with display.phase("likelihood baseline", "tokens", sum(group.tokens for group in groups)) as advance:
            baselines["likelihood"] = likelihood_baseline(language_model, validation, groups, advance)
    return baselines


def pairs_of(items: Sequence[Item]) -> list[TokenPair]:
    """The pairs themselves, or all that single rollouts make."""
    pairs = [item for item in items if isinstance(item, TokenPair)]
    return pairs or all_pairs([item for item in items if isinstance(item, Rollout)])
