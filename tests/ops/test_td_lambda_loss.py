"""The general fused loss: every formula, reduction and option, padded and packed, forward and backward."""

import itertools
import math

import pytest
import torch
from ops_testing import ROUNDED_DTYPES, VALUE_DTYPES, leaf, make_batch, poisoned, rng
from td_lambda_testing import LENGTHS, lengths_with, packed, padded
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lambda_return_ext as lr
from lambda_return_ext import reference
from lambda_return_ext._registrations import LOSS_KINDS, REDUCTIONS

_ops = torch.ops.lambda_return

CLIPPED = ("mse", "huber", "smooth_l1")


def attention(case):
    return torch.rand(case.values.shape, generator=rng(9)) < 0.8


def outputs_for(loss, case):
    """The head's outputs: logits, probabilities or values, and old ones that clip some."""
    if loss == "bce_with_logits":
        return case.values * 6 - 3, None
    if loss == "bce":
        return case.values * 0.9 + 0.05, None
    old = case.values + torch.rand(case.values.shape, generator=rng(3)) - 0.5  # not randn, which differs by processor
    return case.values, old.to(case.values.dtype)


def loss_of(module, case, outputs, **options):
    """The loss by the package or by the reference, which have the same functions."""
    if case.cu_seqlens is None:
        return module.compute_lambda_value_loss(
            outputs, case.terminal_rewards, attention(case), case.loss_mask, case.gamma, case.lam, **options
        )
    # The packed form has one mask: the window is what attention leaves of it.
    return module.lambda_value_loss_varlen(
        outputs,
        case.terminal_rewards,
        case.cu_seqlens,
        case.loss_mask & attention(case),
        case.gamma,
        case.lam,
        output_mask=case.loss_mask,
        **options,
    )


def ours(case, outputs, **options):
    return loss_of(lr, case, outputs, **options)


