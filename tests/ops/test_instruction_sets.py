"""Every instruction set of the CPU kernels through the operators, and the choice among them."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import cross_entropy

import lambda_return_ext
from lambda_return_ext import reference
from lambda_return_ext.categorical import Bins, categorical_values

INSTRUCTION_SETS = ("portable", "avx2", "avx512")

SIZES = ((3, 37), (2, 1), (5, 256), (1, 17_000))
LAMBDAS = (0.0, 0.95, 1.0)
PROBABILITY_LOSSES = ("bce", "bce_with_logits")
# The numbers of the second are all of the first too (of those of this size), so that one reference serves both.
ALIKE = ((torch.float64, torch.float32), (torch.float16, torch.bfloat16))
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}

# Runs in a process of its own, as the choice is made once: every operator in every dtype, on the inputs and against the
# answers in a file.
CHECK = """
import sys
import torch
import lambda_return_ext as package
from lambda_return_ext.categorical import Bins, compute_categorical_value_loss

assert package.build_info()["instruction_set"] == sys.argv[1]

def leaf(x, dtype):
    return x.to(dtype).requires_grad_()

def check(got, wanted, x, grad, rtol, atol, grad_atol=None):
    answer, gradient = wanted
    torch.testing.assert_close(got.double(), answer, rtol=rtol, atol=atol)
    (got_grad,) = torch.autograd.grad(got, x, None if grad is None else grad.to(got.dtype))
    torch.testing.assert_close(got_grad.double(), gradient, rtol=2 * rtol, atol=grad_atol or atol)

cases, classified, tolerances = torch.load(sys.argv[2])
for dtypes, case in cases:
    for dtype in dtypes:
        tolerance, rewards = tolerances[dtype], case["rewards"]
        masks = case["attention"], case["mask"]
        for lam, returns, loss in case["lambdas"]:
            x = leaf(case["values"], dtype)
            got = package.compute_lambda_return(x, rewards, masks[1], 0.99, lam)
            check(got, returns, x, case["grad"], tolerance, tolerance, 4 * tolerance)
            got = package.compute_lambda_value_loss(x, rewards, *masks, 0.99, lam)
            check(got, loss, x, None, tolerance, tolerance)
        for loss, outputs, losses in case["probabilities"]:
            x = leaf(outputs, dtype)
            got = package.compute_lambda_value_loss(x, rewards.sigmoid(), *masks, loss=loss, reduction="none")
            check(got, losses, x, torch.ones(()).expand(got.shape), tolerance, tolerance, 20 * tolerance)
for dtypes, logits, rewards, mask, target, wanted in classified:
    for dtype in dtypes:
        x = leaf(logits, dtype)
        got = compute_categorical_value_loss(x, rewards, mask, mask, bins=Bins(target=target))
        torch.testing.assert_close(got.double(), wanted[0], rtol=2e-6, atol=1e-12)
        (grad,) = torch.autograd.grad(got, x)
        torch.testing.assert_close(grad.double(), wanted[1], rtol=tolerances[dtype], atol=tolerances[dtype] / 300)
print("checked")
"""


def answer(value, x, grad=None):
    """A value in float64 and its gradient in x."""
    grad = None if grad is None else grad.double()
    gradient = torch.autograd.grad(value, x, grad, allow_unused=True, materialize_grads=True)[0]
    return value.detach(), gradient


def make_case(dtype, B, T):
    """Inputs that the dtype represents, and what the reference makes of them."""
    values, rewards = torch.randn(B, T).to(dtype), torch.randn(B)
    mask, attention = torch.rand(B, T) < 0.7, torch.rand(B, T) < 0.8
    values, grad = values.float().masked_fill(~mask, torch.nan), torch.randn(B, T).to(dtype).float()
    case = {"values": values, "rewards": rewards, "mask": mask, "attention": attention, "grad": grad}
    case |= {"lambdas": [], "probabilities": []}
    for lam in LAMBDAS:
        x = values.double().masked_fill(~mask, 0.0).requires_grad_()
        wide_rewards = rewards.double().requires_grad_()  # lam = 1 depends on nothing else
        returns = reference.compute_lambda_return(x, wide_rewards, mask, 0.99, lam)
        loss = reference.masked_mse(x, returns.detach(), mask & attention)
        case["lambdas"].append((lam, answer(returns, x, grad), answer(loss, x)))
    for loss in PROBABILITY_LOSSES:
        logits = torch.randn(B, T).mul(6).clamp(-4, 4)
        outputs = (logits.sigmoid() if loss == "bce" else logits).to(dtype).float().masked_fill(~mask, torch.nan)
        x = outputs.double().masked_fill(~mask, 0.5).requires_grad_()
        said = x.detach().sigmoid() if loss == "bce_with_logits" else x.detach()
        targets = reference.compute_lambda_return(said, rewards.sigmoid().double(), mask)
        losses, _ = reference.token_losses(x, targets, mask & attention, loss)
        case["probabilities"].append((loss, outputs, answer(losses, x, torch.ones(B, T))))
    return case


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """A file with inputs and what the reference makes of them, the same for every instruction set."""
    torch.manual_seed(0)
    cases = [(dtypes, make_case(dtypes[1], *size)) for dtypes in ALIKE for size in SIZES]
    classified = []
    for dtypes in ALIKE:
        for K, target in itertools.product((2, 7, 51), ("hl_gauss", "two_hot")):
            logits = torch.randn(2, 300, K).to(dtypes[1]).float()
            rewards, mask, bins = torch.rand(2), torch.rand(2, 300) < 0.7, Bins(target=target)
            x = logits.double().requires_grad_()
            targets = reference.compute_lambda_return(categorical_values(x.detach(), bins), rewards.double(), mask)
            loss = cross_entropy(x[mask], bins.probabilities(targets[mask], K))
            classified.append((dtypes, logits, rewards, mask, target, answer(loss, x)))
    path = tmp_path_factory.mktemp("answers") / "answers.pt"
    torch.save((cases, classified, TOLERANCES), path)
    return path


def run(source, *args, isa):
    environment = {**os.environ, "LAMBDA_RETURN_ISA": isa}
    return subprocess.run([sys.executable, "-c", source, *args], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_agrees_with_the_reference(isa, answers):
    result = run(CHECK, isa, str(answers), isa=isa)
    if "LAMBDA_RETURN_ISA must be one of" in result.stderr and isa != "portable":
        pytest.skip(f"this processor has no {isa}; ctest runs its kernels in halves")
    assert result.stdout == "checked\n", result.stderr


UNKNOWN = """
import torch, lambda_return_ext as package
x = torch.ones(2, 2)
for function in (package.build_info, lambda: package.compute_lambda_return(x, x[0], x)):
    try:
        function()
    except RuntimeError as error:
        print(str(error).splitlines()[0])
"""


def test_an_unknown_instruction_set_is_an_error():
    errors = run(UNKNOWN, isa="sse9").stdout.splitlines()
    assert len(errors) == 2
    for error in errors:
        assert "LAMBDA_RETURN_ISA must be one of the instruction sets of this processor" in error
        assert "portable, got sse9" in error


def test_build_info_names_what_runs():
    info = lambda_return_ext.build_info()
    assert info["instruction_set"] in INSTRUCTION_SETS
    assert info["version"] == lambda_return_ext.__version__
