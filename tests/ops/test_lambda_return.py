"""compute_lambda_return and torch.ops.lambda_return.lambda_return (+ _backward)."""

import pytest
import torch
from hypothesis import given
from ops_testing import (
    DISCOUNTS,
    HALF_DTYPES,
    LAYOUTS,
    MASK_DTYPES,
    MASK_KINDS,
    OPCHECK_DTYPES,
    PROPERTY,
    ROUNDED_DTYPES,
    VALUE_DTYPES,
    accumulate_dtype,
    assert_as_accurate_as_torch,
    assert_rounded,
    batches,
    leaf,
    make_batch,
    make_grad,
    make_mask,
    mask_as,
    plain_lambda_return,
    poisoned,
    strided,
    unit_floats,
)
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from lambda_return_ext import compute_lambda_return, reference

ops = torch.ops.lambda_return


def gradients(function, batch, grad, *discount):
    """Returns, d values and d rewards of function(values, rewards, loss_mask, *discount) under incoming grad."""
    values, rewards = leaf(batch.values), leaf(batch.rewards)
    returns = function(values, rewards, batch.loss_mask, *discount)
    if not returns.requires_grad:  # plain torch uses neither where no token is valid
        return returns, torch.zeros_like(values), torch.zeros_like(rewards)
    return returns.detach(), *torch.autograd.grad(returns, (values, rewards), grad, materialize_grads=True)


# ---- against the reference ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gamma", "lam"), DISCOUNTS)
@pytest.mark.parametrize("kind", MASK_KINDS)
def test_matches_reference(kind, gamma, lam):
    values, rewards, _, mask = make_batch(kind)
    expected = reference.compute_lambda_return(values, rewards, mask, gamma, lam)
    torch.testing.assert_close(
        compute_lambda_return(values, rewards, mask, gamma, lam), expected, rtol=1e-14, atol=1e-15
    )


@pytest.mark.parametrize(("gamma", "lam"), DISCOUNTS)
@pytest.mark.parametrize("kind", MASK_KINDS)
def test_gradients_match_autograd_of_reference(kind, gamma, lam):
    batch = make_batch(kind)
    grad = make_grad(batch)
    ours = gradients(compute_lambda_return, batch, grad, gamma, lam)
    expected = gradients(reference.compute_lambda_return, batch, grad, gamma, lam)
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-14)


@PROPERTY
@given(batch=batches(), gamma=unit_floats, lam=unit_floats)
def test_any_batch_matches_reference(batch, gamma, lam):
    returns = compute_lambda_return(batch.values, batch.rewards, batch.loss_mask, gamma, lam)
    assert returns.dtype == batch.values.dtype
    assert returns.shape == batch.values.shape
    exact = reference.compute_lambda_return(batch.values.double(), batch.rewards.double(), batch.loss_mask, gamma, lam)
    # A step rounds twice and weights its inputs by at most 1, so T steps are off by at most 2 T units of the largest.
    acc_eps = torch.finfo(accumulate_dtype(batch.values.dtype)).eps
    tolerance = torch.finfo(returns.dtype).eps + 40 * acc_eps
    torch.testing.assert_close(returns.double(), exact, rtol=tolerance, atol=tolerance * 4)


@PROPERTY
@given(batch=batches(), gamma=unit_floats, lam=unit_floats)
def test_any_backward_is_the_adjoint(batch, gamma, lam):
    """<g, J (v, r)> = <J^T g, (v, r)>: the operator is linear in values and rewards together."""
    batch = batch._replace(values=batch.values.double(), rewards=batch.rewards.double())
    grad = make_grad(batch)
    returns, grad_values, grad_rewards = gradients(compute_lambda_return, batch, grad, gamma, lam)
    left = (grad * returns).sum()
    right = (grad_values * batch.values).sum() + (grad_rewards * batch.rewards).sum()
    torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-11)


# ---- the cases everybody asks about ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_lambda_one_equals_monte_carlo(kind):
    values, rewards, _, mask = make_batch(kind)
    returns = compute_lambda_return(values, rewards, mask, gamma=1.0, lam=1.0)
    assert torch.equal(returns, torch.where(mask, rewards[:, None], 0.0))


