"""compute_token_variance."""

import statistics

import pytest
import torch
from hypothesis import given
from ops_testing import (
    HALF_DTYPES,
    LAYOUTS,
    MASK_DTYPES,
    MASK_KINDS,
    PROPERTY,
    VALUE_DTYPES,
    batches,
    leaf,
    make_batch,
    mask_as,
    poisoned,
)

from lambda_return_ext import compute_token_variance


def expected_variance(values, mask):
    """The mean over rows that have a token of the population variance, in Python floats."""
    rows = [row[valid != 0].tolist() for row, valid in zip(values, mask, strict=True)]
    variances = [statistics.pvariance(row) for row in rows if row]
    return sum(variances) / max(len(variances), 1)


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_matches_population_variance_of_each_row(kind):
    values, _, _, mask = make_batch(kind)
    variance = compute_token_variance(values, mask)
    assert type(variance) is float
    assert variance == pytest.approx(expected_variance(values, mask), rel=1e-13)


@PROPERTY
@given(batch=batches())
def test_any_batch_matches(batch):
    expected = expected_variance(batch.values, batch.loss_mask)
    assert compute_token_variance(batch.values, batch.loss_mask) == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_zero_for_the_same_value_at_every_token():
    values = torch.full((3, 1000), 0.1)
    assert compute_token_variance(values, torch.ones(3, 1000)) == pytest.approx(0.0, abs=1e-14)


def test_differences_between_rows_do_not_count():
    values = torch.tensor([[1.0, 1.0], [5.0, 5.0]])
    assert compute_token_variance(values, torch.ones(2, 2)) == 0


def test_small_variance_around_a_large_mean():
    """Mean of squares minus square of mean would lose every digit in float32."""
    values = 1000.0 + torch.tensor([[-0.125, 0.125] * 50])
    assert compute_token_variance(values, torch.ones(1, 100)) == pytest.approx(0.125**2, rel=1e-6)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_halves_are_accumulated_in_float32(dtype):
    values = torch.tensor([[0.25, 0.75] * 10_000], dtype=dtype)
    assert compute_token_variance(values, torch.ones(1, 20_000)) == pytest.approx(0.0625, rel=1e-6)


@pytest.mark.parametrize("kind", ["nothing", "single_token"])
def test_zero_without_two_tokens_in_a_row(kind):
    values, _, _, mask = make_batch(kind)
    assert compute_token_variance(values, mask) == 0


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0)], ids=str)
def test_empty_shapes(shape):
    assert compute_token_variance(torch.zeros(shape), torch.zeros(shape)) == 0


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
def test_mask_of_any_dtype(dtype, mask_dtype):
    values, _, _, mask = make_batch(dtype=dtype)
    assert compute_token_variance(values, mask_as(mask, mask_dtype)) == compute_token_variance(values, mask)


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_nothing_at_a_masked_position_is_used(kind):
    values, _, _, mask = make_batch(kind)
    assert compute_token_variance(poisoned(values, mask), mask) == compute_token_variance(values, mask)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout):
    values, _, _, mask = make_batch()
    other = compute_token_variance(LAYOUTS[layout](values), LAYOUTS[layout](mask))
    assert other == pytest.approx(compute_token_variance(values, mask), rel=1e-14)


def test_trailing_dimension_and_gradient():
    values, _, _, mask = make_batch()
    assert compute_token_variance(leaf(values[..., None]), mask) == compute_token_variance(values, mask)
