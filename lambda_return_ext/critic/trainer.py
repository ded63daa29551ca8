"""The training loop and the evaluation of a finished run.

Read `train` from top to bottom: everything that can be wrong is checked before the first file is written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lambda_return_ext.critic import checkpoint
from lambda_return_ext.critic.config import Config, TrainingConfig, load_config
from lambda_return_ext.critic.data import (
    Collator,
    Packing,
    PairData,
    TokenPair,
    epoch_batches,
    read_examples,
    select_pairs,
)
from lambda_return_ext.critic.errors import UserError
from lambda_return_ext.critic.interrupt import Interrupted, StopRequest
from lambda_return_ext.critic.losses import value_loss
from lambda_return_ext.critic.metrics import evaluate_pairs, length_baseline, likelihood_baseline
from lambda_return_ext.critic.model import Backbone, ValueModel, compute_features, group_by_prompt
from lambda_return_ext.critic.plots import plot_curves
from lambda_return_ext.critic.report import Display, MetricLog, print_data, print_results, read_metrics
from lambda_return_ext.critic.trackers import check_trackers


@dataclass(frozen=True)
class Task:
    """A checked configuration with its data and model, before any heavy work."""

    config: Config
    device: torch.device
    backbone: Backbone
    data: PairData
    sha256: str
    pad_id: int
    model: ValueModel
    steps: int

    @property
    def train_subset(self) -> list[TokenPair]:
        """The training pairs that are evaluated beside validation: the same ones all along."""
        pairs, wanted = self.data.train, self.config.evaluation.train_pairs
        return pairs[:: math.ceil(len(pairs) / wanted)]

    def summary(self) -> dict[str, Any]:
        """The data of this run, as saved with it; another summary means other data."""
        return {"path": self.config.data.path, "sha256": self.sha256, **self.data.report()}


def prepare(config: Config) -> Task:
    """Load and check all that a run needs, without writing anything.

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
    device = choose_device(config.device)
    backbone = Backbone(config.model.backbone)
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
    torch.manual_seed(config.seed)
    base_model = backbone.base_model(config.model.layers, config.data.max_length)
    bias_init = config.training.value_loss.lambda_return.bias_init
    model = ValueModel(base_model, config.model.head, bias_init, config.model.backbone_frozen).to(device)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return Task(config, device, backbone, data, sha256, pad_id, model, steps)


