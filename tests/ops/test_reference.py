"""The oracle itself: against numbers worked out by hand and against the definition of the lambda-return."""

import inspect

import pytest
import torch
from ops_testing import DISCOUNTS, MASK_KINDS, make_batch, plain_lambda_return, poisoned

import lambda_return_ext
from lambda_return_ext import reference

# Plain torch themselves: their tests write the formulas out.
WITHOUT_TWIN = {
    "build_info",
    "compute_pairwise_accuracy",
    "compute_token_variance",
    "init_value_head_bias",
    "pairwise_ranking_loss",
}
TWINS = {name for name in lambda_return_ext.__all__ if inspect.isfunction(getattr(lambda_return_ext, name))}


@pytest.mark.parametrize("name", sorted(TWINS - WITHOUT_TWIN))
def test_every_function_has_the_signature_of_its_twin(name):
    assert inspect.signature(getattr(reference, name)) == inspect.signature(getattr(lambda_return_ext, name))


def test_hand_computed_returns():
    values = torch.tensor([[9.0, 0.5, 9.0, 0.25, 0.75]])
    mask = torch.tensor([[0, 1, 0, 1, 1]])
    returns = reference.compute_lambda_return(values, torch.tensor([1.0]), mask, gamma=0.5, lam=0.5)
    # G[4] = R = 1; G[3] = (0.75 / 2 + 1 / 2) / 2 = 0.4375; G[1] = (0.25 / 2 + 0.4375 / 2) / 2 = 0.171875.
    assert returns.tolist() == [[0.0, 0.171875, 0.0, 0.4375, 1.0]]


@pytest.mark.parametrize(("gamma", "lam"), DISCOUNTS)
def test_definition_as_weighted_sum_of_n_step_returns(gamma, lam):
    values = torch.tensor([0.3, -1.2, 0.8, 2.0, -0.4, 0.1], dtype=torch.float64)
    mask = torch.tensor([True, False, True, True, False, True])
    reward = 0.7
    valid = mask.nonzero().squeeze(1).tolist()
    expected = torch.zeros(6, dtype=torch.float64)
    for i, position in enumerate(valid):
        steps = len(valid) - 1 - i
        n_step = [gamma**k * values[valid[i + k]].item() for k in range(1, steps + 1)]
        weights = [(1 - lam) * lam ** (k - 1) for k in range(1, steps + 1)]
        monte_carlo = gamma**steps * reward
        expected[position] = sum(w * g for w, g in zip(weights, n_step, strict=True)) + lam**steps * monte_carlo
    rewards = torch.tensor([reward], dtype=torch.float64)
    returns = reference.compute_lambda_return(values[None], rewards, mask[None], gamma, lam)
    torch.testing.assert_close(returns[0], expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize(("gamma", "lam"), DISCOUNTS)
def test_recursion_over_valid_positions_equals_the_carry(kind, gamma, lam):
    values, rewards, _, mask = make_batch(kind)
    returns = reference.compute_lambda_return(values, rewards, mask, gamma, lam)
    torch.testing.assert_close(returns, plain_lambda_return(values, rewards, mask, gamma, lam), rtol=1e-14, atol=1e-15)


def test_hand_computed_loss():
    values = torch.tensor([[0.5, 9.0, 0.25, 0.75]])
    loss_mask = torch.tensor([[1, 0, 1, 1]])
    attention_mask = torch.tensor([[1, 1, 1, 0]])
    # G = 0.171875, -, 0.4375, 1 as above; the last token feeds the targets but its error does not count.
    loss = reference.compute_lambda_value_loss(values, torch.tensor([1.0]), attention_mask, loss_mask, 0.5, 0.5)
    assert loss.item() == ((0.5 - 0.171875) ** 2 + (0.25 - 0.4375) ** 2) / 2


def test_masked_positions_are_not_used():
    values, rewards, attention_mask, mask = make_batch("conversation")
    bad = poisoned(values, mask)
    for function, args in (
        (reference.compute_lambda_return, (rewards, mask)),
        (reference.compute_lambda_value_loss, (rewards, attention_mask, mask)),
        (reference.compute_mc_value_loss, (rewards, attention_mask, mask)),
    ):
        assert torch.equal(function(bad, *args), function(values, *args))


def test_eos_only_mask():
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    expected = [[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    assert reference.create_eos_only_mask(mask).tolist() == expected


def test_explained_variance_of_worked_sums():
    # G = 1, 2, 3 and V = 1, 2, 4: Var(G) = 2/3, Var(G - V) = 1/3 - 1/9 = 2/9.
    sums = torch.tensor([[3.0, 6.0, 14.0, -1.0, 1.0, 0.0], [0.0] * 6, [2.0, 2.0, 2.0, 1.0, 1.0, 0.0]]).double()
    expected = torch.tensor([1 - 1 / 3, torch.nan, torch.nan], dtype=torch.float64)
    for function in (reference.explained_variance, lambda_return_ext.explained_variance):
        torch.testing.assert_close(function(sums), expected, equal_nan=True)
        torch.testing.assert_close(function(sums[0]), expected[0])


def test_whitening_of_worked_numbers():
    # Mean 2 and variance 1 of what is valid.
    x, mask = torch.tensor([[1.0, torch.nan], [2.0, 3.0]]), torch.tensor([[1, 0], [1, 1]])
    assert reference.masked_whiten(x, mask, eps=0.0).tolist() == [[-1.0, 0.0], [0.0, 1.0]]
    assert reference.masked_whiten(x, mask * 0).tolist() == [[0.0, 0.0], [0.0, 0.0]]
