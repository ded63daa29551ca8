"""compute_lambda_value_loss, compute_mc_value_loss and torch.ops.lambda_return.lambda_value_loss (+ _backward)."""

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
    Batch,
    accumulate_dtype,
    assert_as_accurate_as_torch,
    assert_rounded,
    batches,
    leaf,
    make_batch,
    mask_as,
    plain_value_loss,
    poisoned,
    strided,
    unit_floats,
)
from torch.autograd import gradcheck
from torch.library import opcheck

from lambda_return_ext import (
    compute_lambda_return,
    compute_lambda_value_loss,
    compute_mc_value_loss,
    create_eos_only_mask,
    reference,
)

ops = torch.ops.lambda_return


def loss_and_gradient(function, batch, *discount, scale=1.0):
    """The loss and scale times its gradient in the values."""
    values = leaf(batch.values)
    loss = function(values, *batch[1:], *discount)
    return loss.detach(), *torch.autograd.grad(loss, values, torch.full_like(loss, scale))


def exact_loss_and_gradient(batch, *discount):
    """Plain torch in float64."""
    batch = batch._replace(values=batch.values.double(), rewards=batch.rewards.double())
    return loss_and_gradient(lambda *args: plain_value_loss(Batch(*args[:4]), *args[4:]), batch, *discount)


# ---- against the reference ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gamma", "lam"), DISCOUNTS)
@pytest.mark.parametrize("kind", MASK_KINDS)
def test_matches_reference_and_its_autograd(kind, gamma, lam):
    batch = make_batch(kind)
    ours = loss_and_gradient(compute_lambda_value_loss, batch, gamma, lam)
    expected = loss_and_gradient(reference.compute_lambda_value_loss, batch, gamma, lam)
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_monte_carlo_matches_reference(kind):
    batch = make_batch(kind)
    ours = loss_and_gradient(compute_mc_value_loss, batch)
    expected = loss_and_gradient(reference.compute_mc_value_loss, batch)
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-15)


@PROPERTY
@given(batch=batches(), gamma=unit_floats, lam=unit_floats)
def test_any_batch_matches_reference(batch, gamma, lam):
    loss, grad = loss_and_gradient(compute_lambda_value_loss, batch, gamma, lam)
    acc = accumulate_dtype(batch.values.dtype)
    assert (loss.shape, loss.dtype) == ((), acc)
    assert (grad.shape, grad.dtype) == (batch.values.shape, batch.values.dtype)
    exact_batch = batch._replace(values=batch.values.double(), rewards=batch.rewards.double())
    exact = loss_and_gradient(reference.compute_lambda_value_loss, exact_batch, gamma, lam)
    # T <= 18 steps of at most two roundings each, on numbers of at most about 4.
    tolerance = 200 * torch.finfo(acc).eps
    torch.testing.assert_close(loss.double(), exact[0], rtol=tolerance, atol=tolerance)
    tolerance += torch.finfo(grad.dtype).eps
    torch.testing.assert_close(grad.double(), exact[1], rtol=tolerance, atol=tolerance)


# ---- the cases everybody asks about ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_lambda_one_equals_monte_carlo(kind):
    batch = make_batch(kind)
    ours = loss_and_gradient(compute_lambda_value_loss, batch, 1.0, 1.0)
    for x, y in zip(ours, loss_and_gradient(compute_mc_value_loss, batch), strict=True):
        assert torch.equal(x, y)


def test_lambda_zero_uses_only_the_next_value():
    values = torch.tensor([[0.5, 0.25, 1.0]])
    loss = compute_lambda_value_loss(values, torch.tensor([2.0]), torch.ones(1, 3), torch.ones(1, 3), lam=0.0)
    assert loss.item() == pytest.approx(((0.5 - 0.25) ** 2 + (0.25 - 1.0) ** 2 + (1.0 - 2.0) ** 2) / 3)


