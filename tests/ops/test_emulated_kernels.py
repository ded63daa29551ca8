"""The CUDA kernels, run on the CPU by the emulator, against the reference."""

from functools import partial
from typing import NamedTuple

import pytest
import torch
from emulated_kernels_testing import EmulatedKernels, build_emulated_kernels, laid_out, to_torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_testing import (
    DISCOUNTS,
    MASK_KINDS,
    PROPERTY,
    VALUE_DTYPES,
    Batch,
    accumulate_dtype,
    assert_as_accurate_as_torch,
    leaf,
    make_batch,
    make_grad,
    make_mask,
    plain_lambda_return,
    plain_masked_mse,
    plain_value_loss,
    poisoned,
    rounding_unit,
    unit_floats,
)
from torch import Tensor

from lambda_return_ext import reference

ORDERS = ("ascending", "descending", "random")
# (offset of the values, of the masks, gap between rows of the values, of the masks), in elements: rows that start at a
# 16-byte boundary, elsewhere but alike (both take the 16-byte accesses), and differently (which cannot).
LAYOUTS = {"dense": (0, 0, 0, 0), "shifted": (5, 5, 2, 2), "mask shifted": (0, 1, 0, 0), "different": (1, 2, 3, 1)}


@pytest.fixture(scope="module")
def kernels():
    kernels = EmulatedKernels(build_emulated_kernels())
    yield kernels
    kernels.close()


@pytest.fixture(autouse=True)
def schedule(kernels):
    kernels.use_schedule("random", 1, 4)


class Inputs(NamedTuple):
    """What every operator takes."""

    batch: Batch
    grad: Tensor  # [B, T], of the returns
    targets: Tensor  # [B, T], of the masked MSE

    @classmethod
    def of(cls, batch: Batch) -> "Inputs":
        return cls(batch, make_grad(batch, seed=1), make_grad(batch, seed=2))

    def double(self) -> "Inputs":
        batch = Batch(*(x.double() if x.is_floating_point() else x for x in self.batch))
        return Inputs(batch, self.grad.double(), self.targets.double())


def run_all(kernels, inputs: Inputs, gamma: float, lam: float, layout: str = "dense") -> dict[str, Tensor]:
    """Every output of every kernel. Gradients are those of 3/4 of a mean's sum, which no token count rounds."""
    batch = inputs.batch
    value_offset, mask_offset, value_gap, mask_gap = LAYOUTS[layout]
    as_values = partial(laid_out, offset=value_offset, gap=value_gap)
    as_mask = partial(laid_out, offset=mask_offset, gap=mask_gap)
    acc = accumulate_dtype(batch.values.dtype)
    values = as_values(poisoned(batch.values, batch.loss_mask != 0))
    attention_mask, loss_mask = as_mask(batch.attention_mask), as_mask(batch.loss_mask)
    grad = as_values(poisoned(inputs.grad, batch.loss_mask != 0))
    rewards = batch.rewards.to(acc).numpy()
    counted, valid = int(batch.counted.sum()), int((batch.loss_mask != 0).sum())

    outputs = {"returns": kernels.lambda_return(values, rewards, loss_mask, gamma, lam)}
    outputs["grad_values"], outputs["grad_rewards"] = kernels.lambda_return_backward(grad, loss_mask, gamma, lam)
    loss_inputs = (values, rewards, attention_mask, loss_mask, gamma, lam)
    outputs["loss"], tokens = kernels.lambda_value_loss(*loss_inputs)
    outputs["loss_grad"] = kernels.lambda_value_loss_backward(0.75 * counted, counted, *loss_inputs)
    assert tokens == counted
    for name, mse_targets in (("mse", inputs.targets), ("wide_mse", inputs.targets.to(acc))):
        mse_inputs = (values, as_values(poisoned(mse_targets, batch.loss_mask != 0)), loss_mask)
        outputs[name], tokens = kernels.masked_mse(*mse_inputs)
        outputs[f"{name}_grad"] = kernels.masked_mse_backward(0.75 * valid, valid, *mse_inputs)
        assert tokens == valid
    means = ("loss", "mse", "wide_mse")
    return {k: torch.tensor(v, dtype=acc) if k in means else to_torch(v) for k, v in outputs.items()}


