"""What wrong arguments are told, by the public functions (TypeError, ValueError) and by the operators themselves."""

import re
from fractions import Fraction

import pytest
import torch

from lambda_return_ext import (
    compute_lambda_return,
    compute_lambda_value_loss,
    compute_mc_value_loss,
    compute_pairwise_accuracy,
    compute_token_variance,
    create_eos_only_mask,
    explained_variance,
    masked_mse,
    masked_whiten,
    pairwise_ranking_loss,
)

ops = torch.ops.lambda_return

V = torch.full((2, 5), 0.5)
R = torch.ones(2)
M = torch.ones(2, 5, dtype=torch.bool)

# Each public function with the arguments of a good call, by name.
LAMBDA_RETURN = compute_lambda_return, {"values": V, "terminal_rewards": R, "loss_mask": M}
LOSS = (
    compute_lambda_value_loss,
    {"value_logits": V, "terminal_rewards": R, "attention_mask": M, "loss_mask": M},
)
MC_LOSS = compute_mc_value_loss, {"value_logits": V, "rewards": R, "attention_mask": M, "loss_mask": M}
MSE = masked_mse, {"values": V, "targets": V, "mask": M}
EOS = create_eos_only_mask, {"loss_mask": M}
PAIRS = {"v_pos": V, "v_neg": V, "loss_mask_pos": M, "loss_mask_neg": M}
RANKING, ACCURACY = (pairwise_ranking_loss, PAIRS), (compute_pairwise_accuracy, PAIRS)
VARIANCE = compute_token_variance, {"values": V, "mask": M}
FUNCTIONS = [LAMBDA_RETURN, LOSS, MC_LOSS, MSE, EOS, RANKING, ACCURACY, VARIANCE]

TENSORS = [(call, name) for call in FUNCTIONS for name in call[1]]
VALUES = [(call, name) for call, name in TENSORS if name in ("values", "value_logits", "v_pos", "v_neg")]
REWARDS = [(call, name) for call, name in TENSORS if "rewards" in name]
MASKS = [(call, name) for call, name in TENSORS if "mask" in name and call is not EOS]
ROWS_ONLY = (compute_lambda_return,)  # takes no [B, T, 1]


def check(call, changes, error, message):
    function, arguments = call
    function(**arguments)  # the call is good without the changes
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        function(**{**arguments, **changes})


def parametrize(cases):
    return pytest.mark.parametrize(("call", "name"), cases, ids=[f"{call[0].__name__}-{name}" for call, name in cases])


# ---- public functions --------------------------------------------------------------------------------------------


@parametrize(TENSORS)
def test_no_tensor(call, name):
    check(call, {name: [[1.0]]}, TypeError, f"{name} must be a torch.Tensor, got list")
    check(call, {name: None}, TypeError, f"{name} must be a torch.Tensor, got NoneType")


@parametrize(VALUES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_dtype_of_values(call, name, dtype):
    message = f"{name} must be float32, bfloat16, float16 or float64, got {dtype}"
    check(call, {name: V.to(dtype)}, TypeError, message)


@parametrize([*REWARDS, *MASKS, (EOS, "loss_mask"), (MSE, "targets")])
def test_complex(call, name):
    message = f"{name} must have a real dtype, got torch.complex64"
    check(call, {name: call[1][name].to(torch.complex64)}, TypeError, message)


@parametrize(VALUES)
@pytest.mark.parametrize("shape", [(10,), (2, 5, 2), (1, 2, 5, 1), ()], ids=str)
def test_shape_of_values(call, name, shape):
    wanted = "[B, T]" if call[0] in ROWS_ONLY else "[B, T] or [B, T, 1]"
    message = f"{name} must have shape {wanted}, got {list(shape)}"
    check(call, {name: torch.zeros(shape)}, ValueError, message)


def test_returns_of_a_value_head_output():
    """Unlike a loss, a return has the shape of its values, so the trailing dimension is not guessed away."""
    message = "values must have shape [B, T], got [2, 5, 1]"
    check(LAMBDA_RETURN, {"values": V[..., None]}, ValueError, message)


@parametrize(REWARDS)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1), (2, 5)], ids=str)
def test_shape_of_rewards(call, name, shape):
    message = f"{name} must have shape [B] = [2], got {list(shape)}"
    check(call, {name: torch.ones(shape)}, ValueError, message)


@parametrize([*MASKS, (MSE, "targets")])
@pytest.mark.parametrize("shape", [(2, 4), (1, 5), (5, 2), (5,), (2, 5, 2)], ids=str)
def test_shape_of_masks(call, name, shape):
    """Nothing is broadcast: a mask of another shape is a mistake."""
    message = f"{name} must have the shape of the values, [2, 5], got {list(shape)}"
    check(call, {name: torch.ones(shape)}, ValueError, message)


@pytest.mark.parametrize("shape", [(5,), (2, 5, 1)], ids=str)
def test_shape_of_eos_mask(shape):
    message = f"loss_mask must have shape [B, T], got {list(shape)}"
    check(EOS, {"loss_mask": torch.ones(shape)}, ValueError, message)