def test_lambda_095_gives_every_position_its_own_gradient():
    batch = Batch(torch.full((1, 8), 0.5), torch.tensor([1.0]), torch.ones(1, 8), torch.ones(1, 8))
    _, grad = loss_and_gradient(compute_lambda_value_loss, batch)
    assert (grad.diff() < 0).all()
    _, grad = loss_and_gradient(compute_mc_value_loss, batch)
    assert (grad == grad[0, 0]).all()


def test_partial_mask():
    """Prompt and padding change nothing."""
    values, rewards, _, _ = make_batch()
    mask = torch.zeros(4, 13)
    mask[:, 4:9] = 1
    alone = Batch(values[:, 4:9], rewards, torch.ones(4, 5), torch.ones(4, 5))
    loss, grad = loss_and_gradient(compute_lambda_value_loss, Batch(values, rewards, torch.ones(4, 13), mask))
    alone_loss, alone_grad = loss_and_gradient(compute_lambda_value_loss, alone)
    assert torch.equal(loss, alone_loss)
    assert torch.equal(grad[:, 4:9], alone_grad)


def test_instruction_mask():
    """Tool output between two turns changes nothing."""
    values, rewards, _, _ = make_batch()
    turns = [2, 3, 4, 9, 11]
    mask = torch.zeros(4, 13)
    mask[:, turns] = 1
    closed = Batch(values[:, turns], rewards, torch.ones(4, 5), torch.ones(4, 5))
    loss, grad = loss_and_gradient(compute_lambda_value_loss, Batch(values, rewards, torch.ones(4, 13), mask), 0.9)
    closed_loss, closed_grad = loss_and_gradient(compute_lambda_value_loss, closed, 0.9)
    torch.testing.assert_close(loss, closed_loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(grad[:, turns], closed_grad, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("empty", ["attention_mask", "loss_mask", "their overlap"])
def test_empty_masks_give_zero_and_zero_gradient(empty):
    values, rewards, _, mask = make_batch("dense")
    values = torch.full_like(values, float("nan"))
    masks = {
        "attention_mask": (torch.zeros_like(mask), mask),
        "loss_mask": (mask, torch.zeros_like(mask)),
        "their overlap": (torch.arange(13).expand(4, 13) < 5, torch.arange(13).expand(4, 13) >= 5),
    }[empty]
    for result in loss_and_gradient(compute_lambda_value_loss, Batch(values, rewards, *masks), scale=float("nan")):
        assert (result == 0).all()


def test_single_valid_token():
    values, rewards, _, mask = make_batch("single_token")
    loss, grad = loss_and_gradient(compute_lambda_value_loss, Batch(values, rewards, torch.ones_like(mask), mask))
    error = torch.where(mask, values - rewards[:, None], 0.0)
    torch.testing.assert_close(loss, (error**2).sum() / 4)
    torch.testing.assert_close(grad, error / 2)


def test_first_position_valid():
    values = torch.tensor([[0.5, 7.0, 7.0, 0.25]])
    mask = torch.tensor([[1, 0, 0, 1]])
    loss = compute_lambda_value_loss(values, torch.tensor([1.0]), torch.ones(1, 4), mask, gamma=0.5, lam=0.5)
    assert loss.item() == ((0.5 - 0.25 * 0.25 - 0.25) ** 2 + (0.25 - 1.0) ** 2) / 2


@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
def test_batch_equals_rows_one_by_one(dtype):
    batch = make_batch("conversation", B=9, T=40, dtype=dtype)
    tokens = batch.counted.sum(dim=1)
    loss, grad = loss_and_gradient(compute_lambda_value_loss, batch)
    losses, grads = zip(
        *(
            loss_and_gradient(compute_lambda_value_loss, batch._make(x[b : b + 1] for x in batch), scale=share)
            for b, share in enumerate((tokens / tokens.sum()).tolist())
        ),
        strict=True,
    )
    torch.testing.assert_close(loss, (torch.stack(losses) * tokens).sum() / tokens.sum())
    torch.testing.assert_close(grad, torch.cat(grads))


@pytest.mark.parametrize("kind", ["conversation", "padding", "first_valid"])
def test_masked_positions_have_zero_gradient(kind):
    batch = make_batch(kind)
    _, grad = loss_and_gradient(compute_lambda_value_loss, batch)
    assert (grad[~batch.counted] == 0).all()
    assert (grad[batch.counted] != 0).all()


def test_right_predictions_lower_the_loss():
    _, rewards, attention_mask, loss_mask = make_batch("conversation")
    right = rewards[:, None].expand(4, 13)
    losses = [
        compute_lambda_value_loss(right + error, rewards, attention_mask, loss_mask).item()
        for error in (0.0, 0.1, 0.5, 1.0)
    ]
    assert losses[0] == pytest.approx(0.0, abs=1e-30)
    assert losses == sorted(losses)
    assert losses[1] > 0


def test_a_gradient_step_lowers_the_loss():
    batch = make_batch("conversation")
    for lam in (1.0, 0.95):
        loss, grad = loss_and_gradient(compute_lambda_value_loss, batch, 1.0, lam)
        stepped = batch._replace(values=batch.values - grad)
        assert loss_and_gradient(compute_lambda_value_loss, stepped, 1.0, lam)[0] < loss


def test_warm_up_gradient_is_zero_at_every_other_token():
    """Training on the outcome alone: the last token's mask as the loss mask."""
    values, rewards, _, mask = make_batch("conversation", B=6)
    eos = create_eos_only_mask(mask)
    loss, grad = loss_and_gradient(compute_lambda_value_loss, Batch(values, rewards, torch.ones_like(mask), eos))
    error = torch.where(eos == 1, values - rewards[:, None], 0.0)
    torch.testing.assert_close(loss, (error**2).sum() / eos.sum())
    assert (grad[eos == 0] == 0).all()
    assert (grad[eos == 1] != 0).all()


def test_attention_mask_only_weights_the_error():
    """The scan runs over loss_mask alone: a token whose error does not count still feeds the targets before it."""
    values, rewards, attention_mask, loss_mask = make_batch("dense")
    targets = compute_lambda_return(values, rewards, loss_mask, 0.9, 0.5)
    error = torch.where(attention_mask, values - targets, 0.0)
    loss, grad = loss_and_gradient(compute_lambda_value_loss, make_batch("dense"), 0.9, 0.5)
    torch.testing.assert_close(loss, (error**2).sum() / attention_mask.sum())
    torch.testing.assert_close(grad, 2 * error / attention_mask.sum())


def test_attention_outside_the_loss_mask_counts_nothing():
    values, rewards, _, loss_mask = make_batch("conversation")
    expected = loss_and_gradient(compute_lambda_value_loss, Batch(values, rewards, loss_mask, loss_mask))
    everywhere = Batch(values, rewards, torch.ones_like(loss_mask), loss_mask)
    for x, y in zip(loss_and_gradient(compute_lambda_value_loss, everywhere), expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("function", [compute_lambda_value_loss, compute_mc_value_loss])
def test_value_head_output_with_trailing_dimension(function):
    values, *rest = make_batch("conversation")
    logits, flat = leaf(values[..., None]), leaf(values)
    losses = function(logits, *rest), function(flat, *rest)
    assert torch.equal(*losses)
    (grad,), (flat_grad,) = (torch.autograd.grad(loss, x) for loss, x in zip(losses, (logits, flat), strict=True))
    assert torch.equal(grad, flat_grad[..., None])


def test_gradient_scales_with_the_incoming_one():
    batch = make_batch("conversation")
    _, grad = loss_and_gradient(compute_lambda_value_loss, batch)
    _, scaled = loss_and_gradient(compute_lambda_value_loss, batch, scale=-4.0)
    assert torch.equal(scaled, -4.0 * grad)


def test_targets_are_constants():
    """No gradient flows through the targets: none to the rewards, and none from one position to another."""
    values, rewards, attention_mask, mask = make_batch("dense")
    rewards = leaf(rewards)
    loss = compute_lambda_value_loss(leaf(values), rewards, attention_mask, mask)
    loss.backward()
    assert rewards.grad is None
    attention_mask[:] = False
    attention_mask[:, 3] = True
    _, grad = loss_and_gradient(compute_lambda_value_loss, Batch(values, rewards.detach(), attention_mask, mask))
    assert (grad[:, 4:] == 0).all()


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_num_tokens(kind):
    batch = make_batch(kind)
    _, num_tokens = ops.lambda_value_loss(*batch)
    assert num_tokens.dtype == torch.int64
    assert num_tokens.item() == batch.counted.sum().item()
    assert not num_tokens.requires_grad


# ---- dtypes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
def test_masks_of_any_dtype(dtype, mask_dtype):
    batch = make_batch("gaps", dtype=dtype)
    expected = loss_and_gradient(compute_lambda_value_loss, batch)
    attention, loss_mask = mask_as(batch.attention_mask, mask_dtype), mask_as(batch.loss_mask, mask_dtype)
    for masks in ((attention, loss_mask), (attention, batch.loss_mask), (batch.attention_mask, loss_mask)):
        ours = loss_and_gradient(compute_lambda_value_loss, Batch(batch.values, batch.rewards, *masks))
        for x, y in zip(ours, expected, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("reward_dtype", MASK_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
def test_rewards_of_any_dtype(dtype, reward_dtype):
    batch = make_batch("gaps", dtype=dtype)._replace(rewards=torch.tensor([0, 1, 1, 0]))
    expected = loss_and_gradient(compute_lambda_value_loss, batch)
    other = batch._replace(rewards=batch.rewards.to(reward_dtype))
    for x, y in zip(loss_and_gradient(compute_lambda_value_loss, other), expected, strict=True):
        assert torch.equal(x, y)


# ---- accuracy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 7, 300])
@pytest.mark.parametrize("dtype", ROUNDED_DTYPES, ids=str)
def test_as_accurate_as_plain_torch(dtype, length):
    for gamma, lam in (*DISCOUNTS, (0.999, 0.99)):
        results = []
        for seed in range(6):  # a single loss may be exact by chance
            batch = make_batch("conversation", B=8, T=length, dtype=dtype, seed=seed)
            ours = loss_and_gradient(compute_lambda_value_loss, batch, gamma, lam)
            plain = loss_and_gradient(lambda *args: plain_value_loss(Batch(*args[:4]), *args[4:]), batch, gamma, lam)
            results.append((ours, plain, exact_loss_and_gradient(batch, gamma, lam)))
        for i in range(2):  # losses, then gradients
            assert_as_accurate_as_torch(*(torch.stack([seed[k][i] for seed in results]) for k in range(3)))


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_half_loss_is_taken_from_unrounded_targets(dtype):
    batch = make_batch("conversation", B=8, T=300, dtype=dtype)
    loss, grad = loss_and_gradient(compute_lambda_value_loss, batch)
    exact_loss, exact_grad = exact_loss_and_gradient(batch, 1.0, 0.95)
    # A thousand times below the rounding of a half target.
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-6, atol=0.0)
    assert_rounded(grad, exact_grad)


def test_one_long_row():
    batch = make_batch("gaps", B=1, T=100_000, dtype=torch.float32)
    loss, grad = loss_and_gradient(compute_mc_value_loss, batch)
    error = torch.where(batch.counted, batch.values.double() - batch.rewards.double(), 0.0)
    torch.testing.assert_close(loss.double(), (error**2).sum() / batch.counted.sum(), rtol=1e-7, atol=0.0)
    torch.testing.assert_close(grad.double(), 2 * error / batch.counted.sum(), rtol=1e-6, atol=0.0)


# ---- NaN and Inf -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
@pytest.mark.parametrize("kind", MASK_KINDS)
def test_nothing_at_a_masked_position_is_used(kind, dtype):
    batch = make_batch(kind, dtype=dtype)
    bad = batch._replace(values=poisoned(batch.values, batch.loss_mask))
    for gamma, lam in DISCOUNTS:
        expected = loss_and_gradient(compute_lambda_value_loss, batch, gamma, lam)
        for x, y in zip(loss_and_gradient(compute_lambda_value_loss, bad, gamma, lam), expected, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_monte_carlo_uses_only_what_counts(kind):
    """The target is R, so a value that attention_mask takes out is not read at all."""
    batch = make_batch(kind)
    expected = loss_and_gradient(compute_mc_value_loss, batch)
    bad = batch._replace(values=poisoned(batch.values, batch.counted))
    for x, y in zip(loss_and_gradient(compute_mc_value_loss, bad), expected, strict=True):
        assert torch.equal(x, y)


def test_inf_value_at_lambda_one_spoils_only_its_own_token():
    batch = make_batch("dense")
    batch.values[2, 5] = float("inf")
    batch.attention_mask[2, 5] = True
    loss, grad = loss_and_gradient(compute_lambda_value_loss, batch, 1.0, 1.0)
    assert loss == float("inf")
    assert grad[2, 5] == float("inf")
    grad[2, 5] = 0
    assert torch.isfinite(grad).all()


def test_nan_at_a_counted_position_is_not_hidden():
    batch = make_batch("dense")
    batch.values[2, 5] = float("nan")
    batch.attention_mask[2, 5] = True
    assert compute_lambda_value_loss(*batch).isnan()


# ---- layouts and shapes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout, mask_dtype, dtype):
    values, rewards, *masks = make_batch(B=5, T=11, dtype=dtype)
    masks = [mask.to(mask_dtype) for mask in masks]
    loss, num_tokens = ops.lambda_value_loss(values, rewards, *masks)
    grad = ops.lambda_value_loss_backward(loss, num_tokens, values, rewards, *masks)
    view = LAYOUTS[layout]
    other = view(values), strided(rewards), *map(view, masks)
    assert torch.equal(ops.lambda_value_loss(*other)[0], loss)
    other_grad = ops.lambda_value_loss_backward(strided(loss[None])[0], num_tokens, *other)
    assert torch.equal(other_grad, grad)
    assert other_grad.is_contiguous()


def test_expanded_masks():
    values, rewards, attention_mask, loss_mask = make_batch()
    for attention, loss in (
        (attention_mask[:1].expand(4, 13), loss_mask[:1].expand(4, 13)),
        (attention_mask[:, :1].expand(4, 13), loss_mask[:, 4:5].expand(4, 13)),
        (torch.tensor(True).expand(4, 13), loss_mask),
    ):
        ours = loss_and_gradient(compute_lambda_value_loss, Batch(values, rewards, attention, loss))
        batch = Batch(values, rewards, attention.contiguous(), loss.contiguous())
        for x, y in zip(ours, loss_and_gradient(compute_lambda_value_loss, batch), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0)], ids=str)
def test_empty_shapes(shape, dtype):
    loss, grad = loss_and_gradient(compute_lambda_value_loss, make_batch("dense", *shape, dtype))
    assert loss == 0
    assert loss.dtype == accumulate_dtype(dtype)
    assert grad.shape == shape


@pytest.mark.parametrize("shape", [(1, 1), (3, 1)], ids=str)
def test_one_position_has_the_reward_as_target(shape):
    values, rewards, _, mask = make_batch("dense", *shape)
    error = values - rewards[:, None]
    loss, grad = loss_and_gradient(compute_lambda_value_loss, Batch(values, rewards, mask, mask))
    torch.testing.assert_close(loss, (error**2).mean())
    torch.testing.assert_close(grad, 2 * error / error.numel())


# ---- the operator as torch sees it -------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("kind", ["dense", "conversation", "nothing"])
def test_gradcheck_at_lambda_one(kind, gamma):
    """Only there is the detached target independent of the values."""
    values, *rest = make_batch(kind, B=2, T=6)
    assert gradcheck(lambda values: compute_lambda_value_loss(values, *rest, gamma, 1.0), leaf(values))


@pytest.mark.parametrize(("dtype", "mask_dtype"), OPCHECK_DTYPES, ids=str)
def test_opcheck(dtype, mask_dtype):
    values, rewards, *masks = make_batch(B=3, T=5, dtype=dtype)
    masks = [mask.to(mask_dtype) for mask in masks]
    for inputs in ((values, rewards), (leaf(values), leaf(rewards)), (leaf(values), rewards > 0)):
        opcheck(ops.lambda_value_loss.default, (*inputs, *masks), {"gamma": 0.9, "lam": 0.8})
    loss, num_tokens = ops.lambda_value_loss(values, rewards, *masks)
    opcheck(ops.lambda_value_loss_backward.default, (loss, num_tokens, values, rewards, *masks, 0.9, 0.8))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1, 1)], ids=str)
