"""Sequences split in time: maps of chunks, and ranks of a gloo group against one process."""

import os

import pytest
import torch
import torch.distributed as dist
from ops_testing import leaf, make_mask, rng
from td_lambda_testing import padded

import lambda_return_ext as lr
from lambda_return_ext.distributed import (
    context_parallel_lambda_return,
    context_parallel_lambda_value_loss,
    lambda_return_carry,
)

T = 48


def batch(kind, dtype=torch.float64, unseen=()):
    """Sequences [4, T] with gaps across every border of chunks, one of them empty, masked and NaN at unseen tokens."""
    generator = rng(7)
    values, rewards = (torch.rand(4, T, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = make_mask(kind, 4, T)
    mask[1, T // 4 - 3 : T // 2 + 3] = False
    mask[2] = False
    mask[:, unseen], values[:, unseen], rewards[:, unseen] = False, torch.nan, torch.nan
    attention = torch.rand(4, T, generator=generator) < 0.8
    gamma, lam = torch.tensor([1.0, 0.9, 1.0, 0.99]).double(), torch.tensor([0.95, 1.0, 0.5, 0.0]).double()
    terminal, bootstrap = (torch.rand(4, generator=generator) for _ in range(2))
    return values.to(dtype), terminal, attention, mask, gamma, lam, rewards.to(dtype), bootstrap


def test_chunks_are_chained_by_their_maps():
    case = padded(B=5, T=300)
    whole = case.returns(lr.compute_lambda_return)
    carry = case.terminal_rewards + case.gamma * case.bootstrap_values
    for part in (slice(200, 300), slice(120, 200), slice(120, 120), slice(0, 120)):
        chunk = case._replace(
            values=case.values[:, part], loss_mask=case.loss_mask[:, part], rewards=case.rewards[:, part]
        )
        returns = lr.compute_lambda_return(
            chunk.values, carry, chunk.loss_mask, case.gamma, case.lam, rewards=chunk.rewards
        )
        torch.testing.assert_close(returns, whole[:, part], rtol=1e-12, atol=1e-12)
        maps = lambda_return_carry(chunk.values, chunk.loss_mask, case.gamma, case.lam, rewards=chunk.rewards)
        carry = maps[:, 0] * carry + maps[:, 1]


def parts_of(x, rank, ranks, layout):
    if layout == "contiguous":
        return x.chunk(ranks, dim=1)[rank]
    parts = x.chunk(2 * ranks, dim=1)
    return torch.cat([parts[rank], parts[2 * ranks - 1 - rank]], dim=1)


def losses(values):
    """Options of the loss: each of its kinds, reductions and keywords."""
    generator = rng(9)
    old_values = values + 0.3 * torch.randn(values.shape, generator=generator, dtype=torch.float64).to(values.dtype)
    outputs = torch.rand(values.shape, generator=generator) < 0.9
    outputs[values.isnan()] = False
    clipped = {"old_values": old_values, "clip_range": 0.1}
    return [
        {},
        {"loss": "huber", "delta": 0.2, "output_mask": outputs},
        {"loss": "smooth_l1", "delta": 0.3, "normalizer": torch.tensor(37), **clipped},
        {"loss": "bce", "reduction": "sum", "output_mask": outputs},
        {"loss": "bce_with_logits"},
        {"loss": "bce_with_logits", "reduction": "sequence_mean", "output_mask": outputs},
        {"reduction": "sequence_mean", "normalizer": torch.tensor(2.5), **clipped},
        {"loss": "bce_with_logits", "reduction": "none"},
        {"reduction": "none", "output_mask": outputs, **clipped},
        {"loss": "huber", "reduction": "sum", **clipped},
        {"normalizer": torch.tensor(0)},
    ]


def check_rank(rank, ranks, folder):
    """One rank of the test below: everything against the whole batch."""
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    try:
        for kind, layout, dtype, first_rank_counts in [
            ("gaps", "contiguous", torch.float64, True),
            ("gaps", "zigzag", torch.float64, True),
            ("conversation", "zigzag", torch.float32, True),
            ("dense", "contiguous", torch.bfloat16, True),
            ("gaps", "contiguous", torch.float64, False),
            ("gaps", "zigzag", torch.float64, False),
        ]:
            check_one(rank, ranks, kind, layout, dtype, first_rank_counts)
        check_dtensor(rank, ranks)
        check_whitening(rank, ranks)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    # Threads of gloo can outlive the group, and now and then abort a process that ends by unwinding.
    os._exit(0)


def check_one(rank, ranks, kind, layout, dtype, first_rank_counts):
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]

    def mine(x):
        """This rank's part of what is split in time, anything else as it is."""
        return parts_of(x, rank, ranks, layout) if isinstance(x, torch.Tensor) and x.dim() == 2 else x

    def same(ours, expected):
        torch.testing.assert_close(ours, mine(expected), rtol=tolerance, atol=tolerance)

    unseen = () if first_rank_counts else parts_of(torch.arange(T)[None], 0, ranks, layout)[0]
    values, terminal, attention, mask, gamma, lam, rewards, bootstrap = batch(kind, dtype, unseen)
    assert first_rank_counts or bool(mine(mask).any()) == (rank > 0)
    weight = torch.randn(values.shape, generator=rng(8), dtype=torch.float64).to(dtype)

    def returns(function, part, **how):
        inputs = leaf(part(values)), leaf(part(rewards)), leaf(terminal.to(dtype)), leaf(bootstrap)
        x, r, R, b = inputs
        result = function(x, R, part(mask), gamma, lam, rewards=r, bootstrap_values=b, **how)
        return result, torch.autograd.grad(result, inputs, part(weight))

    expected, expected_grads = returns(lr.compute_lambda_return, lambda x: x)
    ours, grads = returns(context_parallel_lambda_return, mine, layout=layout)
    same(ours, expected)
    for ours, expected in zip(grads, expected_grads, strict=True):
        same(ours, expected)

    def loss(function, part, options, **how):
        x = leaf(part(values))
        options = {name: part(option) for name, option in options.items()}
        masks = part(attention), part(mask)
        how |= {"rewards": part(rewards), "bootstrap_values": bootstrap, "return_statistics": True}
        result, statistics = function(x[..., None], terminal, *masks, gamma, lam, **options, **how)
        incoming = part(weight).to(result.dtype) if result.dim() else torch.tensor(0.7, dtype=result.dtype)
        return result, statistics, torch.autograd.grad(result, x, incoming)[0]

    for options in losses(values):
        expected = loss(lr.compute_lambda_value_loss, lambda x: x, options)
        for ours, whole in zip(
            loss(context_parallel_lambda_value_loss, mine, options, layout=layout), expected, strict=True
        ):
            same(ours, whole)


def check_dtensor(rank, ranks):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def same(ours, expected):
        assert ours.shape == expected.shape
        torch.testing.assert_close(ours.full_tensor(), expected, rtol=1e-12, atol=1e-12)

    mesh = init_device_mesh("cpu", (ranks,))
    values, terminal, attention, mask, gamma, lam, rewards, _bootstrap = batch("gaps")
    for tokens in (T, 7, 5):  # in equal parts; in unequal ones; of four ranks the last has none
        whole = [x[:, :tokens].contiguous() for x in (values, mask, rewards, attention)]
        sharded = [distribute_tensor(x, mesh, [Shard(1)]) for x in whole]
        whole[0].requires_grad_()
        sharded[0].requires_grad_()
        ours = context_parallel_lambda_return(sharded[0], terminal, sharded[1], gamma, lam, rewards=sharded[2])
        expected = lr.compute_lambda_return(whole[0], terminal, whole[1], gamma, lam, rewards=whole[2])
        same(ours, expected)
        weight = torch.randn(4, tokens, generator=rng(8), dtype=torch.float64)
        ours = torch.autograd.grad(ours, sharded[0], distribute_tensor(weight, mesh, [Shard(1)]))[0]
        same(ours, torch.autograd.grad(expected, whole[0], weight)[0])
        loss = context_parallel_lambda_value_loss(sharded[0], terminal, sharded[3], sharded[1], gamma, lam)
        expected = lr.compute_lambda_value_loss(whole[0], terminal, whole[3], whole[1], gamma, lam)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        same(torch.autograd.grad(loss, sharded[0])[0], torch.autograd.grad(expected, whole[0])[0])
        for options in losses(whole[0].detach()):
            split = {
                name: distribute_tensor(x, mesh, [Shard(1)]) if name in ("old_values", "output_mask") else x
                for name, x in options.items()
            }
            loss = context_parallel_lambda_value_loss(sharded[0], terminal, sharded[3], sharded[1], gamma, lam, **split)
            expected = lr.compute_lambda_value_loss(whole[0], terminal, whole[3], whole[1], gamma, lam, **options)
            loss = loss.full_tensor() if options.get("reduction") == "none" else loss
            torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    how = "must be a plain tensor, got a DTensor: lambda_return_ext.distributed takes sequences"
    with pytest.raises(TypeError, match=f"^values {how}"):
        lr.compute_lambda_return(sharded[0], terminal, sharded[1])
    with pytest.raises(TypeError, match=f"^loss_mask {how}"):
        lr.compute_lambda_value_loss(sharded[0].to_local(), terminal, sharded[3].to_local(), sharded[1])
    replicated = distribute_tensor(gamma, mesh, [Replicate()])
    for name in ("gamma", "lam"):
        with pytest.raises(TypeError, match=f"^{name} {how}"):
            context_parallel_lambda_return(sharded[0], terminal, sharded[1], **{name: replicated})
    with pytest.raises(ValueError, match="values must be sharded on T"):
        context_parallel_lambda_return(distribute_tensor(values, mesh, [Replicate()]), terminal, mask)


def check_whitening(rank, ranks):
    values, terminal, _attention, mask, gamma, *_others = batch("gaps")
    _, expected = lr.returns_and_advantages(values, terminal, mask, gamma, whiten=True)
    rows = slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
    _, ours = lr.returns_and_advantages(
        values[rows], terminal[rows], mask[rows], gamma[rows], whiten=True, group=dist.group.WORLD
    )
    torch.testing.assert_close(ours, expected[rows], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.exhaustive), 4])
