"""Value learning as classification: HL-Gauss and two-hot targets."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_testing import PROPERTY, batches, leaf, rng, unit_floats
from td_lambda_testing import packed, padded

from lambda_return_ext import compute_lambda_return, reference
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


@PROPERTY
@given(
    batch=batches(),
    gamma=unit_floats,
    lam=unit_floats,
    K=st.integers(2, 70),
    kind=st.sampled_from(["hl_gauss", "two_hot"]),
    sigma=st.floats(0.1, 10),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
)
def test_any_mask_discount_and_bins(batch, gamma, lam, K, kind, sigma, scale):
    bins, mask, attention = Bins(-0.25, 1.25, kind, sigma), batch.loss_mask != 0, batch.attention_mask != 0
    logits = scale * torch.randn(*mask.shape, K, generator=rng(K), dtype=torch.float64)
    x, y = leaf(logits.masked_fill(~mask[..., None], math.nan)), leaf(logits)
    arguments = (batch.rewards.double(), batch.attention_mask, batch.loss_mask, gamma, lam)
    loss = compute_categorical_value_loss(x, *arguments, bins=bins, reduction="sum")
    targets = reference.compute_lambda_return(categorical_values(logits, bins), arguments[0], mask, gamma, lam)
    counts = mask & attention
    expected = -(bins.probabilities(targets, K) * y.log_softmax(-1)).sum(-1)[counts].sum()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(expected, y), rtol=1e-9, atol=1e-11)


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


# ---- the operator ------------------------------------------------------------------------------------------------


def example(case, K=11, dtype=torch.float64, bins=BINS[0]):
    """The logits and the loss of a case as a function of them."""
    logits = torch.randn(*case.values.shape, K, generator=rng(5), dtype=torch.float64).to(dtype)
    layout = {} if case.cu_seqlens is None else {"cu_seqlens": case.cu_seqlens}

    def loss(x, **changes):
        arguments = (case.terminal_rewards, case.loss_mask, case.loss_mask, case.gamma, case.lam)
        return compute_categorical_value_loss(x, *arguments, **{**case.options, **layout, "bins": bins, **changes})

    return logits, loss


@pytest.mark.parametrize("reduction", ["token_mean", "none"])
@pytest.mark.parametrize("bins", BINS, ids=str)
def test_gradcheck_where_no_target_depends_on_a_value(bins, reduction):
    case = padded(B=2, T=4)
    logits, loss = example(case._replace(lam=torch.ones(2, dtype=torch.float64)), K=5, bins=bins)
    assert torch.autograd.gradcheck(lambda x: loss(x, reduction=reduction), leaf(logits))


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("reduction", range(4))
@pytest.mark.parametrize("where", ["padded", "packed"])
def test_opcheck(where, reduction, kind):
    case = padded(B=2, T=5) if where == "padded" else packed((3, 0, 4))
    logits = leaf(torch.randn(*case.values.shape, 6, generator=rng(), dtype=torch.float64))
    scan = (case.terminal_rewards, case.loss_mask, None, case.rewards, case.cu_seqlens, case.gamma, case.lam)
    options = (kind, -0.5, 1.5, 0.75, reduction)
    ops = torch.ops.lambda_return
    torch.library.opcheck(ops.categorical_value_loss.default, (logits, *scan, None, *options))
    loss, scale, _statistics, returns, log_sums = ops.categorical_value_loss(logits.detach(), *scan, None, *options)
    arguments = (torch.ones_like(loss), scale, logits.detach(), returns, log_sums, case.cu_seqlens, *options)
    torch.library.opcheck(ops.categorical_value_loss_backward.default, arguments)


def test_compiled_with_dynamic_shapes_and_a_changing_lambda_it_is_compiled_once():
    torch._dynamo.reset()

    def step(logits, rewards, mask, lam):
        return compute_categorical_value_loss(logits, rewards, mask, mask, 1.0, lam)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for i, (B, T) in enumerate([(3, 17), (4, 9), (2, 30)]):
        case, lam = padded(B=B, T=T), torch.tensor(0.9 - 0.1 * i)
        logits = torch.randn(B, T, 8, generator=rng(i), dtype=torch.float64)
        arguments = (case.terminal_rewards, case.loss_mask, lam)
        x, y = leaf(logits), leaf(logits)
        expected = step(x, *arguments)
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            found = compiled(y, *arguments)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, y), torch.autograd.grad(expected, x))


def test_vmap_and_torch_func_grad():
    case = padded(B=2, T=6)
    mask, rewards = case.loss_mask, case.terminal_rewards
    logits = torch.randn(3, 2, 6, 5, generator=rng(), dtype=torch.float64)

    def loss(x):
        return compute_categorical_value_loss(x, rewards, mask, mask, 1.0, torch.tensor(0.9))

    found = torch.func.vmap(torch.func.grad(loss))(logits)
    expected = [torch.autograd.grad(loss(x), x)[0] for x in map(leaf, logits)]
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("layout", ["shifted", "transposed", "strided bins"])
def test_any_layout_of_the_logits(layout):
    case = padded(B=3, T=9)
    logits, loss = example(case)
    views = {
        "shifted": torch.cat([torch.full_like(logits[:, :1], math.nan), logits], 1)[:, 1:],
        "transposed": logits.transpose(0, 1).contiguous().transpose(0, 1),
        "strided bins": torch.stack([logits, torch.full_like(logits, math.nan)], -1)[..., 0],
    }
    x, y = leaf(logits), views[layout].requires_grad_()
    assert torch.equal(loss(y), loss(x))
    assert torch.equal(torch.autograd.grad(loss(y), y)[0], torch.autograd.grad(loss(x), x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bins", BINS, ids=str)
def test_the_fused_loss_is_as_exact_as_torch_in_that_dtype(bins, dtype):
    case = padded(B=4, T=300)
    logits, loss = example(case, K=51, dtype=dtype, bins=bins)
    exact = leaf(logits.double())
    reference_loss = loss(exact)
    (reference_grad,) = torch.autograd.grad(reference_loss, exact)
    x, y = leaf(logits), leaf(logits)
    targets = case.returns(compute_lambda_return, values=categorical_values(logits, bins))
    losses = -(bins.probabilities(targets, 51) * y.float().log_softmax(-1)).sum(-1)
    plain = losses[case.loss_mask].mean()
    fused = loss(x)
    (grad,), (plain_grad,) = torch.autograd.grad(fused, x), torch.autograd.grad(plain, y)
    ulp = torch.finfo(torch.float32).eps
    assert (fused - reference_loss).abs() <= 2 * (plain - reference_loss).abs() + ulp * reference_loss
    error, plain_error = ((g.double() - reference_grad).abs().max() for g in (grad, plain_grad))
    assert error <= 2 * plain_error


def test_the_statistics_are_those_of_the_values():
    case = padded(B=3, T=40)
    logits, loss = example(case)
    _loss, statistics = loss(logits, return_statistics=True)
    values = categorical_values(logits)
    targets = case.returns(reference.compute_lambda_return, values=values, rewards=case.rewards.double())
    expected = reference.token_statistics(values, targets, case.loss_mask)
    torch.testing.assert_close(statistics, expected)


def test_long_and_packed_rows_have_the_same_bits_for_any_number_of_threads():
    case = packed((16384, 5, 0, 40000), torch.float32)
    logits, loss = example(case, K=7, dtype=torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            x = leaf(logits)
            value = loss(x, reduction="sequence_mean")
            results.append((value.detach(), torch.autograd.grad(value, x)[0]))
    finally:
        torch.set_num_threads(threads)
    for value, grad in results[1:]:
        assert torch.equal(value, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_extreme_logits():
    """A bin ruled out by -inf, and logits that overflow without the maximum taken out."""
    case = padded("dense", B=1, T=3)
    rows = torch.tensor([[-math.inf, 0.0, 1.0, 2.0], [500.0, -500.0, 0.0, 3.0], [1e4, 1e4, 0.0, 0.0]])
    rewards, mask, bins = torch.tensor([1.0]), case.loss_mask, Bins(0.0, 1.0, "two_hot")
    x, y = leaf(rows[None]), leaf(rows[None].double())
    found, expected = (compute_categorical_value_loss(z, rewards, mask, mask, bins=bins, lam=1.0) for z in (x, y))
    torch.testing.assert_close(found.double(), expected)
    q = torch.tensor([0.0, 0.0, 0.0, 1.0])
    last = torch.tensor([3, 3, 3])  # by index: with probabilities torch multiplies the -inf by 0
    torch.testing.assert_close(expected, torch.nn.functional.cross_entropy(rows.double(), last))
    torch.testing.assert_close(torch.autograd.grad(found, x)[0], (rows.softmax(-1) - q)[None] / 3)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_no_token(shape):
    logits = torch.zeros(*shape, 4, requires_grad=True)
    mask = torch.ones(shape, dtype=torch.bool)
    loss = compute_categorical_value_loss(logits, torch.zeros(shape[0]), mask, mask)
    assert loss == 0
    assert torch.autograd.grad(loss, logits)[0].shape == logits.shape


def test_a_row_without_a_token_that_counts_is_nothing():
    logits = torch.full((2, 3, 4), math.nan, requires_grad=True)
    nothing = torch.zeros(2, 3)
    loss = compute_categorical_value_loss(logits, torch.zeros(2), nothing, nothing)
    assert loss == 0
    assert (torch.autograd.grad(loss, logits)[0] == 0).all()


def test_a_nan_that_is_used_is_not_hidden():
    logits = torch.zeros(1, 3, 4)
    logits[0, 2, 1] = math.nan
    mask = torch.ones(1, 3)
    losses = compute_categorical_value_loss(logits, torch.ones(1), mask, mask, reduction="none", lam=0.5)
    assert losses.isnan().all()  # of the last token itself, and of those whose targets lean on it


def test_autocast_leaves_it_in_float32():
    case = padded(dtype=torch.float32)
    logits = torch.randn(*case.values.shape, 6, generator=rng()).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = compute_categorical_value_loss(logits, case.terminal_rewards, case.loss_mask, case.loss_mask)
    assert loss.dtype == torch.float32


def test_autocast_rounds_no_value():
    logits = torch.randn(4, 51, generator=rng())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = categorical_values(logits)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, categorical_values(logits.double()).float())


# Each way to lay out tokens meets each reduction and each kind of bins; all three in all ways are for `make test-all`.
@pytest.mark.parametrize(
    ("where", "bins", "reduction"),
    [
        pytest.param(where, bins, reduction, marks=pytest.mark.exhaustive if (i + j + k) % 3 else ())
        for i, where in enumerate(["padded", "packed"])
        for j, bins in enumerate(BINS)
        for k, reduction in enumerate(["token_mean", "sequence_mean", "sum", "none"])
    ],
    ids=str,
)
def test_the_full_gradient_flows_through_the_targets(where, bins, reduction):
    case = padded(B=2, T=5) if where == "padded" else packed((3, 0, 4))
    logits = torch.randn(*case.values.shape, 5, generator=rng(2), dtype=torch.float64)
    layout = {} if case.cu_seqlens is None else {"cu_seqlens": case.cu_seqlens}
    arguments = (case.terminal_rewards, case.loss_mask, case.loss_mask, case.gamma, case.lam)
    options = {**case.options, **layout, "bins": bins, "reduction": reduction}

    def loss(x, **changes):
        return compute_categorical_value_loss(x, *arguments, **{**options, **changes})

    def full(x):
        return loss(x, detach_targets=False)

    fused, statistics = loss(logits, return_statistics=True)
    unfused, others = loss(logits, return_statistics=True, detach_targets=False)
    torch.testing.assert_close(unfused, fused)
    torch.testing.assert_close(others, statistics)
    assert torch.autograd.gradcheck(full, leaf(logits))
    assert torch.autograd.gradgradcheck(full, leaf(logits))
    x = leaf(logits)
    (detached,) = torch.autograd.grad(loss(x).sum(), x)
    (whole,) = torch.autograd.grad(full(x).sum(), x)
    assert not torch.allclose(detached, whole)
    x = torch.where((case.loss_mask != 0)[..., None], logits, torch.nan).requires_grad_()
    assert torch.autograd.grad(full(x).sum(), x)[0].isfinite().all()


def test_there_is_no_second_derivative():
    case = padded(B=1, T=4)
    logits, loss = example(case, K=3)
    x = leaf(logits)
    (grad,) = torch.autograd.grad(loss(x), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="categorical_value_loss_backward: the fused loss has no second"):
        torch.autograd.grad(grad.sum(), x)
