"""Pairs of right and wrong solutions: tokenise, split by problem, sample, batch."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lambda_return_ext import create_eos_only_mask
from lambda_return_ext.critic.config import DataConfig
from lambda_return_ext.critic.errors import UserError
from lambda_return_ext.critic.examples import Example, Piece, Renderer, parse_example, read_chat_template
from lambda_return_ext.critic.sources import Source


class Solution(NamedTuple):
    """A tokenised prompt and one tokenised answer to it.

    Attributes:
        prompt_ids: the prompt.
        output_ids: all that follows it.
        output_mask: which of those the model wrote; the others are gaps, such as a tool's output. None: all.
    """

    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    output_mask: tuple[bool, ...] | None = None

    @property
    def outputs(self) -> int:
        """Number of output tokens: those that carry loss and count in metrics."""
        return len(self.output_ids) if self.output_mask is None else sum(self.output_mask)

    @property
    def length(self) -> int:
        """Number of all tokens."""
        return len(self.prompt_ids) + len(self.output_ids)


class TokenPair(NamedTuple):
    """A right and a wrong solution of the same problem."""

    problem: str
    right: Solution
    wrong: Solution

    @property
    def length(self) -> int:
        """Tokens of the longer side, by which batches are put together whether or not features are cached."""
        return max(self.right.length, self.wrong.length)


@dataclass
class Problem:
    """What the data has of one problem.

    Attributes:
        pairs: pairs that the data gives as such.
        right: right solutions that may be paired with any wrong one.
        wrong: wrong solutions that may be paired with any right one.
    """

    pairs: list[TokenPair] = field(default_factory=list)
    right: list[Solution] = field(default_factory=list)
    wrong: list[Solution] = field(default_factory=list)


@dataclass(frozen=True)
class PairData:
    """The pairs of a run after the split.

    Attributes:
        train: pairs to train on.
        validation: pairs of problems that `train` has none of.
        possible: number of pairs that could be made of the problems of `train` and of `validation`.
        dropped: what was left out, and how much of it.
        truncated: number of pairs whose prompt lost its beginning.
    """

    train: list[TokenPair]
    validation: list[TokenPair]
    possible: dict[str, int]
    dropped: dict[str, int]
    truncated: int

    def report(self) -> dict[str, Any]:
        """The data in numbers."""
        parts = {"train": self.train, "validation": self.validation}
        return {
            **{name: {**_describe(pairs), "possible_pairs": self.possible[name]} for name, pairs in parts.items()},
            "truncated_prompts": self.truncated,
            "dropped": self.dropped,
        }


def _describe(pairs: Sequence[TokenPair]) -> dict[str, Any]:
    gains = [pair.right.outputs - pair.wrong.outputs for pair in pairs]
    return {
        "problems": len({pair.problem for pair in pairs}),
        "pairs": len(pairs),
        "tokens": sum(pair.right.length + pair.wrong.length for pair in pairs),
        "output_tokens": sum(pair.right.outputs + pair.wrong.outputs for pair in pairs),
        "mean_length_right": fmean(pair.right.outputs for pair in pairs),
        "mean_length_wrong": fmean(pair.wrong.outputs for pair in pairs),
        "right_longer": sum(gain > 0 for gain in gains) / len(pairs),
        "right_shorter": sum(gain < 0 for gain in gains) / len(pairs),
    }


def read_examples(config: DataConfig) -> tuple[list[Example], str]:
    """Read and check all rows; return them and a digest, by which a run notices that its data changed.

    Raises:
        UserError: names the file and the line that is wrong, what it must be and what it got.
    """
    source = Source(config.path, config.subset, config.split)
    examples = [parse_example(row) for row in source]
    if not examples:
        raise UserError(f"{config.path} must hold at least one pair, got an empty file")
    return examples, source.sha256()


def select_pairs(examples: Sequence[Example], tokenizer: Any, config: DataConfig) -> PairData:
    """Tokenise the examples, split them by problem and take as many pairs as the configuration says.

    A pair of which one side is longer than `max_length` is dropped and counted, unless prompts may be cut: cut short,
    a solution would end where nothing says whether it was right.

    Raises:
        UserError: there are too few problems for the split.
    """
    dropped: Counter[str] = Counter()
    solutions = tokenize(examples, Renderer(tokenizer, read_chat_template(config.chat_template)))
    problems = group_by_problem(examples, solutions)
    sampled: dict[str, tuple[list[TokenPair], int]] = {}
    for name, problem in problems.items():
        pairs, possible = sample_pairs(name, problem, config, dropped)
        if pairs:
            sampled[name] = pairs, possible
        else:
            dropped["problems without a pair"] += 1
    wanted = config.validation_problems + (config.train_problems or 1)
    if len(sampled) < wanted:
        reasons = "; ".join(f"dropped {number} {reason}" for reason, number in dropped.items())
        raise UserError(
            f"data.validation_problems + data.train_problems must be at most the number of problems in {config.path} "
            f"that fit into data.max_length, got {wanted} for {len(sampled)} problems{f' ({reasons})' * bool(reasons)}"
        )
    order = sorted(sampled, key=lambda problem: _stable_hash(config.split_seed, problem))
    last = None if config.train_problems is None else wanted
    chosen = {"train": order[config.validation_problems : last], "validation": order[: config.validation_problems]}
    whole = {part: [pair for name in names for pair in sampled[name][0]] for part, names in chosen.items()}
    fitted = {
        part: [TokenPair(pair.problem, *fit_prompts(pair[1:], config.max_length)) for pair in pairs]
        for part, pairs in whole.items()
    }
    return PairData(
        train=fitted["train"],
        validation=fitted["validation"],
        possible={part: sum(sampled[name][1] for name in names) for part, names in chosen.items()},
        dropped=dict(dropped),
        truncated=sum(pair.length > config.max_length for pairs in whole.values() for pair in pairs),
    )


def fits(solution: Solution, config: DataConfig) -> bool:
    """Whether a solution fits into `max_length`, once its prompt is cut where the configuration allows that."""
    if config.overlong == "drop":
        return solution.length <= config.max_length
    return len(solution.output_ids) < config.max_length


def fit_prompts(solutions: Sequence[Solution], max_length: int) -> list[Solution]:
    """The same where all of them fit, else with as much of the end of each prompt as the longest answer leaves room."""
    if all(solution.length <= max_length for solution in solutions):
        return list(solutions)
    room = max_length - max(len(solution.output_ids) for solution in solutions)
    return [solution._replace(prompt_ids=solution.prompt_ids[-room:]) for solution in solutions]


def tokenize(examples: Sequence[Example], renderer: Renderer) -> list[list[Solution]]:
    """The solution of each answer of each example; every distinct piece of text is tokenised once."""
    laid_out = [[renderer.pieces(example, answer) for answer in example.answers] for example in examples]
    everything = itertools.chain.from_iterable(itertools.chain.from_iterable(laid_out))
    texts = dict.fromkeys(piece for piece in everything if isinstance(piece.content, str))
    ids: dict[Piece, tuple[int, ...]] = {}
    for special in (True, False):
        pieces = [piece for piece in texts if piece.special == special]
        if pieces:
            rows = renderer.tokenizer([piece.content for piece in pieces], add_special_tokens=special)["input_ids"]
            ids |= {piece: tuple(row) for piece, row in zip(pieces, rows, strict=True)}

    def solution(pieces: Sequence[Piece]) -> Solution:
        prompt, *output = (ids[piece] if isinstance(piece.content, str) else piece.content for piece in pieces)
        mask = tuple(piece.counted for piece, part in zip(pieces[1:], output, strict=True) for _ in part)
        return Solution(prompt, tuple(itertools.chain(*output)), None if all(mask) else mask)

    return [[solution(pieces) for pieces in answers] for answers in laid_out]


def group_by_problem(examples: Sequence[Example], solutions: Sequence[Sequence[Solution]]) -> dict[str, Problem]:
    """Bring together examples that share a problem id, a task or a prompt, directly or through others.

    The same task text under two ids is one problem: on both sides of a split it would leak. Of the ids of one
    problem the first in alphabetical order names it, whatever the order of lines.
    """
    leader: dict[object, object] = {}

    def find(node: object) -> object:
        while leader.setdefault(node, node) != node:
            node = leader[node]
        return node

    for example, answers in zip(examples, solutions, strict=True):
        for node in (("task", example.task), *(answer.prompt_ids for answer in answers)):
            leader[find(node)] = find(example.problem)
    names: dict[object, str] = {}
    for example in examples:
        root = find(example.problem)
        names[root] = min(names.get(root, example.problem), example.problem)
    problems: dict[str, Problem] = {}
    for example, answers in zip(examples, solutions, strict=True):
        name = names[find(example.problem)]
        problem = problems.setdefault(name, Problem())
        if example.paired:
            problem.pairs.append(TokenPair(name, *answers))
        else:
            for answer, solution in zip(example.answers, answers, strict=True):
                (problem.right if answer.reward else problem.wrong).append(solution)
    return problems


def sample_pairs(name: str, problem: Problem, config: DataConfig, dropped: Counter[str]) -> tuple[list[TokenPair], int]:
    """At most `pairs_per_problem` pairs of a problem, the same ones wherever it lands.

    Given pairs come first. Free solutions are paired so that each is used as often as any other; where
    `length_bin` is set, both sides of a pair have their number of output tokens in the same bin of that width.

    Args:
        name: the problem.
        problem: what there is of it.
        config: the configuration.
        dropped: counts what is left out.

    Returns:
        The pairs, and the number of those that could have been taken.
    """

    def length_bin(solution: Solution) -> int:
        return 0 if config.length_bin is None else solution.outputs // config.length_bin

    def prompt_fits(solution: Solution) -> bool:
        return config.overlong != "drop" or len(solution.prompt_ids) < config.max_length

    def drop(reason: str, number: int = 1) -> None:
        if number:
            dropped[reason] += number

    given = []
    for pair in dict.fromkeys(problem.pairs):
        if pair.right == pair.wrong:
            drop("pairs whose two sides are the same")
        elif not (pair.right.outputs and pair.wrong.outputs):
            drop("pairs with a solution that has no output token")
        elif not (prompt_fits(pair.right) and prompt_fits(pair.wrong)):
            drop("pairs whose prompt alone fills data.max_length")
        elif not (fits(pair.right, config) and fits(pair.wrong, config)):
            drop("pairs with a solution that does not fit into data.max_length")
        elif length_bin(pair.right) != length_bin(pair.wrong):
            drop("pairs whose two sides are in different bins of data.length_bin")
        else:
            given.append(pair)
    drop("repeated pairs", len(problem.pairs) - len(set(problem.pairs)))

    both = set(problem.right) & set(problem.wrong)
    free: list[dict[int, list[Solution]]] = []
    for side in (problem.right, problem.wrong):
        bins: dict[int, list[Solution]] = {}
        for solution in sorted(set(side) - both, key=lambda solution: _stable_hash(config.split_seed, solution)):
            if not solution.outputs:
                drop("solutions that have no output token")
            elif not prompt_fits(solution):
                drop("solutions whose prompt alone fills data.max_length")
            elif not fits(solution, config):
                drop("solutions that do not fit into data.max_length")
            else:
                bins.setdefault(length_bin(solution), []).append(solution)
        drop("repeated solutions", len(side) - len(set(side)))
        free.append(bins)
    drop("solutions that are labelled both right and wrong", len(both))
    shared = sorted(free[0].keys() & free[1].keys(), key=lambda key: _stable_hash(config.split_seed, key))
    if config.length_bin is not None:
        alone = sum(len(bins[key]) for bins in free for key in bins if key not in shared)
        drop("solutions without a partner of the other label in their bin of data.length_bin", alone)

    made = (TokenPair(name, *sides) for sides in _alternate([_evenly(free[0][key], free[1][key]) for key in shared]))
    given.sort(key=lambda pair: _stable_hash(config.split_seed, tuple(pair)))
    pairs = list(itertools.islice(itertools.chain(given, made), config.pairs_per_problem))
    return pairs, len(given) + sum(len(free[0][key]) * len(free[1][key]) for key in shared)


def _evenly(right: Sequence[Solution], wrong: Sequence[Solution]) -> Iterator[tuple[Solution, Solution]]:
    """All combinations; after any number of them no solution of a side was used two times more than another."""
    longer, shorter = (right, wrong) if len(right) >= len(wrong) else (wrong, right)
    for shift in range(len(shorter)):
        for i, one in enumerate(longer):
            other = shorter[(i + shift) % len(shorter)]
            yield (one, other) if longer is right else (other, one)


def _alternate(parts: Sequence[Iterator[Any]]) -> Iterator[Any]:
    """One of each in turn until all are empty."""
    missing = object()
    for row in itertools.zip_longest(*parts, fillvalue=missing):
        yield from (item for item in row if item is not missing)


def _stable_hash(seed: int, item: object) -> bytes:
    """Orders items at random, yet the same in every process and whatever else the file holds."""
    return hashlib.sha256(f"{seed}:{item!r}".encode()).digest()


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
