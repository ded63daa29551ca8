"""masked_mse and torch.ops.lambda_return.masked_mse (+ _backward)."""

import pytest
import torch
from hypothesis import given
from ops_testing import (
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
    batches,
    leaf,
    make_batch,
    make_grad,
    mask_as,
    plain_masked_mse,
    poisoned,
    strided,
)
from torch.autograd import gradcheck
from torch.library import opcheck

from lambda_return_ext import compute_lambda_return, compute_lambda_value_loss, masked_mse, reference

ops = torch.ops.lambda_return


def make_inputs(kind="gaps", B=4, T=13, dtype=torch.float64, target_dtype=None, seed=0):
    """values, targets and mask [B, T]."""
    batch = make_batch(kind, B, T, dtype, seed)
    return batch.values, make_grad(batch, seed + 100).to(target_dtype or dtype), batch.loss_mask


def loss_and_gradients(function, values, targets, mask, scale=1.0):
    """The loss and scale times its gradients in values and targets."""
    values, targets = leaf(values), leaf(targets)
    loss = function(values, targets, mask)
    return loss.detach(), *torch.autograd.grad(loss, (values, targets), torch.full_like(loss, scale))


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_matches_reference_and_its_autograd(kind):
    inputs = make_inputs(kind)
    expected = loss_and_gradients(reference.masked_mse, *inputs)
    torch.testing.assert_close(loss_and_gradients(masked_mse, *inputs), expected, rtol=1e-13, atol=1e-15)


@PROPERTY
@given(batch=batches())
def test_any_batch_matches_reference(batch):
    values, targets, mask = batch.values, make_grad(batch), batch.loss_mask
    ours = loss_and_gradients(masked_mse, values, targets, mask)
    expected = loss_and_gradients(reference.masked_mse, values.double(), targets.double(), mask)
    assert ours[0].dtype == accumulate_dtype(values.dtype)
    for x, y in zip(ours, expected, strict=True):
        tolerance = 4 * torch.finfo(x.dtype).eps
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance)


def test_against_lambda_returns_is_the_lambda_value_loss():
    values, rewards, attention_mask, loss_mask = make_batch("conversation")
    targets = compute_lambda_return(values, rewards, loss_mask)
    expected = compute_lambda_value_loss(values, rewards, attention_mask, loss_mask)
    torch.testing.assert_close(masked_mse(values, targets, attention_mask & loss_mask), expected, rtol=1e-14, atol=0.0)


def test_masked_positions_have_zero_gradient():
    values, targets, mask = make_inputs("conversation")
    for grad in loss_and_gradients(masked_mse, values, targets, mask)[1:]:
        assert (grad[~mask] == 0).all()
        assert (grad[mask] != 0).all()


def test_empty_mask_gives_zero_and_zero_gradient():
    _, _, mask = make_inputs("nothing")
    nan = torch.full((4, 13), float("nan"))
    for result in loss_and_gradients(masked_mse, nan, nan, mask, scale=float("nan")):
        assert (result == 0).all()


@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
def test_nothing_at_a_masked_position_is_used(dtype, kind):
    values, targets, mask = make_inputs(kind, dtype=dtype)
    expected = loss_and_gradients(masked_mse, values, targets, mask)
    # Flipped, so that NaN meets Inf and Inf meets -Inf.
    bad_targets = poisoned(targets.flip(1), mask.flip(1)).flip(1)
    for x, y in zip(loss_and_gradients(masked_mse, poisoned(values, mask), bad_targets, mask), expected, strict=True):
        assert torch.equal(x, y)


def test_nan_at_a_valid_position_is_not_hidden():
    values, targets, mask = make_inputs("dense")
    targets[1, 2] = float("nan")
    loss, grad_values, _ = loss_and_gradients(masked_mse, values, targets, mask)
    assert loss.isnan()
    assert grad_values.isnan().sum() == 1


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
def test_mask_of_any_dtype(dtype, mask_dtype):
    values, targets, mask = make_inputs(dtype=dtype)
    expected = loss_and_gradients(masked_mse, values, targets, mask)
    for x, y in zip(loss_and_gradients(masked_mse, values, targets, mask_as(mask, mask_dtype)), expected, strict=True):
        assert torch.equal(x, y)


DTYPE_PAIRS = [*((dtype, dtype) for dtype in ROUNDED_DTYPES), *((dtype, torch.float32) for dtype in HALF_DTYPES)]


