"""torch-discounted-cumsum: y[t] = x[t] + lambda y[t + 1] in C++. With x made of values it gives lambda-returns.

Making x is not timed. The package knows no masks.
"""

import torch
from harness import GAMMA, LAM, Batch, Contestant

from .peer import Peer, version_of

NAME = "torch-discounted-cumsum"


def _prepare(batch: Batch) -> Contestant:
    version = version_of("torch-discounted-cumsum")
    from torch_discounted_cumsum import discounted_cumsum_right

    terms = torch.cat([GAMMA * (1 - LAM) * batch.values[:, 1:], batch.rewards[:, None]], dim=1)  # [B, T]
    # One factor a row: 1.1.0 reads a scalar's memory beyond its end, and gives wrong sums from the second row on.
    factors = torch.full_like(batch.rewards, GAMMA * LAM)  # [B]
    return Contestant(NAME, version, lambda: discounted_cumsum_right(terms, factors))


PEERS = (Peer(NAME, _prepare, gaps=False),)
