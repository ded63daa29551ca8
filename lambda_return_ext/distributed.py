"""Returns and losses of sequences that are split in time, over chunks or over the ranks of a process group.

A chunk of a sequence acts on the carry H, what its right neighbour hands to it, as an affine map H -> a H + b. So ranks
need not see one another's values: each sends (a, b), two numbers a row and chunk, composes those of the chunks to its
right, and scans its own tokens from the carry that results.

Layouts of the tokens [B, T] of a group of W ranks, in equal parts:

* ``contiguous``: rank r holds part r of W;
* ``zigzag``: rank r holds parts r and 2 W - 1 - r of 2 W, one after the other, as causal attention is balanced.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ._arguments import (
    check_choice,
    check_cu_seqlens,
    check_discount,
    check_like,
    check_packed_values,
    check_value_logits,
)
from ._registrations import REDUCTIONS
from .functional import _check_loss, _check_scan, _Scan, _value_loss

_ops = torch.ops.lambda_return

LAYOUTS = ("contiguous", "zigzag")


@torch.no_grad()
def lambda_return_carry(
    values: Tensor,
    loss_mask: Tensor | None,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    *,
    rewards: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    r"""What a chunk of each sequence does to the carry: :math:`H_{left} = a H_{right} + b`.

    The carry that enters at the right end of the last chunk is the terminal reward R; maps compose as (a2, b2) after
    (a1, b1) = (a2 a1, a2 b1 + b2).

    ``terminal_rewards`` of :func:`~lambda_return_ext.compute_lambda_return` **is the carry from the right**.
    Give it the carry into a chunk, and the chunk's returns are those of the whole sequence::

        carry = terminal_rewards
        for chunk in reversed(chunks):
            returns = compute_lambda_return(chunk.values, carry, chunk.loss_mask, gamma, lam)
            a, b = lambda_return_carry(chunk.values, chunk.loss_mask, gamma, lam).unbind(1)
            carry = a * carry + b

    Args:
        values: V, [B, T] or [B, T, 1], or [total] or [total, 1] with ``cu_seqlens``.
        loss_mask: the shape of the values, any real dtype, nonzero = valid; with ``cu_seqlens`` None: every token is.
        gamma: discount per valid token, in [0, 1]; a float, or a 0-dim or [B] floating tensor.
        lam: lambda, likewise.
        rewards: r, the shape of the values, any real dtype.
        cu_seqlens: [B + 1], int32 or int64.

    Returns:
        (a, b), [B, 2], float32 (float64 for float64 values), without gradient.

    Raises:
        TypeError: a tensor argument is no tensor or has an unsupported dtype; gamma or lam is no real number.
        ValueError: a shape or device does not match; ``cu_seqlens``, gamma or lam is not as above.
    """
    values = (check_value_logits if cu_seqlens is None else check_packed_values)("values", values)
    rows = values.shape[0] if cu_seqlens is None else check_cu_seqlens(cu_seqlens, values)
    if loss_mask is not None or cu_seqlens is None:
        check_like("loss_mask", loss_mask, values)
    if rewards is not None:
        check_like("rewards", rewards, values)
    gamma, lam = check_discount("gamma", gamma, values, rows), check_discount("lam", lam, values, rows)
    return _ops.td_lambda_map(values, loss_mask, rewards, cu_seqlens, gamma, lam)


# ---- chunks of a group ---------------------------------------------------------------------------------------------


class _Chunks:
    """Which chunks of the sequence this rank holds, and how numbers of all of them come together."""

    def __init__(self, tokens: int, group: Any, layout: str):
        zigzag = check_choice("layout", layout, LAYOUTS) == 1
        self.group, self.ranks = group, dist.get_world_size(group)
        rank, self.per_rank = dist.get_rank(group), 2 if zigzag else 1
        if tokens % self.per_rank:
            raise ValueError(f"values must hold two parts of one length in the zigzag layout, got {tokens} tokens")
        length = tokens // self.per_rank
        self.slices = [slice(i * length, (i + 1) * length) for i in range(self.per_rank)]
        self.indices = [rank, 2 * self.ranks - 1 - rank] if zigzag else [rank]
        # Where the chunks stand in what all ranks send, from left to right in time.
        order = [(r, 0) for r in range(self.ranks)]
        if zigzag:
            order += [(r, 1) for r in reversed(range(self.ranks))]
        self.places = [r * self.per_rank + i for r, i in order]

    def gather(self, mine: list[Tensor]) -> list[Tensor]:
        """Return one tensor of every chunk, from left to right, from those of this rank's chunks."""
        sent = torch.stack(mine)
        received = [torch.empty_like(sent) for _ in range(self.ranks)]
        dist.all_gather(received, sent, group=self.group)
        everyone = torch.cat(received)
        return [everyone[place] for place in self.places]

    def of(self, x: Tensor | None) -> list[Any]:
        """Return the parts of x [B, T] that are this rank's chunks."""
        return [None if x is None else x[:, part] for part in self.slices]


