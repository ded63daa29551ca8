"""One contestant on one split with one seed: the trainer's own parts on cached features, and what is kept of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from experiments.block import TrainedBlock
from lambda_return_ext.critic.config import Config
from lambda_return_ext.critic.data.batches import Collator, epoch_batches
from lambda_return_ext.critic.data.rollouts import Solution
from lambda_return_ext.critic.data.split import Item, RunData
from lambda_return_ext.critic.evaluation.baselines import length_baseline
from lambda_return_ext.critic.evaluation.metrics import evaluate_items, measure_batch
from lambda_return_ext.critic.evaluation.validation import pairs_of
from lambda_return_ext.critic.losses import count_terms, value_loss
from lambda_return_ext.critic.model.value_model import ValueModel
from lambda_return_ext.critic.training.optimization import lam_schedule, lr_schedule, parameter_groups
from lambda_return_ext.critic.training.trainer import training_batch

KEPT = ("pairwise_accuracy", "last_token_accuracy", "margin", "token_variance_right", "token_variance_wrong", "loss")
TRAIN_PAIRS = 100  # at most so many are measured beside validation


@dataclass(frozen=True)
class Contest:
    """One run to be made."""

    data_set: str
    regime: str
    contestant: str
    seed: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.data_set}-{self.regime}-{self.contestant}-{self.seed}"


class Features(nn.Module):
    """Stands where the backbone does: its features were computed before."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.config = SimpleNamespace(hidden_size=hidden_size)


def run_config(settings: Mapping[str, Any], contest: Contest, train_problems: int | None) -> Config:
    """The configuration that the trainer would be given for this run."""
    chosen = {key: value for key, value in settings["contestants"][contest.contestant].items() if key != "head"}
    run, features, data = settings["run"], settings["features"], settings["data_sets"][contest.data_set]
    return Config.model_validate(
        {
            "run_dir": "unused",
            "seed": contest.seed,
            "data": {
                "path": str(Path(settings["folder"]) / f"{contest.data_set}.jsonl"),
                "max_length": features["max_length"],
                "validation_problems": data["validation_problems"],
                "train_problems": train_problems,
                "split_seed": contest.seed,
            },
            "model": {
                "backbone": features["backbone"],
                "layers": features["layers"],
                "head": {"type": head_type(settings, contest), "hidden_size": run["hidden_size"]},
            },
            "training": {
                "epochs": 10**6,
                "max_steps": run["steps"],
                "batch_size": run["batch_size"],
                "learning_rate": run["learning_rate"],
                "value_loss": chosen,
            },
            "evaluation": {"batch_size": 32},
        }
    )


def head_type(settings: Mapping[str, Any], contest: Contest) -> str:
    """Of the heads that the package has; a trained block goes below an MLP."""
    return "linear" if settings["contestants"][contest.contestant].get("head") == "linear" else "mlp"


def build(config: Config, hidden_size: int, base: Any = None) -> ValueModel:
    """The model of a run, as the trainer initialises it; with a base model, its last block trains below the head."""
    bias = config.training.value_loss.lambda_return.bias_init
    assert bias != "mean"
    torch.manual_seed(config.seed)
    model = ValueModel(Features(hidden_size), config.model.head, bias, backbone_frozen=True)
    if base is not None:
        model.value_head = TrainedBlock(base, model.value_head)
    return model


def groups(config: Config, model: ValueModel, block_rate: float) -> list[dict[str, Any]]:
    """The trainer's groups of parameters, with those of a trained block apart, at their own learning rate."""
    found = parameter_groups(model, config.training, config.model.lora)
    if not isinstance(model.value_head, TrainedBlock):
        return found
    block = set(model.value_head.block.parameters())
    parts = []
    for group in found:
        for inside, rate in ((False, group["base_lr"]), (True, block_rate)):
            chosen = [parameter for parameter in group["params"] if (parameter in block) is inside]
            parts.append({**group, "params": chosen, "lr": rate, "base_lr": rate})
    return [part for part in parts if part["params"]]