def test_lambda_zero_uses_only_the_next_value():
    values = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    returns = compute_lambda_return(values, torch.tensor([1.0]), torch.ones(1, 4), lam=0.0)
    assert torch.equal(returns, torch.tensor([[0.2, 0.3, 0.4, 1.0]]))


def test_lambda_095_makes_targets_differ_by_position():
    values = torch.full((1, 8), 0.5)
    returns = compute_lambda_return(values, torch.tensor([1.0]), torch.ones(1, 8), lam=0.95)[0]
    assert returns[-1] == 1.0
    # Near the reward at the end, leaning on V = 0.5 at the start, strictly in between.
    assert (returns.diff() > 0).all()
    assert (returns > 0.5).all()


def test_gamma_zero_leaves_only_the_terminal_reward():
    values, rewards, _, mask = make_batch("dense")
    returns = compute_lambda_return(values, rewards, mask, gamma=0.0)
    assert torch.equal(returns[:, -1], rewards)
    assert (returns[:, :-1] == 0).all()


def test_partial_mask():
    """Prompt and padding change nothing for the tokens between them."""
    values, rewards, _, _ = make_batch()
    mask = torch.zeros(4, 13, dtype=torch.bool)
    mask[:, 4:9] = True
    returns = compute_lambda_return(values, rewards, mask)
    alone = compute_lambda_return(values[:, 4:9], rewards, torch.ones(4, 5))
    assert torch.equal(returns[:, 4:9], alone)
    assert (returns[~mask] == 0).all()


def test_instruction_mask():
    """Tool output between two turns costs no discount: the gap closes as if it were not there."""
    values, rewards, _, _ = make_batch()
    mask = torch.zeros(4, 13, dtype=torch.bool)
    mask[:, [2, 3, 4, 9, 11]] = True
    returns = compute_lambda_return(values, rewards, mask, gamma=0.9)
    closed = compute_lambda_return(values[:, [2, 3, 4, 9, 11]], rewards, torch.ones(4, 5), gamma=0.9)
    # To rounding: where a token stands decides which terms are added first.
    torch.testing.assert_close(returns[:, [2, 3, 4, 9, 11]], closed, rtol=1e-14, atol=1e-14)
    assert (returns[~mask] == 0).all()


def test_empty_mask_gives_zero():
    batch = make_batch("nothing")
    batch = batch._replace(values=torch.full_like(batch.values, float("nan")))
    for result in gradients(compute_lambda_return, batch, torch.full_like(batch.values, float("nan"))):
        assert (result == 0).all()


def test_single_valid_token_is_the_terminal_reward():
    values, rewards, _, mask = make_batch("single_token")
    assert torch.equal(compute_lambda_return(values, rewards, mask, 0.5, 0.5), torch.where(mask, rewards[:, None], 0.0))


def test_first_position_valid():
    values, rewards, _, _ = make_batch()
    mask = torch.zeros(4, 13)
    mask[:, [0, 7]] = 1
    returns = compute_lambda_return(values, rewards, mask, gamma=0.5, lam=0.5)
    assert torch.equal(returns[:, 7], rewards)
    assert torch.equal(returns[:, 0], 0.25 * values[:, 7] + 0.25 * rewards)


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
def test_batch_equals_rows_one_by_one(dtype):
    batch = make_batch("conversation", B=9, T=40, dtype=dtype)
    grad = make_grad(batch)
    together = gradients(compute_lambda_return, batch, grad)
    for b in range(9):
        row = batch._make(x[b : b + 1] for x in batch)
        for ours, alone in zip(together, gradients(compute_lambda_return, row, grad[b : b + 1]), strict=True):
            assert torch.equal(ours[b : b + 1], alone)


def test_masked_positions_have_zero_gradient():
    batch = make_batch("conversation")
    _, grad_values, _ = gradients(compute_lambda_return, batch, make_grad(batch))
    assert (grad_values[~batch.loss_mask] == 0).all()
    assert (grad_values[batch.loss_mask] != 0).any()


