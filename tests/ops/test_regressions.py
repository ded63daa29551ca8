"""Mistakes that other implementations of these targets were seen to make, each as a test of ours."""

import pytest
import torch
from ops_testing import VALUE_DTYPES, leaf, rng

import lambda_return_ext as lr
from lambda_return_ext import reference

one = torch.ones((), dtype=torch.float64)


@pytest.mark.parametrize("gap", [1, 100, 5000])
def test_a_gap_attenuates_neither_the_reward_nor_what_comes_before_it(gap):
    # Tokens 0 and 1, a gap, tokens 2 and 3: powers of gamma and lambda count valid tokens, not positions.
    mask = torch.zeros(1, gap + 4, dtype=torch.bool)
    mask[0, :2] = mask[0, -2:] = True
    values = torch.full((1, gap + 4), 0.25, dtype=torch.float64)
    gamma, lam = 0.9, 0.8
    returns = lr.compute_lambda_return(values, torch.ones(1), mask, gamma, lam)[mask]
    dense = lr.compute_lambda_return(values[:, :4], torch.ones(1), mask[:, [0, 1, -2, -1]], gamma, lam)[0]
    torch.testing.assert_close(returns, dense, rtol=1e-15, atol=0)
    assert returns[-1] == 1
    general = lr.compute_lambda_return(values, torch.ones(1), mask, gamma * one, lam * one)[mask]
    torch.testing.assert_close(general, dense)


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
def test_monte_carlo_is_the_reward_exactly_after_8192_tokens(dtype):
    values = torch.randn(2, 8192, generator=rng()).to(dtype)
    mask = torch.ones(2, 8192, dtype=torch.bool)
    rewards = torch.tensor([1.0, -0.375])
    for discounts in ((1.0, 1.0), (one, one)):
        returns = lr.compute_lambda_return(values, rewards, mask, *discounts)
        assert torch.equal(returns, rewards[:, None].expand(2, 8192).to(dtype))
        # The derivative by the values is 0 everywhere, and that by the reward is a sum of ones.
        v, r = leaf(values), leaf(rewards)
        lr.compute_lambda_return(v, r, mask, *discounts).float().sum().backward()
        assert (v.grad == 0).all()
        assert torch.equal(r.grad, torch.full((2,), 8192.0))


def test_lambda_1_with_a_discount_is_accurate_at_8192_tokens():
    values = torch.rand(1, 8192, generator=rng())
    mask = torch.ones(1, 8192, dtype=torch.bool)
    exact = 0.999 ** torch.arange(8191, -1, -1, dtype=torch.float64)
    for discounts in ((0.999, 1.0), (0.999 * one, one)):
        returns = lr.compute_lambda_return(values, torch.ones(1), mask, *discounts)[0]
        torch.testing.assert_close(returns.double(), exact, rtol=2e-4, atol=0)


@pytest.mark.parametrize("step", [2, 3])
def test_a_strided_batch_is_not_read_as_if_it_were_contiguous(step):
    base = torch.rand(3, 40 * step, generator=rng(), dtype=torch.float64)
    values, mask = base[:, ::step], (base > 0.3)[:, ::step]
    expected = reference.compute_lambda_return(values, torch.ones(3), mask, 0.9, 0.8)
    for discounts in ((0.9, 0.8), (0.9 * one, 0.8 * one)):
        torch.testing.assert_close(lr.compute_lambda_return(values, torch.ones(3), mask, *discounts), expected)
    column = values[0]
    packed = lr.lambda_return_varlen(column, torch.ones(1), torch.tensor([0, 40]), mask[0], 0.9, 0.8)
    torch.testing.assert_close(packed, expected[0])


def test_masks_that_are_not_given_are_not_read():
    values, cu_seqlens = torch.rand(70, generator=rng()), torch.tensor([0, 30, 30, 70])
    everything = torch.ones(70, dtype=torch.bool)
    rewards = torch.rand(3, generator=rng())
    for given in ({}, {"output_mask": everything}):
        loss = lr.lambda_value_loss_varlen(values, rewards, cu_seqlens, **given)
        assert torch.equal(loss, lr.lambda_value_loss_varlen(values, rewards, cu_seqlens, everything, **given))


def test_a_gamma_for_all_rows_is_one_number():
    values, mask = torch.rand(64, 9, generator=rng()), torch.ones(64, 9)
    one_for_all = lr.compute_lambda_return(values, torch.ones(64), mask, torch.tensor(0.5), torch.tensor(0.5))
    one_each = lr.compute_lambda_return(values, torch.ones(64), mask, torch.full((64,), 0.5), torch.full((64,), 0.5))
    assert torch.equal(one_for_all, one_each)
    # A gamma that is expanded from one element has stride 0, and no more memory than that.
    expanded = torch.tensor([0.5]).expand(64)
    assert torch.equal(lr.compute_lambda_return(values, torch.ones(64), mask, expanded, expanded), one_each)
