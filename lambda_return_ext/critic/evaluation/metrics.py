"""What the critic is judged by: ranking of held-out pairs, calibration and what its values are like."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lambda_return_ext import compute_lambda_return, create_eos_only_mask
from lambda_return_ext.critic.config import Config, ValueLossConfig
from lambda_return_ext.critic.data.batches import Batch, Collator, value_places
from lambda_return_ext.critic.data.split import Item
from lambda_return_ext.critic.evaluation.credit import assign_credit
from lambda_return_ext.critic.losses import value_loss
from lambda_return_ext.critic.ranks import ALONE, Ranks

RELIABILITY_BINS = 10
LENGTH_BINS = 4
SIDES = ("right", "wrong")
# Numbers, and lists of them for what is a curve.
Metrics = dict[str, Any]


@torch.no_grad()
def evaluate_items(
    model: nn.Module,
    config: Config,
    items: Sequence[Item],
    collate: Collator,
    ranks: Ranks = ALONE,
    between_batches: Callable[[], None] = lambda: None,
) -> Metrics:
    """Measure the model on pairs or rollouts; every one counts once and a tie counts as wrong.

    The ranks share the batches and put the records of all items together, in the order that one rank would have.

    Args:
        model: gives the values.
        config: of the run.
        items: what to measure on.
        collate: makes a batch.
        ranks: this process among all.
        between_batches: called on every rank alike; may raise to break off.

    Returns:
        What `summarise_pairs` or `summarise_rollouts` makes of them.

    Raises:
        FloatingPointError: a value is infinite or NaN.
    """
    model.eval()
    device = next(model.parameters()).device
    size, loss, balanced = config.evaluation.batch_size, config.training.value_loss, config.balanced
    by_length = sorted(items, key=lambda item: item.length)
    starts = range(0, len(by_length), size)
    sides = len(by_length[0].rollouts)
    columns: dict[str, Tensor] = {}
    counts = count_items(loss, items, collate, balanced).to(device)
    for turn in range(math.ceil(len(starts) / ranks.size)):
        between_batches()
        own = turn * ranks.size + ranks.rank
        start = starts[min(own, len(starts) - 1)]  # a sharded model needs every rank in each forward
        batch = collate.pad(by_length[start : start + size]).to(device)
        values = model(batch.inputs, batch.attention_mask)
        for name, column in measure_batch(values, batch, loss, counts, balanced).items():
            whole = columns.setdefault(name, torch.zeros(sides, len(items), dtype=torch.float64))
            if own < len(starts):
                whole[:, start : start + size] = column.view(sides, -1)
    table = ranks.sum(torch.stack([*columns.values()]))
    records = dict(zip(columns, table, strict=True))
    finite = records["mean"].sum(0).isfinite()
    if not finite.all():
        problem = by_length[int(finite.int().argmin())].problem
        kind = "pairs" if sides == 2 else "rollouts"
        raise FloatingPointError(
            f"values must be finite, got others for {int((~finite).sum())} of {len(items)} {kind} that were measured, "
            f"one of them of problem {problem!r}"
        )
    if sides == 2:
        return summarise_pairs(records)
    return summarise_rollouts({name: column[0] for name, column in records.items()}, [one.problem for one in by_length])


def count_items(loss: ValueLossConfig, items: Sequence[Item], collate: Collator, balanced: bool) -> Tensor:
    """What `count_terms` gives for all values of these items, each of whose rollouts has some, [3]."""
    total = torch.zeros(3, dtype=torch.int64)
    for item in items:
        rollouts = item.rollouts
        for side, rollout in enumerate(rollouts):
            values = 1 if loss.reduction == "sequence" else int(value_places(rollout, collate.position).mask.sum())
            upper = side == 0 if collate.midpoint is None else rollout.total >= collate.midpoint
            total[0 if upper or not balanced else 1] += values
        total[2] += len(rollouts) == 2 and loss.use_pairwise
    return total


def measure_batch(
    values: Tensor, batch: Batch, loss: ValueLossConfig, counts: Tensor | None = None, balanced: bool = True
) -> dict[str, Tensor]:
    """All that the metrics need of each of the R rollouts of a batch, as float64 [R] on the CPU.

    Rollouts are independent, so that the records of several batches or ranks are simply put together.

    Args:
        values: [R, T].
        batch: the batch.
        loss: the training loss, which is taken over all values.
        counts: what `count_items` gives for all batches together; None if this is the only one.
        balanced: as of the loss.
    """
    gamma, lam = loss.gamma_lam
    credit = assign_credit(values, batch, gamma, lam)
    mask, v, td = credit.mask, credit.values.double(), credit.td_errors.double().abs()
    tokens = mask.sum(1).double()
    mean = v.sum(1) / tokens
    centred = (v - mean[:, None]) * mask
    # Position among the values, centred: only its correlation with V is asked for.
    position = (mask.cumsum(1) - 1 - (tokens[:, None] - 1) / 2) * mask
    variance = centred.square().sum(1) / tokens
    varies = variance.sqrt() > 1e-12 * mean.abs()  # below, a constant float32 value differs by rounding alone
    spread = (centred.square().sum(1) * position.square().sum(1)).sqrt().where(varies, torch.inf)
    # All rewards that are still to come.
    rewards = batch.terminal_rewards, mask, 1.0, 1.0
    outcomes = compute_lambda_return(credit.values, *rewards, rewards=batch.step_rewards).double()
    errors = (outcomes - v) * mask
    # The batch's part of the loss of all, in equal shares: only the sum is asked for.
    part = value_loss(loss, values, batch, counts, balanced=balanced)[0].double()
    rows = {
        "tokens": tokens,
        "mean": mean,
        "last": (v * create_eos_only_mask(mask)).sum(1),
        "total": outcomes.gather(1, mask.int().argmax(1, keepdim=True))[:, 0],
        "token_variance": variance,
        "td_spikiness": (td.amax(1) * tokens / td.sum(1)).nan_to_num(1.0),  # no error at all is no spike
        "position_correlation": ((centred * position).sum(1) / spread).nan_to_num(0.0),  # one token has none
        "error": errors.sum(1),
        "square_error": errors.square().sum(1),
        "outcome": (outcomes * mask).sum(1),
        "square_outcome": (outcomes * mask).square().sum(1),
        "loss": (part / len(values)).expand(len(values)),
    }
    return {name: column.cpu() for name, column in rows.items()}


def summarise_pairs(records: Mapping[str, Tensor]) -> Metrics:
    """The metrics of all pairs together; docs/critic.md says what each means.

    Args:
        records: float64 [2, N] each, as `measure_batch` gives them of the right and of the wrong rollouts.
    """
    mean, last = records["mean"], records["last"]
    ranked = (mean[0] > mean[1]).double()
    per_side = ("token_variance", "td_spikiness", "position_correlation")
    means = {name: column.mean(1).tolist() for name, column in records.items()}
    return {
        "pairwise_accuracy": ranked.mean().item(),
        "mean_right": means["mean"][0],
        "mean_wrong": means["mean"][1],
        "margin": means["mean"][0] - means["mean"][1],
        **{f"{name}_{side}": means[name][k] for name in per_side for k, side in enumerate(SIDES)},
        "last_token_accuracy": (last[0] > last[1]).double().mean().item(),
        "explained_variance": explained_variance(records),
        "loss": 2 * records["loss"][0].sum().item(),
        **calibration(last.flatten(), records["total"].flatten()),
        **accuracy_by_length(ranked, records["tokens"].mean(0)),
    }


def summarise_rollouts(records: Mapping[str, Tensor], problems: Sequence[str]) -> Metrics:
    """The metrics of all rollouts together; docs/critic.md says what each means.

    Args:
        records: float64 [N] each, as `measure_batch` gives them.
        problems: of which problem each is.
    """
    mean, last, total = records["mean"], records["last"], records["total"]
    means = {name: column.mean().item() for name, column in records.items()}
    higher, lower = pairs_within(problems, total)
    rank = {}
    if len(higher):
        ranked = (mean[higher] > mean[lower]).double()
        rank = {
            "pairwise_accuracy": ranked.mean().item(),
            "last_token_accuracy": (last[higher] > last[lower]).double().mean().item(),
            "margin": (mean[higher] - mean[lower]).mean().item(),
            **accuracy_by_length(ranked, (records["tokens"][higher] + records["tokens"][lower]) / 2),
        }
    return {
        "explained_variance": explained_variance(records),
        "mean_value": means["mean"],
        "mean_last_value": means["last"],
        "mean_reward": means["total"],
        **{name: means[name] for name in ("token_variance", "td_spikiness", "position_correlation")},
        "loss": records["loss"].sum().item(),
        **calibration(last, total),
        **rank,
    }


def pairs_within(problems: Sequence[str], total: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the two rollouts of each pair of one problem with different rewards, the higher first.

    Args:
        problems: of which problem each rollout is.
        total: [N], the reward of each.
    """
    names = {name: number for number, name in enumerate(dict.fromkeys(problems))}
    number = torch.tensor([names[name] for name in problems])
    found = [
        torch.stack([group[higher], group[lower]])
        for group in (torch.nonzero(number == name)[:, 0] for name in range(len(names)))
        for higher, lower in [torch.nonzero(total[group][:, None] > total[group], as_tuple=True)]
    ]
    higher, lower = torch.cat(found, 1)
    return higher, lower