# ---- dtypes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
def test_mask_of_any_dtype(dtype, mask_dtype):
    """Nonzero is valid: fractions, negatives, NaN, and integers whose low byte is 0."""
    batch = make_batch("gaps", dtype=dtype)
    other = batch._replace(loss_mask=mask_as(batch.loss_mask, mask_dtype))
    grad = make_grad(batch)
    for ours, expected in zip(
        gradients(compute_lambda_return, other, grad), gradients(compute_lambda_return, batch, grad), strict=True
    ):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("reward_dtype", MASK_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
def test_rewards_of_any_dtype(dtype, reward_dtype):
    values, _, _, mask = make_batch("gaps", dtype=dtype)
    rewards = torch.tensor([0, 1, 1, 0])
    expected = compute_lambda_return(values, rewards.to(dtype), mask)
    assert torch.equal(compute_lambda_return(values, rewards.to(reward_dtype), mask), expected)


@pytest.mark.parametrize("reward_dtype", VALUE_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
def test_gradients_have_the_dtype_of_their_input(dtype, reward_dtype):
    batch = make_batch(dtype=dtype)
    batch = batch._replace(rewards=batch.rewards.to(reward_dtype))
    returns, grad_values, grad_rewards = gradients(compute_lambda_return, batch, make_grad(batch))
    assert returns.dtype == grad_values.dtype == dtype
    assert grad_rewards.dtype == reward_dtype


# ---- accuracy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 7, 300])
@pytest.mark.parametrize("kind", ["dense", "conversation"])
@pytest.mark.parametrize("dtype", ROUNDED_DTYPES, ids=str)
def test_as_accurate_as_plain_torch(dtype, kind, length):
    batch = make_batch(kind, B=8, T=length, dtype=dtype)
    exact_batch = batch._replace(values=batch.values.double(), rewards=batch.rewards.double())
    grad = make_grad(batch)
    for gamma, lam in (*DISCOUNTS, (0.999, 0.99)):
        ours = gradients(compute_lambda_return, batch, grad, gamma, lam)
        plain = gradients(plain_lambda_return, batch, grad, gamma, lam)
        exact = gradients(plain_lambda_return, exact_batch, grad.double(), gamma, lam)
        for triple in zip(ours, plain, exact, strict=True):
            assert_as_accurate_as_torch(*triple)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_half_results_are_float64_rounded(dtype):
    batch = make_batch("conversation", B=8, T=300, dtype=dtype)
    exact_batch = batch._replace(values=batch.values.double(), rewards=batch.rewards.double())
    grad = make_grad(batch)
    ours = gradients(compute_lambda_return, batch, grad, 0.99, 0.95)
    exact = gradients(plain_lambda_return, exact_batch, grad.double(), 0.99, 0.95)
    for pair in zip(ours, exact, strict=True):
        assert_rounded(*pair)


def test_one_long_row():
    values, rewards, _, mask = make_batch("gaps", B=1, T=100_000, dtype=torch.float32)
    gamma, lam = 1.0, 0.9999
    ours = compute_lambda_return(values, rewards, mask, gamma, lam)
    plain = plain_lambda_return(values, rewards, mask, gamma, lam)
    carry, exact = rewards.item(), []
    for value, valid in zip(reversed(values[0].tolist()), reversed(mask[0].tolist()), strict=True):
        exact.append(carry if valid else 0.0)
        carry = gamma * (1.0 - lam) * value + gamma * lam * carry if valid else carry
    assert_as_accurate_as_torch(ours, plain, torch.tensor([exact[::-1]], dtype=torch.float64))


# ---- NaN and Inf -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
@pytest.mark.parametrize("kind", MASK_KINDS)
def test_nothing_at_a_masked_position_is_used(kind, dtype):
    batch = make_batch(kind, dtype=dtype)
    grad = make_grad(batch)
    bad = batch._replace(values=poisoned(batch.values, batch.loss_mask))
    bad_grad = poisoned(grad, batch.loss_mask)
    for gamma, lam in DISCOUNTS:
        expected = gradients(compute_lambda_return, batch, grad, gamma, lam)
        for ours, want in zip(gradients(compute_lambda_return, bad, bad_grad, gamma, lam), expected, strict=True):
            assert torch.equal(ours, want)


def test_reward_of_a_row_without_tokens_is_not_used():
    values, rewards, _, _ = make_batch()
    mask = make_mask("empty_rows", 4, 13)
    rewards[0] = float("nan")
    assert torch.isfinite(compute_lambda_return(values, rewards, mask)).all()


def test_inf_values_do_not_reach_a_monte_carlo_target():
    _, rewards, _, mask = make_batch("dense")
    values = poisoned(torch.zeros(4, 13, dtype=torch.float64), torch.zeros(4, 13, dtype=torch.bool))
    assert torch.equal(compute_lambda_return(values, rewards, mask, lam=1.0), rewards[:, None].expand(4, 13))


def test_inf_value_reaches_only_the_target_before_it_at_lambda_zero():
    values, rewards, _, mask = make_batch("dense")
    values[:, 5] = float("inf")
    returns = compute_lambda_return(values, rewards, mask, lam=0.0)
    assert (returns[:, 4] == float("inf")).all()
    assert torch.isfinite(returns[:, torch.arange(13) != 4]).all()


def test_nothing_is_carried_at_gamma_zero():
    values = torch.full((1, 3), float("nan"))
    returns = compute_lambda_return(values, torch.tensor([float("inf")]), torch.ones(1, 3), gamma=0.0)
    assert returns.tolist() == [[0.0, 0.0, float("inf")]]


def test_nan_at_a_valid_position_is_not_hidden():
    values, rewards, _, mask = make_batch("dense")
    values[1, 5] = float("nan")
    returns = compute_lambda_return(values, rewards, mask)
    assert returns[1, :5].isnan().all()
    assert torch.isfinite(returns[1, 5:]).all()
    assert torch.isfinite(returns[[0, 2, 3]]).all()


# ---- layouts and shapes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout, mask_dtype, dtype):
    values, rewards, _, mask = make_batch(B=5, T=11, dtype=dtype)
    mask, grad, view = mask.to(mask_dtype), make_grad(make_batch(B=5, T=11, dtype=dtype)), LAYOUTS[layout]
    expected = ops.lambda_return(values, rewards, mask), *ops.lambda_return_backward(grad, mask)
    returns = ops.lambda_return(view(values), strided(rewards), view(mask))
    for ours, want in zip((returns, *ops.lambda_return_backward(view(grad), view(mask))), expected, strict=True):
        assert torch.equal(ours, want)
        assert ours.is_contiguous()


def test_expanded_mask():
    values, rewards, _, mask = make_batch()
    for expanded in (mask[:1].expand(4, 13), mask[:, 4:5].expand(4, 13), torch.tensor(True).expand(4, 13)):
        expected = compute_lambda_return(values, rewards, expanded.contiguous())
        assert torch.equal(compute_lambda_return(values, rewards, expanded), expected)


def test_expanded_values_rewards_and_gradient():
    mask = make_mask("gaps", 4, 13)
    value, reward = leaf(torch.tensor(0.25)), leaf(torch.tensor(1.0))
    returns = compute_lambda_return(value.expand(4, 13), reward.expand(4), mask)
    grads = torch.autograd.grad(returns.sum(), (value, reward))  # sum() sends an expanded gradient
    expected = plain_lambda_return(value.expand(4, 13), reward.expand(4), mask, 1.0, 0.95)
    torch.testing.assert_close(returns, expected)
    torch.testing.assert_close(grads, torch.autograd.grad(expected.sum(), (value, reward)))


def test_negative_view():
    """A view with torch's lazy negation holds the opposite of what its memory says."""
    values, rewards, _, mask = make_batch()
    lazy = torch.complex(torch.zeros_like(values), -values).conj().imag
    assert lazy.is_neg()
    assert torch.equal(compute_lambda_return(lazy, rewards, mask), compute_lambda_return(values, rewards, mask))


@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0), (1, 1), (3, 1)], ids=str)
def test_small_shapes(shape, dtype):
    batch = make_batch("dense", *shape, dtype)
    returns, grad_values, grad_rewards = gradients(compute_lambda_return, batch, torch.ones(shape, dtype=dtype))
    assert returns.shape == grad_values.shape == shape
    assert torch.equal(returns, batch.rewards[:, None].expand(shape))  # nothing but R where T <= 1
    assert (grad_values == 0).all()
    assert torch.equal(grad_rewards, torch.full_like(batch.rewards, shape[1]))


