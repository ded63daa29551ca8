"""A sequential loop compiled by numba, the means by which tianshou computes its returns, with gaps and no copies."""

import torch
from harness import GAMMA, LAM, Batch, Contestant

from .peer import Peer, version_of

NAME = "numba loop, as in tianshou"


def _prepare(batch: Batch) -> Contestant:
    version = version_of("numba")
    import numba
    import numpy as np

    # The types of the arithmetic are those of the arrays: a Python float would make it float64.
    weight, decay = np.float32(GAMMA * (1 - LAM)), np.float32(GAMMA * LAM)

    @numba.njit
    def returns_of(values, rewards, mask):  # [B, T], [B], [B, T]
        returns = np.empty_like(values)
        for row in range(values.shape[0]):
            carry = rewards[row]
            for t in range(values.shape[1] - 1, -1, -1):
                if mask[row, t]:
                    returns[row, t] = carry
                    carry = weight * values[row, t] + decay * carry
                else:
                    returns[row, t] = 0
        return returns

    arguments = (batch.values.numpy(), batch.rewards.numpy(), batch.loss_mask.numpy())
    returns_of(*arguments)
    return Contestant(NAME, version, lambda: returns_of(*arguments), torch.from_numpy)


PEERS = (Peer(NAME, _prepare, gaps=True),)