def choose_device(name: str) -> torch.device:
    """The device that `device` of the configuration names."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device must be auto or cpu on a machine without a CUDA device, got cuda")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def total_steps(config: TrainingConfig, pairs: int) -> int:
    """Steps of a run: all epochs, but at most `max_steps`."""
    steps = config.epochs * math.ceil(pairs / config.batch_size)
    return min(steps, config.max_steps or steps)


def build_collator(task: Task, pairs: list[TokenPair], display: Display) -> Collator:
    """The collator of a run; where features are cached, computes those of `pairs` once."""
    features = None
    if task.config.model.cache_features:
        groups = group_by_prompt(pairs)
        with display.phase("features", "tokens", sum(group.tokens for group in groups)) as advance:
            features = compute_features(task.model.backbone, groups, advance)
    return Collator(task.pad_id, features, task.config.data.pad_to_multiple_of, task.config.data.packing)


def train(config: Config, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Train a critic and return its final results.

    Args:
        config: the run.
        resume: go on from the last checkpoint in the run folder; starts anew where there is none.
        overwrite: remove the run that is in the run folder.

    Raises:
        UserError: something that the user can put right, before anything is written; or a file could not be written.
        FloatingPointError: the loss or its gradient is not finite; the batch is saved and no step was taken with it.
        Interrupted: SIGINT or SIGTERM came; all steps so far are saved.
    """
    checkpoint.check_run_dir(config, resume, overwrite)
    check_trackers(config)
    task, display, training = prepare(config), Display(), config.training
    run_dir = checkpoint.open_run_dir(config, task.summary(), overwrite)
    model, data, device = task.model, task.data, task.device
    print_data(display, task.summary())
    collate = build_collator(task, data.train + data.validation, display)

    optimizer = torch.optim.AdamW(parameter_groups(model, training.weight_decay), lr=training.learning_rate)
    learning_rate = lr_schedule(training, task.steps)
    progress: dict[str, Any] = {"step": 0, "best": [-1.0, 0.0], "seconds": 0.0, "skipped": 0}
    if newest := checkpoint.latest_checkpoint(run_dir):
        progress = checkpoint.load_checkpoint(newest, model, optimizer)
        display.line(f"resumed after step {progress['step']}")
    forward_loss = build_forward_loss(model, training)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    lengths = [pair.length for pair in data.train]
    steps_per_epoch = math.ceil(len(data.train) / training.batch_size)
    warmup_steps = training.value_loss.warmup_steps
    gamma, lam = training.value_loss.gamma_lam
    started = time.monotonic() - progress["seconds"]
    epoch_order: list[list[int]] = []

    with (
        checkpoint.explain_failed_writes(run_dir),
        MetricLog(config, progress["step"]) as log,
        display.phase("training", "steps", task.steps, done=progress["step"]) as advance,
        StopRequest() as stop,
    ):
        for step in range(progress["step"] + 1, task.steps + 1):
            epoch, position = divmod(step - 1, steps_per_epoch)
            if position == 0 or not epoch_order:
                epoch_order = epoch_batches(lengths, training.batch_size, config.seed, epoch)
            step_started = time.monotonic()
            pairs = [data.train[index] for index in epoch_order[position]]
            batch = collate(pairs).to(device)
            # Chosen out here and of one dtype in both phases, so that leaving the warm-up compiles nothing anew.
            warmup = step <= warmup_steps
            loss_mask = batch.last_tokens() if warmup else batch.loss_mask

            model.train()
            inputs = batch.inputs, batch.attention_mask, loss_mask, batch.terminal_rewards
            loss, terms = forward_loss(*inputs, batch.packing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm or math.inf)
            metrics: dict[str, float] = {
                "train/loss": loss.item(),
                **{name: term.item() for name, term in terms.items()},
                "train/grad_norm": float(grad_norm),
                "train/lr": learning_rate(step),
                "train/warmup_active": int(warmup),
                "train/epoch": epoch + (position + 1) / steps_per_epoch,
                "config/gamma": gamma,
                "config/lambda": lam,
            }
            if math.isfinite(metrics["train/loss"]) and math.isfinite(metrics["train/grad_norm"]):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step)
                optimizer.step()
            else:
                say_nonfinite(run_dir, step, metrics, pairs, training.nonfinite, display)
                progress["skipped"] += 1
                metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
            metrics["train/skipped_steps"] = progress["skipped"]
            metrics["train/tokens_per_second"] = batch.tokens / (time.monotonic() - step_started)
            log.write(step, metrics)
            advance(1, f"loss {metrics.get('train/loss', math.nan):.4f}")

            checked = step in (warmup_steps, task.steps) or step % config.evaluation.every == 0
            if checked:
                measured = measure(task, collate)
                log.write(step, measured)
                display.line(f"step {step}: {describe(measured)}")
                rank = [measured["validation/pairwise_accuracy"], measured["validation/margin"]]
                if rank > progress["best"]:
                    progress["best"] = rank
                    state = {"step": step, "metrics": measured}
                    checkpoint.save_tensors(run_dir / checkpoint.BEST, model.saved_tensors(), state)
            progress |= {"step": step, "seconds": time.monotonic() - started}
            stopping = stop.received
            if checked or stopping or step % training.save_every == 0:
                checkpoint.save_checkpoint(run_dir, model, optimizer, progress, training.save_total_limit)
            if stopping:
                raise Interrupted(stopping, step)
    if stop.received:
        raise Interrupted(stop.received, task.steps)

    _, best = checkpoint.load_tensors(run_dir / checkpoint.BEST)
    records = [record for record in read_metrics(run_dir) if "validation/pairwise_accuracy" in record]
    last = {"step": task.steps, "metrics": {name: value for name, value in records[-1].items() if name != "step"}}
    results = finish(task, run_dir, {"best": best, "last": last}, display)
    checkpoint.write_json(run_dir / checkpoint.RESULTS, results)
    plot_curves(run_dir, results)
    display.line(f"trained for {progress['seconds']:.0f} s; run folder: {run_dir}")
    return results


def evaluate(run: str) -> dict[str, Any]:
    """Evaluate the best checkpoint of a run on its validation problems and return the results; writes nothing.

    Raises:
        UserError: the folder holds no run, or its data has changed since.
    """
    display = Display()
    task, state = load_run(run)
    collate = build_collator(task, task.data.validation + task.train_subset, display)
    measured = {"step": state["step"], "metrics": measure(task, collate)}
    return finish(task, Path(run), {"best": measured}, display)