# ---- the operator as torch sees it -------------------------------------------------------------------------------


@pytest.mark.parametrize(("gamma", "lam"), DISCOUNTS)
@pytest.mark.parametrize("kind", ["dense", "conversation", "nothing"])
def test_gradcheck(kind, gamma, lam):
    values, rewards, _, mask = make_batch(kind, B=2, T=6)
    inputs = leaf(values), leaf(rewards), mask, gamma, lam
    assert gradcheck(compute_lambda_return, inputs)
    assert gradgradcheck(compute_lambda_return, inputs)


@pytest.mark.parametrize("kind", ["dense", "conversation"])
def test_gradcheck_of_backward(kind):
    values, _, _, mask = make_batch(kind, B=2, T=6)
    assert gradcheck(ops.lambda_return_backward, (leaf(values), mask, 0.9, 0.7))


def test_gradient_for_one_input_alone():
    values, rewards, _, mask = make_batch()
    _, *both = gradients(compute_lambda_return, make_batch(), torch.ones(4, 13, dtype=torch.float64))
    for i, inputs in enumerate([(leaf(values), rewards), (values, leaf(rewards))]):
        returns = compute_lambda_return(*inputs, mask)
        (grad,) = torch.autograd.grad(returns.sum(), inputs[i])
        assert torch.equal(grad, both[i])


