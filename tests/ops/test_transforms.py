"""torch.func, torch.vmap, autocast, and compilation and export of the general operators."""

import pytest
import torch
from ops_testing import leaf, make_batch, rng
from td_lambda_testing import packed, padded
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import lambda_return_ext as lr
from lambda_return_ext.distributed import lambda_return_carry

ops = torch.ops.lambda_return
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")

OPTIONS = {
    "plain": {},
    "general": {"loss": "huber", "delta": 0.3, "reduction": "sequence_mean"},
    "logits": {"loss": "bce_with_logits", "reduction": "sum"},
}


def loss_of(batch, options):
    return lambda values: lr.compute_lambda_value_loss(values, *batch[1:], 0.9, 0.8, **options)


# ---- torch.func ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
def test_func_grad_is_the_gradient(name):
    batch = make_batch()
    function = loss_of(batch, OPTIONS[name])
    values = leaf(batch.values)
    (expected,) = torch.autograd.grad(function(values), values)
    assert torch.equal(torch.func.grad(function)(batch.values), expected)
    per_row = torch.vmap(torch.func.grad(function))(batch.values.expand(3, *batch.values.shape))
    assert torch.equal(per_row, expected.expand_as(per_row))


@pytest.mark.parametrize("lam", [0.8, torch.tensor(0.8)], ids=["plain", "general"])
def test_jacobians_and_hessians_of_the_returns(lam):
    values, rewards, _, mask = make_batch(B=2, T=5)

    def returns(values, rewards):
        return lr.compute_lambda_return(values, rewards, mask, 0.9, lam)

    expected = torch.autograd.functional.jacobian(returns, (values, rewards))
    ours = torch.func.jacrev(returns, argnums=(0, 1))(values, rewards)
    for x, y in zip(ours, expected, strict=True):
        torch.testing.assert_close(x, y)

    def energy(values):
        return (returns(values, rewards) ** 2).sum()

    torch.testing.assert_close(
        torch.func.jacrev(torch.func.grad(energy))(values), torch.autograd.functional.hessian(energy, values)
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_functionalize_changes_nothing(name):
    batch = make_batch()
    function = loss_of(batch, OPTIONS[name])
    assert torch.equal(torch.func.functionalize(function)(batch.values), function(batch.values))


# ---- torch.vmap ----------------------------------------------------------------------------------------------------


def per_sample(function, in_dims, *args):
    """What vmap must give: one call for each element of the batch."""
    N = next(x.shape[dim] for x, dim in zip(args, in_dims, strict=True) if dim is not None)
    calls = [
        function(*(x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True)))
        for i in range(N)
    ]
    if isinstance(calls[0], tuple):
        return tuple(torch.stack(x) for x in zip(*calls, strict=True))
    return torch.stack(calls)


def stacked(cases):
    return [torch.stack([getattr(case, name) for case in cases]) for name in cases[0]._fields[:7]]


FUNCTIONS = {
    "return": lambda v, R, m, g, lam, r, b: lr.compute_lambda_return(v, R, m, 0.9, 0.8),
    "general": lambda v, R, m, g, lam, r, b: lr.compute_lambda_return(v, R, m, g, lam, rewards=r, bootstrap_values=b),
    "gae": lambda v, R, m, g, lam, r, b: lr.gae(v, R, m, g[0], lam, rewards=r),
    "both": lambda v, R, m, g, lam, r, b: lr.returns_and_advantages(v, R, m, g, lam, g * 0.9),
    "loss": lambda v, R, m, g, lam, r, b: lr.compute_lambda_value_loss(v, R, m, m),
    "general_loss": lambda v, R, m, g, lam, r, b: lr.compute_lambda_value_loss(v, R, m, m, g, lam, loss="huber"),
    "mse": lambda v, R, m, g, lam, r, b: lr.masked_mse(v, r.double(), m),
    "eos": lambda v, R, m, g, lam, r, b: lr.create_eos_only_mask(m),
    "carry": lambda v, R, m, g, lam, r, b: lambda_return_carry(v, m, g, lam, rewards=r),
}
DIFFERENTIABLE = ("return", "general", "gae", "loss", "general_loss")
IN_DIMS = [(0,) * 7, (0, 0, None, None, 0, None, None), (1, 0, 1, None, None, 1, 0)]