def load_run(run: str) -> tuple[Task, dict[str, Any]]:
    """A run with its data and the model of its best checkpoint, and that checkpoint's step and metrics.

    Raises:
        UserError: the folder holds no run, or its data has changed since.
    """
    run_dir = Path(run)
    task = prepare(load_config(checkpoint.config_path(run_dir)))
    checkpoint.check_same_data(run_dir, task.summary())
    tensors, state = checkpoint.load_tensors(run_dir / checkpoint.BEST)
    checkpoint.load_model(task.model, tensors)
    return task, state


def build_forward_loss(model: ValueModel, config: TrainingConfig) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """Forward and loss as one function of tensors, compiled whole where the configuration says so."""

    def forward_loss(
        inputs: Tensor, attention_mask: Tensor, loss_mask: Tensor, rewards: Tensor, packing: Packing | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        values = model(inputs, attention_mask, packing and packing.cu_seqlens)
        return value_loss(config.value_loss, values, attention_mask, loss_mask, rewards, packing)

    if not config.compile:
        return forward_loss
    # Else two dimensions that happen to be equal in the first batch would be compiled as one.
    torch.fx.experimental._config.use_duck_shape = False
    return torch.compile(forward_loss, fullgraph=True, dynamic=True)


def parameter_groups(model: ValueModel, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices; none for biases and norms."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in parameters if parameter.dim() > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.dim() <= 1], "weight_decay": 0.0},
    ]


def lr_schedule(config: TrainingConfig, steps: int) -> Callable[[int], float]:
    """The learning rate of step 1, 2, ...; it depends on the step alone, so that a checkpoint need not hold it."""
    if config.lr_schedule == "constant":
        return lambda step: config.learning_rate
    return lambda step: config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * (step - 1) / steps))


def say_nonfinite(
    run_dir: Path, step: int, metrics: dict[str, float], pairs: list[TokenPair], policy: str, display: Display
) -> None:
    """Save the batch of a step whose loss or gradient is not finite, and stop or say that it is left out.

    Raises:
        FloatingPointError: `policy` is to stop.
    """
    sides = [{"problem": pair.problem, "right": pair.right._asdict(), "wrong": pair.wrong._asdict()} for pair in pairs]
    numbers = {name: str(metrics[name]) for name in ("train/loss", "train/grad_norm")}
    checkpoint.save_nonfinite(run_dir, {"step": step, **numbers, "pairs": sides})
    message = (
        f"loss or gradient is not finite at step {step}: loss {numbers['train/loss']}, gradient norm "
        f"{numbers['train/grad_norm']}; its pairs are in {run_dir / checkpoint.NONFINITE}"
    )
    if policy == "stop":
        raise FloatingPointError(f"{message}; training.nonfinite=skip leaves such a batch out")
    display.line(f"{message}; left out")


def measure(task: Task, collate: Collator) -> dict[str, Any]:
    """Validation, a fixed part of the training pairs, and the gap between the two: how much is memorised."""
    config = task.config
    parts = {"validation": task.data.validation, "train_subset": task.train_subset}
    measured = {
        f"{part}/{name}": value
        for part, pairs in parts.items()
        for name, value in evaluate_pairs(
            task.model, config.training.value_loss, pairs, collate, config.evaluation.batch_size
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


def finish(task: Task, run_dir: Path, checkpoints: dict[str, Any], display: Display) -> dict[str, Any]:
    """Add the baselines to the measured checkpoints and print the final table."""
    summary = task.summary()
    baselines = {}
    if task.config.evaluation.baselines:
        name, accuracy = length_baseline(task.data.train, task.data.validation)
        groups = group_by_prompt(task.data.validation)
        language_model = task.backbone.language_model().eval().to(task.device)
        with display.phase("likelihood baseline", "tokens", sum(group.tokens for group in groups)) as advance:
            likelihood = likelihood_baseline(language_model, task.data.validation, groups, advance)
        baselines = {name: accuracy, "likelihood": likelihood}
    title = (
        f"{run_dir}: {summary['validation']['pairs']} pairs of {summary['validation']['problems']} problems "
        f"never trained on, seed {task.config.seed}"
    )
    results = {"title": title, "checkpoints": checkpoints, "baselines": baselines, "data": summary}
    print_results(display, results)
    return results