def _carries(chunks: _Chunks, maps: list[Tensor], terminal: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the carry into each of this rank's chunks from the right, and the maps of all chunks."""
    everyone = chunks.gather(maps)
    into = [terminal]
    for chunk in reversed(everyone[1:]):
        into.append(_apply(chunk[:, 0], chunk[:, 1], into[-1]))
    into.reverse()
    return [into[index] for index in chunks.indices], everyone


def _apply(a: Tensor, b: Tensor, carry: Tensor) -> Tensor:
    """Return a carry + b; a coefficient of exactly 0 drops even an Inf."""
    return torch.where(a == 0, b, a * carry + b)


class _ContextParallelReturn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        terminal: Tensor,
        mask: Tensor,
        rewards: Tensor | None,
        gamma: Tensor,
        lam: Tensor,
        chunks: _Chunks,
    ) -> Tensor:
        """Scan each chunk from the carry that the maps of those to its right give."""
        parts = list(zip(chunks.of(values), chunks.of(mask), chunks.of(rewards), strict=True))
        maps = [_ops.td_lambda_map(v, m, r, None, gamma, lam) for v, m, r in parts]
        carries, everyone = _carries(chunks, maps, terminal)
        returns = [
            _ops.td_lambda(v, carry, m, r, None, gamma, lam) for (v, m, r), carry in zip(parts, carries, strict=True)
        ]
        ctx.save_for_backward(mask, gamma, lam, *[chunk[:, 0] for chunk in everyone])
        ctx.chunks, ctx.rewards_dtype = chunks, None if rewards is None else rewards.dtype
        return torch.cat(returns, dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_returns: Tensor) -> tuple[Tensor | None, ...]:
        """Scan the adjoint from left to right, each chunk from what those to its left hand on."""
        mask, gamma, lam, *slopes = ctx.saved_tensors
        chunks, with_rewards = ctx.chunks, ctx.rewards_dtype is not None
        parts = list(zip(chunks.of(grad_returns), chunks.of(mask), strict=True))
        own = [_ops.td_lambda_backward(g, m, None, gamma, lam, False)[1] for g, m in parts]
        adjoints = [torch.zeros_like(own[0])]
        for a, b in zip(slopes, chunks.gather(own), strict=True):
            adjoints.append(_apply(a, b, adjoints[-1]))
        grad_values, grad_rewards = [], []
        for (g, m), index in zip(parts, chunks.indices, strict=True):
            # The operator starts from 0: what comes from the left enters as the gradient of one more valid token.
            before = adjoints[index][:, None]
            acc = torch.cat([before, g.to(before.dtype)], dim=1)
            valid = torch.cat([torch.ones_like(before, dtype=torch.bool), m != 0], dim=1)
            outputs = _ops.td_lambda_backward(acc, valid, None, gamma, lam, with_rewards)
            grad_values.append(outputs[0][:, 1:].to(g.dtype))
            if with_rewards:
                grad_rewards.append(outputs[2][:, 1:].to(ctx.rewards_dtype))
        rewards = torch.cat(grad_rewards, dim=1) if with_rewards else None
        return torch.cat(grad_values, dim=1), adjoints[-1], None, rewards, None, None, None


def _local(name: str, x: Any, mesh: Any) -> Any:
    """Return the local tokens of a DTensor that is sharded on T over the mesh, anything else as it is."""
    if mesh is None or not hasattr(x, "device_mesh"):
        return x
    if x.device_mesh != mesh or [p.dim for p in x.placements if p.is_shard()] != [1]:
        raise ValueError(f"{name} must be sharded on T as values are, got {x.placements} on {x.device_mesh}")
    return x.to_local()


def _enter(name: str, values: Any, group: Any) -> tuple[Tensor, Any, Any]:
    """Return local values, their mesh if they are a DTensor that is sharded on T, and the group."""
    mesh = getattr(values, "device_mesh", None)
    if mesh is None:
        return check_value_logits(name, values), None, group
    if mesh.ndim != 1 or not values.placements[0].is_shard(1):
        raise ValueError(
            f"{name} must be sharded on T over a mesh of one dimension, got {values.placements} on {mesh}: pass "
            f"{name}.to_local() and the group of the context-parallel dimension instead"
        )
    return check_value_logits(name, values.to_local()), mesh, mesh.get_group()