def batch_of_arguments(in_dims, N=4):
    args = stacked([padded(kind, B=3, T=9) for kind in ("gaps", "prompt", "empty_rows", "dense")])
    return [x[0] if dim is None else x[:N].movedim(0, dim) for x, dim in zip(args, in_dims, strict=True)]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("in_dims", IN_DIMS)
def test_vmap_is_one_call_for_each(name, in_dims):
    args = batch_of_arguments(in_dims)
    function = FUNCTIONS[name]
    ours, expected = torch.vmap(function, in_dims)(*args), per_sample(function, in_dims, *args)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    if name in DIFFERENTIABLE:

        def grad(v, *rest):
            return torch.func.grad(lambda x: function(x, *rest).sum())(v)

        torch.testing.assert_close(
            torch.vmap(grad, in_dims)(*args), per_sample(grad, in_dims, *args), rtol=1e-12, atol=1e-12
        )


def test_vmap_over_packed_rows():
    case = packed()
    values = torch.rand(3, *case.values.shape, generator=rng(), dtype=torch.float64)

    def function(values):
        return case.returns(lr.lambda_return_varlen, values=values)

    assert torch.equal(torch.vmap(function)(values), torch.stack([function(v) for v in values]))


# Every operator itself, with its last arguments given or left at their defaults, and whether the first has a gradient.
OPERATORS = {
    "lambda_return": (lambda v, R, m, g, lam, r, b: ops.lambda_return(v, R, m, 0.9, 0.8), True),
    "lambda_return, defaults": (lambda v, R, m, g, lam, r, b: ops.lambda_return(v, R, m), True),
    "lambda_return_backward": (lambda v, R, m, g, lam, r, b: ops.lambda_return_backward(v, m, 0.9), True),
    "lambda_value_loss": (lambda v, R, m, g, lam, r, b: ops.lambda_value_loss(v, R, r > 0, m, 0.9, 0.8), True),
    "lambda_value_loss, defaults": (lambda v, R, m, g, lam, r, b: ops.lambda_value_loss(v, R, r > 0, m), True),
    "lambda_value_loss_backward": (
        lambda v, R, m, g, lam, r, b: ops.lambda_value_loss_backward(v.sum(), (m != 0).sum(), v, R, m, m, 0.9),
        False,
    ),
    "masked_mse": (lambda v, R, m, g, lam, r, b: ops.masked_mse(v, r.double(), m), True),
    "masked_mse_backward": (
        lambda v, R, m, g, lam, r, b: ops.masked_mse_backward(v.sum(), (m != 0).sum(), v, r.double(), m),
        False,
    ),
    "eos_mask": (lambda v, R, m, g, lam, r, b: ops.eos_mask(m), False),
    "td_lambda": (lambda v, R, m, g, lam, r, b: ops.td_lambda(v, R, m, r, None, g, lam, True), True),
    "td_lambda, defaults": (lambda v, R, m, g, lam, r, b: ops.td_lambda(v, R, None, None, None, g, lam), True),
    "td_lambda_backward": (lambda v, R, m, g, lam, r, b: ops.td_lambda_backward(v, m, None, g, lam, True), True),
    "td_lambda_backward, defaults": (lambda v, R, m, g, lam, r, b: ops.td_lambda_backward(v, m, None, g, lam), True),
    "td_lambda_pair": (lambda v, R, m, g, lam, r, b: ops.td_lambda_pair(v, R, m, r, None, g, lam, g), False),
    "td_lambda_map": (lambda v, R, m, g, lam, r, b: ops.td_lambda_map(v, m, r, None, g, lam), False),
    "td_lambda_loss": (
        lambda v, R, m, g, lam, r, b: ops.td_lambda_loss(v, R, m, m, r, r.double(), None, g, lam, None, 1, 0.5, 0.1, 3),
        True,
    ),
    "td_lambda_loss, defaults": (
        lambda v, R, m, g, lam, r, b: ops.td_lambda_loss(v, R, m, None, r, None, None, g, lam, None),
        True,
    ),
    "td_lambda_loss_backward": (
        lambda v, R, m, g, lam, r, b: ops.td_lambda_loss_backward(v.sum(), R, v, R, m, m, r, None, None, g, lam, 1),
        False,
    ),
    "categorical_value_loss": (
        lambda v, R, m, g, lam, r, b: ops.categorical_value_loss(
            torch.stack((v, r, v * r), -1), R, m, m, r, None, g, lam, None, 1
        ),
        True,
    ),
    "categorical_value_loss_backward": (
        lambda v, R, m, g, lam, r, b: ops.categorical_value_loss_backward(
            v.sum(), R, torch.stack((v, r, v * r), -1), v, r.double(), None
        ),
        False,
    ),
}


