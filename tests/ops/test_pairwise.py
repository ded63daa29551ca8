"""pairwise_ranking_loss and compute_pairwise_accuracy."""

import math

import pytest
import torch
from hypothesis import given
from ops_testing import (
    HALF_DTYPES,
    LAYOUTS,
    MASK_DTYPES,
    PROPERTY,
    VALUE_DTYPES,
    accumulate_dtype,
    batches,
    leaf,
    make_batch,
    mask_as,
    poisoned,
)
from torch.autograd import gradcheck

from lambda_return_ext import compute_pairwise_accuracy, pairwise_ranking_loss

KEYS = {"pairwise_accuracy", "mean_pos", "mean_neg", "margin", "correct_pairs", "total_pairs"}
NO_PAIRS = dict.fromkeys(KEYS, 0)


def make_pairs(B=6, dtype=torch.float64):
    """v_pos [B, 13], v_neg [B, 8], loss_mask_pos, loss_mask_neg; the third pair has no right side."""
    pos, neg = make_batch("gaps", B, 13, dtype, seed=1), make_batch("gaps", B, 8, dtype, seed=4)
    mask_pos = pos.loss_mask.clone()
    mask_pos[2:3] = False
    return pos.values, neg.values, mask_pos, neg.loss_mask


def means_of_pairs(v_pos, v_neg, mask_pos, mask_neg):
    """(mean_pos, mean_neg) of every pair that counts, in Python floats."""
    pairs = []
    for b in range(len(v_pos)):
        sides = v_pos[b][mask_pos[b] != 0].tolist(), v_neg[b][mask_neg[b] != 0].tolist()
        if all(sides):
            pairs.append([math.fsum(side) / len(side) for side in sides])
    return pairs


def expected_loss(*pairs):
    losses = [math.log1p(math.exp(neg - pos)) for pos, neg in means_of_pairs(*pairs)]
    return math.fsum(losses) / max(len(losses), 1)


def expected_metrics(*pairs):
    means = means_of_pairs(*pairs)
    total = max(len(means), 1)
    correct = sum(pos > neg for pos, neg in means)
    mean_pos, mean_neg = (math.fsum(side) / total for side in (zip(*means, strict=True) if means else ((), ())))
    return {
        "pairwise_accuracy": correct / total,
        "mean_pos": mean_pos,
        "mean_neg": mean_neg,
        "margin": mean_pos - mean_neg,
        "correct_pairs": correct,
        "total_pairs": len(means),
    }


# ---- both functions ----------------------------------------------------------------------------------------------


def test_matches_a_loop_over_pairs():
    pairs = make_pairs()
    assert pairwise_ranking_loss(*pairs).item() == pytest.approx(expected_loss(*pairs), rel=1e-14)
    metrics = compute_pairwise_accuracy(*pairs)
    assert metrics == pytest.approx(expected_metrics(*pairs), rel=1e-14)
    assert 0 < metrics["correct_pairs"] < metrics["total_pairs"] == 5


@PROPERTY
@given(pos=batches(), neg=batches())
def test_any_pairs_match_a_loop(pos, neg):
    B = min(len(pos.values), len(neg.values))
    pairs = pos.values[:B], neg.values[:B], pos.loss_mask[:B], neg.loss_mask[:B]
    assert pairwise_ranking_loss(*pairs).item() == pytest.approx(expected_loss(*pairs), rel=1e-5, abs=1e-5)
    metrics, expected = compute_pairwise_accuracy(*pairs), expected_metrics(*pairs)
    assert metrics["total_pairs"] == expected["total_pairs"]
    for key in ("mean_pos", "mean_neg", "margin"):
        assert metrics[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
def test_masks_of_any_dtype(dtype, mask_dtype):
    v_pos, v_neg, *masks = make_pairs(dtype=dtype)
    other = v_pos, v_neg, *(mask_as(mask, mask_dtype) for mask in masks)
    assert torch.equal(pairwise_ranking_loss(*other), pairwise_ranking_loss(v_pos, v_neg, *masks))
    assert compute_pairwise_accuracy(*other) == compute_pairwise_accuracy(v_pos, v_neg, *masks)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout):
    pairs = make_pairs()
    other = [LAYOUTS[layout](x) for x in pairs]
    torch.testing.assert_close(pairwise_ranking_loss(*other), pairwise_ranking_loss(*pairs), rtol=1e-14, atol=0.0)
    assert compute_pairwise_accuracy(*other) == pytest.approx(compute_pairwise_accuracy(*pairs), rel=1e-14)


