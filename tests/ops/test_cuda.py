"""The contract of every operator again, on the device. Everything is compared with the CPU operators in float64.

All of it is skipped without a CUDA device or without the CUDA kernels, with the reason. Under compute-sanitizer:
``compute-sanitizer --tool racecheck python -m pytest -m "not profiler" -k "not 2_to_the_31" tests/ops/test_cuda.py``
and the other tools as in docs/cuda.md.
"""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from ops_testing import (
    DISCOUNTS,
    HALF_DTYPES,
    LAYOUTS,
    MASK_DTYPES,
    MASK_KINDS,
    OPCHECK_DTYPES,
    PROPERTY,
    VALUE_DTYPES,
    Batch,
    batches,
    leaf,
    make_batch,
    make_grad,
    mask_as,
    poisoned,
    unit_floats,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import lambda_return_ext as lr
from lambda_return_ext._registrations import LOSS_KINDS, REDUCTIONS

ops = torch.ops.lambda_return
CUDA_KERNELS = torch.cuda.is_available() and lr._cuda.available
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not CUDA_KERNELS, reason="needs a CUDA device and the CUDA kernels (FORCE_CUDA=1 pip install ...)"
    ),
]

# Around the edges of a thread's 8 (float64: 4) tokens, a warp's 256, a block's 2048 and the look-back's segments.
LENGTHS = (1, 3, 7, 8, 9, 255, 256, 257, 511, 513, 1025, 2047, 2048, 2049, 4095, 4097, 6145, 65537)
ROWS = (1, 2, 5, 33)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def on(batch: Batch, device: str = "cuda") -> Batch:
    return Batch(*(x.to(device) for x in batch))


def all_outputs(
    batch: Batch, gamma: float, lam: float, dtype: torch.dtype | None = None, grad: Tensor | None = None
) -> dict[str, Tensor]:
    """Every output and gradient of every operator, on the batch's device, computed in dtype."""
    if grad is None:
        grad = make_grad(Batch(*(x.cpu() for x in batch))).to(batch.values.device, dtype)
    batch = batch._replace(values=batch.values.to(dtype or batch.values.dtype))
    values, rewards, _, mask = batch
    returns = ops.lambda_return(values, rewards, mask, gamma, lam)
    grad_values, grad_rewards = ops.lambda_return_backward(grad, mask, gamma, lam)
    loss, count = ops.lambda_value_loss(*batch, gamma, lam)
    targets = torch.full_like(values, 0.25)
    mse, mse_count = ops.masked_mse(values, targets, mask)
    return {
        "returns": returns,
        "grad_values": grad_values,
        "grad_rewards": grad_rewards,
        "loss": loss,
        "count": count,
        "loss_grad": ops.lambda_value_loss_backward(torch.ones_like(loss), count, *batch, gamma, lam),
        "mse": mse,
        "mse_count": mse_count,
        "mse_grad": ops.masked_mse_backward(torch.ones_like(mse), mse_count, values, targets, mask),
        "eos": ops.eos_mask(mask),
    }


def assert_like_cpu(batch: Batch, gamma: float = 1.0, lam: float = 0.95, moved: Batch | None = None) -> None:
    """Compare with the CPU in float64; moved is the batch on the device where its layout is another."""
    dtype = batch.values.dtype
    exact = all_outputs(batch, gamma, lam, dtype=torch.float64)
    for name, actual in all_outputs(on(batch) if moved is None else moved, gamma, lam).items():
        assert actual.is_cuda
        if name in ("count", "mse_count", "eos"):
            assert torch.equal(actual.cpu(), exact[name].to(actual.dtype)), name
        else:
            error = (actual.cpu().double() - exact[name]).abs()
            assert (error <= TOLERANCE[dtype] * exact[name].abs().clamp(min=1.0)).all(), (name, error.max())


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("B", ROWS)
@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
def test_every_shape(dtype, B, T):
    assert_like_cpu(make_batch("conversation", B, T, dtype))


@given(batch=batches(), gamma=unit_floats, lam=unit_floats)
@PROPERTY
def test_property(batch, gamma, lam):
    assert_like_cpu(batch, gamma, lam)


def test_a_tensor_on_another_device_is_named():
    values, rewards, attention_mask, mask = make_batch("gaps", 3, 9, torch.float32)
    values, rewards = values.cuda(), rewards.cuda()
    message = "loss_mask must be on the device of the values, cuda:0, got cpu"
    for lam in (0.95, torch.tensor(0.95, device="cuda")):
        with pytest.raises(ValueError, match=message):
            lr.compute_lambda_return(values, rewards, mask, 1.0, lam)
        with pytest.raises(ValueError, match=message):
            lr.compute_lambda_value_loss(values, rewards, attention_mask.cuda(), mask, 1.0, lam)
    with pytest.raises(ValueError, match="lam must be on the device of the values, cuda:0, got cpu"):
        lr.compute_lambda_return(values, rewards, mask.cuda(), 1.0, torch.tensor(0.95))
    with pytest.raises(RuntimeError, match="device"):
        ops.lambda_return(values, rewards, mask)


