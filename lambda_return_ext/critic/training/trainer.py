"""The training loop and the evaluation of a finished run.

Read `train_rank` from top to bottom: everything that can be wrong is checked before the first file is written.
"""

from __future__ import annotations

import itertools
import math
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lambda_return_ext.critic import checkpoint, files
from lambda_return_ext.critic.config import Config, TrainingConfig
from lambda_return_ext.critic.data.batches import Batch, Collator, epoch_batches
from lambda_return_ext.critic.data.split import Item
from lambda_return_ext.critic.display import Display
from lambda_return_ext.critic.evaluation.validation import describe, measure, measure_baselines, results_of
from lambda_return_ext.critic.losses import count_terms, value_loss, window_mask
from lambda_return_ext.critic.model.value_model import check_packing
from lambda_return_ext.critic.ranks import Ranks, gradients_wait, join_ranks, parallelize, whole
from lambda_return_ext.critic.reports.log import open_log, read_metrics
from lambda_return_ext.critic.reports.plots import plot_curves
from lambda_return_ext.critic.reports.tables import print_data, print_results
from lambda_return_ext.critic.reports.trackers import check_trackers
from lambda_return_ext.critic.task import Task, build_collator, load_run, prepare
from lambda_return_ext.critic.training.interrupt import Interrupted, StopRequest
from lambda_return_ext.critic.training.nonfinite import check_weights, say_nonfinite
from lambda_return_ext.critic.training.optimization import lam_schedule, lr_schedule, parameter_groups

Place = tuple[Item, tuple[float, ...]]  # an item, and where the window of each of its rollouts lies


def train(config: Config, resume: bool = False, overwrite: bool = False) -> dict[str, Any] | None:
    """Train a critic and return its final results; under torchrun, one rank of it, of which the first returns them.

    Args:
        config: the run.
        resume: go on from the last checkpoint in the run folder; starts anew where there is none.
        overwrite: remove the run that is in the run folder.

    Raises:
        UserError: something that the user can put right, before anything is written; or a file could not be written.
        FloatingPointError: the loss or its gradient is not finite; the batch is saved and no step was taken with it.
        Interrupted: SIGINT or SIGTERM came; all steps so far are saved.
    """
    with join_ranks(config) as ranks:
        return train_rank(config, ranks, resume, overwrite)