def assert_equals_reference(case, outputs, tolerance, **options):
    x = leaf(outputs)
    result, statistics = ours(case, x, return_statistics=True, **options)
    y = leaf(outputs.double())
    exact, exact_statistics = loss_of(reference, case, y, return_statistics=True, **options)
    assert result.dtype == (torch.float64 if outputs.dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(result.double(), exact, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(statistics, exact_statistics, rtol=tolerance, atol=tolerance)
    weight = torch.rand(exact.shape, generator=rng(5), dtype=torch.float64)
    (grad,) = torch.autograd.grad(result, x, weight.to(result.dtype))
    (exact_grad,) = torch.autograd.grad(exact, y, weight)
    dtype = torch.finfo(outputs.dtype)
    if outputs.dtype not in (torch.float64, torch.float32):
        tolerance = dtype.eps
    scale = exact_grad.abs().max().clamp(min=1e-30)
    step = dtype.smallest_normal * dtype.eps  # of subnormal numbers, which float16 has among such gradients
    torch.testing.assert_close(
        grad.double() / scale, exact_grad / scale, rtol=tolerance, atol=(tolerance + step / scale).item()
    )
    assert (grad[~(case.loss_mask & attention(case))] == 0).all()


@pytest.mark.parametrize("where", ["padded", "packed"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", LOSS_KINDS)
def test_every_loss_and_reduction_equals_the_reference(loss, reduction, where):
    case = padded("empty_rows", T=40) if where == "padded" else packed()
    outputs, old_values = outputs_for(loss, case)
    for rewards, clip in itertools.product([None, case.rewards], [False, True]):
        options = {"loss": loss, "reduction": reduction, "rewards": rewards, "delta": 0.3}
        if loss.startswith("bce") and rewards is not None:
            continue  # targets beyond [0, 1]
        if clip and loss in CLIPPED:
            options |= {"old_values": old_values, "clip_range": 0.2}
        if not loss.startswith("bce"):
            options["bootstrap_values"] = case.bootstrap_values
        assert_equals_reference(case, outputs, 1e-12, **options)
        if reduction.endswith("_mean"):
            assert_equals_reference(case, outputs, 1e-12, **options, normalizer=torch.tensor(17.0))


@pytest.mark.parametrize("loss", LOSS_KINDS)
@pytest.mark.parametrize(("lengths", "dtype"), lengths_with(LENGTHS[1:], ROUNDED_DTYPES), ids=str)
def test_every_dtype_and_length(lengths, loss, dtype):
    case = packed(lengths, dtype)
    outputs, old_values = outputs_for(loss, case)
    options = {"old_values": old_values, "clip_range": 0.25} if loss in CLIPPED else {}
    assert_equals_reference(case, outputs, 2e-5, loss=loss, reduction="sequence_mean", **options)


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
def test_a_tie_of_clipped_and_unclipped_loss_has_the_gradient_of_the_unclipped(dtype):
    values = torch.tensor([[0.75]], dtype=dtype, requires_grad=True)  # 0.25 above R, and 0.25 held 0.25 below it
    ones = torch.ones(1, 1)
    loss = lr.compute_lambda_value_loss(
        values, torch.tensor([0.5]), ones, ones, old_values=torch.zeros(1, 1, dtype=dtype), clip_range=0.25
    )
    loss.backward()
    assert (loss.item(), values.grad.item()) == (0.0625, 0.5)


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
@pytest.mark.parametrize("lam", [0.0, 0.9, 1.0])
def test_the_defaults_as_tensors_are_the_plain_fused_loss(lam, dtype):
    batch = make_batch("conversation", 6, 1500, dtype)

    def run(*discounts):
        values = leaf(batch.values)
        loss = lr.compute_lambda_value_loss(values, *batch[1:], *discounts)
        return loss.detach(), *torch.autograd.grad(loss, values)

    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for general, plain in zip(
        run(torch.tensor(1.0), torch.tensor(lam, dtype=torch.float64)), run(1.0, lam), strict=True
    ):
        # A value next to a rounding boundary of a half may fall to either side of it.
        atol = torch.finfo(dtype).eps * plain.abs().max().item() if plain.dim() else 0
        torch.testing.assert_close(general, plain, rtol=tolerance, atol=max(atol, 1e-12))


def test_the_formulas_are_those_of_torch():
    # One token with no token after it: G = R, whatever lambda is.
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    mask = torch.ones(13, 1)
    rewards = torch.full((13,), 0.25, dtype=torch.float64)

    def tokens(outputs, **options):
        return lr.compute_lambda_value_loss(outputs[:, None], rewards, mask, mask, reduction="none", **options)[:, 0]

    functional = nn.functional
    torch.testing.assert_close(tokens(x), (x - rewards) ** 2)
    torch.testing.assert_close(
        tokens(x, loss="huber", delta=0.7), functional.huber_loss(x, rewards, reduction="none", delta=0.7)
    )
    torch.testing.assert_close(
        tokens(x, loss="smooth_l1", delta=0.7), functional.smooth_l1_loss(x, rewards, reduction="none", beta=0.7)
    )
    torch.testing.assert_close(
        tokens(x, loss="bce_with_logits"),
        functional.binary_cross_entropy_with_logits(x, rewards, reduction="none"),
    )
    p = torch.tensor([0.0, 1e-30, 0.3, 0.999, 1.0, *[0.5] * 8], dtype=torch.float64)
    torch.testing.assert_close(tokens(p, loss="bce"), functional.binary_cross_entropy(p, rewards, reduction="none"))
    extreme = torch.tensor([-1e4, 1e4, -800.0, 800.0, *[0.0] * 9], dtype=torch.float64)
    logits = leaf(extreme)
    losses = tokens(logits, loss="bce_with_logits")
    torch.testing.assert_close(torch.autograd.grad(losses.sum(), logits)[0], extreme.sigmoid() - rewards)
    assert losses.isfinite().all()
    # PPO: the larger of both losses, no gradient where the clipped one is larger and out of range.
    v, old = leaf(torch.tensor([[0.9], [0.1], [0.5]])), torch.tensor([[0.5], [0.5], [0.45]])
    loss, statistics = lr.compute_lambda_value_loss(
        v,
        torch.ones(3),
        mask[:3],
        mask[:3],
        old_values=old,
        clip_range=0.2,
        reduction="sum",
        return_statistics=True,
    )
    # 0.9 moved towards 1 by more than 0.2: the loss of 0.7 is larger and flat.
    torch.testing.assert_close(loss, torch.tensor((1 - 0.7) ** 2 + (1 - 0.1) ** 2 + (1 - 0.5) ** 2))
    torch.testing.assert_close(torch.autograd.grad(loss, v)[0], torch.tensor([[0.0], [-1.8], [-1.0]]))
    assert statistics[5] == 1


def test_a_window_of_the_output_keeps_its_true_end():
    case = padded("dense", B=3, T=30)
    window = torch.zeros(3, 30, dtype=torch.bool)
    window[:, 4:9] = True
    loss, statistics = lr.compute_lambda_value_loss(
        case.values,
        case.terminal_rewards,
        torch.ones(3, 30),
        window,
        1.0,
        0.9,
        output_mask=case.loss_mask,
        return_statistics=True,
    )
    targets = reference.compute_lambda_return(case.values, case.terminal_rewards, case.loss_mask, 1.0, 0.9)
    torch.testing.assert_close(loss, ((case.values - targets)[window] ** 2).mean())
    assert statistics[0] == window.sum()
    # Without it the terminal reward arrives at the end of the window.
    cut = lr.compute_lambda_value_loss(case.values, case.terminal_rewards, torch.ones(3, 30), window, 1.0, 0.9)
    assert abs(cut - loss) > 1e-3


@pytest.mark.parametrize("loss", LOSS_KINDS)
@pytest.mark.parametrize("where", ["padded", "packed"])
def test_nothing_at_a_masked_position_is_used(where, loss):
    case = padded() if where == "padded" else packed()
    outputs, old_values = outputs_for(loss, case)
    options = {"loss": loss, "rewards": case.rewards}
    if loss in CLIPPED:
        options |= {"old_values": old_values, "clip_range": 0.2}
    results = []
    for bad in (False, True):
        for detach in (True, False):
            if bad:
                for name in ("rewards", "old_values"):
                    if name in options:
                        options[name] = poisoned(options[name], case.loss_mask)
            x = leaf(poisoned(outputs, case.loss_mask) if bad else outputs)
            result, statistics = ours(case, x, **options, return_statistics=True, detach_targets=detach)
            results.append((result.detach(), statistics, *torch.autograd.grad(result, x)))
    for clean, bad in zip(results[:2], results[2:], strict=True):
        assert all(map(torch.equal, clean, bad))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(3, 7), (0, 7), (3, 0), (0, 0)])
def test_no_token_at_all_gives_0_and_no_gradient(shape, reduction):
    values = torch.full(shape, float("nan"), requires_grad=True)
    nothing = torch.zeros(shape)
    loss, statistics = lr.compute_lambda_value_loss(
        values, torch.ones(shape[0]), nothing, nothing, reduction=reduction, return_statistics=True
    )
    (grad,) = torch.autograd.grad(loss.sum(), values)
    assert all((x == 0).all() for x in (loss, grad, statistics))


def test_a_rank_without_tokens_adds_0_to_the_sum_over_ranks():
    case = padded(B=4)
    whole = lr.compute_lambda_value_loss(*case[:2], case.loss_mask, case.loss_mask, loss="huber")
    count = case.loss_mask.sum()
    parts = [case._replace(loss_mask=case.loss_mask & (torch.arange(4) < 3)[:, None])]
    parts.append(case._replace(loss_mask=case.loss_mask & (torch.arange(4) >= 3)[:, None]))
    parts.append(case._replace(loss_mask=torch.zeros_like(case.loss_mask)))
    losses = [
        lr.compute_lambda_value_loss(*p[:2], p.loss_mask, p.loss_mask, loss="huber", normalizer=count) for p in parts
    ]
    torch.testing.assert_close(sum(losses), whole)
    assert losses[2] == 0
    nothing = torch.zeros((), dtype=torch.int64)
    assert lr.compute_lambda_value_loss(*case[:2], case.loss_mask, case.loss_mask, normalizer=nothing) == 0


def test_explained_variance_is_exact_after_one_sum():
    case = padded(B=8, T=64)
    _, whole = ours(case, case.values, return_statistics=True)
    parts = []
    for rows in (slice(0, 3), slice(3, 8)):
        part = case._replace(**{name: getattr(case, name)[rows] for name in case._fields[:7]})
        _, statistics = lr.compute_lambda_value_loss(
            part.values,
            part.terminal_rewards,
            attention(case)[rows],
            part.loss_mask,
            part.gamma,
            part.lam,
            return_statistics=True,
        )
        parts.append(statistics)
    torch.testing.assert_close(sum(parts), whole, rtol=1e-13, atol=1e-13)
    counts = case.loss_mask & attention(case)
    targets = reference.compute_lambda_return(case.values, *case[1:5])[counts]
    errors = targets - case.values[counts]
    expected = 1 - errors.var(correction=0) / targets.var(correction=0)
    torch.testing.assert_close(lr.explained_variance(sum(parts)), expected)
    assert lr.explained_variance(torch.zeros(6)).isnan()


@pytest.mark.parametrize("shape", [(1, 7), (1, 100), (3, 1000), (2, 16384), (512, 4096)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("detach", [True, False])
def test_explained_variance_is_nan_where_the_targets_do_not_vary(shape, dtype, detach):
    # Sums of 0.1, which no float holds, are off by up to 135 units in the last place.
    values = torch.rand(shape, generator=rng(), dtype=dtype)
    mask = torch.ones(shape, dtype=torch.bool)
    rewards = torch.full(shape[:1], 0.1, dtype=torch.float64)

    def explained_variance():
        options = {"gamma": 1.0, "lam": 1.0, "return_statistics": True, "detach_targets": detach}
        return lr.explained_variance(lr.compute_lambda_value_loss(values, rewards, mask, mask, **options)[1])

    assert explained_variance().isnan()
    if shape[0] > 1:  # and a number where they do, if only by 4e-5
        rewards[0] = 0.100004
        targets = rewards.to(dtype).double()[:, None].expand(shape)
        expected = 1 - (targets - values).var(correction=0) / targets.var(correction=0)
        torch.testing.assert_close(explained_variance(), expected, rtol=0.05, atol=0)


@pytest.mark.parametrize("loss", LOSS_KINDS)
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "none"])
@pytest.mark.parametrize("where", ["padded", "packed"])
def test_the_full_gradient_flows_through_the_targets(where, reduction, loss):
    case = padded(B=3, T=5) if where == "padded" else packed((4, 0, 3, 5))
    case = case._replace(values=case.values * 0.8 + 0.1)
    outputs, old_values = outputs_for(loss, case)
    options = {"old_values": old_values, "clip_range": 0.3} if loss in CLIPPED else {}

    def function(x):
        return ours(case, x, loss=loss, reduction=reduction, detach_targets=False, delta=0.4, **options)

    x = leaf(outputs)
    torch.testing.assert_close(function(x), ours(case, x, loss=loss, reduction=reduction, delta=0.4, **options))
    torch.autograd.gradcheck(function, x)
    torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("loss", CLIPPED)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("where", ["padded", "packed"])
def test_the_fused_full_gradient_reaches_every_input(where, reduction, loss):
    """Of values, rewards and terminal rewards, first from the kernels and then, for the second, from torch."""
    case = padded(B=3, T=5) if where == "padded" else packed((4, 0, 3, 5))
    normalizer = torch.tensor(7.0) if reduction.endswith("_mean") else None

    def function(values, terminal_rewards, rewards):
        arguments = case._replace(values=values, terminal_rewards=terminal_rewards)
        options = {"loss": loss, "reduction": reduction, "delta": 0.4, "normalizer": normalizer}
        return ours(arguments, values, **options, rewards=rewards, detach_targets=False)

    inputs = leaf(case.values), leaf(case.terminal_rewards), leaf(case.rewards.double())
    torch.autograd.gradcheck(function, inputs)
    torch.autograd.gradgradcheck(function, inputs)
    x = inputs[0]
    torch.autograd.gradcheck(lambda x: function(x, inputs[1].detach(), x), x)  # one tensor in two places
    torch.autograd.gradgradcheck(lambda x: function(x, inputs[1].detach(), x), x)
    for i in range(3):  # each without the others
        alone = [x if i == j else x.detach() for j, x in enumerate(inputs)]
        together = torch.autograd.grad(function(*inputs).sum(), inputs)[i]
        assert torch.equal(torch.autograd.grad(function(*alone).sum(), inputs[i])[0], together)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", CLIPPED)
def test_the_fused_full_gradient_is_that_of_torch_operations(loss, dtype):
    """Those are taken where the gradient is to have one."""
    case = padded(dtype=dtype)
    x = leaf(case.values)
    result, statistics = ours(case, x, loss=loss, detach_targets=False, return_statistics=True)
    assert not statistics.requires_grad
    fused = torch.autograd.grad(result, x, retain_graph=True)[0]
    composed = torch.autograd.grad(result, x, create_graph=True)[0]
    assert composed.requires_grad
    assert not fused.requires_grad
    torch.testing.assert_close(fused, composed.detach())


@pytest.mark.parametrize("loss", ["huber", "bce_with_logits"])
def test_the_full_gradient_is_the_same_under_transforms(loss):
    case = padded()
    outputs = outputs_for(loss, case)[0]
    arguments = case.terminal_rewards, attention(case), case.loss_mask, case.gamma, case.lam

    def function(x):
        return lr.compute_lambda_value_loss(x, *arguments, loss=loss, detach_targets=False)

    def gradient(f):
        x = leaf(outputs)
        return torch.autograd.grad(f(x), x)[0]

    expected = gradient(function)
    torch.testing.assert_close(gradient(torch.compile(function, fullgraph=True, backend="aot_eager")), expected)
    torch.testing.assert_close(torch.func.grad(function)(outputs), expected)
    batched = torch.vmap(torch.func.grad(function))(torch.stack([outputs, outputs]))
    torch.testing.assert_close(batched, torch.stack([expected, expected]))


@pytest.mark.parametrize("clip_range", [0.3, 10.0])
@pytest.mark.parametrize("loss", CLIPPED)
def test_the_statistics_do_not_depend_on_the_gradient_through_the_targets(loss, clip_range):
    """Nor does what is clipped: old + (V - old) rounds, in float32, also where V is within the range of old."""
    shape = (4, 4096)
    values, old_values = torch.rand(shape, generator=rng(1)), torch.rand(shape, generator=rng(2))
    mask = torch.rand(shape, generator=rng(3)) < 0.7
    options = {"loss": loss, "old_values": old_values, "clip_range": clip_range, "return_statistics": True}
    rewards = torch.rand(4, generator=rng(4))
    fused, unfused = (
        lr.compute_lambda_value_loss(values, rewards, mask, mask, detach_targets=detach, **options)
        for detach in (True, False)
    )
    torch.testing.assert_close(fused[0], unfused[0])
    assert fused[1][5] == unfused[1][5]
    assert (fused[1][5] > 0) == (clip_range < 1)
    torch.testing.assert_close(fused[1], unfused[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss", LOSS_KINDS)
def test_the_full_gradient_adds_nothing_up_in_any_order(loss):
    """On a device such an operator is a float atomicAdd, so that the bits would differ from run to run."""
    called = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    case = packed()
    x = leaf(case.values * 0.8 + 0.1)
    with Record():
        result = ours(case, x, loss=loss, reduction="sequence_mean", detach_targets=False)
        (grad,) = torch.autograd.grad(result, x, create_graph=True)
        grad.sum().backward()
    assert "td_lambda_backward" in called
    for name in ("index_add", "index_put", "scatter_add", "scatter_reduce", "segment_reduce", "put", "bincount"):
        assert not any(function.strip("_").startswith(name) for function in called)


@pytest.mark.parametrize("detach_targets", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_bounds_of_a_probability(dtype, detach_targets):
    # One token: G = R. Logarithms end at -100 and the derivative at 1e12, and beyond the bounds there is no loss.
    outputs = leaf(torch.tensor([[0.0, 1e-30, 1.0, 1.0, -0.5, 1.5, torch.nan]], dtype=dtype).T)
    rewards = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0], dtype=dtype)
    mask = torch.ones(7, 1)
    options = {"loss": "bce", "reduction": "none", "detach_targets": detach_targets}
    losses = lr.compute_lambda_value_loss(outputs, rewards, mask, mask, **options)[:, 0]
    expected = torch.tensor([100.0, 30 * math.log(10), 0.0, 100.0, *[torch.nan] * 3], dtype=dtype)
    torch.testing.assert_close(losses, expected, equal_nan=True)
    (grad,) = torch.autograd.grad(losses[:4].sum(), outputs)
    torch.testing.assert_close(grad[:4, 0], torch.tensor([-1e12, -1e12, 0.0, 1e12], dtype=dtype))


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.cuda,
                pytest.mark.skipif(
                    not (torch.cuda.is_available() and lr._cuda.available),
                    reason="needs a CUDA device and the CUDA kernels",
                ),
            ],
        ),
    ],
)
@pytest.mark.parametrize("loss", LOSS_KINDS)
def test_autocast_changes_nothing(loss, device):
    case = padded(dtype=torch.float32)
    arguments = [x.to(device) for x in (outputs_for(loss, case)[0], *case[1:3], case.loss_mask)]
    options = {"loss": loss, "detach_targets": False}
    outside = lr.compute_lambda_value_loss(*arguments, **options)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(lr.compute_lambda_value_loss(*arguments, **options), outside)


