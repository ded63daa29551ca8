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
    return values.to(dtype), torch.rand(4, generator=generator), attention, mask, gamma, lam, rewards.to(dtype)


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


def whole(*how):
    values, terminal, attention, mask, gamma, lam, rewards = batch(*how)
    inputs = leaf(values), leaf(terminal.to(values.dtype)), leaf(rewards)
    returns = lr.compute_lambda_return(inputs[0], inputs[1], mask, gamma, lam, rewards=inputs[2])
    weight = torch.randn(returns.shape, generator=rng(8), dtype=torch.float64).to(values.dtype)
    grads = torch.autograd.grad(returns, inputs, weight)
    x = leaf(values)
    loss = lr.compute_lambda_value_loss(x, terminal, attention, mask, gamma, lam, rewards=rewards, loss="huber")
    return weight, returns.detach(), grads, loss.detach(), torch.autograd.grad(loss, x)[0]


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
            unseen = () if first_rank_counts else parts_of(torch.arange(T)[None], 0, ranks, layout)[0]
            how = kind, dtype, unseen
            weight, returns, grads, loss, loss_grad = whole(*how)

            def mine(x, layout=layout):
                return parts_of(x, rank, ranks, layout)

            tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]

            def same(ours, expected, tolerance=tolerance):
                torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)

            values, terminal, attention, mask, gamma, lam, rewards = batch(*how)
            assert first_rank_counts or bool(mine(mask).any()) == (rank > 0)
            inputs = leaf(mine(values)), leaf(terminal.to(dtype)), leaf(mine(rewards))
            ours = context_parallel_lambda_return(
                inputs[0], inputs[1], mine(mask), gamma, lam, layout=layout, rewards=inputs[2]
            )
            same(ours, mine(returns))
            own_grads = torch.autograd.grad(ours, inputs, mine(weight))
            for ours, expected in zip(own_grads, (mine(grads[0]), grads[1], mine(grads[2])), strict=True):
                same(ours, expected)
            x = leaf(mine(values))
            ours = context_parallel_lambda_value_loss(
                x[..., None],
                terminal,
                mine(attention),
                mine(mask),
                gamma,
                lam,
                layout=layout,
                rewards=mine(rewards),
                loss="huber",
            )
            same(ours, loss)
            same(torch.autograd.grad(ours, x)[0], mine(loss_grad))
        check_dtensor(rank, ranks)
        check_whitening(rank, ranks)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    # Threads of gloo can outlive the group, and now and then abort a process that ends by unwinding.
    os._exit(0)


def check_dtensor(rank, ranks):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def same(ours, expected):
        assert ours.shape == expected.shape
        torch.testing.assert_close(ours.full_tensor(), expected, rtol=1e-12, atol=1e-12)

    mesh = init_device_mesh("cpu", (ranks,))
    values, terminal, attention, mask, gamma, lam, rewards = batch("gaps")
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
    values, terminal, _attention, mask, gamma, _lam, _rewards = batch("gaps")
    _, expected = lr.returns_and_advantages(values, terminal, mask, gamma, whiten=True)
    rows = slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
    _, ours = lr.returns_and_advantages(
        values[rows], terminal[rows], mask[rows], gamma[rows], whiten=True, group=dist.group.WORLD
    )
    torch.testing.assert_close(ours, expected[rows], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_together_are_one_process(ranks, tmp_path):
    torch.multiprocessing.spawn(check_rank, (ranks, str(tmp_path)), nprocs=ranks)


def test_errors_name_the_argument():
    case = padded()
    with pytest.raises(ValueError, match="loss_mask must have the shape of the values"):
        lambda_return_carry(case.values, case.loss_mask[:, 1:])
    with pytest.raises(ValueError, match="loss must be one of mse, huber, smooth_l1, got 'bce'"):
        context_parallel_lambda_value_loss(*case[:2], case.loss_mask, case.loss_mask, loss="bce")
