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

from ._arguments import check_choice, check_cu_seqlens, check_discount, check_like, check_rewards, check_value_logits
from .functional import compute_lambda_value_loss

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
        values: V, [B, T] or [B, T, 1], or [total] with ``cu_seqlens``.
        loss_mask: the shape of the values, any real dtype, nonzero = valid; with ``cu_seqlens`` None: every token is.
        gamma: discount per valid token, in [0, 1]; a float, or a 0-dim or [B] floating tensor.
        lam: lambda, likewise.
        rewards: r, the shape of the values, any real dtype.
        cu_seqlens: [B + 1], int32 or int64.

    Returns:
        (a, b), [B, 2], float32 (float64 for float64 values), without gradient.
    """
    if cu_seqlens is None:
        values = check_value_logits("values", values)
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


def _enter(values: Any, group: Any) -> tuple[Tensor, Any, Any]:
    """Return local values, their mesh if they are a DTensor that is sharded on T, and the group."""
    mesh = getattr(values, "device_mesh", None)
    if mesh is None:
        return check_value_logits("values", values), None, group
    if mesh.ndim != 1 or not values.placements[0].is_shard(1):
        raise ValueError(
            f"values must be sharded on T over a mesh of one dimension, got {values.placements} on {mesh}: pass "
            "values.to_local() and the group of the context-parallel dimension instead"
        )
    return check_value_logits("values", values.to_local()), mesh, mesh.get_group()


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

    Returns:
        G of this rank's tokens, as ``values``. Differentiable once in values, rewards and terminal_rewards; the
        gradient of the last is whole on every rank.

    Raises:
        TypeError: a tensor argument is no tensor or has an unsupported dtype; gamma or lam is no real number.
        ValueError: a shape, device or placement does not match; gamma, lam or the layout is not as above.
    """
    local, mesh, group = _enter(values, group)
    mask, rewards = _local("loss_mask", loss_mask, mesh), _local("rewards", rewards, mesh)
    check_rewards("terminal_rewards", terminal_rewards, local)
    check_like("loss_mask", mask, local)
    if rewards is not None:
        check_like("rewards", rewards, local)
    rows = local.shape[0]
    gamma, lam = check_discount("gamma", gamma, local, rows), check_discount("lam", lam, local, rows)
    terminal = terminal_rewards.to(torch.float64 if local.dtype == torch.float64 else torch.float32)
    chunks = _Chunks(local.shape[1], group, layout)
    returns = _ContextParallelReturn.apply(local, terminal, mask, rewards, gamma, lam, chunks)
    if mesh is None:
        return returns
    from torch.distributed.tensor import DTensor

    # Without a shape, T would be taken for the ranks times the tokens of this one.
    T = values.shape[1]
    return DTensor.from_local(
        returns,
        mesh,
        values.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=torch.Size((local.shape[0], T)),
        stride=(T, 1),
    )


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
    loss: str = "mse",
    delta: float = 1.0,
) -> Tensor:
    """Masked loss of values against their own TD(lambda) targets, of sequences split over the ranks of a group.

    :func:`~lambda_return_ext.compute_lambda_value_loss` of the whole sequences with ``token_mean``: every rank gets the
    loss over all tokens and the gradient of its own. Ranks exchange the maps of their chunks, the number of tokens and
    the loss, never values.

    Args:
        value_logits: V, [B, T of this rank] or [B, T, 1]; or a DTensor, as in :func:`context_parallel_lambda_return`.
        terminal_rewards: R, [B], the same on every rank.
        attention_mask: [B, T of this rank], any real dtype, nonzero = valid.
        loss_mask: [B, T of this rank], any real dtype, nonzero = output token.
        gamma: discount per valid token, in [0, 1]; a float, or a 0-dim or [B] floating tensor.
        lam: lambda, likewise.
        group: a torch.distributed process group; None: the default one.
        layout: ``contiguous`` or ``zigzag``.
        rewards: r, [B, T of this rank], any real dtype.
        loss: ``mse``, ``huber`` or ``smooth_l1``.
        delta: of ``huber`` and ``smooth_l1``, above 0.

    Returns:
        The loss, 0-dim, float32 (float64 for float64 values), the same on every rank.

    Raises:
        TypeError: a tensor argument is no tensor or has an unsupported dtype; a number is none.
        ValueError: a shape, device or placement does not match; a number or an option is not as above.
    """
    check_choice("loss", loss, ("mse", "huber", "smooth_l1"))
    values, mesh, group = _enter(value_logits, group)
    attention, mask = _local("attention_mask", attention_mask, mesh), _local("loss_mask", loss_mask, mesh)
    rewards = _local("rewards", rewards, mesh)
    check_rewards("terminal_rewards", terminal_rewards, values)
    check_like("attention_mask", attention, values)
    chunks = _Chunks(values.shape[1], group, layout)
    maps = [
        lambda_return_carry(v.detach(), m, gamma, lam, rewards=r)
        for v, m, r in zip(chunks.of(values), chunks.of(mask), chunks.of(rewards), strict=True)
    ]
    carries, _everyone = _carries(chunks, maps, terminal_rewards.detach().to(maps[0].dtype))
    count = ((attention != 0) & (mask != 0)).sum()
    dist.all_reduce(count, group=group)
    parts = zip(*(chunks.of(x) for x in (values, attention, mask, rewards)), carries, strict=True)
    losses = [
        compute_lambda_value_loss(v, carry, a, m, gamma, lam, rewards=r, loss=loss, delta=delta, normalizer=count)
        for v, a, m, r, carry in parts
    ]
    mine = torch.stack(losses).sum()
    whole = mine.detach().clone()
    dist.all_reduce(whole, group=group)
    return mine + (whole - mine.detach())