def test_opcheck_of_small_shapes(shape):
    values, *rest = make_batch("dense", *shape)
    opcheck(ops.lambda_value_loss.default, (leaf(values), *rest))
    opcheck(ops.lambda_value_loss_backward.default, (*ops.lambda_value_loss(values, *rest), values, *rest))


def test_second_derivative_raises():
    values, *rest = make_batch()
    values = leaf(values)
    (grad,) = torch.autograd.grad(compute_lambda_value_loss(values, *rest), values, create_graph=True)
    message = "lambda_value_loss_backward: the fused loss has no second derivative; write it with lambda_return"
    with pytest.raises(NotImplementedError, match=message):
        grad.sum().backward()


def test_results_are_fresh_and_inputs_untouched():
    batch = make_batch()
    before = [x.clone() for x in batch]
    first = loss_and_gradient(compute_lambda_value_loss, batch)
    kept = [x.clone() for x in first]
    second = loss_and_gradient(compute_lambda_value_loss, batch, 0.9, 0.5, scale=3.0)
    assert all(torch.equal(x, y) for x, y in zip(batch, before, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(first, kept, strict=True))
    pointers = [x.data_ptr() for x in (*batch, *first, *second)]
    assert len(set(pointers)) == len(pointers)


def test_two_live_graphs_do_not_alias():
    one, two = make_batch(seed=1), make_batch(seed=2)
    alone = [loss_and_gradient(compute_lambda_value_loss, batch)[1] for batch in (one, two)]
    leaves = leaf(one.values), leaf(two.values)
    losses = [compute_lambda_value_loss(x, *batch[1:]) for x, batch in zip(leaves, (one, two), strict=True)]
    grads = [torch.autograd.grad(losses[i], leaves[i])[0] for i in (1, 0)][::-1]
    assert all(torch.equal(x, y) for x, y in zip(grads, alone, strict=True))


def test_backward_twice_through_one_graph():
    values, *rest = make_batch()
    values = leaf(values)
    loss = compute_lambda_value_loss(values, *rest)
    loss.backward(retain_graph=True)
    first = values.grad.clone()
    loss.backward()
    assert torch.equal(values.grad, 2 * first)


def test_values_changed_between_forward_and_backward_raise():
    """The backward reads the values again, so torch must notice that they are no longer the same."""
    values, *rest = make_batch()
    scaled = leaf(values) * 1.0
    loss = compute_lambda_value_loss(scaled, *rest)
    with torch.no_grad():
        scaled.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_masks_of_a_batch_differ():
    """Guards the tests above: the two masks of make_batch are not the same, and neither contains the other."""
    _, _, attention_mask, loss_mask = make_batch("gaps")
    assert (attention_mask & ~loss_mask).any()
    assert (loss_mask & ~attention_mask).any()