def _leave(x: Tensor, values: Any, mesh: Any) -> Any:
    """Return x [B, T of this rank] as a DTensor if the values are one."""
    if mesh is None:
        return x
    from torch.distributed.tensor import DTensor

    # Without a shape, T would be taken for the ranks times the tokens of this one.
    shape = torch.Size((x.shape[0], values.shape[1]))
    return DTensor.from_local(x, mesh, values.placements, run_check=False, shape=shape, stride=(shape[1], 1))


def context_parallel_lambda_return(
    values: Tensor,
    terminal_rewards: Tensor,
    loss_mask: Tensor,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    *,
    group: Any = None,
    layout: str = "contiguous",
    rewards: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
) -> Tensor:
    """TD(lambda) targets of sequences whose tokens are split over the ranks of a group.

    The returns of :func:`~lambda_return_ext.compute_lambda_return` over the whole sequences, gaps across the borders
    included. Ranks exchange two numbers a row and chunk forward and one backward, never values.

    Args:
        values: V, [B, T of this rank] or [B, T, 1]; or a DTensor [B, T] that is sharded on T over a mesh of one
            dimension, and then the masks and rewards are, too, and ``group`` is that of the mesh.
        terminal_rewards: R, [B], the same on every rank.
        loss_mask: [B, T of this rank], any real dtype, nonzero = valid.
        gamma: discount per valid token, in [0, 1]; a float, or a 0-dim or [B] floating tensor; the same on every rank.
        lam: lambda, likewise.
        group: a torch.distributed process group; None: the default one.
        layout: ``contiguous`` or ``zigzag``, see the module. Each rank holds equally many tokens in the latter.
        rewards: r, [B, T of this rank], any real dtype.
        bootstrap_values: b, [B], any real dtype, the same on every rank; 0 for a sequence that is not truncated.

    Returns:
        G of this rank's tokens, as ``values``. Differentiable once in values, rewards, terminal_rewards and
        bootstrap_values; the gradient of the last two is whole on every rank.

    Raises:
        TypeError: a tensor argument is no tensor or has an unsupported dtype; gamma or lam is no real number.
        ValueError: a shape, device or placement does not match; gamma, lam or the layout is not as above.
    """
    local, mesh, group = _enter("values", values, group)
    mask, rewards = _local("loss_mask", loss_mask, mesh), _local("rewards", rewards, mesh)
    scan = _check_scan(local, terminal_rewards, mask, gamma, lam, rewards, bootstrap_values, None)
    terminal = scan.terminal_rewards.to(torch.float64 if local.dtype == torch.float64 else torch.float32)
    chunks = _Chunks(local.shape[1], group, layout)
    returns = _ContextParallelReturn.apply(local, terminal, mask, rewards, scan.gamma, scan.lam, chunks)
    return _leave(returns, values, mesh)


