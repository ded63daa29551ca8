"""Batches of pairs, padded or packed, and the order in which an epoch takes them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lambda_return_ext import create_eos_only_mask
from lambda_return_ext.critic.data.pairs import TokenPair
from lambda_return_ext.critic.data.rollouts import Solution


class Packing(NamedTuple):
    """Where the 2 N sequences of a packed batch lie.

    Attributes:
        cu_seqlens: int32 [2N + 1], where each begins, and where the last ends.
        right_tokens: number of tokens of the N right ones, which come first.
    """

    cu_seqlens: Tensor
    right_tokens: int


@dataclass(frozen=True)
class Batch:
    """N pairs as 2 N sequences: the right solutions first, then the wrong ones in the same order.

    Padded to [2N, T], or packed: one after the other in [total].

    Attributes:
        inputs: token ids [2N, T] or [total], or cached features of what follows the prompt, with H behind.
        attention_mask: bool, the shape of the ids, false at padding.
        loss_mask: bool, the shape of the ids, true at output tokens.
        terminal_rewards: float32 [2N], 1 for right and 0 for wrong.
        tokens: number of positions that are no padding.
        packing: None where the batch is padded.
        output_mask: all output tokens, where `loss_mask` is only a window of them.
    """

    inputs: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    terminal_rewards: Tensor
    tokens: int
    packing: Packing | None = None
    output_mask: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        if self.packing is not None:
            moved["packing"] = self.packing._replace(cu_seqlens=self.packing.cu_seqlens.to(device))
        return replace(self, **moved)

    def last_tokens(self) -> Tensor:
        """Mask of the last output token of each solution, bool, the shape of the loss mask."""
        if self.packing is None:
            return create_eos_only_mask(self.loss_mask).bool()
        # The last output token is the one with which the count over all reaches that at the end of its sequence.
        count = self.loss_mask.cumsum(0)
        ends = count[self.packing.cu_seqlens[1:].long() - 1]
        return self.loss_mask & torch.isin(count, ends)


class Collator:
    """Turns pairs into a batch, padded or packed, of token ids or, where features are given, of those.

    Features hold what follows the prompt only: positions of the prompt carry no loss, and a masked return skips them.

    Args:
        pad_id: token id at padding; it is masked everywhere.
        features: [T, H] for all that follows the prompt of each solution.
        multiple: T, or the total of a packed batch, is a multiple of this.
        packed: batches to train on are packed.
    """

    def __init__(
        self,
        pad_id: int,
        features: Mapping[Solution, Tensor] | None = None,
        multiple: int = 1,
        packed: bool = False,
    ):
        self.pad_id = pad_id
        self.features = features
        self.multiple = multiple
        self.packed = packed

    def __call__(self, pairs: Sequence[TokenPair]) -> Batch:
        """A batch to train on."""
        return self.pack(pairs) if self.packed else self.pad(pairs)

    def pad(self, pairs: Sequence[TokenPair]) -> Batch:
        """Pad the pairs on the right into one batch."""
        rewards = torch.tensor([1.0, 0.0]).repeat_interleave(len(pairs))
        return self.collate([pair.right for pair in pairs] + [pair.wrong for pair in pairs], rewards)

    def pack(self, pairs: Sequence[TokenPair]) -> Batch:
        """Put the pairs one after the other into one batch; what fills it up is masked and ends the last sequence."""
        solutions = [pair.right for pair in pairs] + [pair.wrong for pair in pairs]
        rows, masks = self._rows(solutions), []
        for solution, row in zip(solutions, rows, strict=True):
            output = solution.output_mask or (True,) * len(solution.output_ids)
            masks.append(torch.tensor((False,) * (len(row) - len(output)) + output))
        tokens = sum(map(len, rows))
        filling = -tokens % self.multiple
        fill = 0 if self.features is not None else self.pad_id
        rows.append(rows[0].new_full((filling, *rows[0].shape[1:]), fill))
        masks.append(torch.zeros(filling, dtype=torch.bool))
        ends = torch.tensor([0, *(len(row) for row in rows[:-1])]).cumsum(0)
        ends[-1] += filling
        return Batch(
            inputs=torch.cat(rows),
            attention_mask=torch.arange(tokens + filling) < tokens,
            loss_mask=torch.cat(masks),
            terminal_rewards=torch.tensor([1.0, 0.0]).repeat_interleave(len(pairs)),
            tokens=tokens,
            packing=Packing(ends.int(), int(ends[len(pairs)])),
        )

    def _rows(self, solutions: Sequence[Solution]) -> list[Tensor]:
        if self.features is not None:
            return [self.features[solution] for solution in solutions]
        return [torch.tensor(solution.prompt_ids + solution.output_ids) for solution in solutions]

    def collate(self, solutions: Sequence[Solution], terminal_rewards: Tensor) -> Batch:
        """Pad any solutions on the right into one batch.

        Args:
            solutions: B solutions.
            terminal_rewards: [B].
        """
        rows = self._rows(solutions)
        longest = max(map(len, rows))
        rows.append(rows[0].new_zeros(longest + -longest % self.multiple, *rows[0].shape[1:]))  # sets T, then goes
        inputs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad_id)[:-1]
        lengths = torch.tensor([len(row) for row in rows[:-1]])
        starts = lengths - torch.tensor([len(solution.output_ids) for solution in solutions])
        position = torch.arange(inputs.shape[1])
        attention_mask = position < lengths[:, None]
        loss_mask = attention_mask & (position >= starts[:, None])
        for row, solution in enumerate(solutions):
            if solution.output_mask is not None:
                loss_mask[row, starts[row] : lengths[row]] = torch.tensor(solution.output_mask)
        return Batch(
            inputs=inputs,
            attention_mask=attention_mask,
            loss_mask=loss_mask,
            terminal_rewards=terminal_rewards,
            tokens=int(lengths.sum()),
        )


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