@parametrize([*REWARDS, *MASKS, (MSE, "targets")])
def test_device(call, name):
    message = f"{name} must be on the device of the values, cpu, got meta"
    check(call, {name: call[1][name].to("meta")}, ValueError, message)


A_DISCOUNT = "must be a float or a float32, bfloat16, float16 or float64 tensor"


@pytest.mark.parametrize("gamma_or_lam", ["gamma", "lam"])
@pytest.mark.parametrize("call", [LAMBDA_RETURN, LOSS], ids=["return", "loss"])
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (-0.1, ValueError, "must be in [0, 1], got -0.1"),
        (1.0000001, ValueError, "must be in [0, 1], got 1.0000001"),
        (2, ValueError, "must be in [0, 1], got 2.0"),
        (float("nan"), ValueError, "must be in [0, 1], got nan"),
        (float("inf"), ValueError, "must be in [0, 1], got inf"),
        ("0.5", TypeError, "must be a float, got str"),
        (None, TypeError, "must be a float, got NoneType"),
        (True, TypeError, "must be a float, got bool"),
        (0.5j, TypeError, "must be a float, got complex"),
        (torch.tensor(1), TypeError, f"{A_DISCOUNT}, got torch.int64"),
        (torch.tensor(0.5).to(torch.float8_e5m2), TypeError, f"{A_DISCOUNT}, got torch.float8_e5m2"),
        (torch.tensor(1.5), ValueError, "must be in [0, 1], got 1.5"),
        (torch.ones(5), ValueError, "must be a float, 0-dim or of shape [B] = [2], got [5]"),
        (torch.tensor(0.5, device="meta"), ValueError, "must be on the device of the values, cpu, got meta"),
    ],
    ids=str,
)
def test_gamma_and_lam(call, gamma_or_lam, x, error, message):
    check(call, {gamma_or_lam: x}, error, f"{gamma_or_lam} {message}")


def test_any_real_number_is_a_gamma():
    expected = compute_lambda_return(V, R, M, 1.0, 0.5)
    assert torch.equal(compute_lambda_return(V, R, M, 1, Fraction(1, 2)), expected)


@pytest.mark.parametrize(
    ("dtype", "target_dtype", "wanted"),
    [
        (torch.float32, torch.float64, "torch.float32"),
        (torch.float32, torch.bfloat16, "torch.float32"),
        (torch.float32, torch.int64, "torch.float32"),
        (torch.float64, torch.float32, "torch.float64"),
        (torch.bfloat16, torch.float16, "torch.bfloat16 or torch.float32"),
        (torch.float16, torch.float64, "torch.float16 or torch.float32"),
    ],
    ids=str,
)
def test_dtype_of_targets(dtype, target_dtype, wanted):
    message = f"targets must be {wanted} for values of {dtype}, got {target_dtype}"
    check(MSE, {"values": V.to(dtype), "targets": V.to(target_dtype)}, TypeError, message)


@pytest.mark.parametrize("call", [RANKING, ACCURACY], ids=["ranking", "accuracy"])
def test_different_numbers_of_pairs(call):
    message = "v_neg must have as many rows as v_pos, 2, got 1"
    check(call, {"v_neg": V[:1], "loss_mask_neg": M[:1]}, ValueError, message)


@pytest.mark.parametrize("call", [RANKING, ACCURACY], ids=["ranking", "accuracy"])
def test_pairs_on_different_devices(call):
    function, arguments = call
    with pytest.raises(ValueError, match=r"v_neg must be on the device of v_pos, cpu, got meta"):
        function(**{**arguments, "v_neg": V.to("meta"), "loss_mask_neg": M.to("meta")})


WHITEN = masked_whiten, {"x": V, "mask": M}


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_whitening_of_no_floats(dtype):
    message = f"x must be float32, bfloat16, float16 or float64, got {dtype}"
    check(WHITEN, {"x": torch.ones(2, 5).to(dtype)}, TypeError, message)
    check(WHITEN, {"x": torch.ones(2, 5).to(dtype), "mask": None}, TypeError, message)


