"""Every instruction set of the CPU kernels through the operators, and the choice among them."""

import os
import subprocess
import sys

import pytest

import lambda_return_ext

INSTRUCTION_SETS = ("portable", "avx2", "avx512")

# Runs in a process of its own, as the choice is made once: every operator against the reference in every dtype.
CHECK = """
import sys
import torch
from torch.nn.functional import cross_entropy
import lambda_return_ext as package
from lambda_return_ext import reference
from lambda_return_ext.categorical import Bins, categorical_values, compute_categorical_value_loss

assert package.build_info()["instruction_set"] == sys.argv[1]
torch.manual_seed(0)
for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
    for B, T in ((3, 37), (2, 1), (5, 256), (1, 17_000)):
        values, rewards = torch.randn(B, T).to(dtype), torch.randn(B)
        mask, attention = torch.rand(B, T) < 0.7, torch.rand(B, T) < 0.8
        values = values.masked_fill(~mask, float("nan"))
        wide = values.double().masked_fill(~mask, 0.0).requires_grad_()
        values.requires_grad_()
        for lam in (0.0, 0.95, 1.0):
            got = package.compute_lambda_return(values, rewards, mask, 0.99, lam)
            wide_rewards = rewards.double().requires_grad_()  # lam = 1 depends on nothing else
            want = reference.compute_lambda_return(wide, wide_rewards, mask, 0.99, lam)
            torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
            grad = torch.randn(B, T).to(dtype)
            (got_grad,) = torch.autograd.grad(got, values, grad)
            (want_grad,) = torch.autograd.grad(want, wide, grad.double(), allow_unused=True, materialize_grads=True)
            torch.testing.assert_close(got_grad.double(), want_grad, rtol=2 * tolerance, atol=4 * tolerance)
            got = package.compute_lambda_value_loss(values, rewards, attention, mask, 0.99, lam)
            want = reference.compute_lambda_value_loss(wide, rewards.double(), attention, mask, 0.99, lam)
            torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
            (got_grad,) = torch.autograd.grad(got, values)
            (want_grad,) = torch.autograd.grad(want, wide)
            torch.testing.assert_close(got_grad.double(), want_grad, rtol=2 * tolerance, atol=tolerance)
        for loss in ("bce", "bce_with_logits"):
            logits = torch.randn(B, T).mul(6).clamp(-4, 4)
            outputs = (logits.sigmoid() if loss == "bce" else logits).to(dtype).masked_fill(~mask, float("nan"))
            wide = outputs.double().masked_fill(~mask, 0.5).requires_grad_()
            outputs.requires_grad_()
            said = wide.detach().sigmoid() if loss == "bce_with_logits" else wide.detach()
            targets = reference.compute_lambda_return(said, rewards.sigmoid().double(), mask)
            counts = mask & attention
            got = package.compute_lambda_value_loss(
                outputs, rewards.sigmoid(), attention, mask, loss=loss, reduction="none"
            )
            want, _ = reference.token_losses(wide, targets, counts, loss)
            torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
            (got_grad,) = torch.autograd.grad(got.sum(), outputs)
            (want_grad,) = torch.autograd.grad(want.sum(), wide)
            torch.testing.assert_close(got_grad.double(), want_grad, rtol=2 * tolerance, atol=20 * tolerance)
    for K in (2, 7, 51):
        logits = torch.randn(2, 300, K).to(dtype).requires_grad_()
        rewards, mask = torch.rand(2), torch.rand(2, 300) < 0.7
        wide = logits.detach().double().requires_grad_()
        for target in ("hl_gauss", "two_hot"):
            bins = Bins(target=target)
            targets = reference.compute_lambda_return(categorical_values(wide.detach(), bins), rewards.double(), mask)
            got = compute_categorical_value_loss(logits, rewards, mask, mask, bins=bins)
            want = cross_entropy(wide[mask], bins.probabilities(targets[mask], K))
            torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-12)
            (got_grad,) = torch.autograd.grad(got, logits)
            (want_grad,) = torch.autograd.grad(want, wide)
            torch.testing.assert_close(got_grad.double(), want_grad, rtol=tolerance, atol=tolerance / 300)
print("checked")
"""


def run(source, *args, isa):
    environment = {**os.environ, "LAMBDA_RETURN_ISA": isa}
    return subprocess.run([sys.executable, "-c", source, *args], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_agrees_with_the_reference(isa):
    result = run(CHECK, isa, isa=isa)
    if "LAMBDA_RETURN_ISA must be one of" in result.stderr and isa != "portable":
        pytest.skip(f"this processor has no {isa}; ctest runs its kernels in halves")
    assert result.stdout == "checked\n", result.stderr


def test_an_unknown_instruction_set_is_an_error():
    result = run("import lambda_return_ext; lambda_return_ext.build_info()", isa="sse9")
    assert "RuntimeError: LAMBDA_RETURN_ISA must be one of the instruction sets of this processor" in result.stderr
    assert "portable, got sse9" in result.stderr
    operator = "import torch, lambda_return_ext as p; x = torch.ones(2, 2); p.compute_lambda_return(x, x[0], x)"
    assert "RuntimeError: LAMBDA_RETURN_ISA must be one of" in run(operator, isa="sse9").stderr


def test_build_info_names_what_runs():
    info = lambda_return_ext.build_info()
    assert info["instruction_set"] in INSTRUCTION_SETS
    assert info["version"] == lambda_return_ext.__version__
