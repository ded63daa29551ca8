"""Packed batches: the same sequences, values, losses and gradients as padded ones, without the padding."""

import itertools
from dataclasses import replace

import pytest
import torch
from critic_testing import pair, pair_of

from lambda_return_ext.critic.config import HeadConfig, LambdaReturnConfig, ValueLossConfig
from lambda_return_ext.critic.data.batches import Collator
from lambda_return_ext.critic.data.rollouts import Solution, solutions_of
from lambda_return_ext.critic.losses import value_loss
from lambda_return_ext.critic.model.backbone import Backbone
from lambda_return_ext.critic.model.features import compute_features, group_by_prompt
from lambda_return_ext.critic.model.value_model import ValueModel

GAPPED = pair_of(
    "p",
    Solution((9, 8), (4, 9, 9, 6), (True, False, False, True)),
    Solution((9, 8), (1, 7, 3, 8, 5), (True, False, True, False, True)),
)
PAIRS = [pair((4, 6), (1, 1, 1)), GAPPED, pair((8, 2, 7, 7, 3, 5), (3,), (7,)), pair((1,), (5, 2, 4), (3, 4, 5))]


def in_rows(batch, packed):
    """The packed [total] numbers as the rows that they were packed from."""
    return [packed[start:end] for start, end in itertools.pairwise(batch.packing.cu_seqlens.tolist())]


@pytest.mark.parametrize("multiple", [1, 16])
def test_a_packed_batch_holds_the_rows_of_the_padded_one(multiple):
    padded, packed = Collator(0).pad(PAIRS), Collator(0, multiple=multiple, packed=True)(PAIRS)
    assert packed.inputs.shape[0] % multiple == 0
    assert torch.equal(packed.upper, padded.upper)
    assert packed.upper.tolist() == [True] * 4 + [False] * 4
    assert packed.tokens == padded.tokens == packed.attention_mask.sum()
    for name in ("inputs", "loss_mask"):
        rows = in_rows(packed, getattr(packed, name))
        for row, (ours, theirs) in enumerate(zip(rows, getattr(padded, name), strict=True)):
            length = int(padded.attention_mask[row].sum())
            assert torch.equal(ours[:length], theirs[:length])
            assert not ours[length:].any()  # what fills the batch up is behind the last row
    assert torch.equal(packed.terminal_rewards, padded.terminal_rewards)
    ends = [row.nonzero().tolist() for row in padded.last_tokens()]
    assert [row.nonzero().tolist() for row in in_rows(packed, packed.last_tokens())] == ends


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("term", ["lambda", "mc", "pairwise"])
def test_loss_and_gradient_are_those_of_the_padded_batch(tiny_backbone, cached, warmup, term):
    config = ValueLossConfig(
        use_lambda_return=term == "lambda",
        use_mc_mse=term == "mc",
        use_pairwise=term == "pairwise",
        lambda_return=LambdaReturnConfig(lam=0.8),
    )
    torch.manual_seed(0)
    backbone = Backbone(str(tiny_backbone)).base_model(None, 64)
    model = ValueModel(backbone, HeadConfig(hidden_size=16), None, backbone_frozen=cached)
    features = compute_features(backbone, group_by_prompt(solutions_of(PAIRS)), lambda tokens: None) if cached else None
    collate = Collator(0, features, multiple=8)
    results = []
    for batch in (collate.pad(PAIRS), collate.pack(PAIRS)):
        values = model(batch.inputs, batch.attention_mask, batch.packing and batch.packing.cu_seqlens)
        assert values.shape == batch.loss_mask.shape
        seen = replace(batch, loss_mask=batch.last_tokens()) if warmup else batch
        loss, terms = value_loss(config, values, seen)
        model.zero_grad(set_to_none=True)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append((values.detach()[batch.loss_mask], loss.detach(), terms, gradients))
    (values, loss, terms, gradients), expected = results
    for ours, theirs in zip((values, loss, terms, gradients), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert len(gradients) >= 4
