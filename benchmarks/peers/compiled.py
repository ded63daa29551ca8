"""Parallel scans in plain torch, compiled by torch.compile. They run on any device."""

import torch
from harness import GAMMA, LAM, Batch, Contestant
from torch import Tensor

from .peer import Peer, UnavailableError


def _maps(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The affine map that each position applies first, that of the token right of it: two tensors [B, T]."""
    weight = torch.where(mask, GAMMA * LAM, 1.0).to(torch.float32)
    term = torch.where(mask, GAMMA * (1 - LAM) * values.float(), 0.0)
    a = torch.nn.functional.pad(weight[:, 1:], (0, 1), value=1.0)
    b = torch.nn.functional.pad(term[:, 1:], (0, 1), value=0.0)
    return a, b


def log2_doubling(values: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    """The maps of all positions, composed in log2(T) doublings."""
    a, b = _maps(values, mask)
    shift = 1
    while shift < values.shape[1]:
        next_a = torch.nn.functional.pad(a[:, shift:], (0, shift), value=1.0)
        next_b = torch.nn.functional.pad(b[:, shift:], (0, shift), value=0.0)
        a, b = a * next_a, a * next_b + b
        shift *= 2
    return torch.where(mask, a * rewards[:, None] + b, 0.0).to(values.dtype)


def associative_scan(values: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    """The same through torch's associative_scan, whose pointwise form exists on CUDA alone."""
    from torch._higher_order_ops.associative_scan import associative_scan as scan

    a, b = (x.flip(1) for x in _maps(values, mask))
    mode = "pointwise" if values.is_cuda else "generic"
    a, b = scan(lambda x, y: (x[0] * y[0], y[0] * x[1] + y[1]), (a, b), dim=1, combine_mode=mode)
    return torch.where(mask, a.flip(1) * rewards[:, None] + b.flip(1), 0.0).to(values.dtype)


def _prepare(name: str, function, batch: Batch) -> Contestant:
    compiled = torch.compile(function, dynamic=False, fullgraph=True)
    arguments = (batch.values, batch.rewards, batch.loss_mask)
    try:
        compiled(*arguments)
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
        reason = str(error).strip().splitlines()[0][:120]
        raise UnavailableError(f"torch.compile failed: {type(error).__name__}: {reason}") from error
    return Contestant(name, f"torch {torch.__version__}", lambda: compiled(*arguments))


ASSOCIATIVE_SCAN = "torch.compile of associative_scan"
LOG2_DOUBLING = "torch.compile of log2-doubling"
PEERS = (
    Peer(ASSOCIATIVE_SCAN, lambda batch: _prepare(ASSOCIATIVE_SCAN, associative_scan, batch), True, 65536),
    Peer(LOG2_DOUBLING, lambda batch: _prepare(LOG2_DOUBLING, log2_doubling, batch), True, 65536),
)
