"""Loops over T in plain torch, written as frameworks for reinforcement learning of language models write them."""

import torch
from harness import GAMMA, LAM, Batch, Contestant
from torch import Tensor

from lambda_return_ext import reference

from .peer import Peer


def return_loop(values: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    """The recursion itself, one column [B] after another from the right."""
    returns, carry = torch.zeros_like(values), rewards.float()
    for t in reversed(range(values.shape[1])):
        valid = mask[:, t]
        returns[:, t] = torch.where(valid, carry, 0.0).to(values.dtype)
        carry = torch.where(valid, GAMMA * (1 - LAM) * values[:, t].float() + GAMMA * LAM * carry, carry)
    return returns


def advantage_loop(values: Tensor, token_rewards: Tensor, mask: Tensor) -> Tensor:
    """Generalised advantages plus values, the masks [B, T] floats that blend old and new carries.

    Masked positions hold what was carried past them. verl (compute_gae_advantage_return) and NeMo-RL
    (GeneralizedAdvantageEstimator) do these operations in every step.
    """
    advantages = []
    next_value = advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        value, weight = values[:, t], mask[:, t]
        error = token_rewards[:, t] + GAMMA * next_value - value
        stepped = error + GAMMA * LAM * advantage
        next_value = value * weight + next_value * (1 - weight)
        advantage = stepped * weight + advantage * (1 - weight)
        advantages.append(advantage)
    advantages.reverse()
    return torch.stack(advantages, dim=1) + values


def terminal(batch: Batch) -> Tensor:
    """The reward of each row at its last valid token, zero elsewhere, [B, T]."""
    positions = torch.arange(batch.values.shape[1])
    last = torch.where(batch.loss_mask, positions, -1).amax(dim=1, keepdim=True)
    return torch.where(positions == last, batch.rewards[:, None], 0.0).to(batch.values.dtype)


def _double_loop(batch: Batch) -> Contestant:
    arguments = (batch.values, batch.rewards, batch.loss_mask, GAMMA, LAM)
    return Contestant(
        "double loop over rows and tokens",
        f"torch {torch.__version__}",
        lambda: reference.compute_lambda_return(*arguments),
    )


def _return_loop(batch: Batch) -> Contestant:
    arguments = (batch.values, batch.rewards, batch.loss_mask)
    return Contestant("return loop over T", f"torch {torch.__version__}", lambda: return_loop(*arguments))


def _advantage_loop(batch: Batch) -> Contestant:
    mask = batch.loss_mask.to(batch.values.dtype)
    arguments = (batch.values, terminal(batch), mask)
    return Contestant(
        "GAE loop over T, as in verl and NeMo-RL",
        f"torch {torch.__version__}",
        lambda: advantage_loop(*arguments),
        lambda returns: torch.where(batch.loss_mask, returns, 0.0),
    )


PEERS = (
    Peer("double loop over rows and tokens", _double_loop, gaps=True, most_columns=8192),
    Peer("return loop over T", _return_loop, gaps=True, most_columns=8192),
    Peer("GAE loop over T, as in verl and NeMo-RL", _advantage_loop, gaps=True, most_columns=8192),
)