def train(
    config: Config, model: ValueModel, data: RunData, collate: Collator, checks: list[int], block_rate: float = 0.0
) -> tuple[list[dict[str, float]], list[float]]:
    """The steps of `lambda-critic train`, and nothing else of it; a test holds the two together.

    Returns:
        What was measured before the first step and after those of `checks`, and the largest gradient with respect to
        the value of a token that is not the last of its solution, in every step of the warm-up.
    """
    training, steps = config.training, config.training.max_steps
    assert steps is not None
    optimizer = torch.optim.AdamW(groups(config, model, block_rate))
    lr_factor, lam = lr_schedule(training, steps), lam_schedule(training.value_loss, steps)
    torch.manual_seed(config.seed)
    lengths = [item.length for item in data.train]
    batches: list[list[int]] = []
    trace, elsewhere = [measure(config, model, data, collate, 0)], []
    for step in range(1, steps + 1):
        if not batches:
            epoch = (step - 1) // -(-len(lengths) // training.batch_size)
            batches = epoch_batches(lengths, training.batch_size, config.seed, epoch)[::-1]
        places = [(data.train[index], (0.0, 0.0)) for index in batches.pop()]
        warmup = step <= training.value_loss.warmup_steps
        batch = training_batch(collate, places, places[0], warmup, None)
        model.train()
        optimizer.zero_grad(set_to_none=True)
        counts = count_terms(training.value_loss, batch)
        values = model(batch.inputs, batch.attention_mask)
        values.retain_grad()
        lam_now = torch.tensor(lam(step), dtype=torch.float64)
        value_loss(training.value_loss, values, batch, counts, lam_now)[0].backward()
        if warmup:
            assert values.grad is not None
            elsewhere.append(values.grad.masked_fill(batch.loss_mask, 0.0).abs().max().item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_factor(step)
        optimizer.step()
        if step in checks:
            trace.append(measure(config, model, data, collate, step))
    return trace, elsewhere


def measure(config: Config, model: ValueModel, data: RunData, collate: Collator, step: int) -> dict[str, float]:
    """Validation, and a fixed part of the training pairs."""
    seen = data.train[:: -(-len(data.train) // TRAIN_PAIRS)]
    row: dict[str, float] = {"step": step}
    for part, pairs in (("validation", data.validation), ("train", seen)):
        measured = evaluate_items(model, config, pairs, collate)
        row |= {f"{part}_{name}": measured[name] for name in KEPT}
        row |= {f"{part}_mean": (measured["mean_right"] + measured["mean_wrong"]) / 2}
    return row


@torch.no_grad()
def ranked(config: Config, model: ValueModel, pairs: Sequence[Item], collate: Collator) -> dict[str, list[int]]:
    """Of each problem, for each of its pairs, 1 where the right solution is above the wrong one."""
    model.eval()
    found: dict[str, list[int]] = {}
    for start in range(0, len(pairs), 32):
        part = pairs[start : start + 32]
        batch = collate.pad(part)
        record = measure_batch(model(batch.inputs, batch.attention_mask), batch, config.training.value_loss)
        of_right, of_wrong = record["mean"].chunk(2)
        right = (of_right > of_wrong).int().tolist()
        for pair, one in zip(part, right, strict=True):
            found.setdefault(pair.problem, []).append(one)
    return found


def run(
    settings: Mapping[str, Any],
    contest: Contest,
    config: Config,
    data: RunData,
    features: Mapping[Solution, Tensor],
    human_eval: Sequence[Item],
    base: Any = None,
) -> dict[str, Any]:
    """Train and measure one contestant; with a base model, features are what its last block reads."""
    started = time.monotonic()
    collate, chosen = Collator(0, features), settings["run"]
    width = next(iter(features.values())).shape[1] if base is None else base.config.hidden_size
    model = build(config, width, base)
    trace, elsewhere = train(config, model, data, collate, chosen["checks"], chosen["block_learning_rate"])
    return {
        "data_set": contest.data_set,
        "regime": contest.regime,
        "contestant": contest.contestant,
        "seed": contest.seed,
        "train_problems": len({pair.problem for pair in data.train}),
        "train_pairs": len(data.train),
        "validation_pairs": len(data.validation),
        "trace": trace,
        "warmup_gradient_elsewhere": max(elsewhere, default=None),
        "validation": ranked(config, model, data.validation, collate),
        "human_eval": ranked(config, model, human_eval, collate) if human_eval else {},
        "length": length_baseline(pairs_of(data.train), pairs_of(data.validation))[1],
        "seconds": round(time.monotonic() - started, 1),
    }