def test_value_head_output_with_trailing_dimension():
    v_pos, v_neg, *masks = make_pairs()
    for other in ((v_pos[..., None], v_neg[..., None]), (v_pos[..., None], v_neg)):
        assert torch.equal(pairwise_ranking_loss(*other, *masks), pairwise_ranking_loss(v_pos, v_neg, *masks))
        assert compute_pairwise_accuracy(*other, *masks) == compute_pairwise_accuracy(v_pos, v_neg, *masks)


@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
def test_nothing_at_a_masked_position_is_used(dtype):
    v_pos, v_neg, mask_pos, mask_neg = make_pairs(dtype=dtype)
    results = []
    for right, wrong in ((v_pos, v_neg), (poisoned(v_pos, mask_pos), poisoned(v_neg, mask_neg))):
        leaves = leaf(right), leaf(wrong)
        loss = pairwise_ranking_loss(*leaves, mask_pos, mask_neg)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    metrics = compute_pairwise_accuracy(v_pos, v_neg, mask_pos, mask_neg)
    assert (
        compute_pairwise_accuracy(poisoned(v_pos, mask_pos), poisoned(v_neg, mask_neg), mask_pos, mask_neg) == metrics
    )


def test_a_pair_with_an_empty_side_counts_nowhere():
    v_pos, v_neg, mask_pos, mask_neg = make_pairs()
    mask_neg[4] = False
    kept = [0, 1, 3, 5]
    alone = v_pos[kept], v_neg[kept], mask_pos[kept], mask_neg[kept]
    leaves = leaf(v_pos), leaf(v_neg)
    loss = pairwise_ranking_loss(*leaves, mask_pos, mask_neg)
    torch.testing.assert_close(loss, pairwise_ranking_loss(*alone), rtol=1e-14, atol=0.0)
    for grad in torch.autograd.grad(loss, leaves):
        assert (grad[[2, 4]] == 0).all()
        assert (grad[kept] != 0).any(dim=1).all()
    metrics = compute_pairwise_accuracy(v_pos, v_neg, mask_pos, mask_neg)
    assert metrics == pytest.approx(compute_pairwise_accuracy(*alone), rel=1e-14)
    assert metrics["total_pairs"] == 4


@pytest.mark.parametrize("case", ["no rows", "no positions", "no right token", "no wrong token"])
def test_no_pairs_give_zero(case):
    v_pos, v_neg, mask_pos, mask_neg = make_pairs()
    if case == "no rows":
        v_pos, v_neg, mask_pos, mask_neg = (x[:0] for x in (v_pos, v_neg, mask_pos, mask_neg))
    elif case == "no positions":
        v_pos, v_neg, mask_pos, mask_neg = (x[:, :0] for x in (v_pos, v_neg, mask_pos, mask_neg))
    elif case == "no right token":
        mask_pos = torch.zeros_like(mask_pos)
    else:
        mask_neg = torch.zeros_like(mask_neg)
    leaves = leaf(v_pos), leaf(v_neg)
    loss = pairwise_ranking_loss(*leaves, mask_pos, mask_neg)
    assert loss == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, leaves))
    assert compute_pairwise_accuracy(v_pos, v_neg, mask_pos, mask_neg) == NO_PAIRS


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_half_means_are_accumulated_in_float32(dtype):
    """In a half type the sum would stand still after a few hundred tokens."""
    values = torch.full((1, 20_000), 0.5, dtype=dtype)
    mask = torch.ones(1, 20_000)
    metrics = compute_pairwise_accuracy(values, values[:, :100] - 0.25, mask, mask[:, :100])
    assert metrics["mean_pos"] == 0.5
    assert metrics["margin"] == 0.25
    loss = pairwise_ranking_loss(values, values[:, :100] - 0.25, mask, mask[:, :100])
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.25)), rel=1e-6)