@pytest.mark.parametrize("loss", ["mse", "bce_with_logits"])
@pytest.mark.parametrize("where", ["padded", "packed"])
def test_opcheck(where, loss):
    case = padded(dtype=torch.float32) if where == "padded" else packed(dtype=torch.float32)
    arguments = (
        case.terminal_rewards,
        case.loss_mask,
        attention(case),
        case.rewards,
        case.values if loss == "mse" else None,
        case.cu_seqlens,
        case.gamma,
        case.lam,
    )
    options = (LOSS_KINDS.index(loss), 1.0, 0.2 if loss == "mse" else 0.0)
    for reduction in (0, 3):
        torch.library.opcheck(
            _ops.td_lambda_loss.default, (leaf(case.values), *arguments, torch.tensor(9.0), *options, reduction)
        )
        grad = torch.ones(case.values.shape if reduction == 3 else ())
        torch.library.opcheck(
            _ops.td_lambda_loss_backward.default,
            (grad, torch.ones(5), case.values, *arguments, *options, reduction),
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "l2"}, "loss must be one of mse, huber, smooth_l1, bce, bce_with_logits, got 'l2'"),
        ({"reduction": "mean"}, "reduction must be one of token_mean, sequence_mean, sum, none, got 'mean'"),
        ({"loss": "huber", "delta": 0.0}, "delta must be finite and above 0, got 0.0"),
        ({"loss": "huber", "delta": "1"}, "delta must be a float, got str"),
        ({"clip_range": 0.2}, "old_values must be given with clip_range, got None"),
        ({"old_values": torch.zeros(5, 23)}, "clip_range must be given with old_values, got None"),
        (
            {"old_values": torch.zeros(5, 23).double(), "clip_range": -1.0},
            "clip_range must be finite and above 0, got -1.0",
        ),
        ({"old_values": torch.zeros(5, 2), "clip_range": 1.0}, "old_values must have the shape of the values"),
        (
            {"old_values": torch.zeros(5, 23).half(), "clip_range": 1.0},
            "old_values must have the dtype of the values, torch.float64, got torch.float16",
        ),
        (
            {"loss": "bce", "old_values": torch.zeros(5, 23), "clip_range": 1.0},
            "old_values must be None with loss 'bce'",
        ),
        ({"normalizer": torch.tensor(1.0), "reduction": "sum"}, "normalizer must be None with reduction 'sum'"),
        ({"normalizer": torch.ones(5)}, r"normalizer must be real and 0-dim, got torch.float32 \[5\]"),
        ({"output_mask": torch.ones(5, 22)}, "output_mask must have the shape of the values"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
)
def test_argument_errors(options, message):
    case = padded()
    with pytest.raises((ValueError, TypeError), match=message):
        ours(case, case.values, **options)
