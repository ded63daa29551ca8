"""Two threads give the bits of one: every operator, on inputs large enough to be split."""

import pytest
import torch
from ops_testing import make_batch, make_grad

import lambda_return_ext  # noqa: F401  registers the operators

ops = torch.ops.lambda_return

# Rows of every size: many short ones, a few long ones (several times 16384 tokens, the least that is worth a second
# thread, in all of them), and one alone.
SHAPES = [(4096, 33), (7, 40_000), (1, 200_000)]
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@pytest.fixture
def run_with():
    """Call a function with a number of threads, and restore the number afterwards."""
    before = torch.get_num_threads()

    def run(threads, function, *args):
        torch.set_num_threads(threads)
        result = function(*args)
        return result if isinstance(result, tuple) else (result,)

    yield run
    torch.set_num_threads(before)


def calls(batch):
    """Every operator with its arguments, of which several are [B, T]."""
    values, rewards, attention_mask, mask = batch
    grad, scale = make_grad(batch), torch.tensor(0.7)
    loss_inputs = values, rewards, attention_mask, mask
    discounts = torch.ones(len(values)).double(), torch.tensor(0.95).double()
    general = mask, grad, None, *discounts
    loss = 1, 0.5, 0.1, 1  # huber, clipped, sequence mean
    logits = torch.stack([values, grad, -values], -1)
    accumulated = torch.float64 if values.dtype == torch.float64 else torch.float32
    returns, log_sums = grad.to(accumulated), logits.logsumexp(-1).to(accumulated)
    two_hot = 1, 0.0, 1.0, 0.75, 1  # of bins over [0, 1], sequence mean
    return {
        "lambda_return": (values, rewards, mask),
        "lambda_return_backward": (grad, mask),
        "lambda_value_loss": loss_inputs,
        "lambda_value_loss_backward": (scale, mask.sum(), *loss_inputs),
        "masked_mse": (values, grad, mask),
        "masked_mse_backward": (scale, mask.sum(), values, grad, mask),
        "eos_mask": (mask,),
        "td_lambda": (values, rewards, *general),
        "td_lambda_backward": (grad, mask, None, *discounts, True),
        "td_lambda_pair": (values, rewards, *general, discounts[0]),
        "td_lambda_map": (values, *general),
        "td_lambda_loss": (*loss_inputs[:2], mask, attention_mask, grad, values * 0.9, None, *discounts, None, *loss),
        "td_lambda_loss_backward": (
            scale,
            torch.ones(len(values)),
            *loss_inputs[:2],
            mask,
            attention_mask,
            grad,
            values * 0.9,
            None,
            *discounts,
            *loss,
        ),
        "categorical_value_loss": (logits, rewards, mask, attention_mask, grad, None, *discounts, None, *two_hot),
        "categorical_value_loss_backward": (
            scale,
            torch.ones(len(values)),
            logits,
            returns,
            log_sums,
            None,
            *two_hot,
        ),
    }


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_with_any_number_of_threads(run_with, dtype, shape):
    # Values of very different sizes, so that another order of a sum shows in its last bits.
    batch = make_batch("gaps", *shape, dtype)
    batch = batch._replace(values=batch.values * torch.logspace(-3, 3, shape[1]).to(dtype))
    for op, args in calls(batch).items():
        expected = run_with(1, getattr(ops, op), *args)
        for threads in (2, 3):
            for x, y in zip(run_with(threads, getattr(ops, op), *args), expected, strict=True):
                assert torch.equal(x, y), f"{op} with {threads} threads"


def test_every_operator_is_covered():
    # Those that register a schema, as torch lists them.
    names = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("lambda_return::")
    }
    assert names == set(calls(make_batch()))


def test_another_order_of_the_sum_would_show():
    """Guards the test above: its losses do depend on the order of summation."""
    batch = make_batch("gaps", 1, 200_000, torch.float64)
    errors = (batch.values * torch.logspace(-3, 3, 200_000)).square()[0]
    assert len({errors[order].cumsum(0)[-1].item() for order in (slice(None), torch.arange(199_999, -1, -1))}) == 2


def test_the_inputs_are_split(run_with):
    """Guards the test above: torch really starts its parallel region for these shapes."""
    assert all(B * T >= 4 * 16_384 for B, T in SHAPES)
    run_with(2, ops.lambda_return, *calls(make_batch("gaps", *SHAPES[0], torch.float32))["lambda_return"])
    assert torch.get_num_threads() == 2