def test_vmap_is_tried_on_every_operator():
    every = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("lambda_return::")}
    assert {f"lambda_return::{name.partition(',')[0]}" for name in OPERATORS} == every


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("in_dims", IN_DIMS)
def test_vmap_over_an_operator_is_one_call_for_each(name, in_dims):
    function, differentiable = OPERATORS[name]
    args = batch_of_arguments(in_dims)
    close = {"rtol": 1e-12, "atol": 1e-12}
    ours = torch.vmap(function, in_dims)(*args)
    torch.testing.assert_close(ours, per_sample(function, in_dims, *args), **close)
    nested = torch.vmap(torch.vmap(function, in_dims), (0, *[None] * 6))(args[0][None], *args[1:])
    torch.testing.assert_close(tree_map(lambda x: x[0], nested), ours, **close)
    if differentiable:
        args[0] = leaf(args[0])
        gradients = []
        for outputs in (torch.vmap(function, in_dims)(*args), per_sample(function, in_dims, *args)):
            first = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
            weights = torch.rand(first.shape, generator=rng()).to(first)
            gradients += torch.autograd.grad(first, args[0], weights)
        torch.testing.assert_close(*gradients, **close)


def test_vmap_over_an_operator_on_packed_rows():
    case = packed()
    values = leaf(torch.rand(3, *case.values.shape, generator=rng(), dtype=torch.float64))

    def function(values):
        _values, terminal, mask, gamma, lam, rewards, _bootstrap, cu_seqlens = case
        return ops.td_lambda(values, terminal, mask, rewards, cu_seqlens, gamma, lam)

    ours, expected = torch.vmap(function)(values), torch.stack([function(v) for v in values])
    assert torch.equal(ours, expected)
    assert torch.equal(*(torch.autograd.grad((x**2).sum(), values)[0] for x in (ours, expected)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", [*FUNCTIONS, *OPERATORS])
@pytest.mark.parametrize("in_dims", IN_DIMS)
def test_vmap_over_no_elements_gives_none(name, in_dims):
    function, differentiable = OPERATORS[name] if name in OPERATORS else (FUNCTIONS[name], name in DIFFERENTIABLE)
    one = torch.vmap(function, in_dims)(*batch_of_arguments(in_dims, N=1))
    args = batch_of_arguments(in_dims, N=0)
    args[0].requires_grad_(differentiable)
    ours = torch.vmap(function, in_dims)(*args)
    for x, y in zip(tree_leaves(ours), tree_leaves(one), strict=True):
        assert (x.shape, x.dtype) == ((0, *y.shape[1:]), y.dtype)
    if differentiable:
        (gradient,) = torch.autograd.grad(tree_leaves(ours)[0].sum(), args[0])
        assert torch.equal(gradient, torch.zeros_like(args[0]))


# ---- autocast ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_autocast_takes_what_the_head_gives_and_returns_a_float32_loss(options):
    torch.manual_seed(0)
    head, hidden = nn.Linear(6, 1), torch.randn(4, 13, 6)
    batch = make_batch(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        values = head(hidden)
        assert values.dtype == torch.bfloat16
        loss = loss_of(batch, options)(values)
        returns = lr.compute_lambda_return(values.squeeze(-1), batch.rewards, batch.loss_mask)
    assert (loss.dtype, returns.dtype) == (torch.float32, torch.bfloat16)
    loss.backward()
    assert head.weight.grad.dtype == torch.float32
    assert torch.equal(loss, loss_of(batch, options)(values))


# ---- torch.compile and torch.export ----------------------------------------------------------------------------------


@pytest.fixture
def _forget_compilations():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def everything(values, terminal, mask, gamma, lam, rewards, bootstrap, cu_seqlens=None):
    options = {"rewards": rewards, "bootstrap_values": bootstrap}
    if cu_seqlens is None:
        returns = lr.compute_lambda_return(values, terminal, mask, gamma, lam, **options)
        loss, statistics = lr.compute_lambda_value_loss(
            values,
            terminal,
            mask,
            mask,
            gamma,
            lam,
            **options,
            loss="smooth_l1",
            old_values=values * 0.9,
            clip_range=0.1,
            return_statistics=True,
        )
    else:
        returns = lr.lambda_return_varlen(values, terminal, cu_seqlens, mask, gamma, lam, **options)
        loss, statistics = lr.lambda_value_loss_varlen(
            values, terminal, cu_seqlens, mask, gamma, lam, **options, reduction="sequence_mean", return_statistics=True
        )
    targets, advantages = lr.returns_and_advantages(
        values, terminal, mask, gamma, lam, gamma, **options, cu_seqlens=cu_seqlens, whiten=True
    )
    return loss + (returns * advantages).sum(), targets, lr.explained_variance(statistics)


CASES = {
    "padded": [padded(B=B, T=T, dtype=torch.float32) for B, T in ((2, 5), (3, 7), (4, 9), (6, 12), (3, 100))],
    "packed": [packed(x, torch.float32) for x in ((3, 4), (5, 0, 2), (1, 2, 3, 40), (2, 7), (9, 9, 9, 0, 9))],
}


@pytest.mark.usefixtures("_forget_compilations")
@pytest.mark.parametrize("where", CASES)
def test_compiled_equals_eager_without_recompilation(where):
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager", dynamic=True)

    def run(function, case):
        values = leaf(case.values)
        result = function(values, *case[1:])
        return *(x.detach() for x in result), *torch.autograd.grad(result[0], values)

    for i, case in enumerate(CASES[where]):
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            torch.testing.assert_close(run(compiled, case), run(everything, case), equal_nan=True)


class Everything(nn.Module):
    """All of the general operators, as a saved model holds them."""

    forward = staticmethod(everything)


@pytest.mark.parametrize("where", CASES)
def test_export_round_trip_with_other_sizes(where, tmp_path):
    case, other = CASES[where][2], CASES[where][4]
    B, T = torch.export.Dim("B"), torch.export.Dim("T")
    tokens = {0: B, 1: T} if where == "padded" else {0: T}
    last = () if where == "padded" else ({0: B + 1},)
    shapes = (tokens, {0: B}, tokens, {0: B}, {0: B}, tokens, {0: B}, *last)
    arguments = case[: len(shapes)]
    program = torch.export.export(Everything(), tuple(arguments), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for inputs in (arguments, other[: len(shapes)]):
        torch.testing.assert_close(loaded(*inputs), everything(*inputs), equal_nan=True)
