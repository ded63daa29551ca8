"""init_value_head_bias."""

import math
import re
from fractions import Fraction

import pytest
import torch
from torch import nn

from lambda_return_ext import init_value_head_bias

BIASES = (0.0, 0.5, -1.25, 3.0)


def first_prediction(head, width=4):
    """Prediction of a head whose last weights are zero."""
    last = [layer for layer in head.modules() if isinstance(layer, nn.Linear)][-1]
    nn.init.zeros_(last.weight)
    return head(torch.randn(2, 3, width))


def mlp(*last):
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1), *last)


class Holder(nn.Module):
    """A module that holds a head under one name, beside an unrelated Linear that must not be touched."""

    def __init__(self, name, head):
        super().__init__()
        self.backbone = nn.Linear(4, 4)
        self.add_module(name, head)
        self.name = name

    def forward(self, x):
        return getattr(self, self.name)(x)


class SigmoidHead(nn.Sequential):
    """A Sequential with a constructor of its own, as heads are often written."""

    def __init__(self, width):
        super().__init__(nn.Linear(width, 1), nn.Sigmoid())


@pytest.mark.parametrize("bias", BIASES)
def test_linear_head(bias):
    head = nn.Linear(4, 1)
    weight = head.weight.clone()
    init_value_head_bias(head, bias)
    assert head.bias.item() == bias
    assert torch.equal(head.weight, weight)
    assert (first_prediction(head) == bias).all()


@pytest.mark.parametrize("bias", BIASES)
def test_mlp_head(bias):
    head = mlp()
    before = {name: x.clone() for name, x in head.named_parameters()}
    init_value_head_bias(head, bias)
    for name, x in head.named_parameters():
        if name == "2.bias":
            assert x.item() == bias
        else:
            assert torch.equal(x, before[name])
    assert (first_prediction(head) == bias).all()


@pytest.mark.parametrize("bias", [0.5, 0.1, 0.999])
@pytest.mark.parametrize(
    "head",
    [lambda: mlp(nn.Sigmoid()), lambda: nn.Sequential(mlp(), nn.Sigmoid()), lambda: nn.Sequential(mlp(nn.Sigmoid()))],
)
def test_sigmoid_head_gets_the_logit(head, bias):
    head = head()
    init_value_head_bias(head, bias)
    assert math.isclose(list(head.parameters())[-1].item(), math.log(bias / (1 - bias)), abs_tol=1e-6)
    torch.testing.assert_close(first_prediction(head), torch.full((2, 3, 1), bias))


def test_sigmoid_head_with_its_own_constructor():
    head = SigmoidHead(4)
    init_value_head_bias(head, 0.25)
    torch.testing.assert_close(first_prediction(head), torch.full((2, 3, 1), 0.25))


@pytest.mark.parametrize("name", ["value_head", "linear", "mlp", "score"])
@pytest.mark.parametrize("head", [lambda: nn.Linear(4, 1), mlp])
def test_head_inside_a_module(name, head):
    module = Holder(name, head())
    backbone = module.backbone.bias.clone()
    init_value_head_bias(module, 0.5)
    assert torch.equal(module.backbone.bias, backbone)
    assert (first_prediction(getattr(module, name)) == 0.5).all()


def test_several_nested():
    head = mlp()
    module = Holder("value_head", Holder("mlp", nn.Sequential(nn.Linear(4, 4), Holder("score", head))))
    init_value_head_bias(module, 0.75)
    assert head[-1].bias.item() == 0.75
    assert (first_prediction(head) == 0.75).all()


def test_value_head_comes_before_the_other_names():
    module = Holder("value_head", nn.Linear(4, 1))
    module.score = nn.Linear(4, 1)
    score = module.score.bias.item()
    init_value_head_bias(module, 5.0)
    assert (module.value_head.bias.item(), module.score.bias.item()) == (5.0, score)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtype_and_gradient_flag_are_kept(dtype):
    head = nn.Linear(4, 1, dtype=dtype)
    init_value_head_bias(head, 0.5)
    assert head.bias.dtype == dtype
    assert head.bias.requires_grad
    assert head.bias.is_leaf


@pytest.mark.parametrize("bias", [1, Fraction(1, 4)])
def test_any_real_number(bias):
    head = nn.Linear(4, 1)
    init_value_head_bias(head, bias)
    assert head.bias.item() == bias


HEADS = "module must be a Linear, a Sequential that ends in one, or hold one as value_head, linear, mlp, score; got "


@pytest.mark.parametrize(
    ("module", "found"),
    [
        (nn.GELU(), "GELU with nothing"),
        (nn.Sequential(), "Sequential with nothing"),
        (nn.Sequential(nn.Sigmoid()), "Sequential with 0: Sigmoid"),
        (nn.Sequential(nn.Linear(4, 1), nn.ReLU()), "Sequential with 0: Linear, 1: ReLU"),
        (Holder("head", nn.Linear(4, 1)), "Holder with backbone: Linear, head: Linear"),
        (Holder("score", nn.Identity()), "Holder with backbone: Linear, score: Identity"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_module_without_a_head_says_what_it_found(module, found):
    with pytest.raises(TypeError, match=f"^{re.escape(HEADS + found)}$"):
        init_value_head_bias(module, 0.5)


@pytest.mark.parametrize(
    ("module", "bias", "error", "message"),
    [
        (None, 0.5, TypeError, "module must be a torch.nn.Module, got NoneType"),
        (nn.Linear(4, 1), "0.5", TypeError, "bias must be a float, got str"),
        (nn.Linear(4, 1), True, TypeError, "bias must be a float, got bool"),
        (nn.Linear(4, 1), torch.tensor(0.5), TypeError, "bias must be a float, got Tensor"),
        (nn.Linear(4, 1), float("nan"), ValueError, "bias must be finite, got nan"),
        (nn.Linear(4, 1), float("inf"), ValueError, "bias must be finite, got inf"),
        (
            nn.Linear(4, 1, bias=False),
            0.5,
            ValueError,
            "module must have a bias in its last Linear, got one with bias=False",
        ),
        *(
            (
                mlp(nn.Sigmoid()),
                bias,
                ValueError,
                f"bias must be strictly between 0 and 1 for a head that ends in a sigmoid, got {bias}",
            )
            for bias in (0.0, 1.0, -0.5, 2.0)
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_errors(module, bias, error, message):
    before = [x.clone() for x in module.parameters()] if isinstance(module, nn.Module) else []
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        init_value_head_bias(module, bias)
    after = module.parameters() if isinstance(module, nn.Module) else []
    assert all(torch.equal(x, y) for x, y in zip(after, before, strict=True))