def test_whitening_of_a_mask_of_another_shape_or_device():
    check(WHITEN, {"mask": M[0]}, ValueError, "mask must have the shape of x, [2, 5], got [5]")
    check(WHITEN, {"mask": M.to("meta")}, ValueError, "mask must be on the device of x, cpu, got meta")
    check(WHITEN, {"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list")


@pytest.mark.parametrize(
    ("statistics", "error", "message"),
    [
        ([1.0] * 6, TypeError, "statistics must be a torch.Tensor, got list"),
        (torch.ones(6, dtype=torch.int64), TypeError, "statistics must be floating, got torch.int64"),
        (torch.ones(5), ValueError, "statistics must have shape [..., 6], got [5]"),
        (torch.ones(()), ValueError, "statistics must have shape [..., 6], got []"),
    ],
    ids=["list", "int64", "5", "0-dim"],
)
def test_explained_variance(statistics, error, message):
    check((explained_variance, {"statistics": torch.ones(6)}), {"statistics": statistics}, error, message)


# ---- the operators themselves: nothing is read or written out of bounds ------------------------------------------

ONE, COUNT = torch.tensor(1.0), torch.tensor(10)
OPERATORS = {
    "lambda_return": {"values": V, "terminal_rewards": R, "mask": M},
    "lambda_return_backward": {"grad_returns": V, "mask": M},
    "lambda_value_loss": {"values": V, "terminal_rewards": R, "attention_mask": M, "loss_mask": M},
    "lambda_value_loss_backward": {
        "grad_loss": ONE,
        "num_tokens": COUNT,
        "values": V,
        "terminal_rewards": R,
        "attention_mask": M,
        "loss_mask": M,
    },
    "masked_mse": {"values": V, "targets": V, "mask": M},
    "masked_mse_backward": {"grad_loss": ONE, "num_tokens": COUNT, "values": V, "targets": V, "mask": M},
    "eos_mask": {"mask": M},
}
ARGUMENTS = [(op, name) for op, arguments in OPERATORS.items() for name in arguments]
FIRST = ("values", "grad_returns")  # what the other arguments are compared with


def operator_raises(op, changes, message):
    getattr(ops, op)(**OPERATORS[op])  # the call is good without the changes
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, op)(**{**OPERATORS[op], **changes})


@pytest.mark.parametrize(("op", "name"), [x for x in ARGUMENTS if x[1] in FIRST])
def test_operator_values(op, name):
    operator_raises(op, {name: V[0]}, rf"{name} must be \[B, T\], got 1 dimensions")
    operator_raises(op, {name: V[None]}, rf"{name} must be \[B, T\], got 3 dimensions")
    operator_raises(op, {name: V[:, :4]}, r"must have the shape of .*, \[2, 4\], got \[2, 5\]")
    operator_raises(op, {name: V[:1]}, r"must have the shape of .*, \[1, 5\], got \[2, 5\]")
    for dtype in (torch.int64, torch.complex64):
        operator_raises(op, {name: V.to(dtype)}, "not implemented for|must have the dtype of values")


@pytest.mark.parametrize(("op", "name"), [x for x in ARGUMENTS if "mask" in x[1] or x[1] == "targets"])
def test_operator_masks_and_targets(op, name):
    x = OPERATORS[op][name]
    operator_raises(op, {name: x[0]}, rf"{name} must be \[B, T\], got 1 dimensions")
    operator_raises(op, {name: x[None]}, rf"{name} must be \[B, T\], got 3 dimensions")
    if op != "eos_mask":
        operator_raises(op, {name: x[:, :4]}, rf"{name} must have the shape of \w+, \[2, 5\], got \[2, 4\]")
        operator_raises(op, {name: x[:1]}, rf"{name} must have the shape of \w+, \[2, 5\], got \[1, 5\]")


@pytest.mark.parametrize(("op", "name"), [x for x in ARGUMENTS if x[1] == "terminal_rewards"])
def test_operator_rewards(op, name):
    operator_raises(op, {name: R[:1]}, r"terminal_rewards must be \[B\] = \[2\], got 1 elements in 1 dimensions")
    operator_raises(op, {name: R[:, None]}, r"terminal_rewards must be \[B\] = \[2\], got 2 elements in 2 dimensions")
    operator_raises(op, {name: ONE}, r"terminal_rewards must be \[B\] = \[2\], got 1 elements in 0 dimensions")


@pytest.mark.parametrize(
    ("op", "name"), [x for x in ARGUMENTS if x[0] != "eos_mask" and ("mask" in x[1] or x[1] == "terminal_rewards")]
)
def test_operator_complex(op, name):
    operator_raises(op, {name: OPERATORS[op][name].to(torch.complex64)}, "must have a real dtype")


@pytest.mark.parametrize(("op", "name"), [x for x in ARGUMENTS if x[1] in ("grad_loss", "num_tokens")])
def test_operator_scalars(op, name):
    operator_raises(op, {name: torch.ones(0)}, rf"{name} must be 0-dim, got 1 dimensions")
    operator_raises(op, {name: V}, rf"{name} must be 0-dim, got 2 dimensions")


@pytest.mark.parametrize("op", ["masked_mse", "masked_mse_backward"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64], ids=str)
def test_operator_dtype_of_targets(op, dtype):
    operator_raises(op, {"targets": V.to(dtype)}, "targets must have the dtype of values or its accumulation dtype")


def test_operator_eos_mask_of_complex():
    operator_raises("eos_mask", {"mask": V.to(torch.complex64)}, '"eos_mask" not implemented for')


@pytest.mark.parametrize(("op", "name"), [x for x in ARGUMENTS if x[0] != "eos_mask" and x[1] not in FIRST])
def test_operator_devices(op, name):
    """A meta tensor has no data; torch's own operators refuse one beside CPU tensors."""
    operator_raises(op, {name: OPERATORS[op][name].to("meta")}, "device")


def test_eos_mask_of_an_unsupported_float():
    with pytest.raises(TypeError, match=r"loss_mask must be float32, .* if floating, got torch.float8_e4m3fn"):
        create_eos_only_mask(torch.ones(1, 2).to(torch.float8_e4m3fn))
