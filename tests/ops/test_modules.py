"""LambdaReturn and LambdaValueLoss, and the names and defaults of everything public."""

import copy
import inspect
import pickle
import re

import pytest
import torch
from ops_testing import leaf, make_batch
from torch import nn

import lambda_return_ext
from lambda_return_ext import (
    LambdaReturn,
    LambdaValueLoss,
    compute_lambda_return,
    compute_lambda_value_loss,
    reference,
)

MODULES = [LambdaReturn, LambdaValueLoss]


def call(module, batch):
    return module(batch.values, batch.rewards, batch.loss_mask) if isinstance(module, LambdaReturn) else module(*batch)


def test_lambda_return_is_the_function():
    values, rewards, _, mask = make_batch()
    assert torch.equal(LambdaReturn()(values, rewards, mask), compute_lambda_return(values, rewards, mask))
    expected = compute_lambda_return(values, rewards, mask, 0.9, 0.5)
    assert torch.equal(LambdaReturn(0.9, 0.5)(values, rewards, mask), expected)
    assert torch.equal(LambdaReturn(lam=0.5, gamma=0.9)(values, rewards, mask), expected)


def test_lambda_value_loss_is_the_function():
    batch = make_batch()
    assert torch.equal(LambdaValueLoss()(*batch), compute_lambda_value_loss(*batch))
    assert torch.equal(LambdaValueLoss(0.9, 0.5)(*batch), compute_lambda_value_loss(*batch, 0.9, 0.5))
    values = leaf(batch.values[..., None])
    LambdaValueLoss()(values, *batch[1:]).backward()
    assert values.grad.abs().sum() > 0


@pytest.mark.parametrize("module", MODULES)
def test_nothing_to_train_or_to_save(module):
    module = module(0.9, 0.5)
    assert not list(module.parameters())
    assert not module.state_dict()
    module.load_state_dict(nn.Module().state_dict())
    assert (module.gamma, module.lam) == (0.9, 0.5)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
@pytest.mark.parametrize("module", MODULES)
def test_copies_behave_the_same(module, duplicate):
    module, batch = module(0.9, 0.5), make_batch()
    assert torch.equal(call(duplicate(module), batch), call(module, batch))


@pytest.mark.parametrize("module", MODULES)
def test_repr_shows_gamma_and_lam(module):
    assert repr(module(1, 0.5)) == f"{module.__name__}(gamma=1.0, lam=0.5)"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"gamma": 1.5}, ValueError, "gamma must be in [0, 1], got 1.5"),
        ({"lam": float("nan")}, ValueError, "lam must be in [0, 1], got nan"),
        ({"lam": "0.5"}, TypeError, "lam must be a float, got str"),
    ],
)
@pytest.mark.parametrize("module", MODULES)
def test_bad_discounts_are_refused_at_once(module, arguments, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        module(**arguments)


SIGNATURES = {
    "compute_lambda_return": "values, terminal_rewards, loss_mask, gamma=1.0, lam=0.95",
    "compute_lambda_value_loss": "value_logits, terminal_rewards, attention_mask, loss_mask, gamma=1.0, lam=0.95",
    "compute_mc_value_loss": "value_logits, rewards, attention_mask, loss_mask",
    "explained_variance": "statistics",
    "gae": "values, terminal_rewards, loss_mask, gamma=1.0, lam=0.95",
    "lambda_return_varlen": "values, terminal_rewards, cu_seqlens, loss_mask=None, gamma=1.0, lam=0.95",
    "lambda_value_loss_varlen": "value_logits, terminal_rewards, cu_seqlens, loss_mask=None, gamma=1.0, lam=0.95",
    "masked_mse": "values, targets, mask",
    "masked_whiten": "x, mask",
    "pairwise_ranking_loss": "v_pos, v_neg, loss_mask_pos, loss_mask_neg",
    "compute_pairwise_accuracy": "v_pos, v_neg, loss_mask_pos, loss_mask_neg",
    "compute_token_variance": "values, mask",
    "create_eos_only_mask": "loss_mask",
    "init_value_head_bias": "module, bias",
    "returns_and_advantages": ("values, terminal_rewards, loss_mask, gamma=1.0, lam_returns=1.0, lam_advantages=0.95"),
    "LambdaReturn": "gamma=1.0, lam=0.95",
    "LambdaValueLoss": "gamma=1.0, lam=0.95",
}


def positional(function):
    """Return names and defaults of the parameters that can be given by position."""
    parameters = inspect.signature(function).parameters.values()
    return ", ".join(
        p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters if p.kind is not p.KEYWORD_ONLY
    )


def test_public_names_are_tested_here():
    assert set(lambda_return_ext.__all__) == {"__version__", "build_info", *SIGNATURES}


@pytest.mark.parametrize("name", SIGNATURES)
def test_argument_order_and_defaults(name):
    """What code written for the original functions relies on; later abilities are keyword-only."""
    function = getattr(lambda_return_ext, name)
    assert positional(function) == SIGNATURES[name]
    assert all(
        p.default is not p.empty
        for p in inspect.signature(function).parameters.values()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    )
    if hasattr(reference, name):
        assert positional(getattr(reference, name)) == SIGNATURES[name]