@pytest.mark.parametrize(("gamma", "lam"), DISCOUNTS)
@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize("shape", [(3, 300), (600, 37), (2, 9000)])
def test_every_mask_and_discount(shape, kind, gamma, lam):
    assert_like_cpu(make_batch(kind, *shape, torch.float32), gamma, lam)


@pytest.mark.parametrize("shape", [(4096, 40), (513, 700), (5000, 1200), (16, 70001)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_launch_plan(dtype, shape):
    assert_like_cpu(make_batch("gaps", *shape, dtype))


# ---- the general operators: packed sequences, rewards, a discount a row, every loss ----


class General(NamedTuple):
    """The tensors that the general operators take; values, old, grad, rewards and masks are [B, T] or [total]."""

    values: Tensor
    old: Tensor
    grad: Tensor
    rewards: Tensor
    mask: Tensor
    attention_mask: Tensor
    terminal: Tensor  # [B]
    gamma: Tensor  # [B]
    lam: Tensor  # 0-dim
    other_lam: Tensor  # 0-dim
    one: Tensor  # 0-dim, the gradient of a loss
    cu_seqlens: Tensor | None  # [B + 1]


def general_inputs(
    lengths: tuple[int, ...], packed: bool, dtype: torch.dtype, device: str, kind: int = 1, seed: int = 0
) -> General:
    """Sequences of these lengths, all of one length unless packed."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    shape = (1, sum(lengths)) if packed else (len(lengths), lengths[0])
    batch = make_batch("gaps", *shape, torch.bfloat16, seed)
    narrow = [make_grad(batch, 4 * seed + i) for i in range(4)]  # exact in all dtypes but float16, which has the range
    flat = [x.view(-1) if packed else x for x in (*narrow, batch.loss_mask, batch.attention_mask)]
    values, old, grad, rewards = (x.to(device, dtype) for x in flat[:4])
    if kind == 3:  # probabilities, in steps that every dtype has
        values = (values.float().abs() * 16).floor().remainder(15).add(1).div(16).to(dtype)
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return General(
        values,
        old,
        grad,
        rewards.to(acc) / 16,
        *(x.to(device) for x in flat[4:]),
        ((torch.arange(len(lengths)) + seed) % 5 / 8).to(device, acc),
        (1 - (torch.arange(len(lengths), dtype=torch.float64) + seed) % 7 / 500).to(device),
        *(torch.tensor(x + seed / 50, dtype=torch.float64, device=device) for x in (0.875, 0.5)),
        torch.ones((), dtype=acc, device=device),
        starts.to(device) if packed else None,
    )


def general_outputs(inputs: General, kind: int = 1, reduction: int = 1) -> dict[str, Tensor]:
    """Every output of every general operator."""
    values, old, grad, rewards, mask, attention_mask, terminal, gamma, lam, other_lam, one, cu_seqlens = inputs
    scan = (values, terminal, mask, rewards, cu_seqlens, gamma)
    loss_inputs = (values, terminal, mask, attention_mask, rewards, old if kind < 3 else None, cu_seqlens, gamma, lam)
    options = {"kind": kind, "delta": 0.75, "clip_range": 0.25, "reduction": reduction}
    pair = ops.td_lambda_pair(*scan, lam, other_lam)
    adjoint = ops.td_lambda_backward(grad, mask, cu_seqlens, gamma, lam, True)
    loss, scale, statistics = ops.td_lambda_loss(*loss_inputs, None, **options)
    return {
        "returns": ops.td_lambda(*scan, lam),
        "advantages": ops.td_lambda(*scan, lam, True),
        "pair returns": pair[0],
        "pair advantages": pair[1],
        "map": ops.td_lambda_map(values, mask, rewards, cu_seqlens, gamma, lam),
        "grad_values": adjoint[0],
        "grad_terminal_rewards": adjoint[1],
        "grad_rewards": adjoint[2],
        "loss": loss,
        "scale": scale,
        "statistics": statistics,
        "loss gradient": ops.td_lambda_loss_backward(one.expand(loss.shape), scale, *loss_inputs, **options),
    }


def assert_general_like_cpu(
    lengths: tuple[int, ...], packed: bool, dtype: torch.dtype, kind: int = 1, reduction: int = 1
) -> None:
    exact = general_outputs(general_inputs(lengths, packed, torch.float64, "cpu", kind), kind, reduction)
    actual_outputs = general_outputs(general_inputs(lengths, packed, dtype, "cuda", kind), kind, reduction)
    for name, actual in actual_outputs.items():
        assert actual.is_cuda
        error = (actual.cpu().double() - exact[name]).abs()
        largest = exact[name].abs().max().clamp(min=1.0)
        assert (error <= TOLERANCE[dtype] * largest).all(), (name, error.max())


GENERAL_SHAPES = {
    "rows": ((300,) * 5, False),
    "long rows": ((9001,) * 2, False),
    "packed": ((5, 0, 17, 1, 0, 300, 8, 0), True),
    "long packed": ((0, 90_001, 1, 0, 5000, 2048, 2047, 2049, 0), True),
    "many packed": ((3, 0, 11, 1200) * 300, True),
}


@pytest.mark.parametrize("shape", GENERAL_SHAPES)
@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
def test_general_shapes(dtype, shape):
    assert_general_like_cpu(*GENERAL_SHAPES[shape], dtype)


@pytest.mark.parametrize("reduction", range(4))
@pytest.mark.parametrize("kind", range(5))
def test_general_losses(kind, reduction):
    for shape in ("rows", "long packed"):
        assert_general_like_cpu(*GENERAL_SHAPES[shape], torch.float32, kind, reduction)


@pytest.mark.parametrize("shape", GENERAL_SHAPES)
def test_general_same_bits_from_run_to_run(shape):
    inputs = general_inputs(*GENERAL_SHAPES[shape], torch.float32, "cuda")
    first = general_outputs(inputs)
    for _ in range(10):
        assert all(torch.equal(x, first[name]) for name, x in general_outputs(inputs).items())


@pytest.mark.parametrize("shape", ["rows", "long packed"])
def test_general_nothing_at_a_masked_position_is_used(shape):
    clean = general_inputs(*GENERAL_SHAPES[shape], torch.float32, "cpu")
    dirty = {name: poisoned(getattr(clean, name), clean.mask) for name in ("values", "old", "grad", "rewards")}
    outputs = [
        general_outputs(General(*(None if x is None else x.to("cuda") for x in inputs)))
        for inputs in (clean, clean._replace(**dirty))
    ]
    assert all(torch.equal(x, outputs[1][name]) for name, x in outputs[0].items())


@pytest.mark.parametrize(("lengths", "packed"), [((0, 0, 0), False), ((0, 0), True), ((), True)])
@pytest.mark.parametrize("reduction", range(4))
def test_general_empty(lengths, packed, reduction):
    outputs = general_outputs(general_inputs(lengths, packed, torch.float32, "cuda"), reduction=reduction)
    assert outputs["returns"].numel() == outputs["loss gradient"].numel() == 0
    assert (outputs["loss"] == 0).all()
    assert (outputs["statistics"] == 0).all()
    assert (outputs["grad_terminal_rewards"] == 0).all()
    assert outputs["map"].tolist() == [[1.0, 0.0]] * len(lengths)


def test_general_opcheck():
    inputs = general_inputs((3, 0, 4), True, torch.float32, "cuda")
    values, old, grad, rewards, mask, attention_mask, terminal, gamma, lam, other_lam, one, cu_seqlens = inputs
    scan = (mask, rewards, cu_seqlens, gamma, lam)
    loss_inputs = (values, terminal, mask, attention_mask, rewards, old, cu_seqlens, gamma, lam)
    scale = ops.td_lambda_loss(*loss_inputs, None, clip_range=0.25)[1]
    opcheck(ops.td_lambda.default, (leaf(values), leaf(terminal), *scan, True))
    opcheck(ops.td_lambda_pair.default, (values, terminal, *scan, other_lam))
    opcheck(ops.td_lambda_map.default, (values, *scan))
    opcheck(ops.td_lambda_backward.default, (leaf(grad), mask, cu_seqlens, gamma, lam, True))
    opcheck(ops.td_lambda_loss.default, (leaf(values), *loss_inputs[1:], None, 0, 1.0, 0.25, 0))
    opcheck(ops.td_lambda_loss_backward.default, (one, scale, *loss_inputs, 0, 1.0, 0.25, 0))


@pytest.mark.parametrize("starts", [[9, 0, 9, 0], [0, 5000, 0, 5000], [-(2**62), 2**62, 3, -1]])
def test_offsets_out_of_order_stay_inside(starts):
    values, terminal = torch.ones(5000, device="cuda"), torch.ones(3, device="cuda")
    gamma = torch.tensor(0.9, dtype=torch.float64, device="cuda")
    cu_seqlens = torch.tensor(starts, device="cuda")
    ops.td_lambda(values, terminal, None, None, cu_seqlens, gamma, gamma)
    ops.td_lambda_loss(values, terminal, None, None, None, None, cu_seqlens, gamma, gamma, None, reduction=1)
    torch.cuda.synchronize()


# ---- values as classification ----


def categorical_inputs(
    lengths: tuple[int, ...], packed: bool, dtype: torch.dtype, device: str, K: int = 51, seed: int = 0
) -> tuple[Tensor | None, ...]:
    """Logits, in steps that every dtype has, and the members of General."""
    general = general_inputs(lengths, packed, dtype, device, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-48, 49, (*general.mask.shape, K), generator=generator) / 16
    return logits.to(device, dtype), *general


def categorical_outputs(inputs: tuple[Tensor | None, ...], kind: int = 0, reduction: int = 1) -> dict[str, Tensor]:
    """Every output of the classification loss, and its gradient."""
    logits, general = inputs[0], General(*inputs[1:])
    options = (kind, -0.5, 1.5, 0.75, reduction)
    scan = (general.terminal, general.mask, general.attention_mask, general.rewards, general.cu_seqlens)
    discount = (general.gamma, general.lam)
    names = ("loss", "scale", "statistics", "returns", "log_sums")
    outputs = dict(zip(names, ops.categorical_value_loss(logits, *scan, *discount, None, *options), strict=True))
    grad_loss = general.one.expand(outputs["loss"].shape)
    saved = (outputs["scale"], logits, outputs["returns"], outputs["log_sums"], general.cu_seqlens)
    outputs["gradient"] = ops.categorical_value_loss_backward(grad_loss, *saved, *options)
    return outputs


@pytest.mark.parametrize("shape", GENERAL_SHAPES)
@pytest.mark.parametrize("K", [2, 21, 51, 64, 300])
@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
def test_categorical_shapes(dtype, K, shape):
    for turn, kind in enumerate((0, 1)):
        reduction = (K + turn) % 4
        exact = categorical_outputs(
            categorical_inputs(*GENERAL_SHAPES[shape], torch.float64, "cpu", K), kind, reduction
        )
        found = categorical_outputs(categorical_inputs(*GENERAL_SHAPES[shape], dtype, "cuda", K), kind, reduction)
        for name, actual in found.items():
            assert actual.is_cuda
            uncounted = exact[name].isinf()
            assert torch.equal(actual.cpu().isinf(), uncounted), name
            error = (actual.cpu().double() - exact[name])[~uncounted].abs()
            largest = exact[name][~uncounted].abs().max().clamp(min=1e-6 if name == "gradient" else 1.0)
            # The returns are in float32 whatever the logits are.
            tolerance = TOLERANCE[dtype if name == "gradient" or dtype == torch.float64 else torch.float32]
            assert (error <= tolerance * max(1, K / 16) * largest).all(), (name, error.max())


@pytest.mark.parametrize("shape", ["rows", "long rows", "long packed"])
def test_categorical_same_bits_from_run_to_run(shape):
    inputs = categorical_inputs(*GENERAL_SHAPES[shape], torch.float32, "cuda")
    first = categorical_outputs(inputs)
    for _ in range(10):
        assert all(torch.equal(x, first[name]) for name, x in categorical_outputs(inputs).items())


@pytest.mark.parametrize("shape", ["rows", "long packed"])
def test_categorical_nothing_at_a_masked_position_is_used(shape):
    clean = categorical_inputs(*GENERAL_SHAPES[shape], torch.float32, "cuda")
    logits = torch.where(General(*clean[1:]).mask[..., None] != 0, clean[0], float("nan"))
    dirty = categorical_outputs((logits, *clean[1:]))
    assert all(torch.equal(x, dirty[name]) for name, x in categorical_outputs(clean).items())


def test_categorical_layouts():
    inputs = categorical_inputs(*GENERAL_SHAPES["rows"], torch.bfloat16, "cuda")
    expected, logits = categorical_outputs(inputs), inputs[0]
    views = {
        "shifted": torch.cat([logits[:, :1], logits], 1)[:, 1:],
        "transposed": logits.transpose(0, 1).contiguous().transpose(0, 1),
        "strided bins": torch.stack([logits, logits], -1)[..., 0],
        "apart": torch.cat([logits, logits[..., :3]], -1)[..., :-3],
    }
    for layout, view in views.items():
        for name, x in categorical_outputs((view, *inputs[1:])).items():
            torch.testing.assert_close(x, expected[name], msg=f"{layout}: {name}", rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize(("lengths", "packed"), [((0, 0, 0), False), ((0, 0), True), ((), True)])
@pytest.mark.parametrize("reduction", range(4))
def test_categorical_empty(lengths, packed, reduction):
    outputs = categorical_outputs(categorical_inputs(lengths, packed, torch.float32, "cuda"), 0, reduction)
    assert outputs["returns"].numel() == outputs["gradient"].numel() == 0
    assert (outputs["loss"] == 0).all()
    assert (outputs["statistics"] == 0).all()


@pytest.mark.parametrize("starts", [[9, 0, 9, 0], [0, 5000, 0, 5000], [-(2**62), 2**62, 3, -1]])
def test_categorical_offsets_out_of_order_stay_inside(starts):
    inputs = list(categorical_inputs((5000, 0, 0), True, torch.float32, "cuda", K=3))
    inputs[-1] = torch.tensor(starts, device="cuda")
    for reduction in range(4):
        categorical_outputs(tuple(inputs), 0, reduction)
    torch.cuda.synchronize()


def test_categorical_opcheck():
    inputs = categorical_inputs((3, 0, 4), True, torch.float32, "cuda", K=5)
    logits, general = inputs[0], General(*inputs[1:])
    scan = (general.terminal, general.mask, None, general.rewards, general.cu_seqlens, general.gamma, general.lam, None)
    opcheck(ops.categorical_value_loss.default, (leaf(logits), *scan))
    _loss, scale, _statistics, returns, log_sums = ops.categorical_value_loss(logits, *scan)
    saved = (scale, logits, returns, log_sums, general.cu_seqlens)
    opcheck(ops.categorical_value_loss_backward.default, (general.one, *saved))


@pytest.mark.profiler
def test_categorical_is_two_kernels_forward_and_one_backward():
    inputs = categorical_inputs(*GENERAL_SHAPES["rows"], torch.float32, "cuda")
    categorical_outputs(inputs)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        categorical_outputs(inputs)
        torch.cuda.synchronize()
    events = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert sum("lambda_return::cuda" in name for name in events) == 3, events


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
def test_every_mask_dtype(mask_dtype):
    batch = make_batch("gaps", 3, 700, torch.float32)
    assert_like_cpu(batch._replace(loss_mask=mask_as(batch.loss_mask, mask_dtype)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_layout(layout, dtype):
    batch = make_batch("gaps", 5, 517, dtype)
    view = LAYOUTS[layout]
    device = Batch(view(batch.values), batch.rewards, view(batch.attention_mask), view(batch.loss_mask))
    moved = Batch(*(x.to("cuda").as_strided(x.shape, x.stride()) if x.is_contiguous() else _move(x) for x in device))
    assert_like_cpu(batch, moved=moved)
    # Layouts that are copied have the bits of the copy. Rows that are not aligned alike lie in other chunks, and round
    # otherwise, but not from run to run.
    same = [moved, on(batch)] if moved.values.stride(1) != 1 else [moved]
    first = all_outputs(moved, 1.0, 0.95)
    for other in same:
        assert all(torch.equal(x, first[name]) for name, x in all_outputs(other, 1.0, 0.95).items())


def _move(x: Tensor) -> Tensor:
    """x on the device with the very same strides and offset, which Tensor.to does not keep."""
    base = torch.empty(x.untyped_storage().nbytes() // x.element_size(), dtype=x.dtype)
    base.copy_(torch.as_strided(x, base.shape, (1,), 0))
    return base.cuda().as_strided(x.shape, x.stride(), x.storage_offset())


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty(shape):
    outputs = all_outputs(on(make_batch("dense", *shape, torch.float32)), 1.0, 0.95)
    assert outputs["loss"] == 0
    assert outputs["count"] == 0
    assert (outputs["grad_rewards"] == 0).all()


@pytest.mark.parametrize("shape", [(3, 300), (2, 9001)])
def test_nothing_at_a_masked_position_is_used(shape):
    batch = make_batch("conversation", *shape, torch.float32)
    dirty = batch._replace(values=poisoned(batch.values, batch.loss_mask))
    clean, poison = (all_outputs(on(b), 1.0, 0.95) for b in (batch, dirty))
    assert all(torch.equal(clean[name], poison[name]) for name in clean)


@pytest.mark.parametrize("shape", [(64, 100), (700, 3000), (3, 100_001)])
@pytest.mark.parametrize("dtype", VALUE_DTYPES, ids=str)
def test_same_bits_from_run_to_run(dtype, shape):
    batch = on(make_batch("gaps", *shape, dtype))
    first = all_outputs(batch, 1.0, 0.95)
    for _ in range(10):
        assert all(torch.equal(x, first[name]) for name, x in all_outputs(batch, 1.0, 0.95).items())


def test_gradcheck():
    values, rewards, attention_mask, mask = on(make_batch("gaps", 3, 9))
    values, rewards = leaf(values), leaf(rewards)
    returns = lambda v, r: lr.compute_lambda_return(v, r, mask, 0.9, 0.8)  # noqa: E731
    assert gradcheck(returns, (values, rewards))
    assert gradgradcheck(returns, (values, rewards))
    assert gradcheck(lambda v: lr.compute_mc_value_loss(v, rewards.detach(), attention_mask, mask), (values,))


@pytest.mark.parametrize("dtypes", OPCHECK_DTYPES, ids=str)
def test_opcheck(dtypes):
    batch = make_batch("gaps", 3, 9, dtypes[0])
    batch = on(batch._replace(loss_mask=mask_as(batch.loss_mask, dtypes[1])))
    values, rewards, _, mask = batch
    loss, count = ops.lambda_value_loss(*batch)
    opcheck(ops.lambda_return.default, (leaf(values), leaf(rewards), mask, 0.9, 0.8))
    opcheck(ops.lambda_return_backward.default, (leaf(values), mask, 0.9, 0.8))
    opcheck(ops.lambda_value_loss.default, (leaf(values), *batch[1:], 0.9, 0.8))
    opcheck(ops.lambda_value_loss_backward.default, (loss, count, *batch, 0.9, 0.8))
    opcheck(ops.masked_mse.default, (leaf(values), values, mask))
    opcheck(ops.masked_mse_backward.default, (loss, count, values, values, mask))
    opcheck(ops.eos_mask.default, (mask,))


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_compile_whole_with_dynamic_shapes():
    torch._dynamo.reset()
    compiled = torch.compile(lr.compute_lambda_value_loss, fullgraph=True, dynamic=True)
    for i, (B, T) in enumerate(((3, 20), (4, 33), (7, 9000))):
        batch = on(make_batch("gaps", B, T, torch.float32))
        values, expected = leaf(batch.values), leaf(batch.values)
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            compiled(values, *batch[1:]).backward()
        lr.compute_lambda_value_loss(expected, *batch[1:]).backward()
        assert torch.equal(values.grad, expected.grad)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# Of inputs by seed: all outputs of the operators for equal rows, of the general ones and of the classification loss.
# Sequences differ in length.
WORK = {
    "rows": (lambda seed: on(make_batch("gaps", 32, 500, torch.float32, seed)), all_outputs),
    "long rows": (lambda seed: on(make_batch("gaps", 2, 50_000, torch.float32, seed)), all_outputs),
    "general rows": (lambda seed: general_inputs((300,) * 5, False, torch.float32, "cuda", seed=seed), general_outputs),
    "packed": (
        lambda seed: general_inputs(
            (20_000 * seed, 7, 0, 60_000 - 20_000 * seed), True, torch.float32, "cuda", 1, seed
        ),
        general_outputs,
    ),
    "categorical": (
        lambda seed: categorical_inputs((300,) * 5, False, torch.float32, "cuda", seed=seed),
        categorical_outputs,
    ),
}


def capture(compute: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Capture compute once; return the graph and the outputs that its replays write."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        compute()  # warm up off the default stream, as capture asks
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = compute()
    return graph, outputs


@pytest.mark.parametrize("work", WORK)
def test_graph_replay_with_changed_inputs(work):
    make_inputs, compute = WORK[work]
    static = make_inputs(0)
    grad = make_grad(make_batch("gaps", *static[0].shape, torch.float32)).cuda() if compute is all_outputs else None
    arguments = (static,) if grad is None else (static, 1.0, 0.95, None, grad)
    graph, captured = capture(lambda: compute(*arguments))
    for seed in range(3):
        for buffer, fresh in zip(static, make_inputs(seed), strict=True):
            if buffer is not None:
                buffer.copy_(fresh)
        graph.replay()
        assert all(torch.equal(x, captured[name]) for name, x in compute(*arguments).items())


@pytest.mark.parametrize("shape", [(8, 300), (2, 50_000)])
def test_one_graph_for_a_lambda_that_changes(shape):
    batch = on(make_batch("gaps", *shape, torch.float32))
    values, lam_buffer = leaf(batch.values), torch.zeros((), device="cuda")

    def forward_and_backward(lam: float | Tensor) -> tuple[Tensor, Tensor]:
        loss = lr.compute_lambda_value_loss(values, *batch[1:], 0.99, lam=lam)
        return loss.detach(), *torch.autograd.grad(loss, values)

    graph, captured = capture(lambda: forward_and_backward(lam_buffer))
    losses = set()
    for lam in (0.25, 0.75, 1.0):
        lam_buffer.fill_(lam)
        graph.replay()
        losses.add(captured[0].item())
        assert all(map(torch.equal, captured, forward_and_backward(lam_buffer)))
        torch.testing.assert_close(captured, forward_and_backward(lam), rtol=2e-5, atol=2e-5)
    assert len(losses) == 3


@pytest.mark.parametrize("work", WORK)
def test_side_streams_do_not_disturb_one_another(work):
    make_inputs, compute = WORK[work]
    options = (1.0, 0.95) if compute is all_outputs else ()
    batches = [make_inputs(seed) for seed in range(4)]
    expected = [compute(batch, *options) for batch in batches]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in batches]
    actual = []
    for batch, stream in zip(batches, streams, strict=True):
        with torch.cuda.stream(stream):
            actual.append([compute(batch, *options) for _ in range(5)])
    torch.cuda.synchronize()
    for runs, reference in zip(actual, expected, strict=True):
        assert all(torch.equal(run[name], reference[name]) for run in runs for name in reference)


@pytest.mark.skipif(not CUDA_KERNELS or torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_second_device_while_the_first_is_current():
    batch = make_batch("gaps", 3, 6000, torch.float32)
    second = all_outputs(on(batch, "cuda:1"), 1.0, 0.95)
    first = all_outputs(on(batch, "cuda:0"), 1.0, 0.95)
    assert torch.cuda.current_device() == 0
    for name, x in second.items():
        assert x.device.index == 1
        assert torch.equal(x.cpu(), first[name].cpu())
    general = [
        general_outputs(general_inputs(*GENERAL_SHAPES["long packed"], torch.float32, f"cuda:{i}")) for i in (0, 1)
    ]
    assert torch.cuda.current_device() == 0
    for name, x in general[1].items():
        assert x.device.index == 1
        assert torch.equal(x.cpu(), general[0][name].cpu())


def train_on_everything(general: General) -> None:
    """The public general functions with tensors for gamma and lam, every loss, and the backward of each."""
    values, terminal, mask = leaf(general.values), general.terminal, general.mask
    scan = (general.gamma, general.lam)
    options = {"rewards": general.rewards, "bootstrap_values": terminal}
    if general.cu_seqlens is None:
        returns = lr.compute_lambda_return(values, terminal, mask, *scan, **options)
        loss_of = partial(lr.compute_lambda_value_loss, values, terminal, general.attention_mask, mask, *scan)
    else:
        returns = lr.lambda_return_varlen(values, terminal, general.cu_seqlens, mask, *scan, **options)
        loss_of = partial(lr.lambda_value_loss_varlen, values, terminal, general.cu_seqlens, mask, *scan)
    advantages = {"cu_seqlens": general.cu_seqlens, "whiten": True}
    total = returns.sum() + lr.gae(values, terminal, mask, *scan, **options, **advantages).sum()
    pair = lr.returns_and_advantages(values, terminal, mask, *scan, general.other_lam, **options, **advantages)
    total = total + sum(x.sum() for x in pair)
    for turn, (loss, detach_targets) in enumerate(product(LOSS_KINDS, (True, False))):
        if loss == "bce" and not detach_targets:
            continue  # torch's own, which stops the device where a target is no probability
        clipped = {} if loss.startswith("bce") else {"old_values": general.old, "clip_range": 0.25}
        result, statistics = loss_of(
            **options,
            **clipped,
            loss=loss,
            reduction=REDUCTIONS[turn % len(REDUCTIONS)],
            detach_targets=detach_targets,
            return_statistics=True,
        )
        total = total + result.sum() + lr.explained_variance(statistics)
    total.backward()


def test_no_host_synchronisation():
    batch = on(make_batch("gaps", 8, 300, torch.float32))
    values = leaf(batch.values)
    inputs = [general_inputs(*GENERAL_SHAPES[shape], torch.float32, "cuda") for shape in ("rows", "long packed")]
    logits = categorical_inputs(*GENERAL_SHAPES["long packed"], torch.float32, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        lr.compute_lambda_value_loss(values, *batch[1:]).backward()
        lr.create_eos_only_mask(batch.loss_mask)
        for general in inputs:
            general_outputs(general)
            train_on_everything(general)
        categorical_outputs(logits)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.profiler
@pytest.mark.parametrize("shape", [(64, 100), (700, 3000), (3, 50_000)])
def test_one_kernel_and_one_small_memset_a_direction(shape):
    batch = on(make_batch("gaps", *shape, torch.float32))
    values, rewards, _, mask = batch
    one, count = torch.ones((), device="cuda"), torch.ones((), dtype=torch.int64, device="cuda")
    # Each call with the number of tensors that it returns.
    calls = [
        (lambda: ops.lambda_return(values, rewards, mask), 1),
        (lambda: ops.lambda_return_backward(values, mask), 2),
        (lambda: ops.lambda_value_loss(*batch), 2),
        (lambda: ops.lambda_value_loss_backward(one, count, *batch), 1),
        (lambda: ops.masked_mse(values, values, mask), 2),
        (lambda: ops.masked_mse_backward(one, count, values, values, mask), 1),
    ]
    for call, outputs in calls:
        call()
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        # Outputs, and one workspace.
        assert torch.cuda.memory_stats()["allocation.all.allocated"] - before <= outputs + 1
        events = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        kernels = [name for name in events if not name.startswith("Memset")]
        assert len(kernels) == 1, kernels
        assert "lambda_return::cuda" in kernels[0]
        assert len(events) - len(kernels) <= 1


def skip_without_memory(size: int) -> None:
    """Skip a test that holds this many bytes; counting elements takes some more."""
    free, _total = torch.cuda.mem_get_info()
    if free < 2 * size:
        pytest.skip(f"needs {2 * size / 2**30:.0f} GiB of device memory, {free / 2**30:.0f} are free")


def test_more_than_2_to_the_31_tokens():
    B, T = 3, 2**31 // 3 + 1_000_003
    skip_without_memory(B * T * 6)
    values = torch.zeros(B, T, dtype=torch.bfloat16, device="cuda")
    mask = torch.zeros(B, T, dtype=torch.uint8, device="cuda")
    valid = torch.tensor([0, T // 2, T - 1], device="cuda")
    values[:, valid], mask[:, valid] = 0.5, 1
    rewards = torch.tensor([1.0, 0.0, -1.0], device="cuda")
    returns = ops.lambda_return(values, rewards, mask, 1.0, 0.5)
    for row, reward in enumerate(rewards.tolist()):
        middle = 0.25 + 0.5 * reward
        assert returns[row, valid].tolist() == [0.25 + 0.5 * middle, middle, reward]
    assert returns.count_nonzero() == 3 * B - 1  # one target of this example is 0
    assert ops.eos_mask(mask).nonzero().tolist() == [[row, T - 1] for row in range(B)]


def test_more_than_2_to_the_31_tokens_in_a_loss():
    B, T = 3, 2**31 // 3 + 1_000_003
    skip_without_memory(B * T * 5)
    values = torch.zeros(B, T, dtype=torch.bfloat16, device="cuda")
    mask = torch.zeros(B, T, dtype=torch.uint8, device="cuda")
    valid = torch.tensor([0, T // 2, T - 1], device="cuda")
    mask[:, valid] = 1
    rewards = torch.ones(B, device="cuda")
    loss, count = ops.lambda_value_loss(values, rewards, mask, mask, 1.0, 1.0)
    assert count == 3 * B
    assert loss == 1  # values of 0 against targets of 1
    gradient = ops.lambda_value_loss_backward(loss * count, count, values, rewards, mask, mask, 1.0, 1.0)
    assert (gradient[:, valid] == -2).all()
    assert gradient.count_nonzero() == 3 * B


def test_more_than_2_to_the_31_packed_tokens():
    total = 2**31 + 1_000_003
    skip_without_memory(total * 6)
    values = torch.zeros(total, dtype=torch.bfloat16, device="cuda")
    mask = torch.zeros(total, dtype=torch.uint8, device="cuda")
    cu_seqlens = torch.tensor([0, 5, 2**31 - 7, 2**31 + 500_000, total], device="cuda")
    valid = torch.stack((cu_seqlens[:-1], cu_seqlens[1:] - 1), dim=1)  # the first and last token of each
    mask[valid.view(-1)] = 1
    terminal = torch.tensor([1.0, 2.0, 3.0, 4.0], device="cuda")
    gamma, lam = (torch.tensor(x, dtype=torch.float64, device="cuda") for x in (0.5, 1.0))
    returns = ops.td_lambda(values, terminal, mask, None, cu_seqlens, gamma, lam)
    assert torch.equal(returns[valid].float(), torch.stack((terminal / 2, terminal), dim=1))
    assert returns.count_nonzero() == 8


def test_more_than_2_to_the_31_logits():
    T, K = 2**31 // 64 + 1003, 64
    skip_without_memory(2 * T * K * 2)
    logits = torch.zeros(1, T, K, dtype=torch.bfloat16, device="cuda")
    mask = torch.zeros(1, T, dtype=torch.bool, device="cuda")
    valid = torch.tensor([0, T // 2, T - 1], device="cuda")
    mask[:, valid], logits[:, valid, 0] = True, 4
    one = torch.ones(1, device="cuda")
    discount = torch.ones(2, 1, dtype=torch.float64, device="cuda")
    arguments = (one, mask, None, None, None, *discount, None, 1, 0.0, 1.0, 0.75, 3)
    loss, scale, _statistics, returns, log_sums = ops.categorical_value_loss(logits, *arguments)
    one_token = torch.nn.functional.cross_entropy(logits[0, :1].double(), torch.tensor([K - 1], device="cuda"))
    torch.testing.assert_close(loss[0, valid].double(), one_token.expand(3))
    assert loss.count_nonzero() == 3
    gradient = ops.categorical_value_loss_backward(
        torch.ones_like(loss), scale, logits, returns, log_sums, None, 1, 0.0, 1.0, 0.75, 3
    )
    assert (gradient[0, valid, K - 1] < -0.9).all()
    assert gradient.any(-1).nonzero()[:, 1].tolist() == valid.tolist()


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_halves_are_accumulated_in_float32(dtype):
    batch = on(make_batch("dense", 4, 5000, dtype))
    returns = ops.lambda_return(*batch[:2], batch.loss_mask, 1.0, 0.95)
    exact = ops.lambda_return(batch.values.double(), batch.rewards.double(), batch.loss_mask, 1.0, 0.95)
    assert ((returns.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs().clamp(min=1e-3)).all()
