"""The general return: per-step rewards, discounts as tensors, packed sequences, advantages, maps of chunks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_testing import (
    DISCOUNTS,
    MASK_KINDS,
    PROPERTY,
    ROUNDED_DTYPES,
    VALUE_DTYPES,
    assert_rounded,
    leaf,
    make_batch,
    make_grad,
    make_mask,
    poisoned,
    rng,
)
from td_lambda_testing import LENGTHS, lengths_with, packed, padded

import lambda_return_ext as lr
from lambda_return_ext import reference

_ops = torch.ops.lambda_return


def same_shape(case):
    return lr.compute_lambda_return if case.cu_seqlens is None else lr.lambda_return_varlen


def assert_close(ours, exact, units=16):
    """To a few units in the last place of values of order 1, or of the accumulation rounded to a half."""
    eps = torch.finfo(torch.float64 if ours.dtype == torch.float64 else torch.float32).eps
    if ours.dtype in (torch.bfloat16, torch.float16):
        exact = exact.to(ours.dtype).double()
        eps = torch.finfo(ours.dtype).eps / units
    torch.testing.assert_close(ours.double(), exact, rtol=units * eps, atol=units * eps)


# ---- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
@pytest.mark.parametrize("kind", MASK_KINDS)
def test_padded_equals_the_reference(kind, dtype):
    case = padded(kind, dtype=dtype)
    assert_close(case.returns(lr.compute_lambda_return), case.returns())


@pytest.mark.parametrize(("lengths", "dtype"), lengths_with(LENGTHS, VALUE_DTYPES), ids=str)
def test_packed_equals_the_reference(lengths, dtype):
    case = packed(lengths, dtype)
    ours = case.returns(lr.lambda_return_varlen)
    assert_close(ours, case.returns(), 64)
    assert torch.equal(ours, case.returns(lr.lambda_return_varlen, cu_seqlens=case.cu_seqlens.int()))


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_packed_equals_padded_to_4_ulp(lengths):
    case = packed(lengths)
    bounds = list(zip(case.cu_seqlens[:-1].tolist(), case.cu_seqlens[1:].tolist(), strict=True))

    def pad(x):
        return torch.nn.utils.rnn.pad_sequence([x[begin:end] for begin, end in bounds], batch_first=True)

    in_rows = case._replace(
        values=pad(case.values), loss_mask=pad(case.loss_mask), rewards=pad(case.rewards), cu_seqlens=None
    ).returns(lr.compute_lambda_return)
    ours = case.returns(lr.lambda_return_varlen)
    for b, (begin, end) in enumerate(bounds):
        ulp = torch.finfo(torch.float64).eps * in_rows[b, : end - begin].abs()
        assert ((ours[begin:end] - in_rows[b, : end - begin]).abs() <= 4 * ulp).all()


@pytest.mark.parametrize(("gamma", "lam"), [(0.999, 0.999), (1.0, 0.95)])
def test_packed_equals_padded_to_4_ulp_of_the_largest_return(gamma, lam):
    # Values of both signs cancel: a return near 0 has the error of the numbers it is the sum of.
    lengths = (1500, 1700, 2300, 900)
    values = torch.randn(sum(lengths), generator=rng(), dtype=torch.float64)
    terminal_rewards = torch.randn(4, generator=rng(1), dtype=torch.float64)
    mask = make_mask("gaps", 1, sum(lengths))[0]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    ours = lr.lambda_return_varlen(values, terminal_rewards, cu_seqlens, mask, gamma, lam)

    def pad(x):
        return torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True)

    rows = (pad(values), terminal_rewards, pad(mask), gamma, lam)
    for rewards in (None, torch.zeros(4, 2300)):  # the plain operator, and the general one
        in_rows = lr.compute_lambda_return(*rows, rewards=rewards)
        ulp = torch.finfo(torch.float64).eps * max(1.0, in_rows.abs().max().item())
        unpadded = torch.cat([row[:length] for row, length in zip(in_rows, lengths, strict=True)])
        torch.testing.assert_close(ours, unpadded, rtol=0, atol=4 * ulp)


@pytest.mark.parametrize(("gamma", "lam"), DISCOUNTS)
@pytest.mark.parametrize("dtype", VALUE_DTYPES)
def test_a_tensor_says_the_same_as_a_float(dtype, gamma, lam):
    batch = make_batch("gaps", 4, 2100, dtype)
    expected = lr.compute_lambda_return(batch.values, batch.rewards, batch.loss_mask, gamma, lam)
    for shape in [(), (4,)]:
        as_tensors = torch.full(shape, gamma, dtype=torch.float64), torch.full(shape, lam, dtype=torch.float64)
        ours = lr.compute_lambda_return(batch.values, batch.rewards, batch.loss_mask, *as_tensors)
        assert_close(ours, expected.double())
    mixed = lr.compute_lambda_return(batch.values, batch.rewards, batch.loss_mask, gamma, as_tensors[1])
    assert torch.equal(mixed, ours)


@pytest.mark.parametrize("dtype", ROUNDED_DTYPES)
def test_a_length_adaptive_lambda_is_accumulated_in_float32(dtype):
    # Whoever keeps the recurrence in bfloat16 is off by up to 0.27 here.
    lengths = torch.tensor([64, 512, 4096])
    lam = 1 - 1 / (0.05 * lengths)
    mask = torch.arange(4096) < lengths[:, None]
    values = torch.rand(3, 4096, generator=rng()).to(dtype)
    ours = lr.compute_lambda_return(values, torch.ones(3), mask, 1.0, lam)
    exact = reference.compute_lambda_return(values.double(), torch.ones(3), mask, 1.0, lam.double())
    if dtype == torch.float32:
        assert (ours.double() - exact).abs().max() <= 1e-6
    else:
        assert_rounded(ours, exact)


def test_a_bootstrap_value_is_a_discounted_value_after_the_end():
    values = torch.rand(1, 8, generator=rng(), dtype=torch.float64)
    mask = torch.ones(1, 8, dtype=torch.bool)
    whole = lr.compute_lambda_return(values, torch.zeros(1), mask, 0.9, 0.0)
    cut = lr.compute_lambda_return(
        values[:, :5], torch.zeros(1), mask[:, :5], 0.9, 0.0, bootstrap_values=values[:, 5].float().double()
    )
    torch.testing.assert_close(cut, whole[:, :5], rtol=0, atol=1e-7)


@pytest.mark.parametrize("where", ["padded", "packed"])
@pytest.mark.parametrize("dtype", VALUE_DTYPES)
def test_nothing_at_a_masked_position_is_used(where, dtype):
    case = padded(dtype=dtype) if where == "padded" else packed(LENGTHS[1], dtype)
    mask = case.loss_mask
    bad = case._replace(values=poisoned(case.values, mask), rewards=poisoned(case.rewards, mask))
    assert torch.equal(bad.returns(same_shape(case)), case.returns(same_shape(case)))
    assert torch.equal(lr.gae(*bad[:5], **bad.options, cu_seqlens=case.cu_seqlens)[~mask], case.values[~mask] * 0)


def test_monte_carlo_never_reads_the_values():
    case = padded(dtype=torch.float32)._replace(lam=torch.tensor(1.0))
    bad = case._replace(values=torch.full_like(case.values, float("inf")))
    assert torch.equal(bad.returns(lr.compute_lambda_return), case.returns(lr.compute_lambda_return))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("gamma", [0.0, torch.tensor([0.0, 0.0, 0.5])], ids=["float", "tensor"])
@pytest.mark.parametrize("where", ["padded", "packed"])
def test_a_discount_of_0_never_reads_the_bootstrap_value(where, gamma, bad):
    case = padded(B=3) if where == "padded" else packed((4, 9, 3))
    case = case._replace(gamma=gamma, bootstrap_values=torch.tensor([bad, bad, 0.25]))
    good = case._replace(bootstrap_values=torch.tensor([7.0, 8.0, 0.25]))
    bootstrap = leaf(case.bootstrap_values)
    returns = case.returns(same_shape(case), bootstrap_values=bootstrap)
    assert torch.equal(returns, good.returns(same_shape(case)))
    assert torch.equal(case.returns(), good.returns())  # the reference, too
    (grad,) = torch.autograd.grad(returns.sum(), bootstrap)
    assert (grad[:2] == 0).all()
    assert grad[2].isfinite()


@pytest.mark.parametrize("lengths", [(100_000,), (1, 40_000, 0, 70_000, 3)], ids=str)
def test_the_same_bits_for_every_number_of_threads(lengths):
    case = packed(lengths, torch.float32)
    weight = torch.randn(case.values.shape, generator=rng())

    def run():
        values = leaf(case.values)
        returns = case.returns(lr.lambda_return_varlen, values=values)
        loss = lr.lambda_value_loss_varlen(values, case.terminal_rewards, case.cu_seqlens, case.loss_mask, 1.0, 0.9)
        return returns, *torch.autograd.grad((returns * weight).sum() + loss, values)

    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@PROPERTY
@given(st.data())
def test_any_packing_equals_the_reference(data):
    lengths = tuple(data.draw(st.lists(st.integers(0, 40), max_size=6)))
    case = packed(lengths, data.draw(st.sampled_from(VALUE_DTYPES)))
    if data.draw(st.booleans()):
        case = case._replace(loss_mask=None)
    assert_close(case.returns(lr.lambda_return_varlen), case.returns())


@pytest.mark.parametrize("layout", ["every_other", "expanded"])
def test_strided_inputs(layout):
    case = packed((5, 9, 2))
    if layout == "every_other":
        values = torch.stack([case.values, case.values * float("nan")], 1)[:, 0]
        rewards = torch.stack([case.rewards] * 2, 1)[:, 1]
        changed = case._replace(values=values, rewards=rewards)
    else:
        case = case._replace(gamma=torch.tensor([0.5]).expand(3), lam=torch.tensor([0.25]).expand(3))
        changed = case
    assert torch.equal(changed.returns(lr.lambda_return_varlen), case.returns(lr.lambda_return_varlen))
    assert_close(changed.returns(lr.lambda_return_varlen), case.returns())


# ---- advantages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [padded(), packed()], ids=["padded", "packed"])
def test_gae_is_the_sum_of_td_errors(case):
    options = {**case.options, "cu_seqlens": case.cu_seqlens}
    advantages = lr.gae(*case[:5], **options)
    assert_close(advantages, reference.gae(*case[:5], **options))
    assert_close(lr.gae(*case[:5], **options, whiten=True), reference.gae(*case[:5], **options, whiten=True), 64)
    if case.cu_seqlens is None:  # equation 16 of the paper, term by term
        b = 3
        valid = case.loss_mask[b].nonzero()[:, 0].tolist()
        gamma, lam = case.gamma[b], case.lam[b]
        after = [*(case.values[b, t] for t in valid[1:]), case.bootstrap_values[b]]
        deltas = [case.rewards[b, t] + gamma * v - case.values[b, t] for t, v in zip(valid, after, strict=True)]
        deltas[-1] = deltas[-1] + case.terminal_rewards[b]
        for i, t in enumerate(valid):
            total = sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[i:]))
            torch.testing.assert_close(advantages[b, t], total, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
@pytest.mark.parametrize("where", ["padded", "packed"])
def test_both_at_once_are_the_two_of_them(where, dtype):
    case = padded(dtype=dtype) if where == "padded" else packed(dtype=dtype)
    second = torch.rand(5, generator=rng(), dtype=torch.float64)
    both = lr.returns_and_advantages(
        leaf(case.values), *case[1:4], case.lam, second, **case.options, cu_seqlens=case.cu_seqlens
    )
    assert torch.equal(both[0], case.returns(same_shape(case)))
    assert torch.equal(both[1], lr.gae(*case[:4], second, **case.options, cu_seqlens=case.cu_seqlens))
    assert not both[0].requires_grad
    assert not both[1].requires_grad
    values, rewards = case.values.double(), case.rewards.double()
    options = {"rewards": rewards, "bootstrap_values": case.bootstrap_values, "cu_seqlens": case.cu_seqlens}
    exact = reference.returns_and_advantages(values, *case[1:4], case.lam, second, **options)
    for mine, other in zip(both, exact, strict=True):
        assert_close(mine, other)


def test_whitening_has_mean_0_and_variance_1_over_valid_tokens():
    case = padded(B=6, T=50, dtype=torch.float32)
    _, advantages = lr.returns_and_advantages(*case[:5], 0.9, whiten=True)
    assert torch.equal(advantages, lr.gae(*case[:4], 0.9, whiten=True))
    assert torch.equal(advantages, lr.masked_whiten(lr.gae(*case[:4], 0.9), case.loss_mask))
    valid = advantages[case.loss_mask].double()
    assert abs(valid.mean()) < 1e-6
    assert abs(valid.std() - 1) < 1e-5
    assert (advantages[~case.loss_mask] == 0).all()
    x = case.values.double()
    torch.testing.assert_close(lr.masked_whiten(x, None, eps=0.25), reference.masked_whiten(x, None, eps=0.25))
    one = torch.zeros(2, 3, dtype=torch.bool)
    one[0, 1] = True
    assert (lr.masked_whiten(torch.full((2, 3), float("nan")).masked_fill(one, 5.0), one) == 0).all()
    assert (lr.masked_whiten(torch.ones(2, 3), torch.zeros(2, 3)) == 0).all()


# ---- maps of chunks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [padded(T=2500), packed(LENGTHS[2])], ids=["padded", "packed"])
def test_the_map_of_a_row_carries_its_end_to_its_beginning(case):
    maps = _ops.td_lambda_map(case.values, case.loss_mask, case.rewards, case.cu_seqlens, case.gamma, case.lam)
    # A row with one more valid token in front of it: its return, less its own reward, is the carry.
    starts = [0] * 5 if case.cu_seqlens is None else case.cu_seqlens[:-1].tolist()
    ends = [2500] * 5 if case.cu_seqlens is None else case.cu_seqlens[1:].tolist()
    for b, (begin, end) in enumerate(zip(starts, ends, strict=True)):
        row = (b,) if case.cu_seqlens is None else ()
        values = torch.cat([torch.zeros(1), case.values[(*row, slice(begin, end))]])
        mask = torch.cat([torch.ones(1, dtype=torch.bool), case.loss_mask[(*row, slice(begin, end))]])
        rewards = torch.cat([torch.zeros(1), case.rewards[(*row, slice(begin, end))]])
        for carry in (0.0, 1.0):
            returns = lr.compute_lambda_return(
                values[None],
                torch.tensor([carry]),
                mask[None],
                case.gamma[b],
                case.lam[b],
                rewards=rewards[None],
            )
            torch.testing.assert_close(maps[b, 0] * carry + maps[b, 1], returns[0, 0], rtol=1e-12, atol=1e-12)


# ---- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [padded(T=6), packed((3, 0, 4, 1))], ids=["padded", "packed"])
@pytest.mark.parametrize("advantages", [False, True])
def test_gradients_to_the_second_order(case, advantages):
    discounts = case.gamma, case.lam

    def function(values, terminal, rewards, bootstrap):
        layout = {} if case.cu_seqlens is None else {"cu_seqlens": case.cu_seqlens}
        if advantages:
            return lr.gae(
                values, terminal, case.loss_mask, *discounts, rewards=rewards, bootstrap_values=bootstrap, **layout
            )
        return case.returns(
            same_shape(case), values=values, terminal_rewards=terminal, rewards=rewards, bootstrap_values=bootstrap
        )

    inputs = [leaf(x.double()) for x in (case.values, case.terminal_rewards, case.rewards, case.bootstrap_values)]
    torch.autograd.gradcheck(function, inputs)
    torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize(("lengths", "dtype"), lengths_with(LENGTHS, VALUE_DTYPES), ids=str)
def test_the_gradient_of_every_dtype_and_length(lengths, dtype):
    case = packed(lengths, dtype)
    grad = torch.randn(case.values.shape, generator=rng(), dtype=torch.float64).to(dtype)

    def gradients(function, dtype):
        inputs = leaf(case.values.to(dtype)), leaf(case.terminal_rewards.to(dtype)), leaf(case.rewards.to(dtype))
        returns = case.returns(function, values=inputs[0], terminal_rewards=inputs[1], rewards=inputs[2])
        return torch.autograd.grad(returns, inputs, grad.to(returns.dtype))

    exact = gradients(reference.lambda_return_varlen, torch.float64)
    for ours, expected in zip(gradients(lr.lambda_return_varlen, dtype), exact, strict=True):
        assert ours.dtype == dtype
        units = 64 if dtype in (torch.float64, torch.float32) else 2
        eps = torch.finfo(dtype).eps
        # Sums of thousands of terms of either sign: what cancels leaves the error of what was there.
        atol = units * eps * expected.abs().max().item()
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=atol)


def test_gamma_and_lam_refuse_a_gradient():
    case = padded()
    for name in ("gamma", "lam"):
        with pytest.raises(ValueError, match=f"{name} must not require a gradient"):
            case.returns(lr.compute_lambda_return, **{name: leaf(getattr(case, name))})


# ---- torch ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("where", ["padded", "packed"])
def test_opcheck(where, dtype):
    case = padded(dtype=dtype) if where == "padded" else packed(dtype=dtype)
    values, grad = leaf(case.values), make_grad(make_batch()).flatten()[:1].to(dtype)
    arguments = (case.loss_mask, case.rewards, case.cu_seqlens, case.gamma, case.lam)
    torch.library.opcheck(_ops.td_lambda.default, (values, case.terminal_rewards, *arguments, True))
    torch.library.opcheck(_ops.td_lambda.default, (values, leaf(case.terminal_rewards), None, *arguments[1:]))
    torch.library.opcheck(_ops.td_lambda_pair.default, (case.values, case.terminal_rewards, *arguments, case.lam))
    torch.library.opcheck(_ops.td_lambda_map.default, (case.values, *arguments))
    for with_rewards in (False, True):
        torch.library.opcheck(
            _ops.td_lambda_backward.default,
            (leaf(grad.expand(case.values.shape)), case.loss_mask, *arguments[2:], with_rewards),
        )


def test_a_lambda_that_changes_every_step_compiles_once():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def step(values, rewards, mask, lam):
        loss = lr.compute_lambda_value_loss(values, rewards, mask, mask, 1.0, lam)
        return loss, lr.compute_lambda_return(values, rewards, mask, 1.0, lam)

    case = padded(dtype=torch.float32)
    results = []
    for lam in (1.0, 0.99, 0.97, 0.96, 0.95):
        values = leaf(case.values)
        loss, returns = step(values, case.terminal_rewards, case.loss_mask, torch.tensor(lam))
        loss.backward()
        results.append((returns.detach(), values.grad))
        torch.testing.assert_close(
            returns, lr.compute_lambda_return(values, case.terminal_rewards, case.loss_mask, 1.0, torch.tensor(lam))
        )
    assert counter.frame_count == 1
    assert not torch.equal(results[0][1], results[-1][1])


# ---- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (torch.tensor([0, 3, 2, 8]), "cu_seqlens must not fall, got 3 and then 2"),
        (torch.tensor([1, 3, 5, 8]), "cu_seqlens must begin with 0, got 1"),
        (torch.tensor([0, 3, 5, 7]), "cu_seqlens must end with the number of values, 8, got 7"),
        (torch.tensor([0, 3, 5, 9]), "cu_seqlens must end with the number of values, 8, got 9"),
        (torch.tensor([0, 3, 8]), r"terminal_rewards must have shape \[B\] = \[2\], got \[3\]"),
        (torch.tensor([0.0, 3, 5, 8]), "cu_seqlens must be int32 or int64, got torch.float32"),
        (torch.tensor([[0, 3, 5, 8]]), r"cu_seqlens must have shape \[B \+ 1\], got \[1, 4\]"),
        ([0, 3, 5, 8], "cu_seqlens must be a torch.Tensor, got list"),
    ],
    ids=str,
)
def test_what_cu_seqlens_must_be(cu_seqlens, message):
    with pytest.raises((ValueError, TypeError), match=message):
        lr.lambda_return_varlen(torch.zeros(8), torch.zeros(3), cu_seqlens)


@pytest.mark.parametrize("cu_seqlens", [[0, 3, 2, 8], [0, 3, 5, 9], [0, -4, 5, 8], [2, 3, 5, 8], []])
def test_the_operator_itself_never_reads_out_of_bounds(cu_seqlens):
    one = torch.ones((), dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"cu_seqlens must|terminal_rewards must"):
        _ops.td_lambda(torch.zeros(8), torch.zeros(3), None, None, torch.tensor(cu_seqlens).long(), one, one)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gamma": torch.tensor([0.9, 0.9])}, r"gamma must be a float, 0-dim or of shape \[B\] = \[5\], got \[2\]"),
        ({"lam": torch.tensor(1.5)}, r"lam must be in \[0, 1\], got 1.5"),
        ({"lam": torch.tensor(float("nan"))}, r"lam must be in \[0, 1\], got nan"),
        (
            {"gamma": torch.tensor(1)},
            "gamma must be a float or a float32, .* tensor, got torch.int64",
        ),
        ({"rewards": torch.zeros(5, 22)}, r"rewards must have the shape of the values, \[5, 23\], got \[5, 22\]"),
        ({"bootstrap_values": torch.zeros(5, 1)}, r"bootstrap_values must have shape \[B\] = \[5\], got \[5, 1\]"),
        ({"loss_mask": None}, "loss_mask must be a torch.Tensor, got NoneType"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_argument_errors(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        padded().returns(lr.compute_lambda_return, **changes)


def test_a_discount_of_one_row_is_never_read_past_its_end():
    # A scalar gamma with B > 1 and a gamma of another length: read as said, or refused, also by the operator itself.
    case = padded()
    short = torch.ones(2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="gamma must be 0-dim or"):
        _ops.td_lambda(case.values, case.terminal_rewards, case.loss_mask, None, None, short, case.lam)
