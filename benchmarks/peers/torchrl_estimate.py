"""torchrl's vectorised TD(lambda) estimate, a convolution with powers of gamma * lambda. It knows no masks."""

import torch
from harness import GAMMA, LAM, Batch, Contestant

from .loops import terminal
from .peer import Peer, version_of

NAME = "torchrl vec_td_lambda_return_estimate"


def _prepare(batch: Batch) -> Contestant:
    version = f"{version_of('torchrl')}, {version_of('tensordict')}"
    from torchrl.objectives.value.functional import vec_td_lambda_return_estimate

    next_values = torch.nn.functional.pad(batch.values[:, 1:], (0, 1))[..., None]  # [B, T, 1]
    rewards = terminal(batch)[..., None]
    done = torch.zeros_like(rewards, dtype=torch.bool)
    done[:, -1] = True
    arguments = (GAMMA, LAM, next_values, rewards, done, done)
    return Contestant(NAME, version, lambda: vec_td_lambda_return_estimate(*arguments), lambda returns: returns[..., 0])


PEERS = (Peer(NAME, _prepare, gaps=False, most_columns=65536),)