def test_ranks_together_are_one_process(ranks, tmp_path):
    torch.multiprocessing.spawn(check_rank, (ranks, str(tmp_path)), nprocs=ranks)


def test_errors_name_the_argument():
    case = padded()
    with pytest.raises(ValueError, match="loss_mask must have the shape of the values"):
        lambda_return_carry(case.values, case.loss_mask[:, 1:])
    with pytest.raises(ValueError, match=r"values must have shape \[total\] or \[total, 1\], got \[5, 23\]"):
        lambda_return_carry(case.values, None, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(TypeError, match=r"values must be float32, .*, got torch.int64"):
        lambda_return_carry(case.values[0].long(), None, cu_seqlens=torch.tensor([0, 23]))
    x, terminal, mask = case.values, case.terminal_rewards, case.loss_mask
    for error, message, options in [
        (ValueError, "loss must be one of mse, huber, smooth_l1, bce, bce_with_logits, got 'mae'", {"loss": "mae"}),
        (
            ValueError,
            "reduction must be one of token_mean, sequence_mean, sum, none, got 'mean'",
            {"reduction": "mean"},
        ),
        (ValueError, "clip_range must be given with old_values, got None", {"old_values": x}),
        (ValueError, "old_values must have the shape of the values", {"old_values": x[:, 1:], "clip_range": 0.1}),
        (ValueError, "output_mask must have the shape of the values", {"output_mask": mask[:, 1:]}),
        (ValueError, r"bootstrap_values must have shape \[B\] = \[5\]", {"bootstrap_values": terminal[1:]}),
        (ValueError, "normalizer must be None with reduction 'sum'", {"reduction": "sum", "normalizer": x[0, 0]}),
        (TypeError, "unexpected keyword argument 'detach_targets'", {"detach_targets": False}),
    ]:
        with pytest.raises(error, match=message):
            context_parallel_lambda_value_loss(x, terminal, mask, mask, **options)
    with pytest.raises(TypeError, match=r"value_logits must be a torch\.Tensor, got list"):
        context_parallel_lambda_value_loss([], terminal, mask, mask)