class _SumOverRanks(torch.autograd.Function):
    """The sum of x over the ranks, the same bits on each; what each differentiates is its own part of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor, None]:
        return grad_total, None


def context_parallel_lambda_value_loss(
    value_logits: Tensor,
    terminal_rewards: Tensor,
    attention_mask: Tensor,
    loss_mask: Tensor,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    *,
    group: Any = None,
    layout: str = "contiguous",
    rewards: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    output_mask: Tensor | None = None,
    loss: str = "mse",
    delta: float = 1.0,
    old_values: Tensor | None = None,
    clip_range: float | None = None,
    reduction: str = "token_mean",
    normalizer: Tensor | None = None,
    return_statistics: bool = False,
) -> Any:
    """Masked loss of values against their own TD(lambda) targets, of sequences split over the ranks of a group.

    :func:`~lambda_return_ext.compute_lambda_value_loss` of the whole sequences, with the same options and formulas:
    every rank gets the loss over all tokens and the gradient of its own. Ranks exchange the maps of their chunks, the
    statistics and the loss, for ``sequence_mean`` also the tokens of each row, never values.

    The targets are constants: there is no ``detach_targets``. Where the gradient must flow through them, write the loss
    with :func:`context_parallel_lambda_return`. ``sequence_mean`` and ``none`` keep the losses of this rank's tokens,
    [B, T of this rank], while they run; the other two reductions keep nothing of that size.

    Args:
        value_logits: V or x, [B, T of this rank] or [B, T, 1]; or a DTensor [B, T], as in
            :func:`context_parallel_lambda_return`, and then all arguments of its shape are, too.
        terminal_rewards: R, [B], the same on every rank.
        attention_mask: [B, T of this rank], any real dtype, nonzero = valid.
        loss_mask: [B, T of this rank], any real dtype, nonzero = output token.
        gamma: discount per valid token, in [0, 1]; a float, or a 0-dim or [B] floating tensor; the same on every rank.
        lam: lambda, likewise.
        group: a torch.distributed process group; None: the default one.
        layout: ``contiguous`` or ``zigzag``.
        rewards: r, [B, T of this rank], any real dtype.
        bootstrap_values: b, [B], any real dtype, the same on every rank.
        output_mask: [B, T of this rank], any real dtype: all output tokens, where ``loss_mask`` is a window of them.
        loss: ``mse``, ``huber``, ``smooth_l1``, ``bce`` or ``bce_with_logits``.
        delta: of ``huber`` and ``smooth_l1``, above 0.
        old_values: the shape and dtype of ``value_logits``; needs ``clip_range``.
        clip_range: above 0.
        reduction: ``token_mean``, ``sequence_mean``, ``sum`` or ``none``.
        normalizer: 0-dim, the same on every rank, for the two means: what takes the place of the tokens, or sequences,
            of all ranks of this group; 0 gives a loss of 0.
        return_statistics: also return the sums from which :func:`~lambda_return_ext.explained_variance` is computed.

    Returns:
        The loss, 0-dim, float32 (float64 for float64 values), the same on every rank; with ``none`` that of this rank's
        tokens, as ``value_logits`` without a last 1. With ``return_statistics`` the loss and [6], float64, over all
        tokens of the group: add these up over steps and other groups, not over its ranks.

    Raises:
        TypeError: a tensor argument is no tensor or has an unsupported dtype; a number is none.
        ValueError: a shape, device or placement does not match; a number or an option is not as above.
    """
    values, mesh, group = _enter("value_logits", value_logits, group)
    attention, mask = _local("attention_mask", attention_mask, mesh), _local("loss_mask", loss_mask, mesh)
    rewards, old_values = _local("rewards", rewards, mesh), _local("old_values", old_values, mesh)
    check_like("attention_mask", attention, values)
    check_like("loss_mask", mask, values)
    mask_name = "loss_mask"
    if output_mask is not None:
        output_mask = _local("output_mask", output_mask, mesh)
        check_like("output_mask", output_mask, values)
        attention = (attention != 0) & (mask != 0)
        mask_name, mask = "output_mask", output_mask
    scan = _check_scan(values, terminal_rewards, mask, gamma, lam, rewards, bootstrap_values, None, mask_name=mask_name)
    if old_values is not None:
        old_values = check_value_logits("old_values", old_values)
    how = _check_loss(values, loss, delta, old_values, clip_range, reduction, normalizer)

    chunks = _Chunks(values.shape[1], group, layout)
    parts = list(zip(*(chunks.of(x) for x in (values, mask, rewards, attention, how.old_values)), strict=True))
    maps = []
    for v, m, r, _a, _o in parts:
        v = v.detach()
        if loss == "bce_with_logits":
            v = (v if v.dtype == torch.float64 else v.float()).sigmoid()
        maps.append(lambda_return_carry(v, m, scan.gamma, scan.lam, rewards=r))
    carries, _everyone = _carries(chunks, maps, scan.terminal_rewards.detach().to(maps[0].dtype))

    by_token = reduction in ("sequence_mean", "none")
    how = how._replace(reduction=REDUCTIONS.index("none" if by_token else "sum"), normalizer=None)
    losses, sums = [], []
    for (v, m, r, a, o), carry in zip(parts, carries, strict=True):
        chunk = _Scan(v, carry, m, r, None, scan.gamma, scan.lam)
        part, statistics = _value_loss(chunk, a, how._replace(old_values=o), True, True)
        losses.append(part)
        sums.append(statistics)
    statistics = _SumOverRanks.apply(torch.stack(sums).sum(0).detach(), group)

    if reduction == "none":
        result = _leave(torch.cat(losses, dim=1), value_logits, mesh)
        return (result, statistics) if return_statistics else result
    if reduction == "sequence_mean":
        tokens = _SumOverRanks.apply(((attention != 0) & (mask != 0)).sum(dim=1), group)
        mine = (torch.cat(losses, dim=1).sum(dim=1, dtype=torch.float64) / tokens.clamp(min=1)).sum()
        count = (tokens > 0).sum()
    else:
        mine, count = torch.stack(losses).sum(dtype=torch.float64), statistics[0]
    if reduction != "sum":
        count = count if normalizer is None else normalizer.detach()
        mine = torch.where(count == 0, 0.0, mine / torch.where(count == 0, 1, count))
    result = _SumOverRanks.apply(mine, group).to(losses[0].dtype)
    return (result, statistics) if return_statistics else result
