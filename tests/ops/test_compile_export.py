"""torch.compile and torch.export: whole graphs, dynamic B and T, no recompilation."""

import pytest
import torch
from ops_testing import leaf, make_batch, make_grad
from torch import nn

from lambda_return_ext import (
    LambdaReturn,
    LambdaValueLoss,
    compute_lambda_return,
    compute_lambda_value_loss,
    compute_mc_value_loss,
    create_eos_only_mask,
    masked_mse,
    pairwise_ranking_loss,
)
from lambda_return_ext.categorical import Bins, compute_categorical_value_loss

# torch's own compiler imports modules that torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")

# The first compilation is for fixed sizes and the second, when both change, for any: no other may follow.
SHAPES = [(2, 5), (3, 7)]
LATER_SHAPES = [(4, 9), (4, 12), (6, 12), (3, 100)]

# name: (compiler backend, function of a batch). Inductor compiles C++ for torch's own pointwise operations, which
# takes long and shows nothing about ours, so what has many of them stops at the graphs that Inductor would get.
FUNCTIONS = {
    "lambda_return": ("inductor", lambda v, r, a, m: compute_lambda_return(v, r, m, 0.9, 0.8)),
    "lambda_value_loss": ("inductor", lambda v, r, a, m: compute_lambda_value_loss(v, r, a, m, 0.9, 0.8)),
    "mc_value_loss": ("inductor", lambda v, r, a, m: compute_mc_value_loss(v[..., None], r, a, m)),
    "masked_mse": ("inductor", lambda v, r, a, m: masked_mse(v, r[:, None].expand(v.shape), m)),
    "warm_up": ("aot_eager", lambda v, r, a, m: compute_lambda_value_loss(v, r, a, create_eos_only_mask(m))),
    "targets": ("aot_eager", lambda v, r, a, m: masked_mse(v, compute_lambda_return(v, r, m).detach(), m)),
    "ranking_loss": ("aot_eager", lambda v, r, a, m: pairwise_ranking_loss(v, v.detach().flip(0), m, m.flip(0))),
}


@pytest.fixture(autouse=True)
def _forget_compilations():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(function, batch):
    """The result of function(values, rewards, attention_mask, loss_mask) and its gradient in the values."""
    values = leaf(batch.values)
    result = function(values, *batch[1:])
    grad = make_grad(batch) if result.dim() else torch.ones_like(result)
    return result.detach(), *torch.autograd.grad(result, values, grad)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_equals_eager_without_recompilation(name):
    backend, function = FUNCTIONS[name]
    compiled = torch.compile(function, fullgraph=True, backend=backend)

    def check(shape):
        batch = make_batch("gaps", *shape, torch.float32)
        torch.testing.assert_close(run(compiled, batch), run(function, batch), rtol=1e-6, atol=1e-7)

    for shape in SHAPES:
        check(shape)
    with torch.compiler.set_stance("fail_on_recompile"):
        for shape in LATER_SHAPES:
            check(shape)


def test_a_third_compilation_would_be_noticed():
    """Guards the test above: lam is a Python float, so another one does recompile."""
    compiled = torch.compile(compute_lambda_return, fullgraph=True, backend="aot_eager")
    values, rewards, _, mask = make_batch(dtype=torch.float32)
    compiled(values, rewards, mask, 1.0, 0.9)
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="recompile"):
        compiled(values, rewards, mask, 1.0, 0.8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dynamic_from_the_first_call(dtype):
    """dynamic=True compiles once, for every size; other dtypes, and every mask dtype, through the same graph."""

    def function(values, rewards, attention_mask, loss_mask):
        returns = compute_lambda_return(values, rewards, loss_mask)
        loss = compute_lambda_value_loss(values, rewards, attention_mask, loss_mask)
        return returns * loss

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in (SHAPES[0], *LATER_SHAPES):
        batch = make_batch("gaps", *shape, dtype)
        with torch.compiler.set_stance("fail_on_recompile" if shape != SHAPES[0] else "default"):
            torch.testing.assert_close(run(compiled, batch), run(function, batch))


def test_inductor_trains_a_value_head():
    """The whole of a training step as one graph: head, warm-up mask, both losses, and backward into the weights."""

    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 1)
            self.loss = LambdaValueLoss()

        def forward(self, hidden, rewards, attention_mask, loss_mask):
            values = self.head(hidden)
            loss = self.loss(values, rewards, attention_mask, loss_mask)
            return loss + self.loss(values, rewards, attention_mask, create_eos_only_mask(loss_mask))

    torch.manual_seed(0)
    critic = Critic()
    compiled = torch.compile(critic, fullgraph=True, dynamic=True)
    for shape in (SHAPES[0], *LATER_SHAPES[:2]):
        batch = make_batch("conversation", *shape, torch.float32)
        inputs = torch.randn(*shape, 8), *batch[1:]
        with torch.compiler.set_stance("fail_on_recompile" if shape != SHAPES[0] else "default"):
            ours = torch.autograd.grad(compiled(*inputs), tuple(critic.parameters()))
        torch.testing.assert_close(ours, torch.autograd.grad(critic(*inputs), tuple(critic.parameters())))


class Everything(nn.Module):
    """Every operator that a saved model can hold."""

    def __init__(self):
        super().__init__()
        self.returns, self.loss = LambdaReturn(0.9, 0.8), LambdaValueLoss(0.9, 0.8)

    def forward(self, values, rewards, attention_mask, loss_mask):
        returns = self.returns(values, rewards, loss_mask)
        loss = self.loss(values, rewards, attention_mask, loss_mask)
        logits = torch.stack([values, -values, 2 * values], -1)
        classified = [
            compute_categorical_value_loss(logits, rewards, attention_mask, loss_mask, bins=Bins(target=target))
            for target in ("hl_gauss", "two_hot")
        ]
        mse = masked_mse(values, returns, attention_mask)
        return returns, loss, mse, create_eos_only_mask(loss_mask), *classified


def test_export_round_trip_with_other_sizes(tmp_path):
    rows, tokens = torch.export.Dim("rows"), torch.export.Dim("tokens")
    matrix = {0: rows, 1: tokens}
    batch = make_batch("gaps", 3, 7, torch.float32)
    program = torch.export.export(Everything(), tuple(batch), dynamic_shapes=(matrix, {0: rows}, matrix, matrix))
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for shape in ((3, 7), (5, 11), (2, 400)):
        batch = make_batch("gaps", *shape, torch.float32)
        for ours, expected in zip(loaded(*batch), Everything()(*batch), strict=True):
            assert torch.equal(ours, expected)


def test_meta_tensors_have_the_shapes_and_dtypes_of_the_results():
    for dtype in (torch.float32, torch.float16, torch.float64):
        batch = make_batch("gaps", 3, 7, dtype)
        for fake, real in zip(Everything()(*(x.to("meta") for x in batch)), Everything()(*batch), strict=True):
            assert fake.is_meta
            assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
