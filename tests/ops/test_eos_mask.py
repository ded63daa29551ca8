"""create_eos_only_mask and torch.ops.lambda_return.eos_mask."""

import pytest
import torch
from hypothesis import given
from ops_testing import LAYOUTS, MASK_DTYPES, MASK_KINDS, PROPERTY, batches, leaf, make_mask, mask_as
from torch.library import opcheck

from lambda_return_ext import create_eos_only_mask, reference

ops = torch.ops.lambda_return


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
@pytest.mark.parametrize("kind", MASK_KINDS)
def test_matches_reference(kind, mask_dtype):
    mask = mask_as(make_mask(kind, 4, 13), mask_dtype)
    eos = create_eos_only_mask(mask)
    assert eos.dtype == torch.float32
    assert torch.equal(eos, reference.create_eos_only_mask(mask))


@PROPERTY
@given(batch=batches())
def test_any_mask_matches_reference(batch):
    assert torch.equal(create_eos_only_mask(batch.loss_mask), reference.create_eos_only_mask(batch.loss_mask))


def test_last_valid_position_of_each_row():
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 1]])
    expected = [[0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]]
    assert create_eos_only_mask(mask).tolist() == expected


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
def test_operator_keeps_the_dtype(mask_dtype):
    mask = mask_as(make_mask("conversation", 4, 13), mask_dtype)
    eos = ops.eos_mask(mask)
    assert eos.dtype == mask_dtype
    assert torch.equal(eos.to(torch.float32), create_eos_only_mask(mask))


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout, mask_dtype):
    mask = make_mask("gaps", 5, 11).to(mask_dtype)
    if mask_dtype.is_floating_point:
        mask = mask * 0.5
    eos = ops.eos_mask(LAYOUTS[layout](mask))
    assert torch.equal(eos, ops.eos_mask(mask))
    assert eos.is_contiguous()


def test_expanded_mask():
    mask = make_mask("gaps", 4, 13)
    for expanded in (mask[:1].expand(4, 13), mask[:, 4:5].expand(4, 13), torch.tensor(True).expand(4, 13)):
        assert torch.equal(ops.eos_mask(expanded), ops.eos_mask(expanded.contiguous()))


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0), (1, 1)], ids=str)
def test_small_shapes(shape):
    eos = create_eos_only_mask(torch.ones(shape))
    assert torch.equal(eos, torch.ones(shape))


def test_mask_that_requires_a_gradient():
    mask = leaf(make_mask("gaps", 4, 13).float())
    assert not create_eos_only_mask(mask).requires_grad
    eos = ops.eos_mask(mask)
    with pytest.raises(NotImplementedError, match="lambda_return::eos_mask: a mask has no gradient"):
        eos.sum().backward()


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
def test_opcheck(mask_dtype):
    opcheck(ops.eos_mask.default, (mask_as(make_mask("gaps", 3, 5), mask_dtype),))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_of_layouts(layout):
    opcheck(ops.eos_mask.default, (LAYOUTS[layout](make_mask("gaps", 3, 5)),))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)], ids=str)
def test_opcheck_of_empty_shapes(shape):
    opcheck(ops.eos_mask.default, (torch.ones(shape),))


def test_result_is_fresh_and_input_untouched():
    mask = make_mask("gaps", 4, 13).float()  # the dtype of the result, which could tempt to return the input
    before = mask.clone()
    eos, again = create_eos_only_mask(mask), create_eos_only_mask(mask)
    assert torch.equal(mask, before)
    assert len({mask.data_ptr(), eos.data_ptr(), again.data_ptr()}) == 3