def expected(inputs: Inputs, gamma: float, lam: float, plain: bool) -> dict[str, Tensor]:
    """The same outputs by the reference, or by plain torch in the dtype of the batch."""
    batch = inputs.batch
    counted, valid = int(batch.counted.sum()), int((batch.loss_mask != 0).sum())
    clean = torch.where(batch.loss_mask != 0, batch.values, 0.0)
    values, rewards = leaf(clean), leaf(batch.rewards.to(accumulate_dtype(batch.values.dtype)))
    scan = plain_lambda_return if plain else reference.compute_lambda_return
    mse = plain_masked_mse if plain else reference.masked_mse

    outputs = {"returns": scan(values, rewards, batch.loss_mask, gamma, lam)}
    grad = torch.where(batch.loss_mask != 0, inputs.grad, 0.0)
    connected = outputs["returns"] + 0 * (values + rewards[:, None])  # in a row without tokens nothing else is
    outputs["grad_values"], outputs["grad_rewards"] = torch.autograd.grad(connected, (values, rewards), grad)
    batch = batch._replace(values=values)
    loss = plain_value_loss(batch, gamma, lam) if plain else reference.compute_lambda_value_loss(*batch, gamma, lam)
    mean = mse(values, inputs.targets, batch.loss_mask)
    for name, total, tokens in (("loss", loss, counted), ("mse", mean, valid), ("wide_mse", mean, valid)):
        outputs[name] = total.detach()
        (outputs[f"{name}_grad"],) = torch.autograd.grad(0.75 * tokens * total, values, retain_graph=True)
    return {name: output.detach() for name, output in outputs.items()}


def check(kernels, batch: Batch, gamma: float, lam: float, layout: str = "dense") -> None:
    inputs = Inputs.of(batch)
    ours = run_all(kernels, inputs, gamma, lam, layout)
    plain = expected(inputs, gamma, lam, plain=True)
    exact = expected(inputs.double(), gamma, lam, plain=False)
    assert ours.keys() == plain.keys() == exact.keys()
    for name in ours:
        assert ours[name].shape == exact[name].shape
        accumulation = 16 * torch.finfo(accumulate_dtype(batch.values.dtype)).eps * exact[name].abs().max().clamp(min=1)
        error = (ours[name].double() - exact[name]).abs() - rounding_unit(exact[name], ours[name].dtype)
        allowed = 2 * (plain[name].double() - exact[name]).abs().max() + accumulation
        assert error.max() <= allowed, (name, tuple(batch.values.shape), layout, error.max(), allowed)


def boundaries(kernels, dtype: torch.dtype) -> list[int]:
    """Lengths on both sides of every thread's, warp's and block's share and of every change of plan."""
    items = kernels.items(laid_out(torch.zeros(1, 1, dtype=dtype)))
    warp, block = kernels.constant("WARP") * items, kernels.constant("THREADS") * items
    edges = [items, 2 * items, warp, 2 * warp, block, 2 * block, 3 * block]
    return sorted({1, 2, *(edge + step for edge in edges for step in (-1, 0, 1))})


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
def test_shapes_around_every_tile(kernels, dtype):
    for turn, T in enumerate(boundaries(kernels, dtype)):
        B = (1, 2, 3)[turn % 3] if T < 600 else 1
        gamma, lam = DISCOUNTS[turn % len(DISCOUNTS)]
        layout = tuple(LAYOUTS)[turn % len(LAYOUTS)]
        kind = MASK_KINDS[turn % len(MASK_KINDS)] if turn % 2 else "gaps"
        check(kernels, make_batch(kind, B, T, dtype, seed=turn), gamma, lam, layout)


