"""Pairs of a right and a wrong solution of one problem: which there are, and which are taken."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lambda_return_ext.critic.config import DataConfig
from lambda_return_ext.critic.data.rollouts import Solution, fits
from lambda_return_ext.critic.data.rows import Example


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
        for solution in sorted(set(side) - both, key=lambda solution: stable_hash(config.split_seed, solution)):
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
    shared = sorted(free[0].keys() & free[1].keys(), key=lambda key: stable_hash(config.split_seed, key))
    if config.length_bin is not None:
        alone = sum(len(bins[key]) for bins in free for key in bins if key not in shared)
        drop("solutions without a partner of the other label in their bin of data.length_bin", alone)

    made = (TokenPair(name, *sides) for sides in _alternate([_evenly(free[0][key], free[1][key]) for key in shared]))
    given.sort(key=lambda pair: stable_hash(config.split_seed, tuple(pair)))
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


def stable_hash(seed: int, item: object) -> bytes:
    """Orders items at random, yet the same in every process and whatever else the file holds."""
    return hashlib.sha256(f"{seed}:{item!r}".encode()).digest()
