"""Batches of pairs or rollouts, padded or packed, and the order in which an epoch takes them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lambda_return_ext import create_eos_only_mask
from lambda_return_ext.critic.config import ValuePosition
from lambda_return_ext.critic.data.rollouts import Rollout, Solution
from lambda_return_ext.critic.data.split import Item


class Packing(NamedTuple):
    """Where the R sequences of a packed batch lie.

    Attributes:
        cu_seqlens: int32 [R + 1], where each begins, and where the last ends.
    """

    cu_seqlens: Tensor


@dataclass(frozen=True)
class Batch:
    """R rollouts as sequences; of N pairs R = 2 N, the right ones first, then the wrong ones in the same order.

    Padded to [R, T], or packed: one after the other in [total]. A value belongs to each place where `loss_mask` is
    true: which these are, `model.value_position` says.

    Attributes:
        inputs: token ids [R, T] or [total], or cached features from the prompt's last token on, with H behind.
        attention_mask: bool, the shape of the ids, false at padding.
        loss_mask: bool, the shape of the ids, true where there is a value.
        terminal_rewards: float32 [R].
        upper: bool [R], the rollouts of the upper half, where a loss is balanced between two.
        tokens: number of positions that are no padding.
        step_rewards: float32, the shape of the ids, besides the terminal ones; None where no rollout has any.
        packing: None where the batch is padded.
        output_mask: all places of values, where `loss_mask` is only a window of them.
    """

    inputs: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    terminal_rewards: Tensor
    upper: Tensor
    tokens: int
    step_rewards: Tensor | None = None
    packing: Packing | None = None
    output_mask: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        if self.packing is not None:
            moved["packing"] = Packing(self.packing.cu_seqlens.to(device))
        return replace(self, **moved)

    def last_tokens(self) -> Tensor:
        """Mask of the last value of each rollout, bool, the shape of the loss mask."""
        if self.packing is None:
            return create_eos_only_mask(self.loss_mask).bool()
        # The last one is that with which the count over all reaches that at the end of its sequence.
        count = self.loss_mask.cumsum(0)
        ends = count[self.packing.cu_seqlens[1:].long() - 1]
        return self.loss_mask & torch.isin(count, ends)


class Places(NamedTuple):
    """Where a rollout has values and rewards, over its prompt's last token and all that follows it.

    Attributes:
        mask: bool [1 + T], true where a hidden state gives a value.
        rewards: float32 [1 + T], rewards besides the terminal one, at the place of the value that is told of them.
    """

    mask: Tensor
    rewards: Tensor


def value_places(rollout: Rollout, position: ValuePosition) -> Places:
    """Which hidden states of a rollout give values.

    Output token t stands at place t + 1. `after`: its value is read there, when the model has read it. `before`: at
    place t, so that each run of output tokens moves one to the left, the first one onto the prompt's last token.
    `both`: at all these places under one mask. A reward of token t goes where that token's own value is.
    """
    length = len(rollout.solution.output_ids)
    mask, rewards = torch.zeros(1 + length, dtype=torch.bool), torch.zeros(1 + length)
    gaps = rollout.solution.output_mask
    output = torch.ones(length, dtype=torch.bool) if gaps is None else torch.tensor(gaps)
    if position != "before":
        mask[1:] |= output
    if position != "after":
        mask[:-1] |= output
    if rollout.step_rewards is not None:
        rewards[slice(None, -1) if position == "before" else slice(1, None)] = torch.tensor(rollout.step_rewards)
    return Places(mask, rewards)


class Collator:
    """Turns pairs or rollouts into a batch, padded or packed, of token ids or, where features are given, of those.

    Features need hold what follows the prompt, and its last token where that has a value: other positions of the prompt
    carry no loss, and a masked return skips them.

    Args:
        pad_id: token id at padding; it is masked everywhere.
        features: [S, H] for the last S tokens of each solution, at least those with a value.
        multiple: T, or the total of a packed batch, is a multiple of this.
        packed: batches to train on are packed.
        position: which hidden states give values.
        midpoint: rollouts whose rewards come to at least this are the upper half; None where pairs have two sides.
        step_rewards: batches hold rewards besides the terminal ones.
    """

    def __init__(
        self,
        pad_id: int,
        features: Mapping[Solution, Tensor] | None = None,
        multiple: int = 1,
        packed: bool = False,
        position: ValuePosition = "after",
        midpoint: float | None = None,
        step_rewards: bool = False,
    ):
        self.pad_id = pad_id
        self.features = features
        self.multiple = multiple
        self.packed = packed
        self.position = position
        self.midpoint = midpoint
        self.step_rewards = step_rewards

    def __call__(self, items: Sequence[Item]) -> Batch:
        """A batch to train on."""
        return self.pack(items) if self.packed else self.pad(items)

    def pad(self, items: Sequence[Item]) -> Batch:
        """Pad the rollouts on the right into one batch."""
        rollouts, rows = self._rows(items)
        longest = max(map(len, rows))
        rows.append(rows[0].new_zeros(longest + -longest % self.multiple, *rows[0].shape[1:]))  # sets T, then goes
        inputs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad_id)[:-1]
        lengths = [len(row) for row in rows[:-1]]
        mask = torch.zeros(inputs.shape[:2], dtype=torch.bool)
        rewards = torch.zeros(inputs.shape[:2])
        for row, (rollout, length) in enumerate(zip(rollouts, lengths, strict=True)):
            self._place(rollout, mask[row, :length], rewards[row, :length])
        return Batch(
            inputs=inputs,
            attention_mask=torch.arange(inputs.shape[1]) < torch.tensor(lengths)[:, None],
            loss_mask=mask,
            tokens=sum(lengths),
            step_rewards=rewards if self.step_rewards else None,
            **self._of_rows(items, rollouts),
        )

    def pack(self, items: Sequence[Item]) -> Batch:
        """Put the rollouts one after the other into one batch; what fills it up is masked and ends the last one."""
        rollouts, rows = self._rows(items)
        lengths = [len(row) for row in rows]
        tokens = sum(lengths)
        filling = -tokens % self.multiple
        fill = 0 if self.features is not None else self.pad_id
        rows.append(rows[0].new_full((filling, *rows[0].shape[1:]), fill))
        mask, rewards = torch.zeros(tokens + filling, dtype=torch.bool), torch.zeros(tokens + filling)
        parts = mask[:tokens].split(lengths), rewards[:tokens].split(lengths)
        for rollout, its_mask, its_rewards in zip(rollouts, *parts, strict=True):
            self._place(rollout, its_mask, its_rewards)
        ends = torch.tensor([0, *lengths]).cumsum(0)
        ends[-1] += filling
        return Batch(
            inputs=torch.cat(rows),
            attention_mask=torch.arange(tokens + filling) < tokens,
            loss_mask=mask,
            tokens=tokens,
            step_rewards=rewards if self.step_rewards else None,
            packing=Packing(ends.int()),
            **self._of_rows(items, rollouts),
        )

    def _rows(self, items: Sequence[Item]) -> tuple[list[Rollout], list[Tensor]]:
        """The rollouts, the first of all items before the second of any, and what the model reads of each."""
        rollouts = [*itertools.chain.from_iterable(zip(*(item.rollouts for item in items), strict=True))]
        if self.features is not None:
            return rollouts, [self.features[rollout.solution] for rollout in rollouts]
        return rollouts, [
            torch.tensor(rollout.solution.prompt_ids + rollout.solution.output_ids) for rollout in rollouts
        ]

    def _place(self, rollout: Rollout, mask: Tensor, rewards: Tensor) -> None:
        """Fill in where one rollout has values and rewards: its places are the last ones of the row."""
        places = value_places(rollout, self.position)
        held = min(len(mask), len(places.mask))
        mask[len(mask) - held :] = places.mask[-held:]
        rewards[len(mask) - held :] = places.rewards[-held:]

    def _of_rows(self, items: Sequence[Item], rollouts: Sequence[Rollout]) -> dict[str, Any]:
        totals = torch.tensor([rollout.total for rollout in rollouts], dtype=torch.float64)
        sides = torch.arange(len(rollouts)) < len(items)
        return {
            "terminal_rewards": torch.tensor([rollout.reward or 0.0 for rollout in rollouts]),
            "upper": sides if self.midpoint is None else totals >= self.midpoint,
        }


POOL_BATCHES = 16


def epoch_batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The order of one epoch: every index once, in batches of similar length.

    It depends on the arguments alone, so that the step number is all of the data position that a resumed run
    needs, and every rank can work out the whole order and take its share. Shuffled indices are sorted by length
    within pools of a few batches: little padding, yet other neighbours in each epoch.
    """
    rng = random.Random(f"{seed}:{epoch}")
    order = rng.sample(range(len(lengths)), len(lengths))
    pool = POOL_BATCHES * batch_size
    batches = []
    for start in range(0, len(order), pool):
        part = sorted(order[start : start + pool], key=lambda index: lengths[index])
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return rng.sample(batches, len(batches))