# Every discount with every mask and layout: for `make test-all`. Else they take turns, long rows with short ones.
@pytest.mark.parametrize("discounts", ["in turns", pytest.param("each", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("kind", MASK_KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_and_layouts(kernels, kind, layout, discounts):
    first = MASK_KINDS.index(kind) + tuple(LAYOUTS).index(layout)
    for turn, (gamma, lam) in enumerate(DISCOUNTS):
        if discounts == "each" or (turn - first) % 3 == 0:
            check(kernels, make_batch(kind, 3, 300 + turn, torch.float32, seed=turn), gamma, lam, layout)
        if discounts == "each" or (turn - first) % 3 == 1:
            check(kernels, make_batch(kind, 3, 30 + turn, torch.bfloat16, seed=turn), gamma, lam, layout)


# As views on a device have them: rows whose alignment differs from row to row, the masks' from the values' too.
@pytest.mark.parametrize("layout", [(3, 3, 5, 5), (517, 517, 517, 517)], ids=["window", "every other row"])
@pytest.mark.parametrize("dtype", VALUE_DTYPES)
def test_views_of_rows(kernels, monkeypatch, dtype, layout):
    monkeypatch.setitem(LAYOUTS, "view", layout)
    batch = make_batch("gaps", 5, 517, dtype)
    check(kernels, batch, 1.0, 0.95, "view")
    runs = []
    for order in ORDERS:
        kernels.use_schedule(order, 2, 3)
        runs.append(run_all(kernels, Inputs.of(batch), 1.0, 0.95, "view"))
    for other in runs[1:]:
        assert all(torch.equal(output, other[name]) for name, output in runs[0].items())


@pytest.mark.parametrize(("dtype", "T"), [(torch.float32, 20_001), (torch.bfloat16, 17_000), (torch.float64, 17_000)])
def test_long_rows(kernels, dtype, T):
    assert kernels.plan(2, T, 8)[0] == "long rows"
    check(kernels, make_batch("gaps", 2, T, dtype), 1.0, 0.99, "shifted")


def test_a_row_of_many_segments(kernels):
    batch = make_batch("gaps", 1, 70_001, torch.float32)
    assert kernels.plan(1, 70_001, 8)[2] > 32  # the look-back goes over more than one warp of them
    inputs = (laid_out(poisoned(batch.values, batch.loss_mask)), batch.rewards.numpy(), laid_out(batch.loss_mask))
    exact = reference.compute_lambda_return(batch.values.double(), batch.rewards.double(), batch.loss_mask, lam=0.999)
    for order in ORDERS:
        kernels.use_schedule(order, 3, 7)
        ours = to_torch(kernels.lambda_return(*inputs, 1.0, 0.999))
        plain = plain_lambda_return(batch.values, batch.rewards, batch.loss_mask, 1.0, 0.999)
        assert_as_accurate_as_torch(ours, plain, exact)


def test_enough_rows_for_each_plan(kernels):
    enough = kernels.constant("BLOCKS_TO_FILL")
    shapes = {"warp per row": (8 * enough + 1, 65), "block per row": (enough, 5000), "long rows": (17, 5000)}
    for name, (B, T) in shapes.items():
        assert kernels.plan(B, T, 8)[0] == name
        batch = make_batch("gaps", B, T, torch.float32)
        values, mask = (laid_out(x) for x in (poisoned(batch.values, batch.loss_mask), batch.loss_mask))
        ours = to_torch(kernels.lambda_return(values, batch.rewards.numpy(), mask, 1.0, 0.95))
        plain = plain_lambda_return(batch.values, batch.rewards, batch.loss_mask, 1.0, 0.95)
        exact = plain_lambda_return(batch.values.double(), batch.rewards.double(), batch.loss_mask, 1.0, 0.95)
        assert_as_accurate_as_torch(ours, plain, exact)


@pytest.mark.parametrize("dtype", VALUE_DTYPES)
@pytest.mark.parametrize(("B", "T"), [(9, 300), (3, 2500), (2, 20_000)])
def test_same_bits_under_every_schedule(kernels, dtype, B, T):
    inputs = Inputs.of(make_batch("gaps", B, T, dtype))
    runs = []
    for resident_blocks in (1, 2, 5, 16):
        for order in ORDERS:
            kernels.use_schedule(order, resident_blocks, resident_blocks)
            runs.append(run_all(kernels, inputs, 1.0, 0.95))
    for other in runs[1:]:
        for name, output in runs[0].items():
            bits = (x.reshape(-1).view(torch.uint8) for x in (output, other[name]))
            assert torch.equal(*bits), name


@given(data=st.data())
@settings(PROPERTY, max_examples=150)
def test_property(kernels, data):
    B, T = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 40) | st.integers(1, 600))
    dtype = data.draw(st.sampled_from(VALUE_DTYPES))
    batch = make_batch("nothing", B, T, dtype, seed=data.draw(st.integers(0, 1000)))
    density = data.draw(st.sampled_from([0.02, 0.3, 0.7, 0.98, 1.0]))
    noise = torch.rand(2, B, T, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 1000))))
    attention_mask, loss_mask = noise < torch.tensor([0.9, density])[:, None, None]
    batch = batch._replace(attention_mask=attention_mask, loss_mask=loss_mask)
    kernels.use_schedule(
        data.draw(st.sampled_from(ORDERS)), data.draw(st.integers(1, 99)), data.draw(st.integers(1, 9))
    )
    layout = data.draw(st.sampled_from(sorted(LAYOUTS)))
    check(kernels, batch, data.draw(unit_floats), data.draw(unit_floats), layout)


@pytest.mark.parametrize("T", [1, 15, 16, 17, 257, 513, 4095, 4096, 4097, 8300])
@pytest.mark.parametrize("kind", MASK_KINDS)
def test_eos_mask(kernels, kind, T):
    mask = make_mask(kind, 5, T)
    ours = to_torch(kernels.eos_mask(laid_out(mask, offset=3, gap=5)))
    assert torch.equal(ours.float(), reference.create_eos_only_mask(mask))
