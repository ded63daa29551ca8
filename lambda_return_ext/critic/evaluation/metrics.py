"""What the critic is judged by: ranking of held-out pairs, calibration and what its values are like."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lambda_return_ext import create_eos_only_mask
from lambda_return_ext.critic.config import ValueLossConfig
from lambda_return_ext.critic.data.batches import Batch, Collator
from lambda_return_ext.critic.data.pairs import TokenPair
from lambda_return_ext.critic.evaluation.credit import assign_credit
from lambda_return_ext.critic.losses import value_loss
from lambda_return_ext.critic.ranks import ALONE, Ranks

RELIABILITY_BINS = 10
LENGTH_BINS = 4
# Numbers, and lists of them for what is a curve.
Metrics = dict[str, Any]


@torch.no_grad()
def evaluate_pairs(
    model: nn.Module,
    loss: ValueLossConfig,
    pairs: Sequence[TokenPair],
    collate: Collator,
    batch_size: int,
    ranks: Ranks = ALONE,
    between_batches: Callable[[], None] = lambda: None,
) -> Metrics:
    """Measure the model on pairs; every pair counts once and a tie counts as wrong.

    The ranks share the batches and put the records of all pairs together, in the order that one rank would have.

    Args:
        model: gives the values.
        loss: the training loss.
        pairs: what to measure on.
        collate: makes a batch.
        batch_size: pairs in one; changes no metric but for rounding.
        ranks: this process among all.
        between_batches: called on every rank alike; may raise to break off.

    Returns:
        What `summarise` makes of the pairs.

    Raises:
        FloatingPointError: a value is infinite or NaN.
    """
    model.eval()
    device = next(model.parameters()).device
    by_length = sorted(pairs, key=lambda pair: pair.length)
    starts = range(0, len(by_length), batch_size)
    columns: dict[str, Tensor] = {}
    counts = count_pairs(loss, pairs).to(device)
    for turn in range(math.ceil(len(starts) / ranks.size)):
        between_batches()
        own = turn * ranks.size + ranks.rank
        start = starts[min(own, len(starts) - 1)]  # a sharded model needs every rank in each forward
        batch = collate.pad(by_length[start : start + batch_size]).to(device)
        for name, column in measure_batch(model(batch.inputs, batch.attention_mask), batch, loss, counts).items():
            whole = columns.setdefault(name, torch.zeros(len(pairs), dtype=torch.float64))
            if own < len(starts):
                whole[start : start + batch_size] = column
    table = ranks.sum(torch.stack([*columns.values()]))
    records = dict(zip(columns, table, strict=True))
    finite = (records["mean_right"] + records["mean_wrong"]).isfinite()
    if not finite.all():
        problem = by_length[int(finite.int().argmin())].problem
        raise FloatingPointError(
            f"values must be finite, got others for {int((~finite).sum())} of {len(pairs)} pairs that were measured, "
            f"one of them of problem {problem!r}"
        )
    return summarise(records)


def count_pairs(loss: ValueLossConfig, pairs: Sequence[TokenPair]) -> Tensor:
    """What `count_terms` gives for all output tokens of these pairs, each of which has some on both sides, [3]."""
    if loss.reduction == "sequence":
        return torch.full((3,), len(pairs))
    return torch.tensor(
        [sum(pair.right.outputs for pair in pairs), sum(pair.wrong.outputs for pair in pairs), len(pairs)]
    )


def measure_batch(
    values: Tensor, batch: Batch, loss: ValueLossConfig, counts: Tensor | None = None
) -> dict[str, Tensor]:
    """All that the metrics need of each of the N pairs of a batch, as float64 [N] on the CPU.

    Pairs are independent, so that the records of several batches or ranks are simply put together.

    Args:
        values: [2 N, T].
        batch: the batch.
        loss: the training loss, which is taken over all output tokens.
        counts: what `count_pairs` gives for all batches together; None if this is the only one.
    """
    gamma, lam = loss.gamma_lam
    credit = assign_credit(values, batch.loss_mask, batch.terminal_rewards, gamma, lam)
    mask, v, td = credit.mask, credit.values.double(), credit.td_errors.double().abs()
    tokens = mask.sum(1).double()
    mean = v.sum(1) / tokens
    centred = (v - mean[:, None]) * mask
    # Position among the output tokens, centred: only its correlation with V is asked for.
    position = (mask.cumsum(1) - 1 - (tokens[:, None] - 1) / 2) * mask
    variance = centred.square().sum(1) / tokens
    varies = variance.sqrt() > 1e-12 * mean.abs()  # below, a constant float32 value differs by rounding alone
    spread = (centred.square().sum(1) * position.square().sum(1)).sqrt().where(varies, torch.inf)
    errors = (batch.terminal_rewards[:, None].double() - v) * mask
    rows = {
        "tokens": tokens,
        "mean": mean,
        "last": (v * create_eos_only_mask(mask)).sum(1),
        "token_variance": variance,
        "td_spikiness": (td.amax(1) * tokens / td.sum(1)).nan_to_num(1.0),  # no error at all is no spike
        "position_correlation": ((centred * position).sum(1) / spread).nan_to_num(0.0),  # one token has none
        "error": errors.sum(1),
        "square_error": errors.square().sum(1),
    }
    record = {}
    for name, column in rows.items():
        record[f"{name}_right"], record[f"{name}_wrong"] = column.cpu().chunk(2)
    # The batch's part of the loss of all, in equal shares: only the sum is asked for.
    part = value_loss(loss, values, batch.attention_mask, batch.loss_mask, batch.terminal_rewards, None, counts)[0]
    record["loss"] = (part.double().cpu() / len(record["mean_right"])).expand(len(record["mean_right"]))
    return record


def summarise(records: Mapping[str, Tensor]) -> Metrics:
    """The metrics of all pairs together; docs/critic.md says what each means.

    Args:
        records: float64 [N] each, as `measure_batch` gives them.
    """
    ranked = (records["mean_right"] > records["mean_wrong"]).double()
    means = {name: column.mean().item() for name, column in records.items()}
    per_side = ("token_variance", "td_spikiness", "position_correlation")
    totals = {name: column.sum().item() for name, column in records.items()}
    tokens = totals["tokens_right"] + totals["tokens_wrong"]
    error, square_error = (
        (totals[f"{name}_right"] + totals[f"{name}_wrong"]) / tokens for name in ("error", "square_error")
    )
    reward_variance = totals["tokens_right"] * totals["tokens_wrong"] / tokens**2
    return {
        "pairwise_accuracy": ranked.mean().item(),
        "mean_right": means["mean_right"],
        "mean_wrong": means["mean_wrong"],
        "margin": means["mean_right"] - means["mean_wrong"],
        **{f"{name}_{side}": means[f"{name}_{side}"] for name in per_side for side in ("right", "wrong")},
        "last_token_accuracy": (records["last_right"] > records["last_wrong"]).double().mean().item(),
        "explained_variance": 1.0 - (square_error - error**2) / reward_variance,
        "loss": totals["loss"],
        **calibration(records["last_right"], records["last_wrong"]),
        **accuracy_by_length(ranked, (records["tokens_right"] + records["tokens_wrong"]) / 2),
    }


def calibration(right: Tensor, wrong: Tensor) -> Metrics:
    """How far the value of the last token is a probability of being right.

    Args:
        right: [N], the last values of right solutions.
        wrong: [M], those of wrong ones.

    Returns:
        `brier`, the mean squared distance to 1 or 0; `calibration_error`, the mean distance of prediction and outcome
        over the bins of the reliability plot, weighted by their count; and of the bins that are not empty the mean
        prediction, the share of right solutions and the count. Values beyond 0 and 1 count to the outer bins.
    """
    predicted = torch.cat([right, wrong])
    outcome = torch.cat([torch.ones_like(right), torch.zeros_like(wrong)])
    index = (predicted * RELIABILITY_BINS).floor().clamp(0, RELIABILITY_BINS - 1).long()
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