@pytest.mark.parametrize("length", [1, 7, 300])
@pytest.mark.parametrize(("dtype", "target_dtype"), DTYPE_PAIRS, ids=str)
def test_as_accurate_as_plain_torch(dtype, target_dtype, length):
    results = []
    for seed in range(6):  # a single loss may be exact by chance
        values, targets, mask = make_inputs("conversation", 8, length, dtype, target_dtype, seed)
        ours = loss_and_gradients(masked_mse, values, targets, mask)
        plain = loss_and_gradients(plain_masked_mse, values, targets, mask)
        results.append((ours, plain, loss_and_gradients(plain_masked_mse, values.double(), targets.double(), mask)))
    for i in range(3):  # losses, gradients of the values, gradients of the targets
        assert_as_accurate_as_torch(*(torch.stack([seed[k][i] for seed in results]) for k in range(3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout, mask_dtype, dtype):
    values, targets, mask = make_inputs(B=5, T=11, dtype=dtype, target_dtype=torch.float32)
    mask, view = mask.to(mask_dtype), LAYOUTS[layout]
    loss, num_tokens = ops.masked_mse(values, targets, mask)
    grad = ops.masked_mse_backward(loss, num_tokens, values, targets, mask)
    other = view(values), view(targets), view(mask)
    assert torch.equal(ops.masked_mse(*other)[0], loss)
    other_grad = ops.masked_mse_backward(strided(loss[None])[0], num_tokens, *other)
    assert torch.equal(other_grad, grad)
    assert other_grad.is_contiguous()


def test_expanded_inputs():
    values, targets, mask = make_inputs()
    expanded = values[:1].expand(4, 13), targets[:, :1].expand(4, 13), mask[:1].expand(4, 13)
    assert torch.equal(masked_mse(*expanded), masked_mse(*(x.contiguous() for x in expanded)))


def test_trailing_dimension():
    values, targets, mask = make_inputs()
    expected = masked_mse(values, targets, mask)
    assert torch.equal(masked_mse(values[..., None], targets, mask), expected)
    assert torch.equal(masked_mse(values[..., None], targets[..., None], mask), expected)


@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0)], ids=str)
def test_empty_shapes(shape, dtype):
    loss, *grads = loss_and_gradients(masked_mse, *make_inputs("dense", *shape, dtype))
    assert loss == 0
    assert loss.dtype == accumulate_dtype(dtype)
    assert all(grad.shape == shape for grad in grads)


def test_num_tokens():
    values, targets, mask = make_inputs()
    _, num_tokens = ops.masked_mse(values, targets, mask)
    assert num_tokens.dtype == torch.int64
    assert num_tokens.item() == mask.sum().item()


@pytest.mark.parametrize("kind", ["dense", "conversation", "nothing"])
def test_gradcheck(kind):
    values, targets, mask = make_inputs(kind, B=2, T=6)
    assert gradcheck(masked_mse, (leaf(values), leaf(targets), mask))


@pytest.mark.parametrize("wanted", ["values", "targets"])
def test_gradient_for_one_input_alone(wanted):
    values, targets, mask = make_inputs()
    inputs = {"values": values, "targets": targets, "mask": mask}
    inputs[wanted] = leaf(inputs[wanted])
    (grad,) = torch.autograd.grad(masked_mse(**inputs), inputs[wanted])
    expected = dict(zip(("values", "targets"), loss_and_gradients(masked_mse, values, targets, mask)[1:], strict=True))
    assert torch.equal(grad, expected[wanted])


@pytest.mark.parametrize(("dtype", "mask_dtype"), OPCHECK_DTYPES, ids=str)
def test_opcheck(dtype, mask_dtype):
    values, targets, mask = make_inputs(B=3, T=5, dtype=dtype)
    mask, wide = mask.to(mask_dtype), targets.to(accumulate_dtype(dtype))
    for inputs in ((values, targets), (leaf(values), leaf(targets)), (leaf(values), wide), (values, leaf(wide))):
        opcheck(ops.masked_mse.default, (*inputs, mask))
    opcheck(ops.masked_mse_backward.default, (*ops.masked_mse(values, wide, mask), values, wide, mask))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1, 1)], ids=str)
def test_opcheck_of_small_shapes(shape):
    values, targets, mask = make_inputs("dense", *shape)
    opcheck(ops.masked_mse.default, (leaf(values), leaf(targets), mask))
    opcheck(ops.masked_mse_backward.default, (*ops.masked_mse(values, targets, mask), values, targets, mask))


def test_second_derivative_raises():
    values, targets, mask = make_inputs()
    values = leaf(values)
    (grad,) = torch.autograd.grad(masked_mse(values, targets, mask), values, create_graph=True)
    message = "masked_mse_backward: the fused loss has no second derivative; write it in torch operations"
    with pytest.raises(NotImplementedError, match=message):
        grad.sum().backward()


def test_results_are_fresh_and_inputs_untouched():
    inputs = make_inputs()
    before = [x.clone() for x in inputs]
    first = loss_and_gradients(masked_mse, *inputs)
    kept = [x.clone() for x in first]
    second = loss_and_gradients(masked_mse, *inputs, scale=3.0)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(first, kept, strict=True))
    pointers = [x.data_ptr() for x in (*inputs, *first, *second)]
    assert len(set(pointers)) == len(pointers)


def test_two_live_graphs_do_not_alias():
    one, two = make_inputs(seed=1), make_inputs(seed=2)
    alone = [loss_and_gradients(masked_mse, *inputs)[1] for inputs in (one, two)]
    leaves = leaf(one[0]), leaf(two[0])
    losses = [masked_mse(x, *inputs[1:]) for x, inputs in zip(leaves, (one, two), strict=True)]
    grads = [torch.autograd.grad(losses[i], leaves[i])[0] for i in (1, 0)][::-1]
    assert all(torch.equal(x, y) for x, y in zip(grads, alone, strict=True))