def test_detached_inputs_record_nothing():
    values, rewards, _, mask = make_batch()
    assert not compute_lambda_return(values, rewards, mask).requires_grad
    with torch.no_grad():
        assert not compute_lambda_return(leaf(values), rewards, mask).requires_grad


@pytest.mark.parametrize(("dtype", "mask_dtype"), OPCHECK_DTYPES, ids=str)
def test_opcheck(dtype, mask_dtype):
    values, rewards, _, mask = make_batch(B=3, T=5, dtype=dtype)
    mask = mask.to(mask_dtype)
    for inputs in ((values, rewards), (leaf(values), leaf(rewards)), (leaf(values), rewards > 0)):
        opcheck(ops.lambda_return.default, (*inputs, mask), {"gamma": 0.9, "lam": 0.8})
    for grad in (values, leaf(values), LAYOUTS["transposed"](values).requires_grad_()):
        opcheck(ops.lambda_return_backward.default, (grad, mask, 0.9, 0.8))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1, 1)], ids=str)
def test_opcheck_of_small_shapes(shape):
    values, rewards, _, mask = make_batch("dense", *shape)
    opcheck(ops.lambda_return.default, (leaf(values), leaf(rewards), mask))
    opcheck(ops.lambda_return_backward.default, (leaf(values), mask))


def test_results_are_fresh_and_inputs_untouched():
    batch = make_batch()
    before = [x.clone() for x in batch]
    grad = make_grad(batch)
    first = gradients(compute_lambda_return, batch, grad)
    kept = [x.clone() for x in first]
    second = gradients(compute_lambda_return, batch, -grad)
    assert all(torch.equal(x, y) for x, y in zip(batch, before, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(first, kept, strict=True))
    pointers = [x.data_ptr() for x in (*batch, grad, *first, *second)]
    assert len(set(pointers)) == len(pointers)


def test_two_live_graphs_do_not_alias():
    one, two = make_batch(seed=1), make_batch(seed=2)
    alone = [gradients(compute_lambda_return, batch, make_grad(batch)) for batch in (one, two)]
    leaves = [(leaf(batch.values), leaf(batch.rewards)) for batch in (one, two)]
    graphs = [compute_lambda_return(*inputs, batch.loss_mask) for inputs, batch in zip(leaves, (one, two), strict=True)]
    for graph, inputs, batch, expected in reversed(list(zip(graphs, leaves, (one, two), alone, strict=True))):
        assert torch.equal(graph, expected[0])
        for ours, want in zip(torch.autograd.grad(graph, inputs, make_grad(batch)), expected[1:], strict=True):
            assert torch.equal(ours, want)