def explained_variance(records: Mapping[str, Tensor]) -> float:
    """1 - Var(R - V) / Var(R) over all values; 0 / 0, where all rewards are the same, is 0."""
    names = ("tokens", "error", "square_error", "outcome", "square_outcome")
    tokens, error, square_error, outcome, square_outcome = (records[name].sum(-1).sum().item() for name in names)
    variance = (square_outcome * tokens - outcome**2) / tokens**2  # exact where rewards are 1 and 0
    return 1.0 - (square_error / tokens - (error / tokens) ** 2) / variance if variance > 0 else 0.0


def calibration(predicted: Tensor, outcome: Tensor) -> Metrics:
    """How far the value of the last token is the reward, and where that is 1 or 0 a probability.

    Args:
        predicted: [N], the last value of each rollout.
        outcome: [N], its reward.

    Returns:
        `brier`, the mean squared distance to the reward; `calibration_error`, the mean distance of prediction and
        reward over the bins of the reliability plot, weighted by their count; and of the bins that are not empty the
        mean prediction, the mean reward and the count. The bins span the rewards, 0 to 1 at least; values beyond count
        to the outer ones.
    """
    low, high = min(outcome.min().item(), 0.0), max(outcome.max().item(), 1.0)
    index = ((predicted - low) / (high - low) * RELIABILITY_BINS).floor().clamp(0, RELIABILITY_BINS - 1).long()
    count, prediction, observed = (
        torch.zeros(RELIABILITY_BINS, dtype=torch.float64).index_add_(0, index, column)
        for column in (torch.ones_like(predicted), predicted, outcome)
    )
    filled = count > 0
    count, prediction, observed = count[filled], (prediction / count)[filled], (observed / count)[filled]
    return {
        "brier": (predicted - outcome).square().mean().item(),
        "calibration_error": ((prediction - observed).abs() * count).sum().item() / len(predicted),
        "reliability_predicted": prediction.tolist(),
        "reliability_observed": observed.tolist(),
        "reliability_count": count.tolist(),
    }


def accuracy_by_length(ranked: Tensor, length: Tensor) -> Metrics:
    """Pairwise accuracy in parts of equal size, the shortest pairs first.

    Args:
        ranked: [N], 1 where the right solution is above the wrong one.
        length: [N], mean number of output tokens of the two.
    """
    order = length.argsort(stable=True)
    parts = [part for part in order.tensor_split(LENGTH_BINS) if len(part)]
    return {
        "length_accuracy": [ranked[part].mean().item() for part in parts],
        "length_shortest": [length[part].min().item() for part in parts],
        "length_longest": [length[part].max().item() for part in parts],
    }
