"""Memory that the fused losses allocate, counted by torch's profiler."""

import json

import pytest
import torch
from ops_testing import VALUE_DTYPES, leaf, make_batch
from torch.profiler import ProfilerActivity, profile

from lambda_return_ext import compute_lambda_return, compute_lambda_value_loss, masked_mse

# torch 2.10 repeats in every run that a profiler keeps one cycle of events.
pytestmark = pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")

SHAPE = (8, 1000)
TOKENS = 8 * 1000


@pytest.fixture
def allocations(tmp_path):
    """Sizes in bytes of all that a function allocates, in order; what it frees again is counted too."""

    def count(function, *args):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            function(*args)
        trace = tmp_path / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
        sizes = [event["args"]["Bytes"] for event in events if event.get("name") == "[memory]"]
        return [size for size in sizes if size > 0]

    return count


def large(sizes):
    """The allocations that grow with the number of tokens; scalars and [B] are below one byte a token."""
    return [size for size in sizes if size >= TOKENS]


def byte_batch(dtype=torch.float32):
    values, rewards, attention_mask, loss_mask = make_batch("gaps", *SHAPE, dtype)
    return (
        leaf(values),
        rewards.to(torch.float64 if dtype == torch.float64 else torch.float32),
        attention_mask,
        loss_mask,
    )


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
def test_loss_allocates_two_scalars(allocations, dtype, mask_dtype):
    values, rewards, *masks = byte_batch(dtype)
    masks = [mask.to(mask_dtype) for mask in masks]
    sizes = allocations(compute_lambda_value_loss, values, rewards, *masks)
    assert sorted(sizes) == sorted([rewards.element_size(), 8])  # loss and num_tokens


@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
def test_loss_backward_allocates_the_gradient(allocations, dtype):
    values, *rest = byte_batch(dtype)
    loss = compute_lambda_value_loss(values, *rest)
    sizes = allocations(torch.autograd.grad, loss, values)
    assert large(sizes) == [TOKENS * values.element_size()]


def test_rows_with_space_between_them_are_read_in_place(allocations):
    values, rewards, *masks = byte_batch()
    wide = torch.zeros(8, 1200)[:, 100:1100].copy_(values.detach()).requires_grad_()
    assert not wide.is_contiguous()
    assert not large(allocations(compute_lambda_value_loss, wide, rewards, *masks))
    assert not large(allocations(compute_lambda_value_loss, values[..., None], rewards, *masks))
    assert not large(
        allocations(compute_lambda_value_loss, values, rewards, *(mask[:1].expand(SHAPE) for mask in masks))
    )


def test_masked_mse_allocates_two_scalars_and_its_backward_the_gradient(allocations):
    values, _, _, mask = byte_batch()
    targets = torch.zeros(SHAPE)
    assert sorted(allocations(masked_mse, values, targets, mask)) == [4, 8]
    loss = masked_mse(values, targets, mask)
    assert large(allocations(torch.autograd.grad, loss, values)) == [TOKENS * 4]


def test_lambda_return_allocates_its_result(allocations):
    values, rewards, _, mask = byte_batch()
    assert allocations(compute_lambda_return, values, rewards, mask) == [TOKENS * 4]


def test_other_masks_and_layouts_do_allocate(allocations):
    """One byte a token for a float mask and one copy for another layout, as documented; so the count can fail."""
    values, rewards, attention_mask, loss_mask = byte_batch()
    float_mask = loss_mask.float()
    assert large(allocations(compute_lambda_value_loss, values, rewards, attention_mask, float_mask)) == [TOKENS]
    transposed = values.detach().t().contiguous().t()
    sizes = large(allocations(compute_lambda_value_loss, transposed, rewards, attention_mask, loss_mask))
    assert TOKENS * 4 in sizes