# ---- ranking loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
def test_loss_dtype_and_shape(dtype):
    loss = pairwise_ranking_loss(*make_pairs(dtype=dtype))
    assert (loss.shape, loss.dtype) == ((), accumulate_dtype(dtype))


def test_loss_gradcheck():
    v_pos, v_neg, *masks = make_pairs(B=4)
    assert gradcheck(lambda *values: pairwise_ranking_loss(*values, *masks), (leaf(v_pos), leaf(v_neg)))


def test_loss_of_equal_means_is_log_two():
    values, _, mask, _ = make_pairs()
    assert pairwise_ranking_loss(values, values, mask, mask).item() == pytest.approx(math.log(2), rel=1e-14)


def test_loss_falls_with_the_margin_and_stays_finite():
    ones = torch.ones(1, 3)
    losses = [pairwise_ranking_loss(ones * gap, 0 * ones, ones, ones).item() for gap in (-1e4, -1.0, 0.0, 1.0, 1e4)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] == 1e4
    assert losses[-1] == 0


def test_gradient_raises_right_and_lowers_wrong():
    v_pos, v_neg, mask_pos, mask_neg = make_pairs()
    leaves = leaf(v_pos), leaf(v_neg)
    grad_pos, grad_neg = torch.autograd.grad(pairwise_ranking_loss(*leaves, mask_pos, mask_neg), leaves)
    mask_pos[2] = mask_neg[2] = False  # this pair does not count
    assert (grad_pos[mask_pos] < 0).all()
    assert (grad_neg[mask_neg] > 0).all()
    assert (grad_pos[~mask_pos] == 0).all()
    assert (grad_neg[~mask_neg] == 0).all()


# ---- accuracy ----------------------------------------------------------------------------------------------------


def test_accuracy_types():
    metrics = compute_pairwise_accuracy(*make_pairs())
    assert set(metrics) == KEYS
    assert {key for key, value in metrics.items() if type(value) is int} == {"correct_pairs", "total_pairs"}
    assert all(type(value) in (int, float) for value in metrics.values())


def test_ties_count_as_wrong():
    values, _, mask, _ = make_pairs()
    metrics = compute_pairwise_accuracy(values, values, mask, mask)
    assert metrics["pairwise_accuracy"] == 0
    assert (metrics["correct_pairs"], metrics["total_pairs"], metrics["margin"]) == (0, 5, 0)


def test_nan_counts_as_wrong():
    values = torch.tensor([[1.0], [float("nan")]])
    metrics = compute_pairwise_accuracy(values, torch.zeros(2, 1), torch.ones(2, 1), torch.ones(2, 1))
    assert (metrics["correct_pairs"], metrics["total_pairs"]) == (1, 2)


def test_means_not_sums_are_compared():
    long, short = torch.full((1, 10), 0.5), torch.full((1, 2), 0.9)
    metrics = compute_pairwise_accuracy(short, long, torch.ones(1, 2), torch.ones(1, 10))
    assert metrics["correct_pairs"] == 1


def test_accuracy_records_no_gradient():
    v_pos, v_neg, *masks = make_pairs()
    assert compute_pairwise_accuracy(leaf(v_pos), leaf(v_neg), *masks) == compute_pairwise_accuracy(
        v_pos, v_neg, *masks
    )


def test_inputs_are_untouched():
    pairs = make_pairs()
    before = [x.clone() for x in pairs]
    pairwise_ranking_loss(*pairs)
    compute_pairwise_accuracy(*pairs)
    assert all(torch.equal(x, y) for x, y in zip(pairs, before, strict=True))
