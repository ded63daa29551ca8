"""Value learning as classification: HL-Gauss and two-hot targets."""

import math

import pytest
import torch
from ops_testing import leaf, rng
from td_lambda_testing import packed, padded

from lambda_return_ext import reference
from lambda_return_ext.categorical import Bins, categorical_values, compute_categorical_value_loss

BINS = [Bins(), Bins(-1.0, 2.0, "two_hot"), Bins(-0.5, 1.5, "hl_gauss", 1.5)]


@pytest.mark.parametrize("bins", BINS, ids=str)
def test_a_target_is_a_distribution_with_its_mean(bins):
    targets = torch.linspace(bins.low, bins.high, 41, dtype=torch.float64)
    q = bins.probabilities(targets, 51)
    torch.testing.assert_close(q.sum(-1), torch.ones(41, dtype=torch.float64))
    assert (q >= 0).all()
    mean = q @ bins.centers(51, q)
    inside = slice(None) if bins.target == "two_hot" else slice(5, -5)  # the Gaussian is cut off at the ends
    torch.testing.assert_close(mean[inside], targets[inside], atol=1e-3, rtol=0)
    if bins.target == "two_hot":
        assert ((q > 0).sum(-1) <= 2).all()
    outside = bins.probabilities(torch.tensor([bins.low - 9, bins.high + 9], dtype=torch.float64), 51)
    torch.testing.assert_close(outside, q[[0, -1]])


def test_hl_gauss_is_the_integral_of_the_gaussian():
    bins, K, G = Bins(0.0, 1.0, "hl_gauss", 0.75), 10, 0.33

    def cdf(x):
        return 0.5 * (1 + math.erf((x - G) / (0.075 * math.sqrt(2))))

    expected = [(cdf((k + 1) / K) - cdf(k / K)) / (cdf(1.0) - cdf(0.0)) for k in range(K)]
    q = bins.probabilities(torch.tensor(G, dtype=torch.float64), K)
    torch.testing.assert_close(q, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sum", "none"])
@pytest.mark.parametrize("bins", BINS, ids=str)
@pytest.mark.parametrize("where", ["padded", "packed"])
def test_the_loss_is_the_cross_entropy_against_the_returns(where, bins, reduction):
    case = padded(T=9) if where == "padded" else packed((4, 0, 3, 6, 2))
    attention = torch.rand(case.values.shape, generator=rng(1)) < 0.8
    logits = torch.randn(*case.values.shape, 11, generator=rng(2), dtype=torch.float64)
    layout = {} if case.cu_seqlens is None else {"cu_seqlens": case.cu_seqlens}

    def loss(x, **changes):
        arguments = (case.terminal_rewards, attention, case.loss_mask, case.gamma, case.lam)
        options = {**case.options, **layout, "bins": bins, "reduction": reduction, **changes}
        return compute_categorical_value_loss(x, *arguments, **options)

    values = categorical_values(logits, bins)
    torch.testing.assert_close(values, (logits.softmax(-1) * bins.centers(11, logits)).sum(-1))
    targets = case.returns(
        reference.compute_lambda_return if case.cu_seqlens is None else reference.lambda_return_varlen,
        values=values,
        rewards=case.rewards.double(),
    )
    counts = case.loss_mask & attention
    x, y = leaf(logits), leaf(logits)
    losses = torch.nn.functional.cross_entropy(
        y.flatten(0, -2), bins.probabilities(targets, 11).flatten(0, -2), reduction="none"
    ).view(counts.shape)
    expected = reference.reduce_losses(torch.where(counts, losses, 0.0), counts, reduction, None, case.cu_seqlens)
    torch.testing.assert_close(loss(x), expected)
    grad = torch.autograd.grad(loss(x).sum(), x)[0]
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), y)[0])
    bad = torch.where(counts[..., None] | case.loss_mask[..., None], logits, float("nan"))
    bad = leaf(bad)
    assert torch.equal(torch.autograd.grad(loss(bad).sum(), bad)[0], grad)


def test_half_logits_give_a_float32_loss():
    case = padded(dtype=torch.float32)
    logits = leaf(torch.randn(*case.values.shape, 21, generator=rng()).bfloat16())
    loss = compute_categorical_value_loss(logits, case.terminal_rewards, case.loss_mask, case.loss_mask)
    (grad,) = torch.autograd.grad(loss, logits)
    assert (loss.dtype, grad.dtype) == (torch.float32, torch.bfloat16)
    assert (grad[~case.loss_mask] == 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(5, 23)}, r"logits must have shape \[B, T, K\] with K >= 2, got \[5, 23\]"),
        (
            {"logits": torch.zeros(5, 23, 4).long()},
            "logits must be float32, .* got torch.int64",
        ),
        ({"bins": Bins(1.0, 0.0)}, "bins.low must be below bins.high, both finite, got 1.0 and 0.0"),
        ({"bins": Bins(target="one_hot")}, "bins.target must be one of hl_gauss, two_hot, got 'one_hot'"),
        ({"bins": Bins(sigma=0.0)}, "bins.sigma must be finite and above 0, got 0.0"),
        ({"attention_mask": None}, "attention_mask must be a torch.Tensor, got NoneType"),
        ({"reduction": "mean"}, "reduction must be one of token_mean, sequence_mean, sum, none, got 'mean'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_argument_errors(changes, message):
    case = padded()
    arguments = {
        "logits": torch.zeros(5, 23, 4),
        "terminal_rewards": case.terminal_rewards,
        "attention_mask": case.loss_mask,
        "loss_mask": case.loss_mask,
    }
    with pytest.raises((ValueError, TypeError), match=message):
        compute_categorical_value_loss(**(arguments | changes))
