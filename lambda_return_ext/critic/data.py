"""Pairs of right and wrong solutions: read, check, split by problem, tokenise, batch."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lambda_return_ext.critic.config import DataConfig
from lambda_return_ext.critic.errors import UserError


class Pair(NamedTuple):
    """One line of the data file."""

    problem: str
    prompt: str
    chosen: str
    rejected: str
    line: int


class Solution(NamedTuple):
    """A tokenised prompt and one tokenised answer to it."""

    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]


class TokenPair(NamedTuple):
    """A right and a wrong solution of the same problem."""

    problem: str
    right: Solution
    wrong: Solution

    @property
    def length(self) -> int:
        """Tokens of the longer side, by which batches are put together whether or not features are cached."""
        return len(self.right.prompt_ids) + max(len(self.right.output_ids), len(self.wrong.output_ids))


@dataclass(frozen=True)
class PairData:
    """The pairs of a run after the split.

    Attributes:
        train: pairs to train on.
        validation: pairs of problems that `train` has none of.
        dropped: pairs left out because a solution does not fit into `max_length`.
    """

    train: list[TokenPair]
    validation: list[TokenPair]
    dropped: int


def select_pairs(pairs: Sequence[Pair], tokenizer: Any, config: DataConfig) -> PairData:
    """Tokenise the pairs of the data file, split them by problem and take as many as the configuration says.

    A prompt as long as `max_length` is an error. A pair of which one side is longer than `max_length` is dropped
    and counted: cut short, a solution would end where nothing says whether it was right.

    Raises:
        UserError: a prompt is too long, or there are too few problems for the split.
    """
    tokenized = tokenize_pairs(pairs, tokenizer, config)
    groups = group_by_problem(tokenized)
    wanted = config.validation_problems + (config.train_problems or 1)
    if len(groups) < wanted:
        raise UserError(
            f"data.validation_problems + data.train_problems must be at most the number of problems in {config.path} "
            f"that fit into data.max_length, got {wanted} for {len(groups)} problems"
        )
    order = sorted(groups, key=lambda problem: _stable_hash(config.split_seed, problem))
    last = None if config.train_problems is None else wanted
    return PairData(
        train=_sample(groups, order[config.validation_problems : last], config),
        validation=_sample(groups, order[: config.validation_problems], config),
        dropped=len(pairs) - len(tokenized),
    )


def read_pairs(path: str | Path) -> tuple[list[Pair], str]:
    """Read a JSONL file of pairs; return them and the file's SHA-256, by which a run notices that its data changed.

    Raises:
        UserError: names the file and the line that is wrong, what it must be and what it got.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f"data.path must be a readable JSONL file, got {str(path)!r}: {error.strerror}; "
            "`lambda-critic make-data codeio` writes the demo's"
        ) from error
    pairs = [_parse(line, f"{path}:{n}", n) for n, line in enumerate(content.splitlines(), 1) if line.strip()]
    if not pairs:
        raise UserError(f"{path} must hold at least one pair, got an empty file")
    return pairs, hashlib.sha256(content).hexdigest()


def _parse(line: bytes, where: str, number: int) -> Pair:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: a line must be one JSON object, got {line[:60]!r}: {error}") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: a line must be one JSON object, got {type(record).__name__}")
    texts: dict[str, str] = {}
    for key in ("problem_id", "prompt", "chosen", "rejected"):
        if key not in record:
            raise UserError(f"{where}: the key {key!r} must be there, got the keys {sorted(record)}")
        text = record[key]
        if not isinstance(text, str):
            raise UserError(f"{where}: {key!r} must be a string, got {type(text).__name__}")
        if not text.strip():
            raise UserError(f"{where}: {key!r} must not be empty, got {text!r}")
        texts[key] = text
    return Pair(texts["problem_id"], texts["prompt"], texts["chosen"], texts["rejected"], number)