def train_rank(config: Config, ranks: Ranks, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """What each rank does: its share of every batch, and the same steps as all others."""
    run_dir, display, training = Path(config.run_dir), Display(quiet=not ranks.is_first), config.training
    ranks.on_first(lambda: checkpoint.check_run_dir(config, resume, overwrite))
    ranks.on_first(lambda: check_trackers(config))
    task = ranks.together(lambda: prepare(config, ranks))
    model, data = task.model, task.data
    module = parallelize(model, ranks, training)
    if config.data.packing and not config.model.cache_features:
        ranks.together(lambda: check_packing(model))
    ranks.on_first(lambda: checkpoint.open_run_dir(config, task.summary(), overwrite))
    print_data(display, task.summary())
    collate = build_collator(task, [*data.train, *data.validation], display)

    optimizer = torch.optim.AdamW(parameter_groups(model, training, config.model.lora))
    lr_factor, lam = lr_schedule(training, task.steps), lam_schedule(training.value_loss, task.steps)
    progress: dict[str, Any] = {"step": 0, "best": None, "seconds": 0.0, "skipped": 0, "stale": 0, "peak": None}
    progress["unchecked"] = False  # whether the validation after the last step was broken off
    torch.manual_seed(config.seed + ranks.rank)  # dropout differs from rank to rank
    if newest := checkpoint.latest_checkpoint(run_dir):
        progress |= checkpoint.load_checkpoint(newest, model, optimizer, ranks)
        display.line(f"resumed after step {progress['step']}")
    forward_loss = build_forward_loss(module, config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    lengths = [item.length for item in data.train]
    steps_per_epoch = math.ceil(len(data.train) / training.batch_size)
    warmup_steps = training.value_loss.warmup_steps
    started = time.monotonic() - progress["seconds"]
    epoch_order: list[list[int]] = []

    def save() -> None:
        check_weights(parameters, progress["step"], ranks)
        progress["seconds"] = time.monotonic() - started
        checkpoint.save_checkpoint(run_dir, model, optimizer, progress, training.save_total_limit, ranks)

    def stop_if_asked() -> None:
        if ranks.max(torch.tensor(stop.received)):
            save()
            raise Interrupted(stop.received or signal.SIGTERM, progress["step"])

    def validate() -> None:
        step, progress["unchecked"] = progress["step"], True
        check_weights(parameters, step, ranks)
        measured = measure(task, collate, stop_if_asked)
        log.write(step, measured)
        display.line(f"step {step}: {describe(measured, config.best)}")
        tie = measured["validation/margin"] if config.best == "pairwise_accuracy" else -measured["validation/loss"]
        rank = [measured[f"validation/{config.best}"], tie]
        progress.update(staleness(progress, rank[0], training), unchecked=False)
        if progress["best"] is None or rank > progress["best"]:
            progress["best"] = rank
            checkpoint.save_best(run_dir, model, {"step": step, "metrics": measured}, ranks)
        save()

    with (
        checkpoint.explain_failed_writes(run_dir),
        open_log(config, progress["step"], ranks, display) as log,
        display.phase("training", "steps", task.steps, done=progress["step"]) as advance,
        StopRequest() as stop,
    ):
        if progress["unchecked"]:
            validate()
        for step in range(progress["step"] + 1, task.steps + 1):
            if is_stale(progress, training):
                display.line(f"stopped early: no better validation in {progress['stale']} turns")
                break
            epoch, position = divmod(step - 1, steps_per_epoch)
            if position == 0 or not epoch_order:
                epoch_order = epoch_batches(lengths, training.batch_size, config.seed, epoch)
            step_started = time.monotonic()
            items = [data.train[index] for index in epoch_order[position]]
            warmup = step <= warmup_steps
            # Random numbers of the step, not of the rank: any number of ranks sees the same windows.
            random_numbers = random.Random(f"{config.seed}:window:{step}")
            places = [(item, tuple(random_numbers.random() for _ in item.rollouts)) for item in items]
            micro_batches = [
                training_batch(collate, part, places[0], warmup, training.value_loss.output_window)
                for part in ranks.micro_batches(places, training.micro_batch_size)
            ]
            # One sum over all ranks before the first backward: each loss is a part of the means over all of them.
            *counts, tokens, stopping = ranks.sum(tally(config, micro_batches, stop)).tolist()
            if stopping:
                save()
                raise Interrupted(stop.received or signal.SIGTERM, progress["step"])

            model.train()
            optimizer.zero_grad(set_to_none=True)
            sums: dict[str, Tensor] = {}
            # Tensors: numbers that change from step to step would be compiled anew each time.
            common = (
                torch.tensor(counts, device=ranks.device),
                torch.tensor(lam(step), dtype=torch.float64, device=ranks.device),
            )
            for number, micro_batch in enumerate(micro_batches, 1):
                batch = micro_batch.to(ranks.device)
                with gradients_wait(module, number < len(micro_batches)):
                    loss, terms = forward_loss(batch, *common)
                    (loss * ranks.size).backward()  # gradients are averaged over ranks
                for name, term in {"train/loss": loss.detach(), **terms}.items():
                    sums[name] = sums.get(name, 0.0) + term
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm or math.inf)
            totals = ranks.sum(torch.stack([*sums.values()])).tolist()
            metrics: dict[str, float] = {
                **dict(zip(sums, totals, strict=True)),
                "train/grad_norm": whole(grad_norm).item(),
                "train/lr": training.learning_rate * lr_factor(step),
                "train/warmup_active": int(warmup),
                "train/epoch": epoch + (position + 1) / steps_per_epoch,
                "config/gamma": training.value_loss.gamma_lam[0],
                "config/lambda": lam(step),
            }
            if math.isfinite(metrics["train/loss"]) and math.isfinite(metrics["train/grad_norm"]):
                for group in optimizer.param_groups:
                    group["lr"] = group["base_lr"] * lr_factor(step)
                optimizer.step()
            else:
                say_nonfinite(task, step, metrics, items, display, save)
                progress["skipped"] += 1
                metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
            metrics["train/skipped_steps"] = progress["skipped"]
            metrics["train/tokens_per_second"] = tokens / (time.monotonic() - step_started)
            log.write(step, metrics)
            advance(1, f"loss {metrics.get('train/loss', math.nan):.4f}")
            progress["step"] = step

            if step in (warmup_steps, task.steps) or step % config.evaluation.every == 0:
                validate()
            elif step % training.save_every == 0:
                save()
        stop_if_asked()
    with checkpoint.explain_failed_writes(run_dir):
        return ranks.on_first(lambda: report(task, progress, display))


def training_batch(
    collate: Collator, places: Sequence[Place], filler: Place, warmup: bool, window: int | None
) -> Batch:
    """A micro-batch as the loss is to see it.

    Args:
        collate: makes a batch.
        places: this rank's items; where there are none, the batch has no loss, and keeps step with the other ranks.
        filler: stands in for no items.
        warmup: the loss sees only the last value of each rollout.
        window: else only so many values of each, at its place.
    """
    batch = collate([item for item, _ in places or [filler]])
    batch = replace(batch, output_mask=None if window is None else batch.loss_mask)
    if not places:
        return replace(batch, loss_mask=torch.zeros_like(batch.loss_mask), tokens=0)
    if warmup:  # of the same dtype as after it, so that leaving the warm-up compiles nothing anew
        return replace(batch, loss_mask=batch.last_tokens())
    if window is None:
        return batch
    sides = zip(*(where for _, where in places), strict=True)
    where = torch.tensor([*itertools.chain.from_iterable(sides)], dtype=torch.float64)
    return replace(batch, loss_mask=window_mask(batch.loss_mask, batch.packing, where, window))


def tally(config: Config, micro_batches: Sequence[Batch], stop: StopRequest) -> Tensor:
    """What the ranks must know of one another before a step, [5], int64.

    The counts of the loss, the tokens that the model reads, and whether a rank was asked to stop.
    """
    loss, balanced = config.training.value_loss, config.balanced
    counts = torch.stack([count_terms(loss, batch, balanced) for batch in micro_batches]).sum(0)
    return torch.cat([counts, torch.tensor([sum(batch.tokens for batch in micro_batches), int(stop.received > 0)])])


def staleness(progress: dict[str, Any], measure: float, config: TrainingConfig) -> dict[str, Any]:
    """The highest measure on validation, and how many validations ago it was reached."""
    if progress["peak"] is None or measure > progress["peak"] + config.early_stopping.min_delta:
        return {"peak": measure, "stale": 0}
    return {"stale": progress["stale"] + 1}


def is_stale(progress: dict[str, Any], config: TrainingConfig) -> bool:
    """Whether the run is to stop early."""
    return progress["stale"] >= (config.early_stopping.patience or math.inf)


def report(task: Task, progress: dict[str, Any], display: Display) -> dict[str, Any]:
    """Write and show the results of a run that is done."""
    run_dir = Path(task.config.run_dir)
    _, best = checkpoint.load_best(run_dir)
    records = [record for record in read_metrics(run_dir) if "validation/loss" in record]
    last = {"step": progress["step"], "metrics": {name: value for name, value in records[-1].items() if name != "step"}}
    results = results_of(task, run_dir, {"best": best, "last": last})
    # Before the baselines too, which need more memory than all before them.
    files.write_json(run_dir / checkpoint.RESULTS, results)
    results["baselines"] = measure_baselines(task, display)
    files.write_json(run_dir / checkpoint.RESULTS, results)
    plot_curves(run_dir, results)
    print_results(display, results)
    display.line(f"trained for {progress['seconds']:.0f} s; run folder: {run_dir}")
    return results


def evaluate(run: str) -> dict[str, Any]:
    """Evaluate the best checkpoint of a run on its validation problems and return the results; writes nothing.

    Raises:
        UserError: the folder holds no run, or its data has changed since.
    """
    display = Display()
    task, state = load_run(run)
    collate = build_collator(task, [*task.data.validation, *task.train_subset], display)
    measured = {"step": state["step"], "metrics": measure(task, collate)}
    results = results_of(task, Path(run), {"best": measured})
    results["baselines"] = measure_baselines(task, display)
    print_results(display, results)
    return results


def build_forward_loss(module: nn.Module, config: Config) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """Forward and loss as one function of tensors, compiled whole where the configuration says so."""
    loss, balanced = config.training.value_loss, config.balanced

    def forward_loss(batch: Batch, counts: Tensor, lam: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        values = module(batch.inputs, batch.attention_mask, batch.packing and batch.packing.cu_seqlens)
        return value_loss(loss, values, batch, counts, lam, balanced)

    if not config.training.compile:
        return forward_loss
    # Else two dimensions that happen to be equal in the first batch would be compiled as one.
    torch.fx.experimental._config.use_duck_shape = False
    return torch.compile(forward_loss, fullgraph=True, dynamic=True)