def tokenize_pairs(pairs: Sequence[Pair], tokenizer: Any, config: DataConfig) -> list[TokenPair]:
    """Tokenise prompts and solutions apart, end each solution with the tokenizer's end token, drop what is too long."""
    end = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)

    def ids(texts: Iterable[str], special: bool) -> list[tuple[int, ...]]:
        return [tuple(row) for row in tokenizer(list(texts), add_special_tokens=special)["input_ids"]]

    prompts = ids((pair.prompt for pair in pairs), special=True)
    chosen = ids((pair.chosen for pair in pairs), special=False)
    rejected = ids((pair.rejected for pair in pairs), special=False)
    tokenized = []
    for pair, prompt, right, wrong in zip(pairs, prompts, chosen, rejected, strict=True):
        if len(prompt) >= config.max_length:
            raise UserError(
                f"{config.path}:{pair.line}: the prompt must be shorter than data.max_length = {config.max_length} "
                f"tokens, got {len(prompt)}"
            )
        if len(prompt) + max(len(right), len(wrong)) + len(end) <= config.max_length:
            sides = Solution(prompt, right + end), Solution(prompt, wrong + end)
            tokenized.append(TokenPair(pair.problem, *sides))
    return tokenized


def group_by_problem(pairs: Iterable[TokenPair]) -> dict[str, list[TokenPair]]:
    """Group pairs that share a problem id or a prompt, directly or through others, under one id.

    The same task text under two ids is one problem: on both sides of a split it would leak.
    """
    leader: dict[object, object] = {}

    def find(node: object) -> object:
        while leader.setdefault(node, node) != node:
            node = leader[node]
        return node

    for pair in pairs:
        leader[find(pair.right.prompt_ids)] = find(pair.problem)
    groups: dict[str, list[TokenPair]] = {}
    names: dict[object, str] = {}
    for pair in pairs:
        name = names.setdefault(find(pair.problem), pair.problem)
        groups.setdefault(name, []).append(pair._replace(problem=name))
    return groups


def _sample(groups: Mapping[str, list[TokenPair]], problems: Sequence[str], config: DataConfig) -> list[TokenPair]:
    """At most `pairs_per_problem` pairs of each problem, the same ones wherever it lands."""

    def key(pair: TokenPair) -> bytes:
        return _stable_hash(config.split_seed, pair)

    return [pair for problem in problems for pair in sorted(groups[problem], key=key)[: config.pairs_per_problem]]


def _stable_hash(seed: int, item: object) -> bytes:
    """Orders items at random, yet the same in every process and whatever else the file holds."""
    return hashlib.sha256(f"{seed}:{item!r}".encode()).digest()


@dataclass(frozen=True)
class Batch:
    """N pairs as 2 N rows: the right solutions first, then the wrong ones in the same order.

    Attributes:
        inputs: token ids [2N, T], or cached features of the output tokens [2N, T, H].
        attention_mask: bool [2N, T], false at padding.
        loss_mask: bool [2N, T], true at output tokens.
        terminal_rewards: float32 [2N], 1 for right and 0 for wrong.
        tokens: number of positions that are no padding.
    """

    inputs: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    terminal_rewards: Tensor
    tokens: int

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(
            inputs=self.inputs.to(device),
            attention_mask=self.attention_mask.to(device),
            loss_mask=self.loss_mask.to(device),
            terminal_rewards=self.terminal_rewards.to(device),
            tokens=self.tokens,
        )


class Collator:
    """Turns pairs into a batch, of token ids or, where features are given, of those.

    Features hold the output tokens only: positions of the prompt carry no loss, and a masked return skips them.

    Args:
        pad_id: token id at padding; it is masked everywhere.
        features: [T, H] for the output tokens of each solution.
    """

    def __init__(self, pad_id: int, features: Mapping[Solution, Tensor] | None = None):
        self.pad_id = pad_id
        self.features = features

    def __call__(self, pairs: Sequence[TokenPair]) -> Batch:
        """Pad the pairs on the right into one batch."""
        solutions = [pair.right for pair in pairs] + [pair.wrong for pair in pairs]
        if self.features is not None:
            rows = [self.features[solution] for solution in solutions]
        else:
            rows = [torch.tensor(solution.prompt_ids + solution.output_ids) for solution in solutions]
        lengths = torch.tensor([len(row) for row in rows])
        starts = lengths - torch.tensor([len(solution.output_ids) for solution in solutions])
        position = torch.arange(int(lengths.max()))
        attention_mask = position < lengths[:, None]
        return Batch(
            inputs=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad_id),
            attention_mask=attention_mask,
            loss_mask=attention_mask & (position >= starts[:, None]),
            terminal_rewards=torch.tensor([1.0, 0.0]).repeat_interleave(len(pairs)),
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
